"""The commands that a run suggests at its end."""
import shlex

import pytest

from dks_timm import cli
from dks_timm.publishing import publish
from dks_timm.training import config


@pytest.mark.parametrize('flags, commands', [
    ([], ['report a/run', "export a/run/model_best.pth.tar a/run/export", 'push a/run/export OWNER/NAME']),
    (['--keep-branches', '--model-ema', '--model-ema-force-cpu', '--no-hub-private'], [
        'report a/run', 'export a/run/model_best.pth.tar a/run/export --no-ema --keep-branches',
        'push a/run/export OWNER/NAME --no-hub-private']),
    (['--card-license', 'mit', '--card-baseline', 'b'], [
        'report a/run', 'export a/run/model_best.pth.tar a/run/export --card-license mit --card-baseline b',
        'push a/run/export OWNER/NAME']),
    (['--export-dir', 'out/my net'], ['report a/run', "push 'out/my net' OWNER/NAME"]),
    (['--push-to-hub', 'me/net'], ['report a/run']),
])
def test_the_next_commands_are_those_that_flags_have_not_done(flags, commands, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'x')  # else --push-to-hub is refused
    args, _, _ = config.parse_args(['--dks', *flags])
    title, *lines = publish.next_steps(args, 'a/run').splitlines()
    assert title == 'Next:'
    assert [line.strip() for line in lines] == [f'dks-timm {command}' for command in commands]
    for line in lines:
        cli._create_parser().parse_args(shlex.split(line)[1:])
