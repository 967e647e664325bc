"""The report of `dks-timm inspect`: stages, branches and their cost."""

import pytest

from dks_timm.method.cost import format_inspection, inspect_model


def test_costs_of_the_paper():
    found = inspect_model('resnet50')
    assert found['cost']['flops'] == pytest.approx(2.03, abs=0.005)
    assert [c['parameters'] for c in found['classifiers']] == [25_557_032, 16_297_960, 58_668_008]
    assert [s['index'] for s in found['stages'] if s['supervised']] == [2, 3]


def test_the_table_shows_stages_branches_and_cost():
    text = format_inspection(inspect_model('resnet10t', num_classes=7, img_size=64, stages=(-2,), branches='conv'))
    assert 'resnet10t, 7 classes, 64x64 images' in text
    words = ' '.join(text.split())
    assert '3 layer3 256 16 yes' in words and 'branch 1 3 conv' in words
    assert 'x FLOPs' in text and '1.00x.' in text


@pytest.mark.parametrize('name', ['test_vit', 'swin_tiny_patch4_window7_224'])
def test_image_sizes_reach_models_of_fixed_size(name):
    small, large = (inspect_model(name, img_size=size) for size in (224, 448))
    assert small['image_size'] == [224, 224] and large['image_size'] == [448, 448]
    assert large['classifiers'][0]['flops'] > 3 * small['classifiers'][0]['flops']


@pytest.mark.parametrize('num_classes', [None, 10])
@pytest.mark.parametrize('name', ['mobilenetv5_300m_enc', 'qwen3_vit_88m_enc'])
def test_encoders_without_a_classifier_are_refused_by_name(name, num_classes):
    with pytest.raises(ValueError, match=f'{name} cannot classify: it is an encoder that timm has no classifier for'):
        inspect_model(name, num_classes=num_classes)


def test_a_model_without_a_default_classifier_gets_one_through_num_classes():
    with pytest.raises(ValueError, match='qwen3_vit_88m has no classifier .* give it one with num_classes'):
        inspect_model('qwen3_vit_88m')
    assert inspect_model('qwen3_vit_88m', num_classes=10)['num_classes'] == 10
