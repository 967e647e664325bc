import importlib.metadata
import subprocess
import sys

import pytest

import dks_timm
from dks_timm.cli import main

PUBLIC = ['DKSLoss', 'DKSModel', 'DKSTask', 'create_dks_model', 'export', 'prune', 'push_to_hub', 'synergy_loss']


def run_python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_does_not_import_torch():
    assert run_python("import sys, dks_timm; print('torch' in sys.modules, 'timm' in sys.modules)") == 'False False\n'


@pytest.mark.parametrize('arguments', [
    ['--help'], ['export', '--help'], [], ['no-such-command'], ['export', 'a', 'b', '--no-such-flag'],
    ['inspect', 'resnet18', '--img-size', 'large'], ['validate', '--help'], ['validate', 'out', '--crop-pct', '3'],
])
def test_help_and_typos_of_the_console_script_are_answered_without_torch(arguments):
    assert run_python(f"""
import sys
from dks_timm.cli import main
try:
    main({arguments})
finally:
    print('torch' in sys.modules)
""").endswith('False\n')


@pytest.mark.parametrize('arguments, message', [
    ([], 'COMMAND'),
    (['no-such-command'], "invalid choice: 'no-such-command'"),
    (['export', 'a', 'b', '--no-such-flag'], '--no-such-flag'),
    (['export', 'no/such/file', 'out'], "'no/such/file' cannot be read: [Errno 2] No such file"),
])
def test_bad_invocation_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count('\n') == 1 and message in err


@pytest.mark.parametrize('name', PUBLIC)
def test_public_name_is_there(name):
    assert getattr(dks_timm, name).__name__ == name


def test_public_names_are_listed():
    assert set(dks_timm.__all__) == {'__version__', *PUBLIC}
    assert set(dks_timm.__all__) <= set(dir(dks_timm))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='no_such_name'):
        _ = dks_timm.no_such_name


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version('dks-timm')
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('compares with an installation; here the package is imported from a checkout without one')
    assert dks_timm.__version__ == installed
