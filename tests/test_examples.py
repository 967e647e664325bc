"""The examples in the docstrings of public names."""
import doctest

import pytest
from helpers.hub_server import HubServer, use

import dks_timm


@pytest.mark.parametrize('name', dks_timm.__all__[1:])
def test_the_example_of_a_public_name_prints_what_it_shows(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with HubServer() as hub:
        use(hub, monkeypatch, tmp_path / 'home')
        test, *_ = doctest.DocTestFinder(recurse=False).find(getattr(dks_timm, name), name, globs={})
        for example in test.examples:
            example.source = example.source.replace('owner/name', 'alice/net')
        result = doctest.DocTestRunner().run(test)
    assert result.attempted and not result.failed
