"""Weights that no run here trained: a checkpoint in torchvision's form as a folder for timm."""
import argparse
import json

import pytest
import timm
import torch
import torchvision
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from dks_timm.cli import main
from dks_timm.publishing import export as exporting


@pytest.fixture
def model():
    model = torchvision.models.resnet18(num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    return model


@pytest.fixture
def foreign(model, tmp_path):
    """A checkpoint as PyTorch's ImageNet script wrote it in 2019, of a network with branches."""
    weights = {f'module.{name}': tensor for name, tensor in model.state_dict().items()}
    weights.update({'module.aux1.fc.weight': torch.zeros(7, 2), 'module.aux2.a': torch.zeros(1)})
    weights['module.aux2.b'] = torch.zeros(1)
    return saved(tmp_path / 'dks.pth.tar', dict(epoch=90, best_acc1=torch.tensor(70.), state_dict=weights))


def saved(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def export(checkpoint, *flags):
    return main(['export', str(checkpoint), str(checkpoint.parent / 'net'), *flags])


def logits(model):
    with torch.no_grad():
        return model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_a_foreign_checkpoint_becomes_a_folder_with_its_logits_and_a_card(model, foreign, tmp_path, caplog):
    assert export(foreign, '--model', 'resnet18.tv_in1k', '--card-license', 'mit') == 0
    loaded = timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    assert 'Left out: 3 entries that resnet18.tv_in1k does not have, of aux1 (1), aux2 (2)' in caplog.text
    expected = timm.data.resolve_model_data_config(timm.create_model('resnet18.tv_in1k'))
    found = timm.data.resolve_model_data_config(loaded)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == expected
    assert expected['crop_pct'] == 0.875  # not that of the plain name
    card = ModelCard.load(tmp_path / 'net/README.md')
    assert card.data.to_dict() == dict(
        library_name='timm', license='mit', pipeline_tag='image-classification', tags=['timm'])
    assert 'converted from the file dks.pth.tar' in card.text and '7 classes' in card.text
    for claim in ('Synergy', '## Training', 'Cite', '| dataset |', 'None', 'tv_in1k'):
        assert claim not in card.text


@pytest.mark.parametrize('form', ['bare', 'model', 'safetensors', 'torchvision run'])
def test_the_weights_may_lie_in_other_places(form, model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'verify', lambda *args: None)
    weights, path = model.state_dict(), tmp_path / ('x.safetensors' if form == 'safetensors' else 'x.pth')
    if form == 'safetensors':
        save_file(weights, path)
    else:
        args = dict(args=argparse.Namespace(model='resnet18')) if form == 'torchvision run' else {}
        saved(path, weights if form == 'bare' else dict(model=weights, **args))
    assert export(path, '--model', 'resnet18', '--num-classes', '7') == 0
    assert torch.equal(logits(timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True).eval()), logits(model))
    assert json.loads((tmp_path / 'net/config.json').read_text())['num_classes'] == 7


@pytest.mark.parametrize('flags, message', [
    ([], "dks.pth.tar' does not say how its model was made; give one of a run, or for dks-timm export --model NAME"),
    (['--model', 'resnet34'], 'other weights: Error(s) in loading state_dict for ResNet: Missing key(s)'),
    (['--model', 'resnet10t'], 'other weights: '),
    (['--model', 'resnet18', '--num-classes', '9'], 'size mismatch for fc.weight'),
    (['--model', 'resnet81'], '--model resnet81: timm has no such model; closest: resnet18'),
    (['--model', 'resnet18', '--keep-branches'], '--keep-branches: only for a checkpoint of a run'),
    (['--model', 'resnet18', '--card-baseline', 'x'], '--card-baseline x: only for a checkpoint of a run'),
    (['--num-classes', '7'], '--num-classes 7: only with --model'),
])
def test_what_does_not_fit_is_refused_in_one_line(flags, message, foreign, tmp_path, capsys):
    assert export(foreign, *flags) == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize('content, message', [
    (torchvision.models.resnet34(num_classes=7).state_dict(), 'is of a larger model, with more in layer1'),
    (dict(args=argparse.Namespace(model='resnet50'), state_dict={}), "is one of a run and knows its model, 'resnet50'"),
    (dict(state_dict=3), 'cannot be read'),
    ([1, 2], 'cannot be read'),
    (dict(epoch=3), 'other weights: '),
])
def test_a_file_of_something_else_is_refused_in_one_line(content, message, tmp_path, capsys):
    assert export(saved(tmp_path / 'x.pth', content), '--model', 'resnet18') == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1
    assert not (tmp_path / 'net').exists()
