"""Pushing to the Hub, loading and fine-tuning from it: the real client, over real HTTP, to the Hub of hub_server.py."""
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
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
from dks_timm.publishing.push import PushError, check_repository, push_folder

CONFIG = dict(architecture='test_resnet', num_classes=3, label_names=['a', 'b', 'c'])
CARD = """---
library_name: timm
tags:
- timm
model-index:
- name: net
  results:
  - task:
      type: image-classification
    dataset:
      name: digits
      type: digits
      split: validation
    metrics:
    - type: accuracy
      value: 91.234567
      name: Top-1 accuracy of the backbone (%)
---

# net

    timm.create_model('local-dir:net', pretrained=True)

## Training

    train.py --model local-dir:another --pretrained

## Fine-tune

    train.py --model local-dir:net --pretrained --num-classes 37
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as hub:
        use(hub, monkeypatch, tmp_path / 'home')
        yield hub


@pytest.fixture
def folder(tmp_path):
    """What an export leaves, with weights that nobody loads, among other files."""
    folder = tmp_path / 'net'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    (folder / 'model.safetensors').write_bytes(bytes(range(256)) * 500)
    (folder / 'README.md').write_text(CARD)
    (folder / '.env').write_text('SECRET=1')
    return folder


def change(folder):
    (folder / 'model.safetensors').write_bytes(os.urandom(100_000))


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


def test_the_card_on_the_hub_says_how_to_load_from_there(hub, folder):
    push_folder(folder, 'alice/net', private=False)
    assert not hub.repos['alice/net'].private
    card = hub.files('alice/net')['README.md'].decode()
    assert "timm.create_model('hf-hub:alice/net', pretrained=True)" in card
    assert 'train.py --model hf-hub:alice/net --pretrained --num-classes 37' in card
    assert 'train.py --model local-dir:another --pretrained\n' in card  # the command it was trained by
    push_folder(folder, 'alice/net', revision='v2')
    assert 'hf-hub:alice/net@v2' in hub.files('alice/net', 'v2')['README.md'].decode()


def test_pushing_unchanged_files_again_changes_nothing(hub, folder):
    url = push_folder(folder, 'alice/net')
    hub.requests.clear()
    assert push_folder(folder, 'alice/net') == url
    assert not hub.requests_to('commit', 'lfs-upload', 'create')
    change(folder)
    assert push_folder(folder, 'alice/net') != url
    assert len(hub.commits('alice/net')) == 3


def test_branches_and_tags_leave_what_was_there(hub, folder):
    push_folder(folder, 'alice/net', revision='tag:v1')
    first = hub.files('alice/net')
    assert hub.files('alice/net', 'v1') == first
    push_folder(folder, 'alice/net', revision='tag:v1')
    assert len(hub.commits('alice/net')) == 2
    change(folder)
    push_folder(folder, 'alice/net', revision='wide')
    assert hub.files('alice/net') == first
    assert hub.files('alice/net', 'wide')['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    push_folder(folder, 'alice/net')
    with pytest.raises(ValueError, match="revision 'tag:v1': there is such a tag already"):
        push_folder(folder, 'alice/net', revision='tag:v1')
    assert hub.files('alice/net', 'v1') == first


def test_branches_of_an_earlier_export_do_not_stay_beside_new_weights(hub, folder):
    for name in ('branches.safetensors', 'dks_config.json'):
        (folder / name).write_bytes(b'{}')
    push_folder(folder, 'alice/net')
    assert {'branches.safetensors', 'dks_config.json'} < hub.files('alice/net').keys()
    for name in ('branches.safetensors', 'dks_config.json'):
        (folder / name).unlink()
    change(folder)
    push_folder(folder, 'alice/net')
    assert sorted(hub.files('alice/net')) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']


@pytest.mark.parametrize('files, message', [
    ({'config.json': json.dumps({**CONFIG, 'architecture': 'resnet18'})}, 'resnet18 with 3 classes'),
    ({'config.json': json.dumps({**CONFIG, 'num_classes': 4})}, 'test_resnet with 4 classes'),
    ({'config.json': json.dumps({**CONFIG, 'label_names': ['x', 'y', 'z']})}, 'a model for other classes'),
    ({'config.json': '{"model_type": "bert"}'}, 'a config.json that is not of timm'),
    ({'pytorch_model.bin': 'x'}, 'pytorch_model.bin'),
])
def test_another_model_is_replaced_only_if_asked(hub, folder, files, message, capsys):
    hub.create('alice/net', {name: content.encode() for name, content in files.items()}, private=True)
    command = ['push', str(folder), 'alice/net']
    assert dks_timm_main(command) == 2
    err = capsys.readouterr().err
    assert f"'alice/net' holds another model ({message}); choose another name, or --overwrite" in err
    assert err.count('\n') == 1
    assert not hub.requests_to('commit')
    assert dks_timm_main([*command, '--overwrite']) == 0
    assert 'pytorch_model.bin' not in hub.files('alice/net')
    assert hub.files('alice/net')['config.json'] == (folder / 'config.json').read_bytes()


@pytest.mark.parametrize('repo_id, token, message', [
    ('alice/net', None, 'needs a login: run `hf auth login`, or set HF_TOKEN'),
    ('alice/net', 'hf_wrong', 'the Hub does not accept the token'),
    ('bob/net', True, 'the token may not write there'),
    ('net', True, 'give owner/name'),
    ('alice/net/x', True, 'give owner/name'),
    ('alice/a..b', True, 'give owner/name'),
])
def test_a_push_that_cannot_work_is_refused_in_one_line(hub, folder, monkeypatch, repo_id, token, message, capsys):
    if token is None:
        monkeypatch.delenv('HF_TOKEN')
    elif token is not True:
        monkeypatch.setenv('HF_TOKEN', token)
    hub.add_user('bob')
    assert dks_timm_main(['push', str(folder), repo_id]) == 2
    err = capsys.readouterr().err
    assert repr(repo_id) in err and message in err and err.count('\n') == 1
    assert not hub.repos


def test_a_token_that_may_only_read_is_refused(hub, folder, monkeypatch):
    hub.create('alice/net')
    monkeypatch.setenv('HF_TOKEN', hub.add_user('carol', role='read'))
    with pytest.raises(ValueError, match='may not write there'):
        check_repository('alice/net', CONFIG)
    with pytest.raises(ValueError, match='may not write there'):
        push_folder(folder, 'alice/net')


@pytest.mark.parametrize('fault, message', [
    (lambda hub: hub.slow('lfs-upload', 3600), 'the Hub took longer than 4 s'),
    (lambda hub: hub.fail('create', 409, 'Cannot create repo: another conflicting operation is in progress'),
     'the Hub took longer than 4 s'),
    (lambda hub: hub.fail('commit', 500), r'the Hub answers 500 \(Error 500\)'),
    (lambda hub: hub.fail('validate-yaml', 400), 'the Hub answers 400|Invalid metadata in README.md'),
], ids=['upload-stalls', 'create-409', 'commit-500', 'card'])
def test_a_fault_ends_a_push_in_time_and_it_can_be_repeated(hub, folder, fault, message):
    fault(hub)
    start = time.monotonic()
    with pytest.raises(PushError, match=message):
        push_folder(folder, 'alice/net', timeout=4)
    assert time.monotonic() - start < 60  # not for ever
    hub.recover()
    push_folder(folder, 'alice/net')
    assert len(hub.commits('alice/net')) == 2


def test_a_hub_out_of_reach_is_known_within_ten_seconds(hub, monkeypatch):
    assert push.CHECK_SECONDS < 10
    for fault, seconds, message in (
            (lambda: hub.slow('info', 60), 3, 'the Hub took longer than 3 s'),
            # Far above what it takes here; a busy machine may need more than ten seconds.
            (lambda: hub.fail('*', 500), 30, r'the Hub answers 500 \(Error 500\)'),
            (hub.stop, 30, 'the Hub cannot be reached: ConnectError'),
    ):
        hub.recover()
        fault()
        monkeypatch.setattr(push, 'CHECK_SECONDS', seconds)
        with pytest.raises(PushError, match=message):
            check_repository('alice/net', CONFIG)


def test_checking_creates_the_repository_and_nothing_else(hub):
    assert check_repository('alice/net', CONFIG) == []
    assert hub.repos['alice/net'].private and len(hub.commits('alice/net')) == 1
    hub.create('alice/open')
    assert 'alice/open is public, and stays so' in check_repository('alice/open', CONFIG)[0]


def test_what_the_hub_says_is_repeated_without_the_token(hub, folder, capfd):
    hub.fail('commit', 400, f'bad token {hub.token}')
    assert dks_timm_main(['push', str(folder), 'alice/net']) == 3
    out, err = capfd.readouterr()
    assert 'bad token ***' in err and hub.token not in out + err


def test_a_published_model_comes_back_with_its_branches(hub, monkeypatch):
    monkeypatch.setattr('dks_timm.publishing.export.verify', lambda *args: None)  # has its own tests
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


def create_hostile(hub, repo_id, tmp_path, *names):
    """Create a repository whose weights, under these names, would touch a file when they are unpickled."""
    config = dict(architecture='test_resnet', num_classes=3, pretrained_cfg=dict(input_size=[3, 64, 64]))
    torch.save({'fc.weight': Hostile(tmp_path / 'executed')}, tmp_path / 'weights')
    content = (tmp_path / 'weights').read_bytes()
    hub.create(repo_id, {'config.json': json.dumps(config).encode(), **dict.fromkeys(names, content)})


@pytest.mark.parametrize('names', [['pytorch_model.bin'], ['model.safetensors', 'pytorch_model.bin']])
def test_weights_in_a_repository_are_never_unpickled(hub, tmp_path, names):
    create_hostile(hub, 'alice/net', tmp_path, *names)
    with pytest.raises(Exception, match='(?i)weights|header'):
        dks_timm.create_dks_model('hf-hub:alice/net', pretrained=True)
    assert not (tmp_path / 'executed').exists()


def test_a_background_push_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(publish, '_COMMAND', 'import sys; print(sys.argv[-1]); sys.exit("no such thing")')
    background = publish.BackgroundPush(tmp_path / 'model_best.pth.tar', ['--push-to-hub', 'alice/net'])
    with caplog.at_level(logging.WARNING):
        background()
        while not caplog.text:
            time.sleep(0.05)
    background.close()
    assert 'The best checkpoint was not pushed, training goes on: no such thing' in caplog.text


def test_a_background_push_that_hangs_is_ended_with_the_training(tmp_path, monkeypatch):
    upload = 'import os, subprocess as s; s.run(["sh", "-c", f"echo $$ > {os.environ[\'PID_FILE\']}; exec sleep 600"])'
    monkeypatch.setenv('PID_FILE', str(tmp_path / 'pid'))
    monkeypatch.setattr(publish, '_COMMAND', upload)
    background = publish.BackgroundPush(tmp_path / 'model_best.pth.tar', [])
    background()
    while not (tmp_path / 'pid').exists() or not (pid := (tmp_path / 'pid').read_text()):
        time.sleep(0.05)
    start = time.monotonic()
    background.close(grace=1)
    assert time.monotonic() - start < 60 and background._child.poll() is not None
    while os.path.exists(f'/proc/{pid.strip()}'):
        time.sleep(0.05)


# The whole story, on one tiny run.

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


def fresh_process(*command):
    out = subprocess.run(
        [sys.executable, '-c', *map(str, command)], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


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
    assert float(fresh_process(SCORE, 'hf-hub:alice/digits')) == pytest.approx(best, abs=1e-6)
    assert hub.commits('alice/digits')[0].title.startswith(f'test_resnet with 10 classes: Top-1 accuracy of the '
                                                           f'backbone (%) {best:.2f} on digits (validation)')


def test_without_export_dir_the_export_lies_in_the_runs_folder(story):
    hub, root = story
    assert sorted(p.name for p in (root / 'runs/digits/export').iterdir()) == [
        'README.md', 'branches.safetensors', 'config.json', 'curves.svg', 'dks_config.json', 'model.safetensors']
    config = json.loads(hub.files('alice/digits')['config.json'])
    assert config['label_names'] == [str(i) for i in range(10)]


def test_the_card_says_how_the_model_came_about(story):
    hub, root = story
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
    assert "--push-to-hub 'alice/digits' holds another model (test_resnet with 10 classes)" in capfd.readouterr().err
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
    old = timm.create_model(f'hf-hub:alice/digits@{first}', pretrained=True).eval()
    assert torch.equal(old(x := torch.randn(1, 3, 32, 32)), timm.create_model(
        f'local-dir:{root}/runs/digits/export', pretrained=True).eval()(x))

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
        'test_resnet', '--epochs', '1']


@pytest.mark.parametrize('repo_id, token, words', [
    ('alice/net', None, ['--push-to-hub', 'hf auth login']),
    ('bob/net', True, ['--push-to-hub', "'bob/net'", 'may not write']),
    ('alice/taken', True, ['--push-to-hub', "'alice/taken'", 'resnet18 with 3 classes', '--overwrite']),
])
def test_training_does_not_begin_for_a_push_that_cannot_work(
        hub, noise, tmp_path, monkeypatch, capfd, repo_id, token, words):
    config = json.dumps({**CONFIG, 'architecture': 'resnet18'}).encode()
    hub.create('alice/taken', {'config.json': config}, private=True)
    if token is None:
        monkeypatch.delenv('HF_TOKEN')
    before = sorted(p for p in tmp_path.rglob('*') if 'home' not in p.parts)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train(*noise, '--push-to-hub', repo_id)
    assert e.value.code == 2
    out = capfd.readouterr()
    assert len(out.err.splitlines()) == 1 and all(word in out.err for word in words), out.err
    assert sorted(p for p in tmp_path.rglob('*') if 'home' not in p.parts) == before


def test_a_push_that_fails_at_the_end_leaves_the_export_and_the_line_that_finishes(hub, noise, tmp_path, capfd):
    hub.fail('*', 500)
    with pytest.raises(SystemExit) as e:
        train(*noise, '--output', tmp_path, '--experiment', 'x',
              '--push-to-hub', 'alice/net', '--no-hub-private', '--hub-revision', 'tag:v1', '--hub-timeout', '6')
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
        train(*noise, '--output', tmp_path, '--experiment', 'x',
              '--push-to-hub', 'alice/net')
    assert e.value.code == 3
    err = capfd.readouterr().err
    assert 'No space left' in err and 'Traceback' not in err
    assert err.splitlines()[-1].strip() == (
        f'dks-timm export {tmp_path}/x/model_best.pth.tar {tmp_path}/x/export')
    assert (tmp_path / 'x/model_best.pth.tar').is_file() and len(hub.commits('alice/net')) == 1


def test_a_recipe_does_not_overwrite_a_repository(hub, noise, tmp_path, capfd):
    hub.create('alice/taken', {'pytorch_model.bin': b'x'}, private=True)
    (tmp_path / 'recipe.yaml').write_text('overwrite: true')
    flags = [*noise, '--output', tmp_path, '--push-to-hub', 'alice/taken']
    with pytest.raises(SystemExit) as e:
        train('--config', tmp_path / 'recipe.yaml', *flags)
    assert e.value.code == 2 and 'holds another model (pytorch_model.bin)' in capfd.readouterr().err
    train(*flags, '--overwrite')
    assert timm.create_model('hf-hub:alice/taken', pretrained=True).num_classes == 3


def test_training_does_not_begin_from_a_repository_whose_weights_are_a_pickle(hub, noise, tmp_path, capfd):
    create_hostile(hub, 'alice/hostile', tmp_path, 'pytorch_model.bin')
    with pytest.raises(SystemExit) as e:
        train(*noise, '--model', 'hf-hub:alice/hostile', '--pretrained', '--output', tmp_path / 'runs')
    assert e.value.code == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and '--model hf-hub:alice/hostile' in err, err
    assert not (tmp_path / 'runs').exists() and not (tmp_path / 'executed').exists()


@pytest.mark.slow
def test_only_the_main_process_talks_to_the_hub(hub, noise, tmp_path):
    two_processes(*noise, '--output', tmp_path, '--experiment', 'x', '--dks',
                  '--push-to-hub', 'alice/net')
    assert len(hub.requests_to('create')) == len(hub.requests_to('commit')) == 1
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
