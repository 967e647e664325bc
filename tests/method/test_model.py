"""DKSModel: outputs in both modes, pruning, and the questions timm's factories ask."""
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_reentrant_ckpt, use_reentrant_ckpt
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import dks_timm
from dks_timm import DKSModel, create_dks_model, prune

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(name='resnet10t', **kwargs):
    torch.manual_seed(0)
    return create_dks_model(name, num_classes=5, **kwargs)


def test_training_gives_all_logits_backbone_first_and_evaluation_the_backbones():
    net = make()
    logits = net.train()(IMAGES)
    assert [tuple(z.shape) for z in logits] == [(2, 5)] * 3
    net.eval()
    calls = []
    net.branches[0].register_forward_hook(lambda *args: calls.append(args))
    assert tuple(net(IMAGES).shape) == (2, 5) and not calls
    exits = net.exits(IMAGES)
    assert len(exits) == 3 and len(calls) == 1
    assert torch.equal(exits[0], net(IMAGES))


@pytest.mark.parametrize('name', ['resnet10t', 'test_convnext', 'test_efficientnet'])
def test_pruned_logits_equal_eval_logits_bit_for_bit(name):
    net = make(name)
    sum(z.square().sum() for z in net(IMAGES)).backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    expected = net.eval()(IMAGES)
    plain = timm.create_model(name, num_classes=5)
    plain.load_state_dict(prune(net).state_dict())
    assert torch.equal(plain.eval()(IMAGES), expected)


def test_pruning_leaves_a_plain_timm_model_and_a_dks_model_that_still_works():
    net = make()
    net(IMAGES)
    backbone = prune(net)
    assert type(backbone) is type(timm.create_model('resnet10t'))
    assert not any(m._forward_hooks for m in backbone.modules())
    assert len(net.train()(IMAGES)) == 3
    assert prune(backbone) is backbone


def test_prune_looks_inside_ema_and_compiled_models():
    net = make()
    assert prune(torch.compile(net, backend='eager')) is net.backbone
    ema = ModelEmaV3(net)
    assert prune(ema) is ema.module.backbone


def test_every_classifier_trains_the_backbone_up_to_its_stage():
    net = make()
    for exit_index, reached in ((1, 'layer2'), (2, 'layer3')):
        net.zero_grad()
        net(IMAGES)[exit_index].sum().backward()
        backbone = net.backbone
        assert any(p.grad.abs().sum() > 0 for p in getattr(backbone, reached).parameters())
        assert all(p.grad is None for p in backbone.layer4.parameters())
        assert all(p.grad is not None for p in net.branches[exit_index - 1].parameters())


def test_branches_change_neither_the_backbones_weights_nor_the_random_state():
    torch.manual_seed(7)
    plain = timm.create_model('resnet10t', num_classes=5)
    after_plain = torch.get_rng_state()
    torch.manual_seed(7)
    net = create_dks_model('resnet10t', num_classes=5)
    assert torch.equal(torch.get_rng_state(), after_plain)
    for (name, a), (_, b) in zip(plain.state_dict().items(), net.backbone.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_dropout_in_the_branches_draws_no_random_numbers_of_the_training_run():
    net = make(drop_rate=0.5, drop_path_rate=0.3)
    torch.manual_seed(1)
    prune(net).train()(IMAGES)
    after_plain = torch.get_rng_state()
    torch.manual_seed(1)
    net.train()(IMAGES)
    assert torch.equal(torch.get_rng_state(), after_plain)


def test_from_timm_leaves_statistics_mode_and_random_state_untouched():
    backbone = timm.create_model('resnet10t', num_classes=5).eval()
    before, random_state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    net = DKSModel.from_timm(backbone)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert net.backbone is backbone and not backbone.training and not net.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert all(p.requires_grad for p in backbone.parameters())


def test_branches_have_their_own_initial_weights():
    net = make()
    earlier, later = (b.get_classifier().weight for b in net.branches)
    assert earlier.shape == later.shape == net.get_classifier().weight.shape
    assert not torch.equal(earlier, later) and not torch.equal(earlier, net.get_classifier().weight)


def test_a_copy_taps_its_own_backbone():
    net = make()
    net(IMAGES)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(z.abs().sum() == 0 for z in twin(IMAGES))
    assert all(z.abs().sum() > 0 for z in net(IMAGES))


@pytest.mark.parametrize('name', ['resnet10t', 'test_vit', 'test_convnext'])
def test_the_training_forward_compiles_to_one_graph(name):
    net = make(name)
    x = torch.randn(2, *net.pretrained_cfg['input_size'])
    expected = net.eval().exits(x)
    compiled = torch.compile(net.exits, backend='aot_eager', fullgraph=True)
    for a, b in zip(compiled(x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_a_second_network_compiles_in_the_same_thread():
    torch.compiler.reset()

    def compile_two():
        x = torch.randn(2, 3, 32, 32)
        return [len(torch.compile(make('test_resnet'), backend='aot_eager')(x)) for _ in range(2)]

    with ThreadPoolExecutor(1) as fresh:  # a thread without an earlier forward
        assert fresh.submit(compile_two).result() == [3, 3]


@pytest.mark.parametrize(('name', 'layer_decay'), [('resnet10t', None), ('resnet10t', 0.7), ('test_vit', 0.65)])
def test_backbone_parameters_get_the_same_optimizer_group_as_without_branches(name, layer_decay):
    def settings(model, prefix):
        optimizer = create_optimizer_v2(model, 'adamw', lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
        by_parameter = {
            id(p): (g['weight_decay'], g.get('lr_scale', 1.0)) for g in optimizer.param_groups for p in g['params']}
        return {n[len(prefix):]: by_parameter[id(p)] for n, p in model.named_parameters() if n.startswith(prefix)}

    net = make(name)
    assert settings(net, 'backbone.') == settings(net.backbone, '')
    # Branches learn at the rate of the head.
    assert {scale for _, scale in settings(net, 'branches.').values()} == {1.0}


def replaced_one_by_one(net):
    for branch in net.branches:
        parent, _, name = branch.source.rpartition('.')
        setattr(net.backbone.get_submodule(parent), name, copy.deepcopy(net.backbone.get_submodule(branch.source)))
        net.backbone.get_submodule(branch.source)._forward_hooks.clear()
    return net


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, convert_splitbn_model, replaced_one_by_one])
def test_a_module_that_takes_the_place_of_a_supervised_one_is_tapped_once(convert):
    net = create_dks_model('mobilenetv3_small_050', num_classes=5, stages=(0, 2))  # BatchNorm puts out what they use
    net = convert(net.eval()).eval()
    x = torch.randn(2, 3, 64, 64)
    afresh = DKSModel(prune(copy.deepcopy(net)), copy.deepcopy(net.branches)).eval()
    for z, other in zip(net.exits(x), afresh.exits(x), strict=True):
        assert torch.equal(z, other)
    assert [len(net.backbone.get_submodule(branch.source)._forward_hooks) for branch in net.branches] == [1, 1]
    assert not any(module._forward_hooks for module in prune(net).modules())


def in_threads(calls, rounds):
    """Run calls side by side, each some times. Returns what they gave, or raised."""
    def repeat(call):
        for _ in range(rounds):
            try:
                found.append(call())
            except Exception as e:
                found.append(e)

    found = []
    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@torch.no_grad()
def test_a_model_answers_several_threads_at_once():
    net = create_dks_model('test_convnext', num_classes=5).eval()

    def ask(i):
        return [lambda x: [net(x)], net.exits, lambda x: [net.early_exit(x, 0.)[0]]][i % 3]

    images = [torch.randn(2, 3, 64, 64) for _ in range(6)]
    expected = [ask(i)(x) for i, x in enumerate(images)]

    def right(i):
        return all(torch.allclose(z, other, atol=1e-5) for z, other in zip(ask(i)(images[i]), expected[i], strict=True))

    assert in_threads([functools.partial(right, i) for i in range(6)], rounds=10) == [True] * 60


@pytest.mark.parametrize('name, size', [('xception41p', 64), ('test_resnet', 64), ('test_vit', 160)])
def test_two_forwards_before_one_backward_recompute_each_its_own(name, size):
    net = create_dks_model(name, num_classes=5).train()
    batches = [torch.randn(2, 3, size, size) for _ in range(2)]
    loss_fn, target, found = dks_timm.DKSLoss(), torch.tensor([0, 1]), []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        loss = sum(loss_fn(net(x), target)['loss'] for x in batches)
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    for grad, other in zip(*found, strict=True):
        assert (grad - other).norm() <= 1e-2 * grad.norm() + 1e-6


def test_a_compiled_model_may_recompute():
    torch.compiler.reset()
    net = create_dks_model('test_resnet', num_classes=5).train()
    net.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else m)
    x, found = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        module = torch.compile(net, backend='aot_eager') if enable else net
        found.append(torch.autograd.grad(sum(z.square().sum() for z in module(x)), list(net.parameters())))
    for grad, other in zip(*found, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-3)


def test_grad_checkpointing_is_not_reentrant_as_branches_would_not_train_the_backbone_then():
    net = create_dks_model('test_resnet', num_classes=5).train()
    set_reentrant_ckpt(True)
    try:
        net.set_grad_checkpointing()
        sum(z.square().sum() for z in net(IMAGES)[1:]).backward()
        assert not use_reentrant_ckpt() and all(p.grad is not None for p in net.backbone.layer1.parameters())
    finally:
        set_reentrant_ckpt(False)


@pytest.mark.parametrize('name, kwargs', [
    ('test_resnet', dict()), ('test_vit', dict()), ('test_convnext', dict()), ('resnet20_cifar', dict()),
    ('test_efficientnet', dict(branches='conv'))])
def test_reset_classifier_renews_every_head_and_nothing_else(name, kwargs):
    net = create_dks_model(name, num_classes=5, **kwargs).eval()
    plain = copy.deepcopy(prune(copy.deepcopy(net)))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random_state = []
    for model in (plain, net):
        torch.manual_seed(1)
        model.reset_classifier(7, 'avg')
        random_state.append(torch.get_rng_state())
    assert torch.equal(*random_state)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, net.backbone.state_dict()[key])
    x = torch.randn(2, *net.pretrained_cfg['input_size'])
    assert [z.shape for z in net.exits(x)] == [(2, 7)] * 3 and net.num_classes == 7
    heads = {id(p) for head in net.get_classifiers() for p in head.parameters()}
    changed = [p for key, p in net.named_parameters() if not (
        key in before and before[key].shape == p.shape and torch.equal(before[key], p))]
    assert {id(p) for p in changed} == heads
    dks_timm.DKSLoss()(net.train()(x), torch.tensor([6, 0]))['loss'].backward()
    assert all(p.grad is not None for head in net.get_classifiers() for p in head.parameters())


def test_describe_lists_every_classifier():
    table = make().describe()
    assert table.splitlines()[0].split() == ['classifier', 'stage', 'kind', 'parameters', 'made', 'of']
    assert '2 (layer2, 128 channels, /8)' in table and '3 (layer3, 256 channels, /16)' in table
    assert [' tail ' in line for line in table.splitlines()] == [False, False, True, True]


def test_fine_tuning_with_new_classes_starts_backbone_and_tails_from_the_weights(tmp_path):
    source = timm.create_model('resnet10t', num_classes=5)
    save_for_hf(source, tmp_path, safe_serialization=True)
    net = create_dks_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3)
    assert [tuple(z.shape) for z in net(IMAGES)] == [(2, 3)] * 3
    expected = source.layer4[0].conv1.weight
    assert torch.equal(net.backbone.layer4[0].conv1.weight, expected)
    assert all(torch.equal(b.template.layer4[0].conv1.weight, expected) for b in net.branches)
