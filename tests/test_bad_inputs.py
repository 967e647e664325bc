"""Bad files, folders, labels and command lines: each is trained through, with its name in a warning, or refused."""
import re
import signal
import sys
from pathlib import Path

import pytest
from helpers.bad_inputs import CASES, ENDED, RAN, REFUSED
from helpers.train import main

from dks_timm import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def at_most_a_minute():
    def stop(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def end(case, root):
    """Run a case; its exit code."""
    argv = case.command(root)
    if argv[:1] == ['dks-timm']:
        return cli.main(argv[1:])
    try:
        main(*argv)
    except SystemExit as e:
        if isinstance(e.code, str):  # as Python does
            print(e.code, file=sys.stderr)
            return ENDED
        return e.code
    return RAN


@pytest.mark.parametrize('case', [pytest.param(case, id=case.name[:60]) for case in CASES])
def test_a_bad_input_gets_what_it_should(root, capfd, case, at_most_a_minute):
    case.make(root)
    assert end(case, root) == case.code
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith('  warnings.warn')]
    said = lines if case.code == RAN else lines[-1:]
    for word in case.expected(root):
        assert any(word in line for line in said), said
    if case.code == RAN:
        assert bool(case.words) == any('Bad image' in line or '16 bits' in line for line in lines)
        assert (root / 'out/x/last.pth.tar').exists()
    if case.code == REFUSED:
        assert len(lines) == 1, lines
        assert not (root / 'out/x').exists()
    assert not list(root.rglob('PWNED'))


def test_the_written_table_has_every_bad_input_with_its_exit_code():
    table = (ROOT / 'results/reliability/bad_inputs.md').read_text()
    codes = [int(code) for code in re.findall(r'^\| .*? \| (\d+) \| .*\|$', table, re.MULTILINE)]
    assert codes == [case.code for case in CASES]


def test_the_page_of_faults_names_tests_and_scripts_that_are_there():
    page = (ROOT / 'results/reliability.md').read_text()
    tests = re.findall(r'(tests/[\w/]+\.py)::(\w+)', page)
    assert len(tests) > 20
    for file, name in tests:
        assert f'def {name}(' in (ROOT / file).read_text(), name
    for file in re.findall(r'(?:tests|benchmarks)/\w+\.py|(?<=\()reliability/\w+\.md', page):
        assert (ROOT / file).exists() or (ROOT / 'results' / file).exists(), file
