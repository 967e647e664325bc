"""Pushing to the Hub, loading and fine-tuning from it: the real client, over real HTTP, to the Hub of hub_server.py."""
import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.hub_server import HubServer, use
from helpers.train import image_folder, rows, two_processes
from helpers.train import main as train
from huggingface_hub import ModelCard

import dks_timm
from dks_timm.cli import main as dks_timm_main
from dks_timm.publishing import publish, push
from dks_timm.publishing.card import eval_results
from dks_timm.publishing.push import PushError, check_repository, push_folder
from dks_timm.training.config import parse_args

CONFIG = dict(architecture='test_resnet', num_classes=3, label_names=['a', 'b', 'c'])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as hub:
        use(hub, monkeypatch, tmp_path / 'home')
        yield hub


@pytest.fixture
def folder(tmp_path):
    """Make the files of an export, among others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dks_timm.publishing.export.verify', lambda *args: None)  # has its own tests
        dks_timm.export(
            tmp_path / 'net', timm.create_model('test_resnet', num_classes=3), label_names=CONFIG['label_names'],
            results=eval_results({'top1': 91.234567}, 'digits'),
            card={'command': 'train.py --model local-dir:another --pretrained'})
    (tmp_path / 'net/.env').write_text('SECRET=1')
    return tmp_path / 'net'


def test_a_push_is_one_commit_of_the_exports_files_to_a_private_repository(hub, folder):
    url = push_folder(folder, 'alice/net')
    commit, initial = hub.commits('alice/net')
    assert url == f'{hub.url}/alice/net/commit/{commit.id}'
    assert hub.repos['alice/net'].private
    assert commit.title == (
        'test_resnet with 3 classes: Top-1 accuracy of the backbone (%) 91.23 on digits (validation)')
    files = hub.files('alice/net')
    assert sorted(files) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    for name in ('config.json', 'model.safetensors'):
        assert files[name] == (folder / name).read_bytes()
    (upload,) = hub.requests_to('lfs-upload')  # to a storage that never sees the token
    assert upload.token is None and {r.token for r in hub.requests if r is not upload} == {hub.token}
    assert not hub.requests_to(None)  # nothing was asked that the test Hub does not know


def test_onnx_goes_along_and_does_not_stay_beside_new_weights(hub, folder):
    (folder / 'model.onnx').write_bytes(b'graph')
    push_folder(folder, 'alice/net')
    assert hub.files('alice/net')['model.onnx'] == b'graph'
    (folder / 'model.onnx').unlink()
    push_folder(folder, 'alice/net')
    assert 'model.onnx' not in hub.files('alice/net')


def test_the_card_on_the_hub_says_how_to_load_from_there(hub, folder):
    push_folder(folder, 'alice/net', private=False)
    assert not hub.repos['alice/net'].private
    card = hub.files('alice/net')['README.md'].decode()
    assert "timm.create_model('hf-hub:alice/net', pretrained=True)" in card and 'local-dir:net' not in card
    assert 'train.py --model hf-hub:alice/net --pretrained --num-classes 37' in card
    assert 'train.py --model local-dir:another --pretrained\n' in card  # the command it was trained by
    push_folder(folder, 'alice/net', revision='v2')
    card = hub.files('alice/net', 'v2')['README.md'].decode()
    assert 'hf-hub:alice/net@v2' in card
    assert "pipeline('image-classification', model='alice/net', revision='v2')" in card


def test_pushing_unchanged_files_again_changes_nothing(hub, folder):
    url = push_folder(folder, 'alice/net')
    hub.requests.clear()
    assert push_folder(folder, 'alice/net') == url
    assert not hub.requests_to('commit', 'lfs-upload')
    (folder / 'model.safetensors').write_bytes(b'other')
    assert push_folder(folder, 'alice/net') != url
    assert len(hub.commits('alice/net')) == 3


def test_branches_and_tags_leave_what_was_there(hub, folder):
    push_folder(folder, 'alice/net', revision='tag:v1')
    first = hub.files('alice/net')
    assert hub.files('alice/net', 'v1') == first
    push_folder(folder, 'alice/net', revision='tag:v1')
    assert len(hub.commits('alice/net')) == 2
    (folder / 'model.safetensors').write_bytes(b'other')
    push_folder(folder, 'alice/net', revision='wide')
    assert hub.files('alice/net') == first
    assert hub.files('alice/net', 'wide')['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    push_folder(folder, 'alice/net')
    with pytest.raises(ValueError, match="repo_id 'alice/net': it has a tag v1 already"):
        push_folder(folder, 'alice/net', revision='tag:v1')
    assert hub.files('alice/net', 'v1') == first


def test_branches_of_an_earlier_export_do_not_stay_beside_new_weights(hub, folder):
    (folder / 'dks_config.json').write_bytes(b'{}')
    push_folder(folder, 'alice/net')
    assert 'dks_config.json' in hub.files('alice/net')
    (folder / 'dks_config.json').unlink()
    push_folder(folder, 'alice/net')
    assert sorted(hub.files('alice/net')) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']


@pytest.mark.parametrize('config, message', [
    ({**CONFIG, 'architecture': 'resnet18', 'num_classes': 4}, 'other architecture, num_classes'),
    ({**CONFIG, 'label_names': ['x', 'y', 'z']}, 'other label_names'),
])
def test_another_model_is_replaced_only_if_asked(hub, folder, config, message, capsys):
    hub.create('alice/net', {'config.json': json.dumps(config).encode()}, private=True)
    command = ['push', str(folder), 'alice/net']
    assert dks_timm_main(command) == 2
    err = capsys.readouterr().err
    assert f"'alice/net': it holds another model ({message}); choose another name, or --overwrite" in err
    assert err.count('\n') == 1
    assert not hub.requests_to('commit')
    assert dks_timm_main([*command, '--overwrite']) == 0
    assert hub.files('alice/net')['config.json'] == (folder / 'config.json').read_bytes()


@pytest.mark.parametrize('repo_id, token, message', [
    ('alice/new', None, 'needs a login: run `hf auth login`, or set HF_TOKEN'),
    ('alice/new', 'hf_wrong', 'Invalid credentials'),
    ('bob/new', True, 'rights to write under the namespace "bob"'),
    ('alice/net', 'hf_aliceReadToken2', 'you must use a write token'),
    ('net', True, 'give owner/name'),
    ('alice/a..b', True, 'give owner/name'),
])
def test_a_push_that_cannot_work_is_refused_in_one_line(hub, folder, monkeypatch, repo_id, token, message, capsys):
    hub.add_user('bob')
    hub.add_user('alice', role='read')
    hub.create('alice/net')
    if token is None:
        monkeypatch.delenv('HF_TOKEN')
    elif token is not True:
        monkeypatch.setenv('HF_TOKEN', token)
    assert dks_timm_main(['push', str(folder), repo_id]) == 2
    err = capsys.readouterr().err
    assert repr(repo_id) in err and message in err and err.count('\n') == 1
    assert list(hub.repos) == ['alice/net'] and len(hub.commits('alice/net')) == 1


def test_a_push_that_stalls_is_ended_in_time_and_can_be_repeated(hub, folder):
    hub.slow('lfs-upload', 3600)
    with pytest.raises(PushError, match='the Hub took longer than 4 s'):
        push_folder(folder, 'alice/net', timeout=4)
    hub.recover()
    push_folder(folder, 'alice/net')
    assert len(hub.commits('alice/net')) == 2


def test_a_hub_out_of_reach_is_known_within_ten_seconds(hub, monkeypatch):
    assert push.CHECK_SECONDS < 10
    for fault, seconds, message in (
            (lambda: hub.slow('refs', 60), 3, 'the Hub took longer than 3 s'),
            (hub.stop, 30, 'ConnectError'),  # far above what it takes here; a busy machine may need more than ten
    ):
        hub.recover()
        fault()
        monkeypatch.setattr(push, 'CHECK_SECONDS', seconds)
        with pytest.raises(PushError, match=message):
            check_repository('alice/net', CONFIG)


def test_what_the_hub_says_is_repeated_without_the_token(hub, folder, capfd):
    hub.fail('commit', 400, f'bad token {hub.token}')
    assert dks_timm_main(['push', str(folder), 'alice/net']) == 3
    out, err = capfd.readouterr()
    assert 'bad token ***' in err and hub.token not in out + err


def test_a_published_model_comes_back_with_its_branches(hub, monkeypatch):
    monkeypatch.setattr('dks_timm.publishing.export.verify', lambda *args: None)
    net = dks_timm.create_dks_model('test_resnet', num_classes=3)
    url = dks_timm.push_to_hub('alice/net', net, keep_branches=True)
    assert url.startswith(f'{hub.url}/alice/net/commit/')
    loaded = dks_timm.create_dks_model('hf-hub:alice/net', pretrained=True)
    x = torch.randn(2, 3, 64, 64)
    for expected, logits in zip(net.eval().exits(x), loaded.eval().exits(x), strict=True):
        assert torch.equal(expected, logits)
    model = timm.create_model('hf-hub:alice/net', pretrained=True).eval()
    assert torch.equal(model(x), net(x))


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.parametrize('names', [['pytorch_model.bin'], ['model.safetensors', 'pytorch_model.bin']])
def test_weights_in_a_repository_are_never_unpickled(hub, tmp_path, names, capfd):
    config = dict(architecture='test_resnet', num_classes=3, pretrained_cfg=dict(input_size=[3, 64, 64]))
    torch.save({'fc.weight': Hostile(tmp_path / 'executed')}, tmp_path / 'weights')
    content = (tmp_path / 'weights').read_bytes()
    hub.create('alice/net', {'config.json': json.dumps(config).encode(), **dict.fromkeys(names, content)})
    with pytest.raises(Exception, match='(?i)weights|header'):
        dks_timm.create_dks_model('hf-hub:alice/net', pretrained=True)
    with pytest.raises(SystemExit) as e:
        train('--dataset', 'digits', '--device', 'cpu', '--model', 'hf-hub:alice/net', '--pretrained',
              '--num-classes', '3', '--output', tmp_path / 'runs')
    assert e.value.code == 2 and len(capfd.readouterr().err.splitlines()) == 1
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'runs').exists()


def test_a_background_push_that_fails_is_a_warning_and_one_at_work_is_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('HF_TOKEN', 'x')
    args, _, _ = parse_args(['--push-to-hub', 'alice/net', '--push-every-best', '--hub-revision', 'tag:v1'])
    monkeypatch.setattr(publish, '_COMMAND', 'import sys, time; time.sleep(3); sys.exit("no such thing")')
    background = publish.BackgroundPush(args, str(tmp_path))
    assert background.flags == ['--push-to-hub', 'alice/net']  # only the end of the run is tagged
    background()
    child = background.child
    background()
    assert background.child is child
    background.close()
    assert 'The best checkpoint was not pushed, training goes on: no such thing' in caplog.text


TINY = [
    '--model', 'test_resnet', '--img-size', '32', '--device', 'cpu', '--workers', '0', '-b', '64', '--opt', 'adamw',
    '--lr', '3e-3', '--warmup-epochs', '0', '--hflip', '0', '--scale', '0.8', '1', '--color-jitter', '0',
]
SCORE = """
import sys
import timm, torch
from timm.data import create_transform, resolve_model_data_config
model = timm.create_model(sys.argv[1], pretrained=True).eval()
assert not any(name.startswith('dks_timm') for name in sys.modules)
from dks_timm.training.data import create_datasets
from dks_timm.training.config import parse_args
_, val = create_datasets(parse_args(['--dataset', 'digits'])[0])
val.transform = create_transform(**resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    predicted = model(torch.stack([x for x, _ in val])).argmax(1)
print(100 * (predicted == torch.tensor([y for _, y in val])).double().mean().item())
"""


@pytest.fixture(scope='module')
def story(tmp_path_factory):
    """A Hub with a model that train.py trained and pushed, and the folder of the run."""
    root = tmp_path_factory.mktemp('story')
    with pytest.MonkeyPatch.context() as monkeypatch, HubServer() as hub:
        use(hub, monkeypatch, root / 'home')
        monkeypatch.chdir(root)
        log = logging.FileHandler(root / 'log')
        logging.root.addHandler(log)
        train('--dataset', 'digits', '--num-classes', '10', *TINY, '--epochs', '2', '--dks', '--output', root / 'runs',
              '--experiment', 'digits', '--keep-branches', '--card-license', 'mit', '--push-to-hub', 'alice/digits')
        logging.root.removeHandler(log)
        yield hub, root


def test_a_fresh_process_scores_as_the_run_did(story):
    hub, root = story
    best = max(float(row['eval_top1']) for row in rows(root / 'runs/digits'))
    command = [sys.executable, '-c', SCORE, 'hf-hub:alice/digits']
    out = subprocess.check_output(command, cwd=Path(__file__).parents[2], text=True)
    assert float(out) == pytest.approx(best, abs=1e-6)
    assert hub.commits('alice/digits')[0].title.startswith(f'test_resnet with 10 classes: Top-1 accuracy of the '
                                                           f'backbone (%) {best:.2f} on digits (validation)')


def test_the_card_says_how_the_model_came_about(story):
    hub, root = story
    assert sorted(p.name for p in (root / 'runs/digits/export').iterdir()) == [
        'README.md', 'branches.safetensors', 'config.json', 'curves.svg', 'dks_config.json', 'model.safetensors']
    card = ModelCard(hub.files('alice/digits')['README.md'].decode())
    best = max(rows(root / 'runs/digits'), key=lambda row: float(row['eval_top1']))
    assert [(r.metric_value, r.dataset_name, r.dataset_split) for r in card.data.eval_results] == [
        (float(best['eval_top1']), 'digits', 'validation'), (float(best['eval_top5']), 'digits', 'validation')]
    assert (card.data.license, card.data.library_name, card.data.datasets) == ('mit', 'timm', ['digits'])
    assert 'base_model' not in card.data.to_dict()
    for fact in ('train.py --dataset digits --num-classes 10', '| seed | 42 |', '| training time | 0:',
                 '| hardware | CPU', '| lr | 0.003 |', 'branch 2',
                 '| chosen among the epochs by | top1 on the split validation |',
                 '![Loss and accuracy by epoch](curves.svg)', "create_dks_model('hf-hub:alice/digits'"):
        assert fact in card.text, fact
    svg = hub.files('alice/digits')['curves.svg'].decode()
    assert all(f'>{line} ' in svg for line in ('train', 'eval', 'backbone', 'stage2', 'stage3', 'ensemble'))


def test_nothing_that_a_run_leaves_holds_the_token(story):
    hub, root = story
    files = [p for p in root.rglob('*') if p.is_file()]
    assert {'log', 'args.yaml', 'last.pth.tar', 'README.md'} <= {p.name for p in files}
    for path in files:
        assert hub.token.encode() not in path.read_bytes(), path
    assert not any(hub.token.encode() in content for content in hub.files('alice/digits').values())
    assert all(hub.token not in c.title for c in hub.commits('alice/digits'))


def test_a_model_is_fine_tuned_from_the_hub_and_pushed_as_a_new_revision(story, monkeypatch, tmp_path, capfd):
    hub, root = story
    first = hub.commits('alice/digits')[0].id
    data = image_folder(tmp_path / 'images', classes=3)
    tune = [*TINY, '--model', f'hf-hub:alice/digits@{first}', '--pretrained', '--num-classes', '3', '--data-dir', data,
            '--epochs', '1', '-b', '16', '--output', tmp_path]
    with pytest.raises(SystemExit) as e:
        train(*tune, '--dks', '--push-to-hub', 'alice/digits')
    assert e.value.code == 2
    line, = capfd.readouterr().err.splitlines()
    assert "--push-to-hub 'alice/digits': it holds another model (other num_classes, label_names)" in line
    assert not list(tmp_path.glob('*/args.yaml'))

    train(*tune, '--dks', '--experiment', 'dks', '--push-to-hub', 'alice/digits', '--hub-revision', 'shapes')
    assert 'trained with other shapes; in its branches start fresh: 0.' in capfd.readouterr().err
    card = ModelCard(hub.files('alice/digits', 'shapes')['README.md'].decode())
    assert card.data.base_model == 'alice/digits' and card.data.base_model_relation == 'finetune'
    assert 'fine-tuned from [alice/digits@' in card.text
    assert "timm.create_model('hf-hub:alice/digits@shapes'" in card.text
    assert f'--model hf-hub:alice/digits@{first} --pretrained' in card.text
    tuned = timm.create_model('hf-hub:alice/digits@shapes', pretrained=True)
    assert tuned.num_classes == 3 and tuned.pretrained_cfg['label_names'] == ['0', '1', '2']

    # Without --dks, and with the Hub out of reach: what is in the cache is used.
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    hub.requests.clear()
    train(*tune, '--experiment', 'plain')
    assert len(rows(tmp_path / 'plain')) == 1 and not hub.requests


@pytest.fixture
def noise(tmp_path):
    """Flags that train for one short epoch."""
    return [
        '--data-dir', image_folder(tmp_path / 'images', classes=3, count=16), '--num-classes', '3', '--img-size', '32',
        '--device', 'cpu', '--workers', '0', '-b', '16', '--no-aug', '--lr', '0.05', '--warmup-epochs', '0', '--model',
        'test_resnet', '--epochs', '1', '--output', tmp_path, '--experiment', 'x']


def test_a_push_that_fails_at_the_end_leaves_the_export_and_the_line_that_finishes(hub, noise, tmp_path, capfd):
    hub.fail('*', 500)
    with pytest.raises(SystemExit) as e:
        train(*noise, '--push-to-hub', 'alice/net', '--no-hub-private', '--hub-revision', 'tag:v1',
              '--hub-timeout', '6')
    assert e.value.code == 3
    out, err = capfd.readouterr()
    assert 'training goes on, and the push is tried at its end' in err and 'Traceback' not in err
    assert 'Exported to' in out and not hub.repos
    line = err.splitlines()[-1].strip()
    assert line.startswith('dks-timm push ') and '--no-hub-private --hub-revision tag:v1' in line
    hub.recover()
    assert dks_timm_main(shlex.split(line)[1:]) == 0
    assert not hub.repos['alice/net'].private and 'model.safetensors' in hub.files('alice/net', 'v1')


def test_an_export_that_fails_at_the_end_shows_no_traceback_and_pushes_nothing(
        hub, noise, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('dks_timm.publishing.export._save', fail)
    with pytest.raises(SystemExit) as e:
        train(*noise, '--push-to-hub', 'alice/net')
    assert e.value.code == 3
    err = capfd.readouterr().err
    assert 'No space left' in err and 'Traceback' not in err
    assert err.splitlines()[-1].strip() == (
        f'dks-timm export {tmp_path}/x/model_best.pth.tar {tmp_path}/x/export')
    assert (tmp_path / 'x/model_best.pth.tar').is_file() and len(hub.commits('alice/net')) == 1


def test_a_recipe_does_not_overwrite_a_repository(hub, noise, tmp_path, capfd):
    hub.create('alice/taken', {'config.json': b'{"model_type": "bert"}'}, private=True)
    (tmp_path / 'recipe.yaml').write_text('overwrite: true')
    with pytest.raises(SystemExit) as e:
        train('--config', tmp_path / 'recipe.yaml', *noise, '--push-to-hub', 'alice/taken')
    assert e.value.code == 2 and 'it holds another model' in capfd.readouterr().err
    train(*noise, '--push-to-hub', 'alice/taken', '--overwrite')
    assert timm.create_model('hf-hub:alice/taken', pretrained=True).num_classes == 3


@pytest.mark.slow
def test_only_the_main_process_talks_to_the_hub(hub, noise):
    two_processes(*noise, '--dks', '--push-to-hub', 'alice/net')
    assert len(hub.requests_to('commit')) == 1 and len(hub.requests_to('create')) == 2  # before and after the training
    assert timm.create_model('hf-hub:alice/net', pretrained=True).num_classes == 3


@pytest.mark.slow
def test_the_best_checkpoint_is_pushed_while_training_goes_on(hub, tmp_path, capfd):
    train('--dataset', 'digits', '--num-classes', '10', *TINY, '--epochs', '12', '--output', tmp_path, '--experiment',
          'y', '--push-to-hub', 'alice/net', '--push-every-best', '--export-dir', tmp_path / 'model')
    err = capfd.readouterr().err
    assert 'The best checkpoint so far is on the Hub: http' in err
    assert len(hub.commits('alice/net')) >= 3
    titles = [re.search(r'\(%\) ([\d.]+)', c.title) for c in hub.commits('alice/net')[:-1]]
    scores = [float(found[1]) for found in titles]
    assert scores == sorted(scores, reverse=True)
