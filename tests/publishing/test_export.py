import argparse
import json
import re
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

from dks_timm import DKSModel, create_dks_model
from dks_timm.cli import main
from dks_timm.publishing import export as exporting
from dks_timm.publishing import push, verify
from dks_timm.publishing.card import eval_results
from dks_timm.publishing.export import check_export_dir, export, export_checkpoint
from dks_timm.training.build import create_model
from dks_timm.training.config import create_parser

DATA_CONFIG = dict(
    input_size=(3, 48, 48),
    interpolation='bilinear',
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    crop_pct=0.9,
    crop_mode='center',
)
CARD = dict(
    dks=True,
    license='apache-2.0',
    datasets=['digits'],
    branches='a table of branches',
    command='accelerate launch train.py --dks',
    training={'epochs': 3, 'seed': 42},
)


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
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return deepcopy(model).float().eval()(x)


@pytest.fixture
def unverified(monkeypatch):
    """For what has nothing to do with the check in a fresh process: leave it out, it takes seconds."""
    monkeypatch.setattr(exporting, 'verify', lambda *args: None)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = tiny(), tmp_path_factory.mktemp('exported') / 'my-model'
    results = eval_results({'top1': 91.234567, 'top5': 99.5, 'loss': 0.3}, 'digits')
    export(
        folder, model, card=CARD, data_config=DATA_CONFIG, label_names=['zero', 'one', 'zwölf'], results=results)
    return model, folder, results


def test_exported_folder_holds_config_weights_and_card(exported):
    assert sorted(p.name for p in exported[1].iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    modes = {p.stat().st_mode for p in exported[1].iterdir()}
    assert len(modes) == 1  # the weights are as readable as the rest


def test_fresh_process_without_dks_timm_gives_the_same_logits(exported, tmp_path):
    model, folder, _ = exported
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
    for key, value in DATA_CONFIG.items():
        wanted = list(value) if isinstance(value, tuple) else value
        assert config['pretrained_cfg'][key] == wanted, key
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


def test_card_metadata_round_trips(exported):
    data = ModelCard.load(exported[1] / 'README.md').data
    assert data.eval_results == exported[2]
    assert [r.metric_value for r in data.eval_results] == [91.234567, 99.5]
    assert (data.model_name, data.license, data.library_name) == ('test_resnet on digits', 'apache-2.0', 'timm')
    assert data.datasets == ['digits']
    assert data.tags == ['timm', 'dks']


def test_dataset_in_a_folder_goes_by_the_name_of_the_folder(tmp_path):
    (tmp_path / 'flowers').mkdir()
    result, = eval_results({'top1': 50.0}, f'{tmp_path}/flowers/', split='test')
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == ('flowers', 'flowers', 'test')


def test_card_says_what_it_was_given(exported):
    text = ModelCard.load(exported[1] / 'README.md').text
    for fact in ('a table of branches', 'accelerate launch train.py --dks', '| seed | 42 |', '| 91.23 |', '48 x 48'):
        assert fact in text


def test_card_claims_nothing_it_was_not_given(tmp_path, unverified):
    export(tmp_path / 'model', tiny())
    card = ModelCard.load(tmp_path / 'model/README.md')
    assert card.data.to_dict() == {
        'library_name': 'timm', 'pipeline_tag': 'image-classification', 'tags': ['timm']}
    for claim in ('Synergy', 'Training', 'Cite', '| dataset |', 'None', '{{', '{%'):
        assert claim not in card.text


def run_card(folder, monkeypatch):
    """Run the Python blocks of a folder's card one after another, and return their variables."""
    monkeypatch.chdir(folder.parent)
    Image.new('RGB', (60, 50), 'red').save('image.png')
    names = {}
    for block in blocks(folder / 'README.md'):
        if block.language == 'python':
            exec(block.text, names)
    return names


def test_code_in_the_card_runs(exported, monkeypatch):
    names = run_card(exported[1], monkeypatch)
    assert names['probabilities'].shape == (1, 3)
    torch.testing.assert_close(names['probabilities'].sum().item(), 1.0)
    assert {answer['label'] for answer in names['answers']} == {'zero', 'one', 'zwölf'}


def test_code_in_the_card_of_a_model_with_branches_runs(tmp_path, monkeypatch, unverified):
    export(tmp_path / 'net', create_dks_model('test_resnet', num_classes=3), keep_branches=True)
    names = run_card(tmp_path / 'net', monkeypatch)
    assert [z.shape for z in names['logits']] == [(1, 3)] * 3 and names['answer'].shape == (1, 3)
    torch.testing.assert_close(names['logits'][0].softmax(-1), names['probabilities'])


def test_card_knows_its_repository(tmp_path, unverified):
    export(tmp_path / 'model', tiny(), card={'repo_id': 'someone/something'})
    text = (tmp_path / 'model/README.md').read_text()
    assert "timm.create_model('hf-hub:someone/something', pretrained=True)" in text


@pytest.mark.parametrize('chosen', [None, 'my choice'])
def test_a_model_is_named_after_architecture_and_data_and_once_pushed_after_its_repository(chosen, exported, tmp_path):
    card = {**CARD, 'model_name': chosen} if chosen else CARD
    export(tmp_path / 'x', exported[0], card=card, results=exported[2], data_config=DATA_CONFIG)
    written = ModelCard.load(tmp_path / 'x/README.md')
    pushed = ModelCard(push._pushed_card(written, 'test_resnet on digits', 'someone/something', 'v1'))
    for found, name in ((ModelCard.load(tmp_path / 'x/README.md'), 'test_resnet on digits'), (pushed, 'something')):
        assert found.data.model_name == (chosen or name)
        assert f'# {chosen or name}\n' in found.text
    assert "pipeline('image-classification', model='someone/something', revision='v1')" in pushed.text
    assert pushed.data.eval_results == exported[2]


@pytest.mark.parametrize('name, kwargs, dtype', [
    ('test_resnet', dict(in_chans=1, global_pool='max'), torch.float32),
    ('test_vit', dict(img_size=48, global_pool='avg'), torch.bfloat16),
    ('resnet20_cifar', dict(), torch.float32),
])
def test_transformers_loads_every_export_with_the_same_logits(name, kwargs, dtype, tmp_path, caplog):
    model = tiny(name, **kwargs).to(dtype)
    net = DKSModel.from_timm(model)
    with caplog.at_level('WARNING'):
        export(tmp_path / 'net', net, label_names=['zero', 'one', 'two'], keep_branches=True)
    assert 'transformers' not in caplog.text
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'net', dtype=torch.float32)
    timms = load(tmp_path / 'net')
    x = torch.randn(2, *timms.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x).logits, timms(x))
    assert loaded.config.id2label == {0: 'zero', 1: 'one', 2: 'two'}


@pytest.mark.parametrize('code, fault, message', [
    ('from_pretrained(args.model_dir', 'from_pretrained("nowhere"', 'transformers cannot load it: OSError'),
    ('eval()(x)', "eval()(x if name == 'timm' else 2 * x)", 'transformers loads it with other logits'),
])
def test_what_transformers_does_not_load_is_exported_with_a_warning(
        code, fault, message, tmp_path, monkeypatch, caplog):
    text = verify._LOAD_BACK.read_text()
    assert code in text
    (tmp_path / 'load_back.py').write_text(text.replace(code, fault))
    monkeypatch.setattr(verify, '_LOAD_BACK', tmp_path / 'load_back.py')
    export(tmp_path / 'net', tiny())
    assert message in caplog.text and (tmp_path / 'net/model.safetensors').exists()


def test_wrapped_model_is_exported_whole(tmp_path):
    model = tiny()
    export(tmp_path / 'model', torch.compile(convert_sync_batchnorm(deepcopy(model))))
    assert torch.equal(logits(load(tmp_path / 'model')), logits(model))
    assert load_file(tmp_path / 'model/model.safetensors').keys() == model.state_dict().keys()


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
    assert model.state_dict().keys() == state.keys()
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
    before = {p.name: p.read_bytes() for p in exported[1].iterdir()}
    with pytest.raises(RuntimeError, match='largest difference 0.1'):
        export(exported[1], changed, overwrite=True)
    assert {p.name: p.read_bytes() for p in exported[1].iterdir()} == before
    with pytest.raises(RuntimeError, match='largest difference 0.1'):
        export(tmp_path / 'new', changed)
    assert not (tmp_path / 'new').exists()


def test_model_args_describe_a_model_that_the_factory_did_not_make(tmp_path):
    model = timm.models.model_entrypoint('test_resnet')(num_classes=3, layers=(2, 1, 1, 1))
    with pytest.raises(RuntimeError, match='cannot load it: .*state_dict'):
        export(tmp_path / 'model', model)
    export(tmp_path / 'model', model, model_args={'layers': (2, 1, 1, 1)})
    assert torch.equal(logits(load(tmp_path / 'model')), logits(model))


def test_architecture_that_timm_does_not_know_says_what_to_import(tmp_path):
    import dks_timm.models  # noqa: F401
    export(tmp_path / 'net', timm.create_model('resnet20_cifar', num_classes=3))
    text = (tmp_path / 'net/README.md').read_text()
    assert 'import dks_timm.models' in text and 'Only timm is needed' not in text


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'README.md', 'pytorch_model.bin'])
def test_folder_with_a_model_is_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text('precious')
    with pytest.raises(ValueError, match=f'already holds {name}.*overwrite'):
        check_export_dir(tmp_path)
    with pytest.raises(ValueError, match=f'already holds {name}.*overwrite'):
        export(tmp_path, tiny())
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert check_export_dir(tmp_path, overwrite=True) == tmp_path


def test_overwriting_replaces_the_model_and_leaves_other_files(tmp_path, unverified):
    first, second = tiny(), tiny('test_resnet', in_chans=1)
    (tmp_path / 'notes.txt').write_text('mine')
    export(tmp_path, first)
    export(tmp_path, second, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'config.json', 'model.safetensors', 'notes.txt']
    assert load(tmp_path).state_dict().keys() == second.state_dict().keys()
    assert load(tmp_path).in_chans == 1


def test_checking_a_folder_writes_nothing(tmp_path):
    assert check_export_dir(tmp_path / 'a/b') == tmp_path / 'a/b'
    assert not list(tmp_path.iterdir())


def test_preprocessing_follows_the_channels_of_the_model(tmp_path, unverified):
    export(tmp_path / 'model', tiny(in_chans=1), data_config=DATA_CONFIG)
    data_config = timm.data.resolve_model_data_config(load(tmp_path / 'model'))
    assert data_config['input_size'] == (1, 48, 48)
    assert data_config['mean'] == pytest.approx([0.2])
    assert data_config['std'] == pytest.approx([0.5])


@pytest.mark.parametrize('arguments, message', [
    (dict(label_names=['a'] * 4), 'label_names has 4 names; the model has 3 classes'),
    (dict(card={'licence': 'mit'}), 'card has licence; it takes .*license'),
])
def test_argument_that_does_not_fit_is_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / 'model', tiny(), **arguments)
    assert not list(tmp_path.iterdir())


def test_network_with_branches_is_exported_as_its_backbone(tmp_path):
    net = create_dks_model('test_resnet', num_classes=3).train()
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net)
        export(tmp_path / 'model', wrapped)
    finally:
        dist.destroy_process_group()
    loaded = load(tmp_path / 'model')
    assert type(loaded) is type(net.backbone)
    assert torch.equal(logits(loaded), logits(net))

    text = (tmp_path / 'model/README.md').read_text()
    assert 'Deeply-supervised Knowledge Synergy' in text
    assert net.describe() in text
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


@pytest.mark.parametrize('name, kwargs', [
    ('test_resnet', dict(branches='conv')),
    ('test_resnet', dict(stages=(1, 3), branch_kwargs={'1.layers': (1, 1, 2, 1), 'act_layer': 'gelu'})),
    ('test_efficientnet', dict(budget=1.8, bn_eps=0.01)),
    ('test_vit', dict(img_size=64)),
    ('test_convnext', dict(in_chans=1)),
])
def test_branches_come_back_whatever_they_are(name, kwargs, tmp_path, unverified):
    net = create_dks_model(name, num_classes=3, **kwargs)
    export(tmp_path / 'net', net, keep_branches=True)
    assert_comes_back(tmp_path / 'net', net)
    assert load_file(tmp_path / 'net/model.safetensors').keys() == net.backbone.state_dict().keys()


@pytest.mark.parametrize('change', [
    lambda net: net.to(memory_format=torch.channels_last),
    lambda net: net.to(torch.bfloat16),
    lambda net: torch.compile(net),
    lambda net: convert_sync_batchnorm(net),
    lambda net: net.requires_grad_(False),
], ids=['channels_last', 'bfloat16', 'compiled', 'sync-bn', 'frozen'])
def test_branches_come_back_from_any_training_layout(change, tmp_path, unverified):
    net = create_dks_model('test_resnet', num_classes=3)
    export(tmp_path / 'net', change(net), keep_branches=True)
    assert_comes_back(tmp_path / 'net', net)


def test_branches_of_a_split_bn_model_come_back_without_auxiliary_statistics(tmp_path, unverified):
    plain = create_dks_model('test_resnet', num_classes=3)
    export(tmp_path / 'net', convert_splitbn_model(deepcopy(plain)), keep_branches=True)
    assert not any('aux_bn' in name for name in load_file(tmp_path / 'net/branches.safetensors'))
    assert_comes_back(tmp_path / 'net', plain)


def test_folder_with_branches_is_the_same_for_timm_and_checked(tmp_path, monkeypatch):
    net = create_dks_model('test_resnet', num_classes=3)
    export(tmp_path / 'net', net, keep_branches=True)
    assert torch.equal(logits(load(tmp_path / 'net')), logits(net.backbone))
    assert "create_dks_model('local-dir:net', pretrained=True)" in (tmp_path / 'net/README.md').read_text()

    save_branches = exporting.save_branches
    other = create_dks_model('test_resnet')
    monkeypatch.setattr(exporting, 'save_branches', lambda _, folder: save_branches(other, folder))
    before = {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()}
    with pytest.raises(RuntimeError, match='branches load with other logits'):
        export(tmp_path / 'net', net, keep_branches=True, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()} == before


def test_export_without_branches_leaves_none_of_an_earlier_one(tmp_path, unverified):
    net = create_dks_model('test_resnet', num_classes=3)
    export(tmp_path, net, keep_branches=True)
    export(tmp_path, net, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'config.json', 'model.safetensors']


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
    unloaded = create_dks_model(name)
    assert not torch.equal(unloaded.branches[0].get_classifier().weight, net.branches[0].get_classifier().weight)


@pytest.mark.parametrize('change, message', [
    (dict(branch_kwargs={'checkpoint_path': '/etc/passwd'}), 'not accepted.*checkpoint_path'),
    (dict(branch_kwargs={'2.pretrained_cfg_overlay': {'url': 'http://x'}}), 'not accepted.*pretrained_cfg_overlay'),
    (dict(stages=[1, 3]), 'holds other branches'),
    (dict(stages=None, branch_kwargs=3), 'is not one of a published network'),
])
def test_layout_that_was_tampered_with_is_refused(change, message, tmp_path, unverified):
    export(tmp_path / 'net', create_dks_model('test_resnet', num_classes=3), keep_branches=True)
    path = tmp_path / 'net/dks_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        create_dks_model(f'local-dir:{tmp_path / "net"}', pretrained=True)


@pytest.mark.parametrize('net, message', [
    (lambda: tiny(), 'keep_branches needs a network with branches, not a ResNet'),
    (lambda: DKSModel(*(lambda n: (n.backbone, n.branches))(create_dks_model('test_resnet', num_classes=3))),
     'keep_branches needs a network made by'),
    (lambda: create_dks_model('test_resnet', branch_kwargs={'act_layer': nn.ReLU}),
     'keep_branches cannot write branch_kwargs'),
])
def test_branches_that_could_not_come_back_are_refused(net, message, tmp_path, unverified):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / 'net', net(), keep_branches=True)
    assert not (tmp_path / 'net').exists()


@pytest.fixture
def run(tmp_path):
    """A function that makes the folder of a run with --dks and --model-ema, as train.py leaves it."""
    def make(name, top1=(50., 60.), **settings):
        settings = {'model': 'test_resnet', 'num_classes': 3, 'dataset': 'digits', 'epochs': 2, **settings}
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'args.yaml').write_text(json.dumps(settings))  # JSON is YAML
        (folder / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n' + ''.join(
            f'{i},2.0,1.0,{value},99.0,0.1\n' for i, value in enumerate(top1)))
        args = argparse.Namespace(**{**vars(create_parser().parse_args([])), **settings}, label_names=['a', 'b', 'c'])
        net = create_model(args)
        if args.dks:
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
        return folder
    return make


def test_checkpoint_is_exported_with_label_names_results_and_branches(run, tmp_path, unverified):
    folder, net, average = run('run', dks=True, model_ema=True)
    flags = ['--keep-branches', '--card-license', 'mit']
    assert main(['export', str(folder / 'model_best.pth.tar'), str(tmp_path / 'net'), *flags]) == 0
    assert_comes_back(tmp_path / 'net', average)
    assert load(tmp_path / 'net').pretrained_cfg['label_names'] == ['a', 'b', 'c']
    data = ModelCard.load(tmp_path / 'net/README.md').data
    assert [(r.metric_value, r.dataset_name) for r in data.eval_results] == [(60., 'digits'), (99., 'digits')]
    assert data.license == 'mit'
    assert (tmp_path / 'net/curves.svg').read_text().startswith('<svg')


def test_checkpoint_is_exported_and_pushed_in_one_go(run, tmp_path, unverified, monkeypatch, capfd):
    folder, _, _ = run('run', dks=True, model_ema=True)
    command = ['export', str(folder / 'model_best.pth.tar'), str(tmp_path / 'net'), '--push-to-hub', 'alice/net']
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setenv('HF_TOKEN_PATH', str(tmp_path / 'none'))
    monkeypatch.setattr('huggingface_hub.constants.HF_TOKEN_PATH', str(tmp_path / 'none'))
    assert main(command) == 2 and not (tmp_path / 'net').exists()  # nobody is logged in
    with HubServer() as server:
        use(server, monkeypatch, tmp_path / 'home')
        server.fail('*', 500)
        assert main([*command, '--hub-timeout', '3']) == 3
        hint, error = capfd.readouterr().err.splitlines()[-2:]
        assert hint.endswith(f'To push it: dks-timm push {tmp_path}/net alice/net') and 'answers 500' in error
        server.recover()
        assert main([*command, '--overwrite']) == 0
        url = capfd.readouterr().out.splitlines()[-1]
        assert url == f'{server.url}/alice/net/commit/{server.commits("alice/net")[0].id}'
        assert "'hf-hub:alice/net'" in (tmp_path / 'net/README.md').read_text()


def test_results_are_shown_for_the_weights_they_were_measured_on_only(run, tmp_path, unverified):
    folder, net, _ = run('run', dks=True, model_ema=True)
    path = folder / 'model_best.pth.tar'
    export_checkpoint(path, tmp_path / 'net', use_ema=False)  # the average was evaluated
    assert torch.equal(logits(load(tmp_path / 'net')), logits(net.backbone))
    assert 'No evaluation was recorded' in (tmp_path / 'net/README.md').read_text()
    summary = folder / 'summary.csv'
    summary.write_text(summary.read_text().replace('60.0', '61.0'))  # of another run
    export_checkpoint(path, tmp_path / 'other')
    assert 'No evaluation was recorded' in (tmp_path / 'other/README.md').read_text()


def test_card_shows_the_baseline_beside_the_run(run, tmp_path, unverified):
    folder, _, _ = run('run', dks=True, model_ema=True, lr=0.1)
    without = run('without', top1=(58.5, 57.), dks=False, model_ema=True, lr=0.2)
    export_checkpoint(folder / 'model_best.pth.tar', tmp_path / 'net', baseline_dir=without)
    text = (tmp_path / 'net/README.md').read_text()
    assert '| this model, with DKS | 60.0 | 99.0 |\n| baseline, without DKS | 58.5 | 99.0 |\n' in text
    assert 'these settings differ: lr: 0.1, in the baseline 0.2.' in text


@pytest.mark.parametrize('settings, message', [
    (dict(model='test_convnext'), "has model 'test_convnext', this run 'test_resnet'"),
    (dict(dataset='torch/cifar10'), "has data 'torch/cifar10', this run 'digits'"),
    (dict(top1=()), 'has no evaluated epoch'),
    (None, 'no such folder; give the folder of a run'),
])
def test_baseline_that_cannot_be_compared_is_refused(run, tmp_path, settings, message, capsys):
    folder, _, _ = run('run', dks=True, model_ema=True)
    other = run('other', **settings, dks=False) if settings is not None else tmp_path / 'none'
    command = ['export', str(folder / 'model_best.pth.tar'), str(tmp_path / 'net')]
    assert main([*command, '--card-baseline', str(other)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize('complete', [False, True])
def test_card_renders_as_html(run, tmp_path, unverified, complete):
    markdown_it = pytest.importorskip('markdown_it')
    folder, net, _ = run('run', dks=True, model_ema=True)
    if complete:
        without = run('without', dks=False, model_ema=True)
        export_checkpoint(
            folder / 'model_best.pth.tar', tmp_path / 'net', keep_branches=True, license='mit', baseline_dir=without)
    else:
        export(tmp_path / 'net', net.backbone)
    html = markdown_it.MarkdownIt('commonmark').enable('table').render(ModelCard.load(tmp_path / 'net/README.md').text)
    assert html.count('<table>') == (3 if complete else 0)
    assert html.count('<img') == (1 if complete else 0)
    assert html.count('<h1>') == 1 and html.count('<pre>') == html.count('</pre>') == (6 if complete else 3)
    titles = ['Use', 'Evaluation', *(['Training'] if complete else []), 'Fine-tune', *(['Cite'] if complete else [])]
    assert re.findall('<h2>(.*?)</h2>', html) == titles
    assert not any(mark in html for mark in ('{{', '{%', '```', '|--', 'None', 'Undefined'))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as timm's saver writes it, its model made with other than default arguments."""
    args = create_parser().parse_args([
        '--model', 'test_efficientnet', '--num-classes', '3', '--img-size', '48', '--mean', '0.5', '--bn-eps', '0.01',
        '--model-kwargs', 'act_layer=relu', '--lr', '0.25', '--dks',
    ])
    args.rank = 0  # train.py notes such things in passing
    model, average = (tiny('test_efficientnet', bn_eps=0.01, act_layer='relu') for _ in range(2))
    path = tmp_path / 'model_best.pth.tar'
    torch.save({
        'epoch': 7,
        'arch': args.model,
        'args': args,
        'state_dict': convert_splitbn_model(deepcopy(model)).state_dict(),
        'state_dict_ema': average.state_dict(),
        'task_state': {'branches': {'0.weight': torch.zeros(1)}},
    }, path)
    return path, model, average


def test_checkpoint_is_exported_with_the_arguments_of_its_run(checkpoint, tmp_path, capsys):
    path, model, average = checkpoint
    assert main(['export', str(path), str(tmp_path / 'model')]) == 0
    assert f"timm.create_model('local-dir:{tmp_path}/model', pretrained=True)" in capsys.readouterr().out
    loaded = load(tmp_path / 'model')
    assert torch.equal(logits(loaded), logits(average))
    assert not torch.equal(logits(loaded), logits(model))
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == (3, 48, 48)
    text = (tmp_path / 'model/README.md').read_text()
    for fact in ('| lr | 0.25 |', '| model | test_efficientnet |', 'Synergy', 'branch 1', 'weights (from 0) | 7 |'):
        assert fact in text
    assert 'rank' not in text and 'someone' not in text


@pytest.mark.parametrize('content, message', [
    (b'no checkpoint', 'cannot be read'),
    ({'state_dict': {}}, 'does not say how its model was made'),
])
def test_file_that_is_no_checkpoint_of_a_run_is_refused(content, message, tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f'checkpoint .*{message}'):
        export_checkpoint(path, tmp_path / 'model')
    assert not (tmp_path / 'model').exists()
