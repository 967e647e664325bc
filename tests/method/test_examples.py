"""The examples in docstrings."""
import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize('name', ['loss', 'model', 'create', 'task'])
def test_examples_of_docstrings_print_what_they_show(name):
    found = doctest.testmod(import_module(f'dks_timm.method.{name}'))
    assert found.attempted and not found.failed
