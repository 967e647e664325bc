"""The paper's CIFAR networks: its parameter counts, and everything that timm's own models answer."""
import math
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import group_parameters
from timm.models.resnet import BasicBlock
from torch.utils._pytree import tree_leaves

from dks_timm import DKSLoss, create_dks_model, prune
from dks_timm.method.cost import inspect_model
from dks_timm.method.plan import PRESETS, PRESETS_BY_ANALOGY
from dks_timm.models import ARCHITECTURES, DenseLayer, PadShortcut, PreActBlock

PARAMETERS = {
    'resnet8_cifar': 81_140,
    'resnet20_cifar': 275_572,
    'resnet32_cifar': 470_004,
    'resnet44_cifar': 664_436,
    'resnet56_cifar': 858_868,
    'resnet110_cifar': 1_733_812,
    'wrn_16_2_cifar': 703_284,
    'wrn_28_10_cifar': 36_536_884,
    'wrn_40_4_cifar': 8_972_340,
    'densenet_40_12_cifar': 1_060_132,
    'resnet18_cifar': 11_220_132,
    'resnet50_cifar': 23_705_252,
}
# Blocks per stage. The branches have as many of the last two stages, or half of them, rounded up.
DEPTHS = {
    'resnet8_cifar': 1, 'resnet20_cifar': 3, 'resnet32_cifar': 5, 'resnet44_cifar': 7, 'resnet56_cifar': 9,
    'wrn_16_2_cifar': 2, 'wrn_28_10_cifar': 4, 'wrn_40_4_cifar': 6,
}
# One network of each kind, as small as it gets.
SMALL = {
    'resnet20_cifar': dict(layers=(1, 2, 1)),
    'wrn_16_2_cifar': dict(layers=(1, 2, 1)),
    'densenet_40_12_cifar': dict(layers=(2, 3, 2)),
    'resnet18_cifar': dict(layers=(1, 1, 1, 1), channels=(64, 16, 16, 32)),
}
small = pytest.mark.parametrize('name', SMALL)


def create(name, **kwargs):
    return timm.create_model(name, **{**SMALL[name], **kwargs})


def create_meta(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def images(count=2, chans=3):
    return torch.randn(count, chans, 32, 32)


# The paper's numbers.

def test_all_networks_are_registered():
    assert {*PARAMETERS} == ARCHITECTURES == {*timm.list_models('*_cifar')}
    assert not timm.list_models('*_cifar', pretrained=True)


@pytest.mark.parametrize('name', PARAMETERS)
def test_networks_have_the_published_number_of_parameters(name):
    assert parameters(create_meta(name)) == PARAMETERS[name]


@pytest.mark.parametrize(('name', 'earlier', 'later'), [
    ('resnet32_cifar', 298_212, 1_379_428),
    ('resnet110_cifar', 816_356, 5_219_940),
    ('wrn_28_10_cifar', 20_145_060, 107_464_420),
])
def test_branches_of_the_paper_have_the_papers_number_of_parameters(name, earlier, later):
    with torch.device('meta'):
        net = create_dks_model(name)
    assert net.stages == (1, 2)
    assert [b.kind for b in net.branches] == ['tail', 'tail']
    assert [parameters(b) for b in net.branches] == [earlier, later]


def test_training_cost_of_wrn_28_10_is_the_papers():
    found = inspect_model('wrn_28_10_cifar')
    gflop = [c['flops'] / 1e9 for c in found['classifiers']]
    assert (round(gflop[0], 2), round(sum(gflop), 2)) == (10.49, 29.47)
    assert round(found['cost']['flops'], 2) == 2.81


@pytest.mark.parametrize('name', DEPTHS)
def test_earlier_branch_halves_the_last_stage_and_later_branch_doubles_its_width(name):
    with torch.device('meta'):
        net = create_dks_model(name)
    blocks = [
        [m for m in branch.modules() if isinstance(m, (BasicBlock, PreActBlock)) and parameters(m)]
        for branch in net.branches]
    depth = DEPTHS[name]
    assert [len(b) for b in blocks] == [depth + math.ceil(depth / 2), depth]
    widths = [head.in_features for head in net.get_classifiers()]
    assert widths == [net.backbone.num_features * n for n in (1, 1, 2)]


def test_densenets_branches_have_12_and_6_layers_and_12_of_three_times_the_growth():
    with torch.device('meta'):
        net = create_dks_model('densenet_40_12_cifar')
    growths = [
        [m.conv.out_channels for m in b.modules() if isinstance(m, DenseLayer) and parameters(m)] for b in net.branches]
    assert net.stages == (1, 2)
    assert growths == [[12] * 18, [36] * 12]


def test_every_network_has_a_layout_for_its_default_stages_and_says_whether_it_is_the_papers():
    assert ARCHITECTURES <= PRESETS.keys() | PRESETS_BY_ANALOGY.keys()
    for name, stages, text in (
            ('resnet32_cifar', (1, 2), "the paper's layout, "),
            ('resnet20_cifar', (1, 2), "layout as in the paper's networks, "),
            ('resnet18_cifar', (2, 3), "layout as in the paper's networks, "),
    ):
        with torch.device('meta'):
            net = create_dks_model(name)
        assert net.stages == stages
        assert [b.reason.startswith(text) for b in net.branches] == [True, True]


# What they are made of.

def test_shortcuts_of_resnet20_subsample_and_add_channels_of_zeros():
    assert not [n for n in create_meta('resnet20_cifar').state_dict() if 'downsample' in n]
    x = images(chans=4)
    y = PadShortcut(4, 6, stride=2)(x)
    assert y.shape == (2, 6, 16, 16)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()


def test_shortcuts_of_wide_networks_project_the_activated_input_and_pass_on_the_raw_one():
    x = images(chans=4)
    for out_chs, expected in ((4, x), (8, torch.zeros(2, 8, 32, 32))):
        block = PreActBlock(4, out_chs).eval()
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.weight)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize('name', ['resnet20_cifar', 'wrn_16_2_cifar', 'densenet_40_12_cifar'])
def test_convolutions_start_from_kaimings_distribution_and_norms_from_one(name):
    model = timm.create_model(name)
    conv = model.stages[-1][-1].get_submodule('conv' if 'densenet' in name else 'conv2')
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    assert not model.get_classifier().bias.any()


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    ('resnet20_cifar', dict(layers=(3, 3)), r'channels is \(16, 32, 64\), but layers has 2 stages'),
    ('resnet20_cifar', dict(layers=(3, 0, 3)), r'layers is \(3, 0, 3\); give each stage at least one block'),
    ('resnet20_cifar', dict(channels=(16, 32, 8)), 'channels shrinks from 32 to 8'),
    ('resnet20_cifar', dict(proj_drop_rate=0.3), 'proj_drop_rate is 0.3, but only'),
    ('densenet_40_12_cifar', dict(growth_rate=(12, 36)), r'growth_rate is \(12, 36\), but layers has 3 stages'),
])
def test_layouts_that_cannot_be_built_are_refused_by_name(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


# What timm asks of its models.

@small
def test_preprocessing_is_that_of_cifar(name):
    config = resolve_data_config(model=create(name))
    assert config['input_size'] == (3, 32, 32)
    assert config['crop_pct'] == 1.0
    assert [round(255 * v, 1) for v in config['mean']] == [125.3, 123.0, 113.9]
    assert [round(255 * v, 1) for v in config['std']] == [63.0, 62.1, 66.7]


@pytest.mark.parametrize('name', PARAMETERS)
def test_configuration_names_existing_layers_and_the_final_resolution(name):
    model = create_meta(name)
    cfg, state_dict = model.pretrained_cfg, model.state_dict()
    assert f'{cfg["first_conv"]}.weight' in state_dict and f'{cfg["classifier"]}.weight' in state_dict
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    assert cfg['num_classes'] == model.num_classes == 100
    features = model.forward_features(torch.zeros(1, 3, 32, 32, device='meta'))
    assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model(torch.zeros(1, 3, 32, 32, device='meta')).shape == (1, 100)


@small
def test_gradient_checkpointing_changes_neither_logits_nor_gradients(name):
    model = create(name)
    x = images()
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        logits = model(x)
        found.append((logits, *torch.autograd.grad(logits.square().mean(), tuple(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    _, intermediates = model.forward_intermediates(x)
    assert len(intermediates) == len(model.feature_info)


@small
def test_classifier_and_pooling_can_be_replaced_and_removed(name):
    model = create(name).eval()
    x = images()
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(7, 'catavgmax')
    assert model.head_hidden_size == 2 * model.num_features
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, 'avg')
    assert model.num_classes == 0
    assert torch.equal(model(x), pre_logits)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.forward_features(x))
    bare = create(name, num_classes=0, global_pool='').eval()
    assert bare(x).shape == (2, model.num_features, *model.pretrained_cfg['pool_size'])


@small
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
def test_features_only_gives_all_stages_by_every_method(name, feature_cls):
    torch.manual_seed(0)
    expected = create(name).eval().forward_intermediates(x := images(), intermediates_only=True)
    torch.manual_seed(0)
    model = create(name, features_only=True, feature_cls=feature_cls).eval()
    features = tree_leaves(model(x))
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [32 // f.shape[2] for f in features] == model.feature_info.reduction()


@small
def test_intermediate_features_are_those_of_the_forward(name):
    model = create(name).eval()
    x = images()
    final, intermediates = model.forward_intermediates(x)
    assert [f.shape[1] for f in intermediates] == [stage['num_chs'] for stage in model.feature_info]
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model.forward_head(final), model(x))
    *_, normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed, final)
    last = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert torch.equal(*last, intermediates[-1])


@small
def test_layer_decay_goes_from_the_stem_to_the_head(name):
    model = create(name)
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert layers.keys() == {n for n, _ in model.named_parameters()}
        cfg = model.pretrained_cfg
        assert layers[f'{cfg["first_conv"]}.weight'] == 0
        assert layers[f'{cfg["classifier"]}.weight'] == max(layers.values())
        order = [layers[n] for n, _ in model.named_parameters()]
        assert order == sorted(order)


# With branches, and as a published model.

@small
def test_a_training_step_reaches_every_classifier_and_pruning_is_exact(name):
    net = create_dks_model(name, num_classes=7, **SMALL[name])
    assert [b.kind for b in net.branches] == ['tail', 'tail']
    DKSLoss()(net(images()), torch.tensor([1, 5]))['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    x = images()
    expected = net.eval()(x)
    plain = create(name, num_classes=7).eval()
    plain.load_state_dict(prune(net).state_dict())
    assert torch.equal(plain(x), expected)


def test_a_process_knows_the_networks_once_it_has_imported_them():
    code = """
import timm, dks_timm
print(timm.is_model('resnet20_cifar'))
import dks_timm.models
print(timm.is_model('resnet20_cifar'))
"""
    assert subprocess.check_output([sys.executable, '-c', code], text=True).split() == ['False', 'True']
