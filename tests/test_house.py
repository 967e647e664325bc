"""The order of the house: which folder may use which, without a circle, also none within a function."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'dks_timm'
# Each folder may use itself and those before it; errors, _compat and models are used by all.
ORDER = ('errors', '_compat', 'models', 'method', 'training', 'runs', 'publishing', 'train', 'cli')
MODULES = {
    '.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__'): path
    for path in PACKAGE.rglob('*.py')}


def imports(name):
    """Yield the modules of the package that one imports, anywhere in its text; names of the package are no modules."""
    parts = [*name.split('.'), 'x'] if MODULES[name].name == '__init__.py' else name.split('.')
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found = [[alias.name.removeprefix('dks_timm.')] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or '').removeprefix('dks_timm').lstrip('.')
            if node.level:
                base = '.'.join([*parts[:-node.level], *([base] if base else [])])
            found = [[f'{base}.{alias.name}'.lstrip('.'), base] for alias in node.names]
        else:
            continue
        for candidates in found:
            yield from [candidate for candidate in candidates if candidate in MODULES][:1]


@pytest.mark.parametrize('name', sorted(set(MODULES) - {'__init__'}))
def test_a_module_imports_its_own_folder_and_those_below(name):
    floor = ORDER.index(name.partition('.')[0])
    for other in imports(name):
        assert ORDER.index(other.partition('.')[0]) <= floor, f'{name} imports {other}'


def test_no_import_goes_in_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, ' <- '.join([*path[path.index(name):], name])
        if name in done:
            return
        path.append(name)
        for other in imports(name):
            visit(other)
        done.add(path.pop())

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: path.stem)
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize('path', sorted((ROOT / 'tests').rglob('*.py')), ids=lambda path: path.stem)
def test_no_test_file_is_imported_by_another(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, 'module', None) or '', *(alias.name for alias in node.names)]
            assert not [name for name in names if name.rpartition('.')[2].startswith('test_')]
