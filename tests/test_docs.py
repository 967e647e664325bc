"""The documentation: every command and block of code is run, links lead somewhere, generated pages are up to date."""
import csv
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sklearn.datasets
import timm
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from helpers.documents import PAGES, ROOT, anchors, blocks, inline_code, links
from helpers.hub_server import HubServer, use
from helpers.train import image_folder
from helpers.train import main as train
from safetensors.torch import save
from sklearn.utils import Bunch

import dks_timm
from dks_timm import cli
from dks_timm.publishing import export
from dks_timm.training import config, readers

# What stands for the reader's own things.
PLACEHOLDERS = {
    'path/to/images': 'images',
    'CIFAR100': 'images',
    'DIR': 'images',
    'MODEL': 'resnet50',
    'N': '10',
    'owner/name': 'alice/net',
}
ELLIPSIS = ['--data-dir', 'images', '--num-classes', '10']
# Models are replaced by small ones of their kind; those of a folder or the Hub are small here.
SMALL_MODELS = {
    r'resnet\d+|resnet\d+_cifar|wrn_\w+|densenet_\w+': 'test_resnet',
    r'convnext_\w+(\.\w+)?': 'test_convnext',
    r'(deit|vit)_\w+(\.\w+)?': 'test_vit',
    r'efficientnet_b\d': 'test_efficientnet',
}
# What a training command gets on top: as little work as leaves every step of a run in it.
SMALLER = [
    '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '8', '--workers', '0', '--device', 'cpu',
    '--log-interval', '100', '--grad-accum-steps', '1', '--aug-repeats', '0', '--no-hub-private',
]
# Flags that are checked and then left out, as they are for the model or the machine that the command is written for.
LEFT_OUT = ('--torchcompile', '--dks-budget', '--dks-stages', '--dks-branch-kwargs', '--drop-path', '--layer-decay')
# What a page takes for granted as it begins: folders of a model that was exported with its branches.
GIVEN = {page: ['out/resnet50'] for page in (
    'docs/deployment.md', 'docs/publishing.md', 'docs/report.md', 'docs/validation.md')}
MARKS = r'slow|needs (a GPU|the Hub|the network|ImageNet|several machines|a file of yours)|takes (minutes|hours|days)'
RESULTS = ROOT / 'results/cifar100/README.md'
SHELL, PYTHON, NOT_RUN = ('', 'bash'), 'python', ('text', 'bibtex', 'yaml', 'diff', 'pycon')


def named(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The folder of a small network for ten classes, with its branches."""
    folder = tmp_path_factory.mktemp('exported')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, 'verify', lambda *args: None)
        net = dks_timm.create_dks_model('test_resnet', num_classes=10)
        dks_timm.export(folder, net, keep_branches=True)
    return folder


@pytest.fixture(scope='module')
def timms_weights():
    """Repositories in timm's name with weights for the small models."""
    models = [timm.create_model(name) for name in SMALL_MODELS.values()]
    return {m.pretrained_cfg['hf_hub_id']: {'model.safetensors': save(m.state_dict())} for m in models}


@pytest.fixture
def workplace(exported, timms_weights, tmp_path, monkeypatch):
    """A folder with what a clone holds, a folder of images, a Hub with models, and few digits."""
    for name in ('benchmarks', 'docs', 'recipes', 'results', 'tests', 'train.py'):
        (tmp_path / name).symlink_to(ROOT / name)
    image_folder(tmp_path / 'images')
    digits = sklearn.datasets.load_digits()
    few = Bunch(images=digits.images[:200], target=digits.target[:200])
    monkeypatch.setattr(sklearn.datasets, 'load_digits', lambda: few)
    monkeypatch.setattr(readers.MultiDigits, 'counts', (40, 20))
    # tests/publishing/test_export.py has the check of an export, a process that takes seconds to start.
    monkeypatch.setattr(export, 'verify', lambda *args: None)
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        use(server, monkeypatch, tmp_path / 'home')
        server.create('alice/net', {path.name: path.read_bytes() for path in exported.iterdir()})
        for repo, files in timms_weights.items():
            server.create(repo, files)
        yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def filled_in(text):
    if text in PLACEHOLDERS:
        return PLACEHOLDERS[text]
    for name in ('owner/name', 'path/to/images'):
        text = text.replace(name, PLACEHOLDERS[name])
    return text


def all_filled_in(words):
    """Words of a command; an ellipsis stands for the flags that name the data."""
    return [f for word in words for f in (ELLIPSIS if word == '...' else [filled_in(word)])]


def small_model(name):
    return next((small for pattern, small in SMALL_MODELS.items() if re.fullmatch(pattern, name)), name)


def script_of(words):
    """Script and arguments of a command that starts one, after the launcher has read its own; (None, []) of others."""
    for program in (['dks-timm', 'train'], ['python', '-m', 'dks_timm.train']):
        if words[:len(program)] == program:
            return 'train.py', words[len(program):]
    if words[:2] == ['accelerate', 'launch']:
        launched = launch_command_parser().parse_args(words[2:])
        assert not launched.config_file or Path(launched.config_file).is_file(), f'no {launched.config_file}'
    elif words[0] == 'torchrun':
        launched = torch.distributed.run.get_args_parser().parse_args(words[1:])
    else:
        return (words[1], words[2:]) if words[0] == 'python' else (None, [])
    is_module = launched.module and launched.training_script == 'dks_timm.train'
    return 'train.py' if is_module else launched.training_script, launched.training_script_args


def check_command(words):
    """Check that programs, files, flags and values of a command exist."""
    words = all_filled_in(words)
    script, arguments = script_of(words)
    if '--help' in words:
        return
    if script == 'train.py':
        config.parse_args(arguments)
    elif [script, *arguments] == ['-m', 'build']:
        pass  # tests/test_wheel.py
    elif script is not None:
        text = (ROOT / script).read_text()
        assert all(f"'{word}'" in text for word in arguments if word.startswith('--')), f'{script} has no such flag'
    elif words[0] == 'dks-timm':
        cli._create_parser().parse_args(words[1:])
    elif words[0] == 'pip':
        extras = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
        assert all(name in extras for names in re.findall(r'\[(.+?)\]', ' '.join(words)) for name in names.split(','))
        assert all(version == dks_timm.__version__ for version in re.findall(r'dks_timm-([\d.]+)-', ' '.join(words)))
    elif words[0] == 'pytest':
        assert all((ROOT / word).exists() for word in words[1:] if '/' in word)
    else:
        assert words[0] in ('git', 'hf', 'cd'), f'no rule for {shlex.join(words)}: is it a text block?'


def run_command(words):
    check_command(words)
    words = all_filled_in(words)
    script, arguments = script_of(words)
    if script == 'train.py':
        args, _, _ = config.parse_args(arguments)
        kept, drop = [], False
        for word in arguments:
            drop = word in LEFT_OUT or drop and not word.startswith('-')
            kept += [] if drop else [word]
        model = small_model(args.model)
        size = ['--img-size', '160' if model == 'test_vit' else '32']
        train(*kept, '--model', model, *size, *SMALLER)
    elif script is not None:
        pytest.fail(f'no rule to run {shlex.join(words)}: mark the block')
    elif words[0] == 'dks-timm':
        assert cli.main(words[1:]) == 0
    else:
        assert words[0] in ('pip', 'pytest'), f'no rule to run {shlex.join(words)}: mark the block'


def run_python(block, module):
    text = re.sub(r"'([^'\n]+)'", lambda quoted: repr(small_model(filled_in(quoted[1]))), block.text)
    # As many lines above it as in the page, so that a traceback leads there.
    exec(compile('\n' * block.line + text, str(block.page), 'exec'), module.__dict__)


def run_page(page, slow, monkeypatch, capsys):
    module = types.ModuleType(f'blocks_of_{page.stem}')
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = None
    for block in blocks(page):
        runs = not block.mark or slow and block.mark == 'slow'
        try:
            if block.language == 'text' and block.follows:
                assert printed is None or printed == block.text
            elif block.language == PYTHON and runs:
                run_python(block, module)
            elif block.language in SHELL:
                capsys.readouterr()
                for words in block.commands:
                    (run_command if runs else check_command)(words)
                printed = capsys.readouterr().out if runs else None
        except (Exception, SystemExit) as e:
            raise AssertionError(f'{block}: {type(e).__name__}: {e}') from e


def prepare(page, exported):
    for folder in GIVEN.get(str(page.relative_to(ROOT)), ()):
        Path(folder).parent.mkdir(exist_ok=True)
        Path(folder).symlink_to(exported)
    if 'resnet50_dks.pth.tar' in page.read_text():  # as the authors' training saves it
        weights = timm.create_model('resnet50').state_dict()
        torch.save({'state_dict': {f'module.{k}': v for k, v in weights.items()}}, 'resnet50_dks.pth.tar')


RUNNABLE = [page for page in PAGES if any(block.language not in NOT_RUN for block in blocks(page))]


@pytest.mark.parametrize('page', named(RUNNABLE))
def test_every_command_and_block_of_code_of_a_page_runs(page, workplace, exported, monkeypatch, capsys):
    for name in ('transformers', 'lightning', 'onnxruntime'):
        if f'import {name}' in page.read_text() or f'from {name} ' in page.read_text():
            pytest.importorskip(name, reason='pip install -e ".[test]"')
    prepare(page, exported)
    run_page(page, False, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize('page', named(p for p in PAGES if any(b.mark == 'slow' for b in blocks(p))))
def test_slow_blocks_run_too(page, workplace, exported, monkeypatch, capsys):
    prepare(page, exported)
    run_page(page, True, monkeypatch, capsys)


@pytest.mark.slow
def test_a_newcomer_gets_from_a_clone_to_a_model_on_the_hub_by_the_readme_alone(tmp_path):
    """The README's commands for the quickstart, in a shell and as they are, but for what is installed already and the
    name of the repository."""
    clone = tmp_path / 'clone'
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns('.git', 'output', 'out', '__pycache__', '.*_cache'))
    page = [block for block in blocks(ROOT / 'README.md') if not block.mark]
    lines = [line for block in page if block.language == 'bash' for line in block.text.splitlines()]
    install, lines[0] = lines[0].split(' && ')
    lines = [line for line in lines if 'quickstart' in line]
    assert install == 'pip install -e ".[demo]"' and [line.split()[:2] for line in lines] == [
        ['accelerate', 'launch'], ['dks-timm', 'report'], ['dks-timm', 'push']]
    load, = (block.text for block in page if block.language == PYTHON and 'hf-hub:' in block.text)
    with HubServer() as server:
        path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
        env = {**os.environ, 'PATH': path, **server.env(tmp_path / 'home')}
        env.pop('HF_HUB_OFFLINE', None)
        script = filled_in('\n'.join([*lines, f'python -c "import timm\n{load}"']))
        out = subprocess.run(['bash', '-ec', script], cwd=clone, env=env, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        assert server.repos['alice/net'].private
        assert {'README.md', 'config.json', 'model.safetensors'} <= set(server.files('alice/net'))
    with open(clone / 'output/quickstart/summary.csv', newline='') as f:
        assert float(list(csv.DictReader(f))[-1]['eval_top1']) > 90
    assert (clone / 'output/quickstart/report/index.html').is_file()


@pytest.mark.parametrize('page', named(PAGES))
def test_blocks_are_of_known_languages_and_marks(page):
    for block in blocks(page):
        assert block.language in (*SHELL, PYTHON, *NOT_RUN), block
        assert not block.mark or re.fullmatch(MARKS, block.mark), f'{block}: {block.mark}'
    # None is lost, for instance to a blank line below the comment.
    assert page.read_text().count('<!-- test:') == sum(bool(block.mark) for block in blocks(page)), page


@pytest.mark.parametrize('page', named(PAGES))
def test_commands_in_running_text_are_right(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for text in inline_code(page):
        words = shlex.split(text) if text.startswith(('accelerate ', 'torchrun ', 'python ', 'dks-timm ')) else []
        # Without an argument it is the name of a command, with a flag perhaps.
        named_only = words[:1] == ['dks-timm'] and (len(words) < 3 or words[2].startswith('-'))
        if len(words) > 2 and not named_only and (
                words[0] in ('python', 'dks-timm') or {'train.py', 'dks_timm.train'} & set(words)):
            check_command(words)


def known_flags():
    parsers = [config.create_parser(), launch_command_parser(), torch.distributed.run.get_args_parser()]
    commands = cli._create_parser()._subparsers._group_actions[0].choices.values()
    found = {o for parser in chain(parsers, commands) for a in parser._actions for o in a.option_strings}
    for script in (ROOT / 'benchmarks').glob('*.py'):
        found |= set(re.findall(r"'(--[a-z-]+)'", script.read_text()))
    return found


@pytest.mark.parametrize('page', named(PAGES))
def test_flags_in_running_text_exist(page):
    flags = {flag for text in inline_code(page) for flag in re.findall(r'(?<![\w-])--[a-z][\w-]*\w(?![\w*-])', text)}
    assert flags <= known_flags() | {'--all', '--extra-index-url'}


@pytest.mark.parametrize('page', named([*PAGES, *sorted(ROOT.glob('results/**/*.md')), ROOT / 'MODEL_CARD.md']))
def test_links_and_pictures_lead_somewhere(page):
    for link in links(page):
        url = urlsplit(link)
        if url.scheme or '{' in link:
            continue
        target = page.parent / url.path if url.path else page
        assert target.exists(), f'{page.relative_to(ROOT)}: no {link}'
        if url.fragment:
            assert url.fragment in anchors(target), f'{page.relative_to(ROOT)}: no {link}'


@pytest.mark.parametrize('page', named([ROOT / 'README.md', ROOT / 'docs/method.md']))
def test_accuracies_are_those_of_the_results(page):
    quoted = set(re.findall(r'[+\d.]+ ± [\d.]+', page.read_text()))
    assert len(quoted) >= 4 and quoted <= set(re.findall(r'[+\d.]+ ± [\d.]+', RESULTS.read_text()))


def test_the_index_lists_every_page():
    listed = [link for link in links(ROOT / 'docs/README.md') if link.endswith('.md') and '/' not in link]
    assert sorted(listed) == sorted(p.name for p in (ROOT / 'docs').glob('*.md') if p.name != 'README.md')


def test_generated_pages_are_what_the_generator_writes():
    pytest.importorskip('docstring_parser', reason='pip install -e ".[test]"')
    for name, page in runpy.run_path(str(ROOT / 'docs/generate.py'))['PAGES'].items():
        assert (ROOT / 'docs' / name).read_text() == page(), f'docs/{name} is old: python docs/generate.py'


def test_what_the_examples_and_the_generator_import_is_in_the_test_extra():
    extra = re.search(r'^test = \[.*?^\]', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE | re.DOTALL)[0]
    assert all(f"'{name}" in extra for name in ('docstring-parser', 'lightning', 'onnxruntime', 'transformers'))


def test_the_api_page_has_every_public_name():
    headings = anchors(ROOT / 'docs/api.md')
    assert {f'dks_timm{name.lower()}' for name in dks_timm.__all__ if name != '__version__'} <= headings


def test_every_flag_has_a_row():
    rows = (ROOT / 'docs/flags.md').read_text()
    assert all(f'`{o}' in rows for a in config.create_parser()._actions for o in a.option_strings if o not in (
        '-h', '--help'))
