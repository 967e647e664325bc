"""The console script `dks-timm`."""
import json

import pytest

from dks_timm.cli import main


def test_train_is_listed_and_has_the_help_of_train_py(capsys):
    for arguments, words in ((['--help'], ['usage: dks-timm', '\n    train ']),
                             (['train', '--help'], ['usage: train.py', '--dks-synergy-weight'])):
        with pytest.raises(SystemExit) as e:
            main(arguments)
        out = capsys.readouterr().out
        assert not e.value.code and all(word in out for word in words)


def test_inspect_prints_tables(capsys):
    assert main(['inspect', 'resnet10t', '--num-classes', '7', '--img-size', '64', '--dks-stages', '3']) == 0
    out = capsys.readouterr().out
    assert 'resnet10t, 7 classes, 64x64 images' in out and 'branch 1' in out and 'branch 2' not in out


def test_inspect_prints_json(capsys):
    assert main(['inspect', 'resnet10t', '--json', '--dks-branches', 'conv']) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c['kind'] for c in found['classifiers']] == ['ResNet', 'conv', 'conv']


@pytest.mark.parametrize(('flags', 'message'), [
    (['resnet81'], 'MODEL resnet81: timm has no such model; closest: resnet18'),
    (['resnet10t', '--dks-stages', '4'], '--dks-stages has 4, which is none before the last'),
    (['resnet10t', '--dks-stages', '7'], '--dks-stages has 7, which is none before the last'),
    (['resnet10t', '--dks-budget', '1.001'], '--dks-budget is 1.001, but the cheapest'),
    (['resnet10t', '--dks-branches', 'tial'], '--dks-branches'),
    (['qwen3_vit_88m_enc'], 'qwen3_vit_88m_enc cannot classify'),
    (['resnet10t', '--model-kwargs', 'layerz=1'], 'layerz'),
    (['resnet10t', '--dks-branch-kwargs', 'layerz=1'], 'resnet10t cannot be made with layerz=1: '),
])
def test_inspect_refuses_bad_input_in_one_line(flags, message, capsys):
    assert main(['inspect', *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count('\n') == 1 and not captured.out
