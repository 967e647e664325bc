"""What is built from the project: an sdist and a wheel, and training from that wheel without a clone."""
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest
import timm

import dks_timm

ROOT = Path(__file__).parents[1]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'recipes').rglob('*.yaml'))
TRAIN = ['--config', 'quickstart', '--epochs', '1', '--warmup-epochs', '0', '--workers', '0', '--device', 'cpu']


def run(*words, cwd, code=0, **env):
    """Run a command and return what it prints, errors included."""
    env = {**os.environ, 'PYTHONPATH': '', **env}
    out = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert out.returncode == code, out.stdout
    return out.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The sdist and the wheel of what git tracks, built in a copy so that the checkout stays clean."""
    for name in ('build', 'hatchling', 'twine'):
        pytest.importorskip(name, reason='pip install -e ".[test]"')
    if not (ROOT / '.git').exists():
        pytest.skip('only a clone knows which of its files are the project\'s')
    copy, dist = (tmp_path_factory.mktemp(name) for name in ('copy', 'dist'))
    for name in run('git', 'ls-files', cwd=ROOT).splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, cwd=copy)
    sdist, wheel = dist / f'dks_timm-{dks_timm.__version__}.tar.gz', next(dist.glob('*.whl'))
    assert sorted(dist.iterdir()) == sorted([sdist, wheel])
    return sdist, wheel


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    """A folder with what the wheel installs, without its dependencies."""
    folder = tmp_path_factory.mktemp('installed')
    pip = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', folder]
    run(*pip, built[1], cwd=folder)
    return folder


def test_sdist_and_wheel_pass_twine_check(built):
    assert run(sys.executable, '-m', 'twine', 'check', '--strict', *built, cwd=ROOT).count('PASSED') == 2


def test_the_wheel_has_train_py_the_card_and_all_recipes_and_no_tests(installed):
    for name in ('train.py', 'MODEL_CARD.md', *RECIPES):
        path = installed / 'dks_timm' / name
        assert path.is_file() and not path.is_symlink() and path.read_bytes() == (ROOT / name).read_bytes()
    assert {path.name.partition('-')[0] for path in installed.iterdir()} == {'bin', 'dks_timm'}
    assert not list(installed.rglob('test*'))


def test_train_py_is_in_the_package_by_a_link_so_that_there_is_one_source():
    assert (ROOT / 'dks_timm/train.py').resolve() == ROOT / 'train.py'


def test_the_quickstart_trains_from_the_wheel_and_exports_what_timm_loads(installed, tmp_path):
    env = dict(PYTHONPATH=str(installed))
    where = run(sys.executable, '-c', 'import dks_timm; print(dks_timm.__file__)', cwd=tmp_path, **env)
    assert Path(where.strip()) == installed / 'dks_timm/__init__.py'
    launch = ['-m', 'accelerate.commands.launch', '--cpu', '-m', 'dks_timm.train']
    run(sys.executable, *launch, *TRAIN, cwd=tmp_path, **env)
    model = timm.create_model(f'local-dir:{tmp_path}/output/quickstart/model', pretrained=True)
    assert model.num_classes == 10
    # The card is written by the template of the wheel, and tells the command.
    assert 'dks-timm train --config quickstart' in (tmp_path / 'output/quickstart/model/README.md').read_text()


@pytest.mark.parametrize(('program', 'name', 'words'), [
    (['-m', 'dks_timm.train'], 'quikstart', 'no recipe has that name; closest: quickstart'),
    (['{installed}/bin/dks-timm', 'train'], 'resnet20.yaml', 'closest: cifar100/resnet20'),
])
def test_an_unknown_recipe_is_one_line_with_the_closest_names(program, name, words, installed, tmp_path):
    program = [word.format(installed=installed) for word in program]
    said = run(sys.executable, *program, '--config', name, cwd=tmp_path, code=2, PYTHONPATH=str(installed))
    assert said.startswith(f'train.py: error: --config {name}: ') and words in said and said.count('\n') == 1


def test_a_wheel_without_recipes_says_so_in_one_line(installed, tmp_path):
    shutil.copytree(installed / 'dks_timm', tmp_path / 'dks_timm', ignore=shutil.ignore_patterns('recipes'))
    (tmp_path / 'recipes').mkdir()  # of another package, beside it
    (tmp_path / 'recipes/soup.yaml').write_text('salt: 1')
    said = run(
        sys.executable, '-m', 'dks_timm.train', '--config', 'soup', cwd=tmp_path, code=2, PYTHONPATH=str(tmp_path))
    assert 'this dks_timm has no recipes; give the path of a YAML file' in said and said.count('\n') == 1


@pytest.mark.slow
def test_a_fresh_environment_trains_validates_exports_and_loads_with_the_wheel_alone(built, tmp_path):
    """Downloads the dependencies: minutes, the network, and gigabytes of disk, which are given back."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        programs = Path(folder, 'bin')
        run(programs / 'pip', 'install', '--quiet', f'{built[1]}[demo]', cwd=tmp_path)
        run(programs / 'dks-timm', 'train', '--config', 'quickstart', '--epochs', '1', cwd=tmp_path)
        best = 'output/quickstart/model_best.pth.tar'
        run(programs / 'dks-timm', 'export', best, 'exported', cwd=tmp_path)
        assert 'backbone' in run(programs / 'dks-timm', 'validate', 'exported', '--dataset', 'digits', cwd=tmp_path)
        load = "import timm; print(timm.create_model('local-dir:exported', pretrained=True).num_classes)"
        assert run(programs / 'python', '-c', load, cwd=tmp_path).endswith('10\n')
