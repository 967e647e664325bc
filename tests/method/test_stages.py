"""Stages: indices into feature_info, the default choice, and what is refused."""
import pytest
import timm
import torch

from dks_timm.method.stages import list_stages, resolve_stages


def make(name):
    with torch.device('meta'):
        return timm.create_model(name, num_classes=10)


def test_a_stage_index_is_an_out_index_of_features_only():
    features = timm.create_model('resnet18', features_only=True)
    for stage in list_stages(make('resnet18')):
        assert features.feature_info.channels(stage.index) == stage.channels
        assert features.feature_info.reduction(stage.index) == stage.reduction


@pytest.mark.parametrize(('name', 'stages'), [
    ('resnet18', (2, 3)),  # stem, four layers
    ('convnext_atto', (1, 2)),  # four stages, no stem
    ('vgg11', (3, 4)),
    ('vit_tiny_patch16_224', (5, 8)),  # twelve blocks of one resolution: 1/2 and 3/4 of the depth
])
def test_default_stages(name, stages):
    assert resolve_stages(make(name)) == stages


def test_negative_stages_count_from_the_end_and_come_out_ascending():
    assert resolve_stages(make('resnet18'), (-2, 1)) == (1, 3)


@pytest.mark.parametrize(('stages', 'message'), [
    ((9,), r'stages has 9, which is none before the last; choose from the stages: 0 \(act1, 64 channels, /2\), 1'),
    ((-6,), 'stages has -6, which is none'),
    ((4,), 'stages has 4, which is none'),
    ((-1,), 'stages has -1, which is none'),
    ((2, 2), 'stages has 2 twice'),
    ((2, -3), 'stages has -3 twice'),
    ((), 'at least two classifiers'),
    (('2',), "stages has '2'"),
])
def test_impossible_stages_are_refused_with_the_choices(stages, message):
    with pytest.raises(ValueError, match=message):
        resolve_stages(make('resnet18'), stages)


def test_a_model_without_feature_info_is_refused():
    with pytest.raises(ValueError, match='Linear has no feature_info'):
        list_stages(torch.nn.Linear(1, 1))
