"""Every family of timm: the smallest architecture of each model file attaches, trains a step, and prunes exactly."""
import pytest
import timm
import torch
from timm.models._registry import _model_to_module

from dks_timm import DKSModel, create_dks_model, prune
from dks_timm.attach import BranchBuilder, BranchSpec
from dks_timm.inspection import inspect_model
from dks_timm.stages import resolve_stages

QUICK = (
    'test_byobnet', 'cait_xxs24_224', 'convit_tiny', 'test_convnext', 'cpubone_nano', 'crossvit_tiny_240',
    'cs3darknet_focus_s', 'cspnext_tiny', 'deit_tiny_patch16_224', 'dla46x_c', 'edgenext_xx_small',
    'efficientformer_l1', 'efficientformerv2_s0', 'test_efficientnet', 'efficientvim_m1', 'efficientvit_b0',
    'efficientvit_m0', 'vit_tiny_patch16_dinov3_qkvb', 'fasternet_t0', 'fastvit_t8', 'gcvit_xxtiny', 'ghostnet_050',
    'hardcorenas_b', 'hgnetv2_b0', 'iformer_t', 'inception_next_atto', 'lcnetv2_small', 'levit_128s', 'test_mambaout',
    'test_coatnet', 'poolformerv2_s12', 'gmlp_ti16_224', 'mobilenetv3_small_050', 'mobilevit_xxs', 'test_nfnet',
    'pit_ti_224', 'pvt_v2_b0', 'regnetx_002', 'repghostnet_050', 'repvit_m1', 'resnest14d', 'test_resnet',
    'resnetv2_18', 'rexnet_100', 'legacy_seresnet18', 'shvit_s1', 'skresnet18', 'starnet_s050', 'tiny_vit_5m_224',
    'visformer_tiny', 'test_vit', 'vit_tiny_r_s16_p8_224', 'test_vit_relpos', 'ese_vovnet19b_slim_dw',
    'xcit_nano_12_p8_224',
)
# A step of these takes longer, or more memory; -m slow runs them.
SLOW = (
    'beit_base_patch16_224', 'halonet_h1', 'coat_tiny', 'convmixer_768_32', 'csatv2', 'davit_tiny',
    'deepseek_vit_412m', 'densenet121', 'dpn48b', 'focalnet_tiny_srf', 'gemma4_vit_167m', 'hiera_tiny_224',
    'sam2_hiera_tiny', 'hrnet_w18_small', 'inception_resnet_v2', 'inception_v3', 'inception_v4', 'lowformer_b0',
    'mobilenetv5_base', 'mvitv2_tiny', 'naflexvit_base_patch16_parfac_gap', 'nasnetalarge', 'nest_tiny',
    'nextvit_small', 'pnasnet5large', 'qwen3_vit_88m', 'rdnet_tiny', 'res2next50', 'selecsls42', 'sequencer2d_s',
    'swiftformer_xs', 'swin_tiny_patch4_window7_224', 'swinv2_tiny_window16_256', 'swinv2_cr_tiny_224',
    'tnt_s_legacy_patch16_224', 'tresnet_m', 'twins_svt_small', 'vgg11', 'samvit_base_patch16_224',
    'vitamin_small_224', 'volo_d1_224', 'legacy_xception', 'xception41p',
)
# No tail after one of their default stages: two tensors are passed along, or all stages meet in the head.
WITH_CONV = {'efficientvim_m1', 'nasnetalarge', 'pnasnet5large'}
# Over 100 M parameters: attached on the meta device only.
LARGE = {'deepseek_vit_412m', 'gemma4_vit_167m', 'vgg11'}
STEPS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name not in LARGE)]


def test_the_list_has_one_architecture_of_every_model_file():
    files = [_model_to_module[name] for name in (*QUICK, *SLOW)]
    assert sorted(files) == sorted(set(_model_to_module.values()))


@pytest.mark.parametrize('name', [*QUICK, *SLOW])
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
