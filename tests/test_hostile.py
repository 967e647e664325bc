"""Hostile input: nothing in a file runs, nothing is written outside the output folder, no input ends in a traceback."""
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import re

import pytest
import torch
import yaml
from helpers import bad_inputs
from helpers.bad_inputs import VALUES, WORDS, Payload, make_data, saved, write
from helpers.train import main
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from dks_timm import errors
from dks_timm.training import checkpoint, config, loop, readers
from dks_timm.training.images import Images

NO_NUL = st.characters(exclude_characters='\0')  # which no command line can hold
# Flags by name, but for the one that prints help and ends.
ACTIONS = {a.dest: a for a in config.create_parser()._actions if a.dest != 'help'}


def examples(count):
    """The same examples in every run."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink])


def words():
    numbers = st.one_of(st.integers(-3, 600), st.floats(-1, 3)).map(str)
    return st.one_of(st.sampled_from(WORDS), numbers, st.text(NO_NUL, max_size=8))


def flag_and_values(action):
    name = st.sampled_from(action.option_strings or [''])
    good = [words()] + ([st.sampled_from(list(action.choices))] if action.choices else [])
    count = action.nargs if isinstance(action.nargs, int) else {None: 1}.get(action.nargs)
    values = st.lists(st.one_of(good), min_size=count or 0, max_size=3 if count is None else count)
    return st.tuples(name, values).map(lambda pair: [word for word in (pair[0], *pair[1]) if word != ''])


def command_lines(most=5):
    stray = words().map(lambda word: [word])
    joined = st.tuples(st.sampled_from(sorted(o for a in ACTIONS.values() for o in a.option_strings)), words()).map(
        lambda pair: ['='.join(pair)])
    part = st.one_of(st.sampled_from(list(ACTIONS.values())).flatmap(flag_and_values), joined, stray)
    return st.lists(part, max_size=most).map(lambda parts: list(itertools.chain(*parts)))


def refusal(argv):
    """Parse a command line; the message where it is refused. Any other exception is a failure."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config.parse_args(argv)
    except errors.OptionError as e:
        assert str(e) and str(e).isprintable() and len(str(e)) < 1100
        return str(e)
    except SystemExit as e:
        assert e.code == 0 and any(word.startswith(('-h', '--h')) for word in argv)  # help, abbreviated perhaps
    return ''


def refusal_of_recipe(folder, content):
    (folder / 'r.yaml').write_bytes(content)
    return refusal(['-c', str(folder / 'r.yaml')])


# Any command line, any recipe


@examples(150)
@given(command_lines())
def test_any_command_line_is_parsed_or_refused_in_one_line(argv):
    refusal(argv)


@pytest.mark.slow
@examples(5000)
@given(command_lines(12))
def test_any_of_many_command_lines_is_parsed_or_refused_in_one_line(argv):
    refusal(argv)


@pytest.mark.slow
@pytest.mark.parametrize('dest', sorted(ACTIONS))
def test_every_flag_with_any_word_is_parsed_or_refused_by_its_name(dest):
    action = ACTIONS[dest]
    for word in WORDS:
        count = action.nargs if isinstance(action.nargs, int) and action.nargs else 1
        argv = [*action.option_strings[-1:], *[word] * count][:1 if action.nargs == 0 else None]
        message = refusal(argv)
        assert not message or any(option in message for option in action.option_strings or [message]), message


recipe_lines = st.tuples(st.one_of(st.sampled_from(sorted(ACTIONS)), words()), st.sampled_from(VALUES)).map(': '.join)
recipes = st.one_of(
    st.lists(recipe_lines, max_size=4).map('\n'.join).map(lambda text: text.encode('utf-8', 'surrogatepass')),
    st.dictionaries(st.sampled_from(sorted(ACTIONS)), st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(NO_NUL, max_size=5), st.dates()),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
        max_leaves=4), max_size=3).map(lambda recipe: yaml.dump(recipe).encode('utf-8', 'surrogatepass')),
    st.binary(max_size=30),
)


@examples(150)
@given(recipes)
def test_any_recipe_is_parsed_or_refused_in_one_line(tmp_path_factory, content):
    refusal_of_recipe(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@examples(5000)
@given(recipes)
def test_any_of_many_recipes_is_parsed_or_refused_in_one_line(tmp_path_factory, content):
    refusal_of_recipe(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@pytest.mark.parametrize('dest', sorted(ACTIONS))
def test_every_flag_with_any_value_in_a_recipe_is_parsed_or_refused(tmp_path, dest):
    for value in VALUES:
        refusal_of_recipe(tmp_path, f'{dest}: {value}'.encode('utf-8', 'surrogatepass'))


# Flags that make no sense of a small run are left out: they choose other data, or what to wait for.
LEFT_OUT = {
    'config', 'data', 'data_dir', 'dataset', 'train_split', 'val_split', 'workers', 'model', 'torchcompile',
    'torchcompile_mode', 'device', 'push_to_hub', 'log_with', 'num_classes', 'pin_mem', 'batch_size',
    'train_size_probs', 'naflex_patch_size_probs',
}


def sensible(action):
    """Flags with values that often parse."""
    kinds = {int: st.integers(0, 70), float: st.floats(0, 2).map(lambda x: round(x, 3))}
    choices = action.choices
    value = (st.sampled_from([c for c in choices if c]) if choices else kinds.get(action.type, st.just('x'))).map(str)
    if action.nargs == 0:
        return st.just([action.option_strings[-1]])
    count = action.nargs if isinstance(action.nargs, int) else 1
    return st.lists(value, min_size=count, max_size=count).map(lambda values: [action.option_strings[-1], *values])


builds = st.lists(
    st.sampled_from([a for a in ACTIONS.values() if a.dest not in LEFT_OUT]).flatmap(sensible), min_size=1, max_size=4,
).map(lambda parts: list(itertools.chain(*parts)))


def build_and_end(folder, argv, dks):
    """All of train.py but the training itself; refused in one line, or through."""
    shown = io.StringIO()
    common = bad_inputs.Case('', ['--dks'] * dks).command(folder)
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context(
        ) as patch:
            patch.chdir(folder)  # where flags such as --output name one of their own
            patch.setattr(loop.Trainer, 'running', lambda *_: (_ for _ in ()).throw(SystemExit(0)))
            main(*common, *argv)
    except SystemExit as e:
        assert e.code in (0, 2)
        assert e.code == 0 or len(shown.getvalue().splitlines()) == 1, shown.getvalue()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@examples(25)
@given(builds, st.booleans())
def test_what_parses_is_built_or_refused_in_one_line(data, argv, dks):
    build_and_end(data, argv, dks)


@pytest.mark.slow
@examples(600)
@given(builds, st.booleans())
def test_much_of_what_parses_is_built_or_refused_in_one_line(data, argv, dks):
    build_and_end(data, argv, dks)


# Files of any bytes


def changed(content: bytes, number: int) -> bytes:
    """A file with a few bytes changed, put in or cut off, mostly where its header is."""
    draw, content = random.Random(number), bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(min(len(content), draw.choice([60, 400, 10 ** 9])) or 1)
        kind = draw.random()
        if kind < 0.7:
            content[at:at + 1] = [draw.choice([0, 1, 127, 255, draw.randrange(256)])]
        elif kind < 0.85:
            del content[at:]
        else:
            content[at:at] = draw.randbytes(3)
    return bytes(content)


def formats():
    image = bad_inputs.picture()
    names = ['png', 'jpeg', 'gif', 'tiff', 'bmp', 'ppm', 'ico', 'tga', 'dds', 'webp', 'jpeg2000', 'sgi', 'qoi', 'avif']
    return [bad_inputs.encoded(image, name) for name in names if name.upper() in Image.SAVE]


def read_changed(folder, count):
    """Good images and changed ones in turns: all of them come out, or give way."""
    kept = folder / 'a/good.png'
    kept.parent.mkdir()
    kept.write_bytes(bad_inputs.PNG)
    changed_file = folder / 'a/changed.png'
    for number, content in zip(range(count), itertools.cycle(formats())):
        changed_file.write_bytes(changed(content, number))
        images = Images(readers.create_reader('', str(folder)), 'RGB', 1)
        image, label = images[images.reader.filenames(basename=True).index('changed.png')]
        assert image.mode == 'RGB' and label == 0


def test_an_image_of_any_bytes_is_read_or_passed_over(tmp_path):
    read_changed(tmp_path, 300)


@pytest.mark.slow
def test_many_images_of_any_bytes_are_read_or_passed_over(tmp_path):
    read_changed(tmp_path, 20_000)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with data and a run on them, out/x."""
    root = make_data(tmp_path_factory.mktemp('trained'))  # noqa: F811
    main(*bad_inputs.Case('').command(root))
    return root


def resume_changed(root, capfd, count):  # noqa: F811
    whole = (root / 'out/x/last.pth.tar').read_bytes()
    command = bad_inputs.Case('', ['--experiment', 'y', '--resume', '{root}/changed.pth.tar']).command(root)
    for number in range(count):
        content = changed(whole, number)
        if content == whole:
            continue
        (root / 'changed.pth.tar').write_bytes(content)
        capfd.readouterr()
        with contextlib.suppress(SystemExit):
            main(*command)  # to the end, where the change is one that does not matter
            continue
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and f'--resume {root}/changed.pth.tar' in lines[0], lines


def test_a_checkpoint_of_any_bytes_is_refused_in_one_line(trained, capfd):
    resume_changed(trained, capfd, 8)


@pytest.mark.slow
def test_many_checkpoints_of_any_bytes_are_refused_in_one_line(trained, capfd):
    resume_changed(trained, capfd, 300)


# What a run leaves, and where

CLASSES = ['../../x', '<script>alert(1)</script>', '| a | b |', '# heading', '```', "'); import os; ('",
           '{{ 7 * 1111 }}', '\u202egnp', '%s', '---', '-b', 'x' * 200]


def files(root):  # noqa: F811
    return {path.relative_to(root) for path in root.rglob('*')}


def test_hostile_names_of_classes_and_folders_stay_names(tmp_path, monkeypatch):
    hostile = 'a | b\n# c ``` <script> {{ 7 * 1111 }}'
    names = [*(name.replace('/', '\u2215') for name in CLASSES), 'no text \udcff']
    make_data(tmp_path, names, (('train', 1), ('validation', 1)))
    (tmp_path / 'data').rename(tmp_path / hostile)
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    case = bad_inputs.Case('', [
        '--num-classes', str(len(names)), '--data-dir', '{root}/' + hostile, '--export-dir', '{root}/out/' + hostile])
    main(*case.command(tmp_path))
    assert all(path.is_relative_to('out') for path in files(tmp_path) - before)
    exported = tmp_path / 'out' / hostile
    assert sorted(json.loads((exported / 'config.json').read_text())['label_names']) == sorted(names)
    head, _, body = (exported / 'README.md').read_text()[4:].partition('---\n')
    assert yaml.safe_load(head)['model-index'][0]['results'][0]['dataset']['name'] == hostile
    prose = ''.join(re.split('(?m)^```', body)[::2])  # without the blocks of code
    headings = [line for line in prose.splitlines() if line.startswith('# ')]
    assert headings == [r'# test_resnet on a \| b # c ``` &lt;script> {{ 7 * 1111 }}']
    assert '<script>' not in prose and '7777' not in body
    tables = [line.replace(r'\|', '') for line in prose.splitlines() if line.startswith('|')]
    assert {line.count('|') for line in tables} == {3, 5}


def test_a_run_writes_into_its_folder_alone(trained):
    assert {path.parts[0] for path in files(trained)} <= {'data', 'out', 'changed.pth.tar'}
    assert {path.parts[0] for path in files(trained / 'out')} <= {'x', 'y'}


def test_resume_auto_passes_over_a_checkpoint_that_would_run_code(trained, caplog):
    newest = trained / 'out/x/checkpoint-9.pth.tar'
    saved('out/x/checkpoint-9.pth.tar', x=Payload)(trained)
    os.utime(newest, (2e9, 2e9))
    write('out/other/args.yaml', b'\xff\xfe')(trained)
    try:
        for argv in (['--experiment', 'x'], ['--experiment', '']):
            args, _, text = config.parse_args(bad_inputs.Case('', ['--resume', 'auto', *argv]).command(trained))
            found = checkpoint.find_resume(args, text)
            assert found == str(trained / 'out/x/last.pth.tar') or not args.experiment
        assert f'{newest} is not complete (holds something other than plain weights' in caplog.text
    finally:
        newest.unlink()
    assert not list(trained.rglob('PWNED'))


def test_a_payload_would_run_where_it_is_unpickled(tmp_path):
    """Else the tests of this file and of the list of bad inputs could not fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path)))
    (tmp_path / 'PWNED').unlink()
    saved('x.pth', x=Payload)(tmp_path)
    torch.load(tmp_path / 'x.pth', weights_only=False)
    assert (tmp_path / 'PWNED').exists()


def test_code_of_a_dataset_is_not_trusted_unless_the_command_line_says_so():
    assert config.parse_args([])[0].dataset_trust_remote_code is False
    assert config.parse_args(['--dataset-trust-remote-code'])[0].dataset_trust_remote_code is True
