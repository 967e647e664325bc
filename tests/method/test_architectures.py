"""Every family of timm: the smallest architecture of each model file attaches, trains a step, and prunes exactly."""
import pytest
import timm
import torch
from timm.models._registry import _model_to_module

from dks_timm import DKSModel, create_dks_model, prune
from dks_timm.method.cost import inspect_model
from dks_timm.method.plan import BranchBuilder, BranchSpec
from dks_timm.method.stages import resolve_stages

QUICK = (
    'cpubone_nano', 'cs3darknet_focus_s', 'cspnext_tiny', 'densenet_40_12_cifar', 'efficientformerv2_s0',
    'efficientvim_m1', 'efficientvit_b0', 'ese_vovnet19b_slim_dw', 'fasternet_t0', 'ghostnet_050', 'hardcorenas_b',
    'hgnetv2_b0', 'mobilenetv3_small_050', 'mobilevit_xxs', 'pvt_v2_b0', 'regnetx_002', 'repghostnet_050', 'repvit_m1',
    'resnet20_cifar', 'resnetv2_18', 'starnet_s050', 'test_byobnet', 'test_coatnet', 'test_convnext',
    'test_efficientnet', 'test_mambaout', 'test_nfnet', 'test_resnet', 'test_vit',
)
# A step of these takes longer, or more memory; -m slow runs them.
SLOW = (
    'beit_base_patch16_224', 'cait_xxs24_224', 'coat_tiny', 'convit_tiny', 'convmixer_768_32', 'crossvit_tiny_240',
    'csatv2', 'davit_tiny', 'deepseek_vit_412m', 'deit_tiny_patch16_224', 'densenet121', 'dla46x_c', 'dpn48b',
    'edgenext_xx_small', 'efficientformer_l1', 'efficientvit_m0', 'fastvit_t8', 'focalnet_tiny_srf', 'gcvit_xxtiny',
    'gemma4_vit_167m', 'gmlp_ti16_224', 'halonet_h1', 'hiera_tiny_224', 'hrnet_w18_small', 'iformer_t',
    'inception_next_atto', 'inception_resnet_v2', 'inception_v3', 'inception_v4', 'lcnetv2_small', 'legacy_seresnet18',
    'legacy_xception', 'levit_128s', 'lowformer_b0', 'mobilenetv5_base', 'mvitv2_tiny',
    'naflexvit_base_patch16_parfac_gap', 'nasnetalarge', 'nest_tiny', 'nextvit_small', 'pit_ti_224', 'pnasnet5large',
    'poolformerv2_s12', 'qwen3_vit_88m', 'rdnet_tiny', 'res2next50', 'resnest14d', 'rexnet_100', 'sam2_hiera_tiny',
    'samvit_base_patch16_224', 'selecsls42', 'sequencer2d_s', 'shvit_s1', 'skresnet18', 'swiftformer_xs',
    'swin_tiny_patch4_window7_224', 'swinv2_cr_tiny_224', 'swinv2_tiny_window16_256', 'test_vit_relpos',
    'tiny_vit_5m_224', 'tnt_s_legacy_patch16_224', 'tresnet_m', 'twins_svt_small', 'vgg11', 'visformer_tiny',
    'vit_tiny_patch16_dinov3_qkvb', 'vit_tiny_r_s16_p8_224', 'vitamin_small_224', 'volo_d1_224', 'xception41p',
    'xcit_nano_12_p8_224',
)
# No tail after one of their default stages: two tensors are passed along, or all stages meet in the head.
WITH_CONV = {'efficientvim_m1', 'nasnetalarge', 'pnasnet5large'}
# Over 100 M parameters: attached on the meta device only.
LARGE = {'deepseek_vit_412m', 'gemma4_vit_167m', 'vgg11'}
# Attaching to these takes ten seconds to half a minute; -m slow does it.
SLOW_TO_TRACE = {
    'coat_tiny', 'csatv2', 'gemma4_vit_167m', 'inception_resnet_v2', 'inception_v4', 'mobilenetv5_base', 'nasnetalarge',
    'pnasnet5large', 'sequencer2d_s', 'twins_svt_small'}
STEPS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name not in LARGE)]


def test_the_list_has_one_architecture_of_every_model_file():
    files = [_model_to_module[name] for name in (*QUICK, *SLOW)]
    assert sorted(files) == sorted(set(_model_to_module.values()))


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_TO_TRACE)) for name in (*QUICK, *SLOW)])
def test_every_model_file_attaches_on_the_meta_device(name):
    found = inspect_model(name, num_classes=7)
    kinds = {c['kind'] for c in found['classifiers'][1:]}
    assert kinds <= ({'tail', 'conv'} if name in WITH_CONV else {'tail'})
    assert 1 < found['cost']['flops'] < 4


@pytest.mark.parametrize('name', STEPS)
def test_a_training_step_reaches_every_parameter_and_pruning_is_exact(name):
    torch.manual_seed(0)
    net = create_dks_model(name, num_classes=7)
    images = torch.randn(2, *net.pretrained_cfg['input_size'])
    logits = net(images)
    assert [tuple(z.shape) for z in logits] == [(2, 7)] * 3
    sum(z.float().square().sum() for z in logits).backward()
    assert not [n for n, p in net.branches.named_parameters() if p.grad is None]
    assert not [n for n, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]

    plain = timm.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        expected = net.eval()(images)
        plain.load_state_dict(prune(net).state_dict(), strict=True)
        assert torch.equal(plain(images), expected)


@pytest.mark.parametrize('name', [
    p for p in STEPS if (p if isinstance(p, str) else p.values[0]) not in WITH_CONV])
def test_whole_tails_with_the_backbones_weights_give_the_backbones_logits(name, monkeypatch):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=7).eval()
    builder = BranchBuilder(backbone)
    branches = [builder.build(i, BranchSpec('tail', 'whole tail')) for i in resolve_stages(backbone)]
    for branch in branches:
        branch.start_from(backbone)
    net = DKSModel(backbone, branches).eval()

    new_empty = torch.Tensor.new_empty  # what stands in for everything before the stage must not matter
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda self, *a, **k: new_empty(self, *a, **k).fill_(float('nan')))
    with torch.no_grad():
        expected, *logits = net.exits(torch.randn(2, *backbone.pretrained_cfg['input_size']))
    assert expected.isfinite().all()
    assert all(torch.equal(z, expected) for z in logits)
