"""DKS for less: branches on a part of each batch or in some updates only, synergy from an epoch on, thinner tails."""
import contextlib
import io
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.train import main, rows
from PIL import Image
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.task import LogitDistillationTask
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch.utils.flop_counter import FlopCounterMode

from dks_timm import DKSLoss, DKSModel, DKSTask, cli, create_dks_model, errors
from dks_timm.method.cost import inspect_model, training_cost
from dks_timm.method.task import DKSDistillationTask
from dks_timm.training import build, config, fsdp2

BATCH, PART, CLASSES = 10, 4, 7


@pytest.fixture(scope='module')
def net():
    """A model whose images do not depend on each other, as it has no BatchNorm."""
    return create_dks_model('test_convnext', num_classes=CLASSES, image_size=(32, 32))


@pytest.fixture(autouse=True)
def as_made(net):
    yield
    net.batch_fraction, net.branches_on = 1., True
    net.train().zero_grad()


def images(count=BATCH):
    return torch.randn(count, 3, 32, 32)


def some_logits():
    return [torch.randn(n, CLASSES, dtype=torch.float64, requires_grad=True) for n in (BATCH, PART, PART)]


INDICES = torch.arange(BATCH) % CLASSES
DENSE = torch.rand(BATCH, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)


# The loss


@pytest.mark.parametrize('criterion, target', [
    (None, INDICES),
    (None, DENSE),
    (LabelSmoothingCrossEntropy(0.1), INDICES),
    (torch.nn.CrossEntropyLoss(label_smoothing=0.1), DENSE),
    (BinaryCrossEntropy(smoothing=0.1), INDICES),
])
@pytest.mark.parametrize('temperature', [1., 2.])
def test_the_loss_counts_all_samples_for_the_backbone_and_the_first_for_the_rest(criterion, target, temperature):
    logits = some_logits()
    weights = dict(ce_weight=[3., 0.5, 2.], synergy_weight=0.7)
    out = DKSLoss(criterion, **weights, temperature=temperature, synergy='softmax')(logits, target)
    ce = torch.stack([(criterion or F.cross_entropy)(z, target[:len(z)]) for z in logits])
    shared = [z[:PART] for z in logits]
    synergy = temperature ** 2 * sum(
        F.kl_div((q / temperature).log_softmax(1), (p / temperature).detach().softmax(1), reduction='batchmean')
        for p in shared for q in shared if p is not q)
    expected = 3 * ce[0] + 0.5 * ce[1] + 2 * ce[2] + 0.7 * synergy
    for value, wanted in ((out['loss'], expected), (out['ce'], ce), (out['synergy'].sum(), synergy)):
        torch.testing.assert_close(value.detach(), wanted.detach())
    gradients = [torch.autograd.grad(loss, logits) for loss in (out['loss'], expected)]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize('sizes', [(4, 3, 2), (4, 2, 3), (4, 6, 6), (4, 0, 0), (4, 4, 2)])
def test_branches_have_logits_of_the_same_first_samples(sizes):
    with pytest.raises(ValueError, match='those of branches alone may all be of the first n samples'):
        DKSLoss()([torch.randn(n, CLASSES) for n in sizes], INDICES[:4])


@pytest.mark.parametrize('criterion, target', [
    (None, INDICES),
    (None, DENSE),
    (LabelSmoothingCrossEntropy(0.1), INDICES),
    (torch.nn.CrossEntropyLoss(label_smoothing=0.1), DENSE),
    (torch.nn.CrossEntropyLoss(torch.arange(1., 8.)), INDICES),
])
def test_without_branches_the_weighted_label_loss_of_the_backbone_is_left(criterion, target):
    z = torch.randn(BATCH, CLASSES, dtype=torch.float64)
    out = DKSLoss(criterion and criterion.double(), ce_weight=[0.5, 1., 1.]).forward_backbone(z, target)
    expected = (criterion or F.cross_entropy)(z, target)
    torch.testing.assert_close(out, {'loss': 0.5 * expected, 'ce': expected[None]})


# The model


@pytest.mark.parametrize('fraction, batch_size, count', [
    (0.15625, 64, 10), (0.07, 100, 7), (0.5, 5, 3), (0.01, 8, 1), (0.999, 8, 8)])
def test_branches_train_on_the_first_images_of_a_batch_and_evaluate_on_all(net, fraction, batch_size, count):
    x = images(batch_size)
    whole = net(x)
    net.batch_fraction = fraction
    part = net(x)
    assert [len(z) for z in part] == [batch_size, count, count]
    for all_logits, logits in zip(whole, part, strict=True):
        torch.testing.assert_close(logits, all_logits[:len(logits)])
    assert all(len(z) == batch_size for z in net.eval().exits(x))


def count_flops(forward, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(x)
    return counter.get_total_flops()


def test_what_training_costs_is_what_is_said(net):
    x = images(8)
    plain, whole = count_flops(net.backbone, x), count_flops(net, x)
    assert training_cost(net) == pytest.approx(whole / plain)
    net.batch_fraction = 0.25
    assert training_cost(net) == pytest.approx(count_flops(net, x) / plain) == pytest.approx(
        1 + 0.25 * (whole / plain - 1))
    net.branches_on = False
    assert count_flops(net, x) == plain


def test_in_an_update_without_branches_only_the_backbone_gets_gradients(net):
    net.branches_on = False
    logits = net(images())
    assert len(logits) == 1
    logits[0].sum().backward()
    assert all(p.grad is not None for p in net.backbone.parameters())
    assert all(p.grad is None for p in net.branches.parameters())
    assert len(net.eval().exits(images())) == 3


def test_a_compiled_model_has_one_graph_with_branches_and_one_without(net):
    torch.compiler.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    net.batch_fraction = 0.5
    compiled = torch.compile(net, backend=backend)
    for step in range(4):
        net.branches_on = step % 2 == 0
        x = images()
        for ours, wanted in zip(compiled(x), net(x), strict=True):
            torch.testing.assert_close(ours, wanted)
    assert len(graphs) == 2


@pytest.mark.parametrize('fraction', [0, 1.5, -1, math.nan])
def test_a_fraction_that_is_none_is_refused(net, fraction):
    with pytest.raises(ValueError, match='batch_fraction is .*above 0 and at most 1'):
        DKSModel(net.backbone, [], batch_fraction=fraction)


# The task


def test_updates_without_branches_leave_them_alone_momentum_and_weight_decay_included(net):
    task = DKSTask(net, every=3, verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    moved = []
    for update in range(7):
        before = [[p.detach().clone() for p in part.parameters()] for part in (net.backbone, net.branches)]
        task.begin_update(epoch=0, num_updates=update)
        out = task(images(), INDICES)
        assert len(out['logits']) == (3 if update % 3 == 0 else 1)
        out['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append([
            any(not torch.equal(a, b) for a, b in zip(old, part.parameters(), strict=True))
            for old, part in zip(before, (net.backbone, net.branches), strict=True)])
    assert moved == [[True, update % 3 == 0] for update in range(7)]


def test_from_its_off_epoch_on_the_backbone_trains_alone(net):
    task = DKSTask(net, off_epoch=2, verbose=False)
    classifiers = []
    for epoch in range(4):
        task.begin_update(epoch, num_updates=10 * epoch)
        classifiers.append(len(task(images(), INDICES)['logits']))
    assert classifiers == [3, 3, 1, 1]


def test_before_its_first_epoch_there_is_no_synergy_in_the_loss_but_in_the_report(net):
    task = DKSTask(net, start_epoch=2, verbose=False)
    x = images()
    losses = {}
    for epoch in (1, 2, 3):
        task.begin_update(epoch, num_updates=10 * epoch)
        losses[epoch] = task(x, INDICES)
    for epoch, out in losses.items():
        synergy = out['synergy'].sum()
        assert synergy > 0
        torch.testing.assert_close(out['loss'].detach(), out['ce'].sum() + (synergy if epoch >= 2 else 0))


def test_distillation_goes_on_in_updates_without_branches(net):
    teacher = timm.create_model('test_convnext', num_classes=CLASSES).eval()
    distillation = LogitDistillationTask(
        net.backbone, teacher_model=teacher, criterion=torch.nn.CrossEntropyLoss(), distill_loss_weight=2.,
        task_loss_weight=0.5, verbose=False)
    task = DKSDistillationTask(net, distillation, every=2, verbose=False)
    task.begin_update(epoch=0, num_updates=1)
    out = task(images(), INDICES)
    assert len(out['logits']) == 1 and out['kd_loss'] > 0
    torch.testing.assert_close(out['loss'].detach(), 0.5 * out['ce'][0] + 2 * out['kd_loss'])


def test_a_task_refuses_numbers_of_updates_and_epochs_that_are_none(net):
    with pytest.raises(ValueError, match='every is 0; it must be at least 1'):
        DKSTask(net, every=0)
    with pytest.raises(ValueError, match='off_epoch is -1; it must be 0 or more'):
        DKSTask(net, off_epoch=-1)


# train.py


@pytest.fixture(scope='module')
def same(tmp_path_factory):
    """Flags of a run on 12 times the same image: any batch has the gradient of any other."""
    folder = tmp_path_factory.mktemp('same') / 'train/0'
    folder.mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for i in range(12):
        image.save(folder / f'{i}.png')
    return [
        '--data-dir', folder.parents[1], '--val-split', '', '--num-classes', '2', '--img-size', '32', '--device', 'cpu',
        '--workers', '0', '--no-aug', '--warmup-epochs', '0', '--sched', 'none', '--lr', '0.05', '--opt', 'momentum',
        '--momentum', '0.9', '--weight-decay', '0.1', '--model', 'test_convnext', '--dks',
    ]


def weights(path):
    checkpoint = load_checkpoint_metadata(path / 'last.pth.tar')
    return {**checkpoint['state_dict'], **checkpoint['task_state']['branches']}


EVERY = ('--dks-every', 2, '--epochs', 2)  # of three updates each


@pytest.fixture(scope='module')
def every(same, tmp_path_factory):
    """The folder of a run in one process, whether the branches ran for each of its batches, and what it printed."""
    root = tmp_path_factory.mktemp('every')
    seen = []
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        exits = DKSModel.exits

        def noted(net, x):
            if net.training:
                seen.append(net.branches_on)
            return exits(net, x)

        patch.setattr(DKSModel, 'exits', noted)
        main(*same, *EVERY, '-b', 2, '--grad-accum-steps', 2, '--output', root, '--experiment', 'run')
    return root / 'run', seen, printed.getvalue()


def test_all_batches_of_an_update_run_the_branches_or_none_and_epochs_continue_the_pattern(every):
    folder, seen, _ = every
    assert seen == [True, True, False, False, True, True] + [False, False, True, True, False, False]
    for row in rows(folder):
        assert all(math.isfinite(float(value)) for value in row.values())


def test_progress_shows_no_accuracy_of_branches_that_have_not_run_yet(every):
    _, _, printed = every
    first = [line for line in printed.splitlines() if line.startswith('Epoch 1 [1/3]')]
    last = [line for line in printed.splitlines() if line.startswith('Epoch 1 [3/3]')]
    assert 'backbone' in first[0] and 'stage' not in first[0] and 'stage1' in last[0]
    assert 'nan' not in printed


def test_a_resumed_run_continues_the_pattern(every, same, tmp_path):
    main(*same, *EVERY, '--epochs', 1, '-b', 4, '--output', tmp_path, '--experiment', 'run')
    main(*same, *EVERY, '-b', 4, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto')
    torch.testing.assert_close(weights(tmp_path / 'run'), weights(every[0]), rtol=1e-4, atol=1e-6)


def test_synergy_that_starts_later_is_deep_supervision_first_and_dks_then(same, tmp_path):
    flags = [*same, '-b', 4, '--output', tmp_path, '--experiment']
    main(*flags, 'late', '--epochs', 2, '--dks-start-epoch', 1)
    main(*flags, 'parts', '--epochs', 1, '--dks-direction', 'none')
    main(*flags, 'parts', '--epochs', 2, '--resume', 'auto')
    late, parts = rows(tmp_path / 'late'), rows(tmp_path / 'parts')
    assert late == parts and len(late) == 2
    ce = [sum(float(value) for name, value in row.items() if name.startswith('train_ce_')) for row in late]
    assert float(late[0]['train_loss']) == pytest.approx(ce[0])
    assert float(late[1]['train_loss']) > ce[1] + 1e-6


def test_branches_rest_from_the_off_epoch_on_and_cost_nothing_then(same, tmp_path, capfd):
    main(*same, '--dks-off-epoch', 1, '--epochs', 2, '-b', 4, '--output', tmp_path, '--experiment', 'run')
    first, last = (load_checkpoint_metadata(tmp_path / f'run/checkpoint-{epoch}.pth.tar') for epoch in (0, 1))
    torch.testing.assert_close(first['task_state']['branches'], last['task_state']['branches'], rtol=0, atol=0)
    name = next(iter(first['state_dict']))
    assert not torch.equal(first['state_dict'][name], last['state_dict'][name])
    cost = inspect_model('test_convnext', num_classes=2, img_size=32, share=1 / 2)['cost']['flops']
    printed = capfd.readouterr().err
    assert f'Training forward, on average: {cost:.2f}x the FLOPs' in printed and 'nan' not in printed


def test_branches_on_a_part_of_each_batch_train_and_report_their_means_over_it(same, tmp_path, capfd):
    less = ['--dks-batch-fraction', 0.5, '--dks-every', 2]
    main(*same, *less, '--epochs', 1, '-b', 4, '--lr', 1e-8, '--output', tmp_path, '--experiment', 'run')
    printed = capfd.readouterr().err
    row, = rows(tmp_path / 'run')
    # All images are one and the weights hardly move: a mean is the same whatever it is over.
    main(*same, '--epochs', 1, '-b', 4, '--lr', 1e-8, '--output', tmp_path, '--experiment', 'whole')
    whole, = rows(tmp_path / 'whole')
    for name in row:
        if name != 'train_loss':
            assert float(row[name]) == pytest.approx(float(whole[name]), rel=1e-3, abs=1e-6), name
    cost = inspect_model('test_convnext', num_classes=2, img_size=32, batch_fraction=0.5, share=1 / 2)['cost']['flops']
    assert f'Training forward, on average: {cost:.2f}x the FLOPs' in printed


def refusal(*argv):
    with pytest.raises(errors.OptionError) as e:
        config.parse_args([str(a) for a in argv])
    return str(e.value)


@pytest.mark.parametrize('flags, message', [
    ('--dks-batch-fraction 0', '--dks-batch-fraction 0.0: must be above 0'),
    ('--dks-batch-fraction 1.1', '--dks-batch-fraction 1.1: must be at most 1'),
    ('--dks-batch-fraction 0.5 --aug-splits 2 --jsd-loss', 'cannot be combined with --aug-splits 2; use one'),
    ('--dks-batch-fraction 0.5 --resplit --split-bn', 'cannot be combined with --split-bn; use one'),
    ('--dks-every 0', '--dks-every 0: must be at least 1'),
    ('--dks-every 1.5', "--dks-every: invalid int value: '1.5'"),
    ('--dks-start-epoch -1', '--dks-start-epoch -1: must be at least 0'),
    ('--dks-start-epoch 9 --epochs 9', '--dks-start-epoch 9: not within the 9 epochs'),
    ('--dks-start-epoch 2 --dks-off-epoch 2', '--dks-start-epoch 2: not within the 2 epochs'),
])
def test_what_cannot_work_is_refused_by_name(flags, message):
    assert message in refusal('--dks', *flags.split())


@pytest.mark.parametrize('flags', [
    '--dks-batch-fraction 0.5', '--dks-every 2', '--dks-off-epoch 2', '--dks-start-epoch 2'])
def test_without_dks_the_flags_are_refused(flags):
    assert refusal(*flags.split()) == f'{flags.split()[0]}: needs --dks'


def test_fsdp2_takes_no_updates_without_branches(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    monkeypatch.setenv('FSDP_VERSION', '2')
    fsdp2.requested(config.parse_args(['--dks', '--dks-every', '1', '--opt', 'adamw'])[0])
    for flag in ('--dks-every', '--dks-off-epoch'):
        args, *_ = config.parse_args(['--dks', flag, '2', '--opt', 'adamw'])
        with pytest.raises(errors.OptionError, match=f'{flag} 2: not under FSDP2: .* use --dks-batch-fraction'):
            fsdp2.requested(args)


def test_a_model_that_takes_no_part_of_a_batch_is_refused_by_flag():
    args, *_ = config.parse_args(
        ['--dks', '--dks-batch-fraction', '0.5', '--model', 'tnt_s_legacy_patch16_224', '--model-kwargs', 'depth=4'])
    with torch.device('meta'), pytest.raises(errors.OptionError, match='^--dks-batch-fraction 0.5: features of this'):
        build.create_model(args)


# What it costs


def test_inspect_counts_the_part_of_the_batch_and_the_updates(capsys):
    whole = inspect_model('test_convnext')['cost']
    found = inspect_model('test_convnext', batch_fraction=0.5, share=1 / 3)['cost']
    assert found['flops'] == pytest.approx(1 + (whole['flops'] - 1) / 6) and found['parameters'] == whole['parameters']
    assert cli.main(['inspect', 'test_convnext', '--dks-batch-fraction', '0.5', '--dks-every', '3']) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f'{found["flops"]:.2f}x FLOPs on average ({whole["flops"]:.2f}x where branches run on whole' in line
    assert cli.main(['inspect', 'test_convnext', '--dks-every', '0']) == 2
    assert capsys.readouterr().err == 'dks-timm: error: --dks-every 0: must be at least 1\n'


@pytest.mark.parametrize('budget, made_of', [
    (1.5, ['1 block of a kind', 'whole tail']),
    (1.3, ['1 block of a kind', '1 block of a kind']),
    (1.2, ['within the budget', '1 block of a kind']),  # convolutions
])
def test_a_budget_prefers_tails_of_fewer_blocks_to_convolutions(budget, made_of):
    found = inspect_model('resnet20_cifar', img_size=32, num_classes=20, budget=budget)
    assert [c['made_of'] for c in found['classifiers'][1:]] == made_of
    assert found['cost']['flops'] <= budget


def test_a_branch_grows_back_where_another_has_made_room():
    # Tails of one block a stage cost 1.26 together; once the earlier gives way, the later may keep two.
    found = inspect_model('resnet20_cifar', img_size=32, num_classes=20, budget=1.25)
    assert [c['kind'] for c in found['classifiers'][1:]] == ['conv', 'tail']
    assert found['classifiers'][2]['made_of'] == '1 in 2 of repeated blocks' and found['cost']['flops'] <= 1.25
