"""Branches: the paper's layouts, tails that compute what the whole model computes, and the convolutional fallback."""
import logging
import re

import pytest
import timm
import torch
from timm.layers import SplitBatchNorm2d, convert_splitbn_model, convert_sync_batchnorm

from dks_timm import DKSModel, create_dks_model, prune
from dks_timm.method.cost import inspect_model
from dks_timm.method.plan import BranchBuilder, BranchSpec


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(('name', 'earlier', 'later'), [
    ('resnet18', 9_825_768, 31_968_232),
    ('resnet34', 12_187_112, 50_846_696),
    ('resnet50', 16_297_960, 58_668_008),
    ('resnet101', 26_352_616, 58_668_008),
    ('resnet152', 33_055_720, 58_668_008),
])
def test_branches_of_the_paper_have_the_papers_parameter_counts(name, earlier, later):
    with torch.device('meta'):
        net = create_dks_model(name)
    assert all(p.is_meta for p in net.parameters())
    assert net.stages == (2, 3)
    assert [b.kind for b in net.branches] == ['tail', 'tail']
    assert [parameters(b) for b in net.branches] == [earlier, later]


def test_repeated_blocks_are_thinned_to_every_second():
    with torch.device('meta'):
        net = create_dks_model('vit_tiny_patch16_224')
        whole = BranchBuilder(net.backbone).build(5, BranchSpec('tail', 'whole'))
    block = parameters(net.backbone.blocks[0])
    assert parameters(whole) - parameters(net.branches[0]) == 3 * block  # blocks 7, 9 and 11 of 6 to 11
    assert sorted(net.branches[0].plan.skips) == ['blocks.11', 'blocks.7', 'blocks.9']


def test_branch_kwargs_override_the_template_for_one_stage_or_for_all():
    with torch.device('meta'):
        net = create_dks_model('resnet18', branch_kwargs={'2.layers': (2, 2, 1, 1), 'channels': (64, 128, 256, 128)})
        preset = create_dks_model('resnet18')
    assert parameters(net.branches[0]) < parameters(preset.branches[0])
    assert parameters(net.branches[1]) < parameters(preset.branches[1])
    with pytest.raises(ValueError, match=r"branch_kwargs has '1.layers', but the supervised stages are 2, 3"):
        create_dks_model('resnet18', branch_kwargs={'1.layers': (2, 2, 1, 1)})
    with pytest.raises(ValueError, match='resnet18 cannot be made with layerz=1'):
        create_dks_model('resnet18', branch_kwargs={'layerz': 1})


def test_auto_takes_conv_and_says_why_where_there_is_no_tail(caplog):
    with torch.device('meta'), caplog.at_level(logging.WARNING):
        net = create_dks_model('efficientvim_m1', num_classes=3)
    assert [b.kind for b in net.branches] == ['tail', 'conv']
    assert 'it also uses tensors from before the stage' in caplog.text
    assert 'no tail' in net.describe()
    with torch.device('meta'), pytest.raises(ValueError, match="branches='tail' does not fit efficientvim_m1"):
        create_dks_model('efficientvim_m1', branches='tail')


def test_a_template_that_does_not_match_the_backbone_is_an_error_that_names_model_kwargs():
    with torch.device('meta'):
        backbone = timm.create_model('resnet18', channels=(64, 96, 256, 512))
        backbone._model_args = {}  # as made by a timm that does not note its arguments
        with pytest.raises(ValueError, match='model_kwargs must say how the backbone was made'):
            DKSModel.from_timm(backbone, branches='tail')
        assert [b.kind for b in DKSModel.from_timm(backbone).branches] == ['conv', 'tail']
        net = DKSModel.from_timm(backbone, branches='tail', model_kwargs=dict(channels=(64, 96, 256, 512)))
    assert [b.kind for b in net.branches] == ['tail', 'tail']


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_vit', 'swin_tiny_patch4_window7_224'])
def test_conv_branches_fit_nchw_nhwc_and_token_features(name):
    net = create_dks_model(name, num_classes=5, branches='conv')
    logits = net(torch.randn(2, *net.pretrained_cfg['input_size']))
    assert [b.kind for b in net.branches] == ['conv', 'conv']
    assert [tuple(z.shape) for z in logits] == [(2, 5)] * 3
    norms = {type(b.blocks[0].bn).__name__ for b in net.branches}
    has_batch_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in net.backbone.modules())
    assert norms == {'BatchNormAct2d' if has_batch_norm else 'LayerNormAct2d'}


def test_tails_follow_the_image_size():
    net = create_dks_model('test_vit', num_classes=5, dynamic_img_size=True)
    for size in (160, 96):
        assert [tuple(z.shape) for z in net(torch.randn(2, 3, size, size))] == [(2, 5)] * 3
    with torch.inference_mode():
        assert [tuple(z.shape) for z in net.eval().exits(torch.randn(2, 3, 128, 128))] == [(2, 5)] * 3


def test_tails_start_from_given_weights(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model('test_resnet', num_classes=5)
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    net = create_dks_model('test_resnet', num_classes=5, checkpoint_path=str(tmp_path / 'weights.pth'))
    tail = net.branches[-1].template.layer4
    assert all(torch.equal(a, b) for a, b in zip(tail.parameters(), source.layer4.parameters(), strict=True))
    assert torch.equal(prune(net).fc.weight, source.fc.weight)


def test_tails_are_fresh_where_a_configuration_alone_is_given_and_on_the_device_that_is(tmp_path):
    net = create_dks_model('test_resnet', num_classes=5, pretrained_cfg_overlay=dict(crop_pct=0.9), device='cpu')
    pairs = list(zip(net.branches[-1].template.layer4.modules(), prune(net).layer4.modules(), strict=True))
    convolutions = [(a, b) for a, b in pairs if isinstance(a, torch.nn.Conv2d)]
    assert convolutions and not any(torch.equal(a.weight, b.weight) for a, b in convolutions)


def test_a_budget_below_the_cheapest_branches_is_refused_with_the_least_that_works():
    pattern = r'budget is 1.001, but the cheapest branches on stages 2, 3 of resnet10t need (\d\.\d+); give at least'
    with pytest.raises(ValueError, match=pattern) as refusal:
        inspect_model('resnet10t', budget=1.001)
    least = float(re.search(pattern, str(refusal.value))[1])
    assert 1.001 < inspect_model('resnet10t', budget=least)['cost']['flops'] <= least


def test_branches_take_part_in_sync_and_split_batch_norm():
    def norms(module):
        return {type(m) for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}

    net = convert_sync_batchnorm(create_dks_model('resnet10t', num_classes=5))
    assert norms(net.branches) == {torch.nn.SyncBatchNorm}
    net = convert_splitbn_model(create_dks_model('resnet10t', num_classes=5))
    assert SplitBatchNorm2d in norms(net.branches)
    assert [tuple(z.shape) for z in net(torch.randn(4, 3, 64, 64))] == [(4, 5)] * 3


def test_branches_are_planned_without_weights_also_with_fast_norms(monkeypatch):
    monkeypatch.setattr(timm.layers.fast_norm, '_USE_FAST_NORM', True)
    backbone = timm.create_model('test_vit', num_classes=4)
    builder = BranchBuilder(backbone)
    assert all(p.is_meta for p in builder.trace.model.parameters())
    branch, = builder.attach([2], budget=1.5)
    for model in (backbone, branch):
        assert {m._fast_norm for m in model.modules() if hasattr(m, '_fast_norm')} == {True}
