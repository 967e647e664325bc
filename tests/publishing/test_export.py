import argparse
import importlib.util
import json
import subprocess
import sys
from copy import deepcopy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
from helpers.documents import blocks
from helpers.hub_server import HubServer, use
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel

from dks_timm import create_dks_model
from dks_timm.cli import main
from dks_timm.publishing import export as exporting
from dks_timm.publishing.card import eval_results
from dks_timm.publishing.export import check_export_dir, export, export_checkpoint
from dks_timm.training.build import create_model
from dks_timm.training.config import create_parser

DATA_CONFIG = dict(
    input_size=(3, 48, 48), interpolation='bilinear', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9,
    crop_mode='center')
CARD = dict(
    dks=True, license='apache-2.0', datasets=['digits'], branches='a table of branches',
    command='accelerate launch train.py --dks', training={'epochs': 3, 'seed': 42})
PLAIN = ['README.md', 'config.json', 'model.safetensors']


def tiny(name='test_resnet', **kwargs):
    """A tiny model whose BatchNorm statistics are not those of a new one."""
    model = timm.create_model(name, num_classes=3, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def logits(model, size=64):
    return logits_of(model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


def logits_of(model, x):
    with torch.no_grad():
        return deepcopy(model).float().eval()(x)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def unverified(monkeypatch):
    """For what has nothing to do with the check in a fresh process: leave it out, it takes seconds."""
    monkeypatch.setattr(exporting, 'verify', lambda *args: None)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = tiny(), tmp_path_factory.mktemp('exported') / 'my-model'
    results = eval_results({'top1': 91.234567, 'top5': 99.5, 'loss': 0.3}, 'digits')
    export(folder, model, card=CARD, data_config=DATA_CONFIG, label_names=['zero', 'one', 'zwölf'], results=results)
    return model, folder, results


def test_fresh_process_without_dks_timm_gives_the_same_logits(exported, tmp_path):
    model, folder, _ = exported
    assert names(folder) == PLAIN
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # the weights are as readable as the rest
    code = '''
import sys, timm, torch
model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
torch.save(model(x).detach(), sys.argv[2])
assert not any(name.startswith('dks_timm') for name in sys.modules)
'''
    subprocess.run([sys.executable, '-c', code, folder, tmp_path / 'logits.pt'], check=True)
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), logits(model))


def test_config_has_the_preprocessing_of_the_run_and_the_label_names(exported):
    config = json.loads((exported[1] / 'config.json').read_text())
    assert config['num_classes'] == 3
    assert load(exported[1]).pretrained_cfg['label_names'] == ['zero', 'one', 'zwölf']
    assert 'num_classes' not in config['model_args']  # transformers gives it as an argument of its own
    for use_test_size in (False, True):
        loaded = timm.data.resolve_model_data_config(load(exported[1]), use_test_size=use_test_size)
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.items()} == DATA_CONFIG


def test_config_says_nothing_about_timms_own_weights(tmp_path, unverified):
    model = timm.create_model('resnet18.a1_in1k', num_classes=3)
    assert model.pretrained_cfg['tag'] and model.pretrained_cfg['license']
    export(tmp_path / 'model', model)
    config = json.loads((tmp_path / 'model/config.json').read_text())['pretrained_cfg']
    assert not any(config.get(key) for key in ('tag', 'license', 'origin_url', 'paper_ids', 'hf_hub_id', 'url'))


def test_card_says_what_it_was_given(exported):
    card = ModelCard.load(exported[1] / 'README.md')
    assert card.data.eval_results == exported[2]
    assert [r.metric_value for r in card.data.eval_results] == [91.234567, 99.5]
    assert (card.data.model_name, card.data.license, card.data.library_name) == (
        'test_resnet on digits', 'apache-2.0', 'timm')
    assert card.data.datasets == ['digits'] and card.data.tags == ['timm', 'dks']
    for fact in ('# test_resnet on digits\n', 'a table of branches', 'accelerate launch train.py --dks',
                 '| seed | 42 |', '| 91.23 |', '48 x 48'):
        assert fact in card.text


def test_card_claims_nothing_it_was_not_given(tmp_path, unverified):
    export(tmp_path / 'model', tiny())
    card = ModelCard.load(tmp_path / 'model/README.md')
    assert card.data.to_dict() == {
        'library_name': 'timm', 'pipeline_tag': 'image-classification', 'tags': ['timm']}
    for claim in ('Synergy', 'Training', 'Cite', '| dataset |', 'None', '{{', '{%'):
        assert claim not in card.text


def test_code_in_the_card_of_a_model_with_branches_runs(tmp_path, monkeypatch, unverified):
    net = create_dks_model('test_resnet', num_classes=3)
    export(tmp_path / 'net', net, keep_branches=True, label_names=['zero', 'one', 'two'])
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (60, 50), 'red').save('image.png')
    found = {}
    for block in blocks(tmp_path / 'net/README.md'):
        if block.language == 'python':
            exec(block.text, found)
    assert found['probabilities'].shape == (1, 3)
    assert {answer['label'] for answer in found['answers']} == {'zero', 'one', 'two'}
    assert [z.shape for z in found['logits']] == [(1, 3)] * 3 and found['answer'].shape == (1, 3)
    torch.testing.assert_close(found['logits'][0].softmax(-1), found['probabilities'])


@pytest.mark.parametrize('name, kwargs, dtype', [
    ('test_resnet', dict(in_chans=1, global_pool='max'), torch.float32),
    ('test_vit', dict(img_size=48, global_pool='avg'), torch.bfloat16),
    ('resnet20_cifar', dict(), torch.float32),
])
def test_transformers_loads_every_export_with_the_same_logits(name, kwargs, dtype, tmp_path):
    export(tmp_path / 'net', tiny(name, **kwargs).to(dtype), label_names=['zero', 'one', 'two'])
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'net', dtype=torch.float32)
    timms = load(tmp_path / 'net')
    x = torch.randn(2, *timms.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x).logits, timms(x))
    assert loaded.config.id2label == {0: 'zero', 1: 'one', 2: 'two'}
    text = (tmp_path / 'net/README.md').read_text()
    assert ('import dks_timm.models' in text) == ('Only timm is needed' not in text) == ('cifar' in name)


def test_model_with_shared_weights_is_exported_whole(tmp_path):
    # CoaT's blocks share their position encodings, which safetensors refuses to save.
    model = timm.create_model(
        'coat_lite_tiny', num_classes=3, img_size=64, embed_dims=(8, 8, 8, 8), serial_depths=(2, 1, 1, 1))
    assert model.serial_blocks1[0].cpe.proj.weight is model.serial_blocks1[1].cpe.proj.weight
    export(tmp_path / 'model', model)
    assert torch.equal(logits(load(tmp_path / 'model')), logits(model))


def test_training_layout_is_not_exported_and_stays_as_it_is(tmp_path):
    plain = tiny()
    model = convert_splitbn_model(deepcopy(plain)).to(memory_format=torch.channels_last).train()
    state, strides = deepcopy(model.state_dict()), [p.stride() for p in model.parameters()]
    random_state = torch.get_rng_state()
    export(tmp_path / 'model', model)
    assert all(m.training for m in model.modules())
    assert strides == [p.stride() for p in model.parameters()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert load_file(tmp_path / 'model/model.safetensors').keys() == plain.state_dict().keys()
    assert torch.equal(logits(load(tmp_path / 'model')), logits(plain))


def test_low_precision_weights_stay_as_small_as_they_are(tmp_path):
    # Swin's table of relative coordinates is computed when the model is made; the cast rounds it, and no file has it.
    model = timm.create_model(
        'swinv2_tiny_window8_256', num_classes=3, img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # its blocks start as identities
    model.to(torch.bfloat16)
    export(tmp_path / 'model', model)
    assert {t.dtype for t in load_file(tmp_path / 'model/model.safetensors').values()} == {torch.bfloat16}
    loaded = load(tmp_path / 'model')
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float())


def test_model_that_timm_would_make_differently_is_refused(exported, tmp_path):
    changed = tiny()
    changed.act1 = nn.Tanh()
    before = contents(exported[1])
    for folder in (exported[1], tmp_path / 'new'):
        with pytest.raises(RuntimeError, match='loads it with other logits'):
            export(folder, changed, overwrite=True)
    assert contents(exported[1]) == before and not (tmp_path / 'new').exists()


def test_model_args_describe_a_model_that_the_factory_did_not_make(tmp_path):
    model = timm.models.model_entrypoint('test_resnet')(num_classes=3, layers=(2, 1, 1, 1))
    with pytest.raises(RuntimeError, match='cannot load it: .*state_dict'):
        export(tmp_path / 'model', model)
    export(tmp_path / 'model', model, model_args={'layers': (2, 1, 1, 1)})
    assert torch.equal(logits(load(tmp_path / 'model')), logits(model))


@pytest.mark.parametrize('name', ['config.json', 'README.md'])
def test_folder_with_a_model_is_not_overwritten(name, tmp_path):
    check_export_dir(tmp_path / 'a/b')
    assert not names(tmp_path)
    (tmp_path / name).write_text('precious')
    with pytest.raises(ValueError, match=f'already holds {name}.*overwrite'):
        export(tmp_path, tiny())
    assert names(tmp_path) == [name]
    check_export_dir(tmp_path, overwrite=True)


def test_overwriting_replaces_the_model_and_leaves_other_files(tmp_path, unverified):
    (tmp_path / 'notes.txt').write_text('mine')
    export(tmp_path, create_dks_model('test_resnet', num_classes=3), keep_branches=True)
    export(tmp_path, tiny(in_chans=1), overwrite=True)
    assert names(tmp_path) == [*PLAIN, 'notes.txt']
    assert load(tmp_path).in_chans == 1


def test_network_with_branches_is_exported_as_its_backbone(tmp_path):
    net = create_dks_model('test_resnet', num_classes=3).train()
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        export(tmp_path / 'model', DistributedDataParallel(net))
    finally:
        dist.destroy_process_group()
    loaded = load(tmp_path / 'model')
    assert type(loaded) is type(net.backbone)
    assert torch.equal(logits(loaded), logits(net))
    text = (tmp_path / 'model/README.md').read_text()
    assert 'Deeply-supervised Knowledge Synergy' in text and net.describe() in text
    assert len(net.train()(torch.randn(2, 3, 64, 64))) == 3  # and it trains on


def exits(net):
    """Logits of all classifiers in float32."""
    channels = timm.models.get_model_input_config(net.backbone)['input_size'][0]
    x = torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return deepcopy(net).float().to(memory_format=torch.contiguous_format).eval().exits(x)


def assert_comes_back(folder, net):
    loaded = create_dks_model(f'local-dir:{folder}', pretrained=True)
    assert [(b.kind, b.stage) for b in loaded.branches] == [(b.kind, b.stage) for b in net.branches]
    for expected, found in zip(exits(net), exits(loaded), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize('name, kwargs, change', [
    ('test_resnet', dict(stages=(1, 3), branch_kwargs={'1.layers': (1, 1, 2, 1), 'act_layer': 'gelu'}),
     lambda net: torch.compile(convert_sync_batchnorm(net.to(memory_format=torch.channels_last)))),
    ('test_efficientnet', dict(budget=1.8, bn_eps=0.01), convert_splitbn_model),
    ('test_vit', dict(img_size=64), lambda net: net.to(torch.bfloat16)),
    ('test_convnext', dict(in_chans=1, branches='conv'), lambda net: net.requires_grad_(False)),
])
def test_branches_come_back_whatever_they_are_and_from_any_training_layout(name, kwargs, change, tmp_path, unverified):
    net = create_dks_model(name, num_classes=3, **kwargs)
    plain = deepcopy(net) if change is convert_splitbn_model else net
    export(tmp_path / 'net', change(net), keep_branches=True)
    assert not any('aux_bn' in key for key in load_file(tmp_path / 'net/branches.safetensors'))
    assert_comes_back(tmp_path / 'net', plain)


def test_folder_with_branches_is_the_same_for_timm_and_checked(tmp_path, monkeypatch):
    net = create_dks_model('test_resnet', num_classes=3)
    export(tmp_path / 'net', net, keep_branches=True)
    assert torch.equal(logits(load(tmp_path / 'net')), logits(net.backbone))
    save_branches, other = exporting.save_branches, create_dks_model('test_resnet')
    monkeypatch.setattr(exporting, 'save_branches', lambda _, folder: save_branches(other, folder))
    before = contents(tmp_path / 'net')
    with pytest.raises(RuntimeError, match='branches load with other logits'):
        export(tmp_path / 'net', net, keep_branches=True, overwrite=True)
    assert contents(tmp_path / 'net') == before


def test_published_branches_adapt_to_other_classes_and_give_way_to_what_is_asked_for(tmp_path, unverified):
    net = create_dks_model('test_resnet', num_classes=3)
    with torch.no_grad():
        for p in net.branches.parameters():
            p.add_(1.)
    export(tmp_path / 'net', net, keep_branches=True)
    name = f'local-dir:{tmp_path / "net"}'
    other = create_dks_model(name, pretrained=True, num_classes=5)
    fresh = {k for k, p in other.branches.named_parameters() if not torch.equal(p, net.branches.get_parameter(k))}
    assert len(fresh) == 4 and {other.branches.get_parameter(k).shape[0] for k in fresh} == {5}  # two classifiers
    assert create_dks_model(name, pretrained=True, stages=[3]).stages == (3,)
    assert {b.kind for b in create_dks_model(name, pretrained=True, branches='conv').branches} == {'conv'}


@pytest.mark.parametrize('arguments, message', [
    (dict(keep_branches=True), 'keep_branches needs a network with branches, not a ResNet'),
    (dict(label_names=['a'] * 4), 'label_names has 4 names; the model has 3 classes'),
])
def test_an_argument_that_does_not_fit_the_model_is_refused(arguments, message, tmp_path, unverified):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / 'net', tiny(), **arguments)
    assert not (tmp_path / 'net').exists()


@pytest.fixture
def run(tmp_path):
    """A function that makes the folder of a run with --dks and --model-ema, as train.py leaves it."""
    def make(name, top1=(50., 60.), **settings):
        settings = {
            'model': 'test_resnet', 'num_classes': 3, 'dataset': 'digits', 'epochs': 2, 'model_ema': True, **settings}
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'args.yaml').write_text(json.dumps(settings))  # JSON is YAML
        (folder / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n' + ''.join(
            f'{i},2.0,1.0,{value},99.0,0.1\n' for i, value in enumerate(top1)))
        args = argparse.Namespace(**{**vars(create_parser().parse_args([])), **settings}, label_names=['a', 'b', 'c'])
        if not args.dks:
            return folder
        net = create_model(args)
        average = deepcopy(net)
        for p in average.parameters():
            p.data += 0.01
        torch.save({
            'epoch': 1,
            'metric': top1[1],
            'args': args,
            'state_dict': net.backbone.state_dict(),
            'state_dict_ema': average.backbone.state_dict(),
            'task_state': {'stages': list(net.stages), 'branches': net.branches.state_dict()},
            'task_state_ema': {'stages': list(net.stages), 'branches': average.branches.state_dict()},
        }, folder / 'model_best.pth.tar')
        return folder, net, average
    return make


def test_checkpoint_is_exported_with_what_its_run_noted_and_its_branches(run, tmp_path, unverified, capsys):
    settings = dict(model='test_efficientnet', in_chans=1, img_size=48, mean=[0.5], bn_eps=0.01, lr=0.25)
    folder, net, average = run('run', dks=True, model_kwargs={'act_layer': 'relu'}, **settings)
    flags = ['--keep-branches', '--card-license', 'mit']
    assert main(['export', str(folder / 'model_best.pth.tar'), str(tmp_path / 'net'), *flags]) == 0
    assert f"timm.create_model('local-dir:{tmp_path}/net', pretrained=True)" in capsys.readouterr().out
    assert_comes_back(tmp_path / 'net', average)
    loaded = load(tmp_path / 'net')
    assert loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    data_config = timm.data.resolve_model_data_config(loaded)
    assert data_config['input_size'] == (1, 48, 48) and tuple(data_config['mean']) == (0.5,)
    card = ModelCard.load(tmp_path / 'net/README.md')
    assert [(r.metric_value, r.dataset_name) for r in card.data.eval_results] == [(60., 'digits'), (99., 'digits')]
    assert card.data.license == 'mit'
    for fact in ('| lr | 0.25 |', '| model | test_efficientnet |', 'branch 1', 'weights (from 0) | 1 |'):
        assert fact in card.text
    assert (tmp_path / 'net/curves.svg').read_text().startswith('<svg')


def onnx_session(folder):
    onnxruntime = pytest.importorskip('onnxruntime', reason='pip install -e ".[test]"')
    return onnxruntime.InferenceSession(folder / 'model.onnx')


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_onnx_has_the_logits_of_the_backbone_for_a_batch_of_any_size(run, tmp_path, unverified, name):
    folder, _, _ = run('run', dks=True, model=name)
    command = ['export', str(folder / 'model_best.pth.tar'), str(tmp_path / 'net')]
    assert main([*command, '--onnx']) == 0
    session, model = onnx_session(tmp_path / 'net'), load(tmp_path / 'net')
    for count in (1, 5):
        x = torch.randn(count, *model.pretrained_cfg['input_size'])
        found, = session.run(['logits'], {'images': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits_of(model, x), rtol=1e-3, atol=1e-4)
    assert 'model.onnx' in (tmp_path / 'net/README.md').read_text()
    assert main([*command, '--overwrite']) == 0
    assert not (tmp_path / 'net/model.onnx').exists()
    assert 'model.onnx' not in (tmp_path / 'net/README.md').read_text()


def test_onnx_of_a_large_model_keeps_its_weights_in_a_second_file(tmp_path, unverified, monkeypatch):
    monkeypatch.setattr('torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD', 0)
    model = tiny().to(torch.bfloat16)
    random_state = torch.get_rng_state()
    export(tmp_path / 'net', model, onnx=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    found, = onnx_session(tmp_path / 'net').run(None, {'images': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits_of(load(tmp_path / 'net'), x), rtol=1e-3, atol=1e-4)
    assert (tmp_path / 'net/model.onnx.data').stat().st_size > (tmp_path / 'net/model.onnx').stat().st_size


@pytest.mark.parametrize('broken, message', [
    (('torch.onnx.export', lambda *args, **kwargs: exec('raise RuntimeError("no such operation")')),
     'torch has no ONNX of it: no such operation'),
    (('onnxruntime.InferenceSession.run', lambda *args: [torch.ones(1).numpy()]), 'model.onnx has other logits'),
])
def test_onnx_that_is_not_the_model_is_not_kept(broken, message, tmp_path, unverified, monkeypatch):
    pytest.importorskip('onnxruntime', reason='pip install -e ".[test]"')
    monkeypatch.setattr(*broken)
    with pytest.raises(RuntimeError, match=message):
        export(tmp_path / 'net', tiny(), onnx=True)
    assert not (tmp_path / 'net').exists()


def test_onnx_without_its_packages_is_refused_before_the_checkpoint_is_read(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else find_spec(name))
    assert main(['export', 'nowhere.pth.tar', str(tmp_path / 'net'), '--onnx']) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and '--onnx needs onnxscript' in said and "pip install 'dks-timm[onnx]'" in said


def test_checkpoint_is_exported_and_pushed_in_one_go(run, tmp_path, unverified, monkeypatch, capfd):
    folder, _, _ = run('run', dks=True)
    command = ['export', str(folder / 'model_best.pth.tar'), str(tmp_path / 'net'), '--push-to-hub', 'alice/net']
    with HubServer() as server:
        use(server, monkeypatch, tmp_path / 'home')
        server.fail('*', 500)
        assert main([*command, '--hub-timeout', '9']) == 3
        hint, error = capfd.readouterr().err.splitlines()[-2:]
        assert hint.endswith(f'To push it: dks-timm push {tmp_path}/net alice/net') and 'the Hub' in error
        server.recover()
        assert main([*command, '--overwrite']) == 0
        url = capfd.readouterr().out.splitlines()[-1]
        assert url == f'{server.url}/alice/net/commit/{server.commits("alice/net")[0].id}'


def test_results_are_shown_for_the_weights_they_were_measured_on_only(run, tmp_path, unverified):
    folder, net, _ = run('run', dks=True)
    path = folder / 'model_best.pth.tar'
    export_checkpoint(path, tmp_path / 'net', use_ema=False)  # the average was evaluated
    assert torch.equal(logits(load(tmp_path / 'net')), logits(net.backbone))
    assert 'No evaluation was recorded' in (tmp_path / 'net/README.md').read_text()
    summary = folder / 'summary.csv'
    summary.write_text(summary.read_text().replace('60.0', '61.0'))  # of another run
    export_checkpoint(path, tmp_path / 'other')
    assert 'No evaluation was recorded' in (tmp_path / 'other/README.md').read_text()


def test_card_shows_the_baseline_beside_the_run(run, tmp_path, unverified):
    folder, _, _ = run('run', dks=True, lr=0.1)
    without = run('without', top1=(58.5, 57.), dks=False, lr=0.2)
    export_checkpoint(folder / 'model_best.pth.tar', tmp_path / 'net', baseline_dir=without)
    text = (tmp_path / 'net/README.md').read_text()
    assert '| this model, with DKS | 60.0 | 99.0 |\n| baseline, without DKS | 58.5 | 99.0 |\n' in text
    assert 'these settings differ: lr: 0.1, in the baseline 0.2.' in text


@pytest.mark.parametrize('settings, message', [
    (dict(dataset='torch/cifar10'), "has data 'torch/cifar10', this run 'digits'"),
    (dict(top1=()), 'is no run with an ev'),
])
def test_baseline_that_cannot_be_compared_is_refused(run, tmp_path, settings, message, capsys):
    folder, _, _ = run('run', dks=True)
    other = run('other', **settings, dks=False)
    command = ['export', str(folder / 'model_best.pth.tar'), str(tmp_path / 'net')]
    assert main([*command, '--card-baseline', str(other)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'net').exists()
