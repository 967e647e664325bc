"""Evaluation of trained models by `dks-timm validate`: timm's numbers, early exits, and what is refused."""
import argparse
import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.train import image_folder
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.task.evaluator import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch.nn.functional import cross_entropy

from dks_timm import create_dks_model
from dks_timm.cli import main
from dks_timm.method.cost import exit_flops
from dks_timm.publishing import export as exporting
from dks_timm.training import validate
from dks_timm.training.build import create_model
from dks_timm.training.config import create_parser
from dks_timm.training.data import create_eval_loader
from dks_timm.training.metrics import THRESHOLDS

COMMON = ['--device', 'cpu', '--workers', '0']
DIGITS = ['--dataset', 'digits', '--img-size', '32', *COMMON]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def spread(net, factor=30):
    """Give an untrained network confidences of all sizes."""
    with torch.no_grad():
        for head in net.get_classifiers():
            head.weight.mul_(factor)
    return net.eval()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Exported folders: 'branches' of a network for the ten digits, 'plain' of one for seven classes."""
    root = tmp_path_factory.mktemp('folders')
    torch.manual_seed(0)
    net = spread(create_dks_model('test_resnet', num_classes=10, stages=(1, 2), branches='conv'))  # cheap exits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, 'verify', lambda *args: None)
        exporting.export(root / 'branches', net, keep_branches=True)
        plain = timm.create_model('test_resnet', num_classes=7)
        config = dict(crop_pct=0.8, interpolation='bicubic', mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)
        exporting.export(root / 'plain', plain, data_config=config)
    image_folder(root / 'images', classes=7, count=3, size=48)
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint of a run with --dks and --model-ema, the weights themselves, and their average."""
    given = dict(
        model='test_resnet', num_classes=10, dataset='digits', img_size=32, in_chans=1, mean=[0.3], dks=True,
        model_ema=True, batch_size=7)
    args = argparse.Namespace(**{**vars(create_parser().parse_args([])), **given})
    torch.manual_seed(0)
    net = spread(create_model(args))
    average = spread(deepcopy(net), 0.5)
    path = tmp_path_factory.mktemp('run') / 'last.pth.tar'
    state = dict(epoch=1, args=args, state_dict=net.backbone.state_dict(), state_dict_ema=average.backbone.state_dict())
    for name, of in (('task_state', net), ('task_state_ema', average)):
        state[name] = dict(stages=list(of.stages), branches=of.branches.state_dict())
    torch.save(state, path)
    return path, net, average


def found_by(capsys, *argv):
    assert main(['validate', *map(str, argv), '--json']) == 0
    return json.loads(capsys.readouterr().out)


def direct(monkeypatch, capsys, *argv):
    """Run the command; return what it found, and all its images with their targets."""
    loaders = []

    def noted(*args, **kwargs):
        loaders.append(create_eval_loader(*args, **kwargs))
        return loaders[-1]

    monkeypatch.setattr(validate.data, 'create_eval_loader', noted)
    found = found_by(capsys, *argv)
    images, targets = zip(*loaders[0], strict=True)
    return found, torch.cat(images), torch.cat(targets)


@pytest.mark.parametrize('flags', [[], ['--crop-pct', '1', '--img-size', '40', '--mean', '0.5', '-b', '5']])
def test_a_folder_is_evaluated_as_by_timm_to_the_digit(folders, flags, capsys):
    found = found_by(capsys, folders / 'plain', '--data-dir', folders / 'images', *COMMON, *flags)
    model = timm.create_model(f'local-dir:{folders / "plain"}', pretrained=True).eval()
    given = dict(crop_pct=1., img_size=40, mean=[0.5]) if flags else {}
    config = resolve_data_config(given, model=model, use_test_size=True)
    dataset = create_dataset('', root=folders / 'images', split='validation')
    loader = create_loader(
        dataset, batch_size=4, num_workers=0, device=torch.device('cpu'), **config)
    evaluator = ClassificationEvaluator()
    with torch.inference_mode():
        for images, target in loader:
            evaluator.update(model(images), target)
    wanted, backbone = evaluator.compute(), found['heads']['backbone']
    assert (backbone['top1'], backbone['top5']) == (wanted['top1'], wanted['top5'])
    assert backbone['loss'] == pytest.approx(wanted['loss'], abs=1e-6)
    assert found['images'] == 21 and found['num_classes'] == 7 and found['crop_pct'] == config['crop_pct']
    assert list(found['heads']) == ['backbone'] and found['thresholds'] == {} and backbone['cost'] == 1
    assert tuple(found['input_size']) == config['input_size'] and found['interpolation'] == 'bicubic'


def test_every_head_of_a_folder_with_branches_is_evaluated_at_its_cost(folders, monkeypatch, capsys):
    found, images, target = direct(monkeypatch, capsys, folders / 'branches', *DIGITS, '-b', '50')
    net = create_dks_model(f'local-dir:{folders / "branches"}', pretrained=True).eval()
    with torch.inference_mode():
        logits = net.exits(images)
    logits.append(torch.stack([z.softmax(-1) for z in logits]).mean(0).log())
    flops = exit_flops(net, (3, 32, 32))
    branches = flops['branches']
    costs = [flops['backbone'], *(b['to_stage'] + b['branch'] for b in branches)]
    costs.append(flops['backbone'] + sum(b['branch'] for b in branches))
    assert list(found['heads']) == ['backbone', 'stage1', 'stage2', 'ensemble'] and found['images'] == 355
    for head, z, cost in zip(found['heads'].values(), logits, costs, strict=True):
        assert head['top1'] == pytest.approx(100 * (z.argmax(-1) == target).float().mean().item(), abs=1e-4)
        in_five = (z.topk(5).indices == target[:, None]).any(-1)
        assert head['top5'] == pytest.approx(100 * in_five.float().mean().item(), abs=1e-4)
        assert head['loss'] == pytest.approx(cross_entropy(z, target).item(), abs=1e-4)
        assert head['cost'] == pytest.approx(cost / flops['backbone'])
    assert len({head['top1'] for head in found['heads'].values()}) > 2


@pytest.mark.parametrize('batch_size', [51, 128])  # odd ones, too, leave every other image in its half
def test_thresholds_are_chosen_on_one_half_of_the_images_and_measured_on_the_other(
        folders, batch_size, monkeypatch, capsys):
    found, images, target = direct(monkeypatch, capsys, folders / 'branches', *DIGITS, '-b', batch_size)
    net = create_dks_model(f'local-dir:{folders / "branches"}', pretrained=True).eval()
    with torch.inference_mode():
        logits = net.exits(images)
    flops = exit_flops(net, (3, 32, 32))
    whole, right = flops['backbone'], [z.argmax(-1) == target for z in logits]
    for i, (exit, row) in enumerate(found['thresholds'].items()):
        sure, cost = logits[i + 1].softmax(-1).amax(-1), flops['branches'][i]
        measured = []
        for half in (slice(0, None, 2), slice(1, None, 2)):
            measured.append([])
            for threshold in torch.tensor(THRESHOLDS):
                leave = sure[half] >= threshold
                top1 = torch.where(leave, right[i + 1][half], right[0][half]).float().mean().item()
                share = leave.float().mean().item()
                mean = (cost['to_stage'] + cost['branch'] + (1 - share) * (whole - cost['to_stage'])) / whole
                measured[-1].append((mean, top1, share))
        goal = right[0][::2].float().mean().item()
        good = [(m[0], -t, t) for t, m in zip(THRESHOLDS, measured[0], strict=True) if m[1] >= goal - 1e-6 and m[0] < 1]
        best = min(good)[2] if good else None
        mean, top1, share = measured[1][THRESHOLDS.index(best)] if good else (
            1., right[0][1::2].float().mean().item(), 0.)
        assert row['threshold'] == best, exit
        wanted = dict(leave=100 * share, top1=100 * top1, cost=mean)
        wanted['backbone_top1'] = 100 * right[0][1::2].float().mean().item()
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize('to_stage, threshold, leave, top1, cost', [
    (50, 0.8, 45., 79., 0.925), (95, None, 0., 78., 1.)])  # the dearer branch saves nothing before it is less accurate
def test_the_cheapest_threshold_as_accurate_as_the_backbone_is_taken(to_stage, threshold, leave, top1, cost):
    def half(whole, *rows):
        rows = [dict(zip(('exit', 'threshold', 'leave', 'top1'), ('stage1', *row), strict=True)) for row in rows]
        return SimpleNamespace(names=('backbone', 'stage1', 'ensemble'), compute=lambda: (dict(top1=whole), rows))

    halves = [
        half(80., (0., 100., 60.), (0.5, 70., 79.), (0.8, 50., 80.), (0.9, 40., 81.), (0.999, 0., 80.)),
        half(78., (0., 100., 61.), (0.5, 66., 78.), (0.8, 45., 79.), (0.9, 41., 78.), (0.999, 0., 78.))]
    flops = dict(backbone=100, branches=[dict(to_stage=to_stage, branch=15)])
    assert validate.choose_exits(halves, flops) == dict(stage1=dict(
        threshold=threshold, leave=leave, top1=top1, backbone_top1=78., cost=pytest.approx(cost)))


def test_where_no_threshold_is_accurate_enough_the_backbone_answers():
    class Half:
        names = ('backbone', 'stage2', 'ensemble')

        def compute(self):
            return {'top1': 90.}, [dict(exit='stage2', threshold=t, leave=50., top1=80.) for t in THRESHOLDS]

    flops = dict(backbone=10, branches=[dict(to_stage=5, branch=3)])
    assert validate.choose_exits([Half(), Half()], flops) == {
        'stage2': dict(threshold=None, leave=0, top1=90, backbone_top1=90, cost=1)}


def test_a_checkpoint_is_evaluated_as_its_run_did_with_its_average_or_without(checkpoint, monkeypatch, capsys):
    path, net, average = checkpoint
    for flags, of in (([], average), (['--no-ema'], net)):
        found, images, target = direct(monkeypatch, capsys, path, *COMMON, *flags)
        assert found['ema'] == (of is average) and images.shape == (355, 1, 32, 32)
        assert images.min() == pytest.approx(-0.3 / 0.5)  # the mean is the run's, the deviation the model's
        with torch.inference_mode():
            wanted = [cross_entropy(z, target).item() for z in of.exits(images)]
        losses = [found['heads'][name]['loss'] for name in ('backbone', 'stage2', 'stage3')]
        assert losses == pytest.approx(wanted, rel=1e-4)


def test_flags_win_over_the_run_of_a_checkpoint(checkpoint, folders, capsys):
    data = ['--data-dir', folders / 'images', '--dataset', '', '--split', 'train', '--img-size', '24']
    found = found_by(capsys, checkpoint[0], *COMMON, *data)
    assert (found['images'], found['split'], found['input_size']) == (21, 'train', [1, 24, 24])


def test_the_folder_itself_and_other_channels_are_evaluated_where_that_is_asked_for(folders, capsys):
    data = ['--data-dir', folders / 'images/train', '--split', '', '--in-chans', '1']
    found = found_by(capsys, folders / 'plain', *COMMON, *data)
    assert found['images'] == 21 and found['input_size'][0] == 1


def test_it_prints_tables_that_say_what_was_chosen_where(folders, capsys):
    assert main(['validate', str(folders / 'branches'), *DIGITS]) == 0
    out = capsys.readouterr().out
    assert '355 images of digits, split validation' in out and 'top-1 %' in out and 'ensemble' in out
    assert 'chosen on every other image (178)' in out and 'other images (177)' in out
    assert main(['validate', f'local-dir:{folders / "plain"}', '--data-dir', str(folders / 'images'), *COMMON]) == 0
    assert 'chosen' not in capsys.readouterr().out


@pytest.mark.parametrize('flags, words', [
    (['nothing', *DIGITS], ('MODEL nothing', 'no such folder or checkpoint')),
    (['resnet81', *DIGITS], ('MODEL resnet81', 'closest: resnet18')),
    (['{root}', *DIGITS], ('MODEL {root}', 'no config.json')),
    (['{root}/plain/model.safetensors', *DIGITS], ('does not say how its model was made',)),
    (['{root}/plain/README.md', *DIGITS], ('cannot be read',)),
    (['{root}/plain', *COMMON], ('--data-dir: missing',)),
    (['{root}/plain', *COMMON, '--data-dir', 'nowhere'], ('--data-dir nowhere: no such folder',)),
    (['{root}/plain', *COMMON, '--data-dir', '{root}/images/train'], ('--val-split validation', '"" is the folder')),
    (['{root}/plain', *COMMON, '--data-dir', '{root}/images', '--split', 'test'], ('--val-split test', 'it has train')),
    (['{root}/plain', *DIGITS], ('has 7 classes, the data 10',)),
    (['{root}/branches', *DIGITS, '--num-classes', '9'], ('--num-classes 9', 'has 10 classes')),
    (['{root}/branches', *DIGITS, '--model-kwargs', 'layerz=1'], ('--model-kwargs', 'layerz')),
    (['{run}', *COMMON, '--model-kwargs', 'act_layer=gelu'], ('--model-kwargs', 'whose run says')),
    (['{run}', *COMMON, '--input-size', '3', '32', '32'], ('MODEL {run}: input size (3, 32, 32)',)),
    (['{root}/plain', *DIGITS[:-4], '--device', 'cuda:99'], ('--device cuda:99',)),
])
def test_bad_input_is_one_line_and_exit_code_2(flags, words, folders, checkpoint, capsys):
    assert main(['validate', *(f.format(root=folders, run=checkpoint[0]) for f in flags)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count('\n') == 1
    assert all(word.format(root=folders, run=checkpoint[0]) in err for word in words), err


def test_a_checkpoint_does_not_get_to_run_code(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint[0], weights_only=False)
    state['args'].dataset, state['args'].val_split = 'wds/x', 'pipe:touch ran'
    torch.save(state, tmp_path / 'x.pth.tar')
    assert main(['validate', str(tmp_path / 'x.pth.tar'), *COMMON]) == 2
    assert 'runs code from elsewhere' in capsys.readouterr().err


def test_a_sigmoid_threshold_is_chosen_on_even_images_and_measured_on_odd_ones():
    logits, target = torch.randn(101, 6), torch.rand(101, 6) < 0.3
    logits = logits - 1 + 2 * target  # more sure of labels that are there, but not enough for 0.5

    def micro_f1(first, threshold):
        evaluator = MultiLabelClassificationEvaluator(threshold=threshold)
        evaluator.update(logits[first::2], target[first::2])
        return evaluator.compute()['micro_f1']

    found = validate.choose_label_threshold(logits, target)
    assert found['threshold'] == max(validate.LABEL_THRESHOLDS, key=lambda t: micro_f1(0, t)) != 0.5
    assert found['micro_f1'] == pytest.approx(micro_f1(1, found['threshold']))
    assert found['micro_f1_at_half'] == pytest.approx(micro_f1(1, 0.5))
