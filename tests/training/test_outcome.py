"""What a run says at its end."""
import shlex

import pytest
import torch

from dks_timm import cli
from dks_timm.publishing import publish
from dks_timm.training import config
from dks_timm.training.outcome import cost_line, outcome_table, peak_memory

ROWS = [
    {'epoch': str(epoch), 'train_loss': '3.0', 'eval_loss': str(1 / top1), 'eval_top1': str(top1),
     'eval_top1_stage1': str(top1 - 1), 'eval_loss_stage1': '0.5', 'eval_top1_ensemble': str(top1 + 1)}
    for epoch, top1 in enumerate([50., 62.5, 60.])]


def test_the_table_has_every_head_in_the_best_and_in_the_last_epoch():
    assert outcome_table(ROWS, ['backbone', 'stage1'], best_epoch=1).splitlines() == [
        '                        Best epoch 1                Last epoch 2',
        '               top-1 %          loss       top-1 %          loss',
        'backbone         62.50        0.0160         60.00        0.0167',
        'stage1           61.50        0.5000         59.00        0.5000',
        'ensemble         63.50                       61.00',
    ]


def test_the_table_of_a_plain_run_has_its_model_alone_and_without_evaluation_its_training_loss():
    table = outcome_table(ROWS, ['backbone'], best_epoch=1).splitlines()
    assert [line.split()[0] for line in table] == ['Best', 'top-1', 'model']
    rows = [{'epoch': '0', 'train_loss': '2.5', 'lr': '0.1'}, {'epoch': '1', 'train_loss': '1.25', 'lr': '0.1'}]
    assert outcome_table(rows, ['backbone', 'stage1'], best_epoch=0).splitlines()[1:] == [
        '            train loss    train loss', 'backbone        2.5000        1.2500']


def test_beside_an_average_the_table_has_the_weights_themselves_where_they_were_evaluated():
    assert outcome_table(ROWS, ['backbone'], 1, {2: dict(top1=70., loss=0.25)}).splitlines()[2:] == [
        'model               62.50        0.0160         60.00        0.0167',
        'without EMA                                     70.00        0.2500',
    ]


def test_an_epoch_that_the_summary_does_not_have_is_not_shown_as_the_best():
    assert 'Best epoch 2' in outcome_table(ROWS, ['backbone'], best_epoch=None)


def test_what_a_run_took_is_said_in_a_line():
    before, _ = peak_memory(torch.device('cpu'))
    block = torch.ones(64, 2 ** 20)  # 256 MiB, written to
    after, where = peak_memory(torch.device('cpu'))
    assert where == 'memory' and after >= block.nbytes and after >= before
    line = cost_line(3725.4, 1234.5, torch.device('cpu'))
    assert line.startswith('1:02:05 in all, 1,234 images/s in training, at most ') and line.endswith(' MiB of memory')
    assert 'images/s' not in cost_line(1., 0., torch.device('cpu'))
    assert cost_line(1., 0., torch.device('cpu'), processes=2).endswith('in the first process')


def test_on_a_gpu_memory_is_that_of_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 3 * 2 ** 30)
    assert cost_line(1., 0., torch.device('cuda')) == '0:00:01 in all, at most 3,072 MiB of GPU memory'


@pytest.mark.parametrize('flags, commands', [
    ([], ['report a/run', "export a/run/model_best.pth.tar a/run/export", 'push a/run/export OWNER/NAME']),
    (['--keep-branches', '--model-ema', '--model-ema-force-cpu', '--no-hub-private'], [
        'report a/run', 'export a/run/model_best.pth.tar a/run/export --no-ema --keep-branches',
        'push a/run/export OWNER/NAME --no-hub-private']),
    (['--export-dir', 'out/my net'], ['report a/run', "push 'out/my net' OWNER/NAME"]),
    (['--export-dir', 'out/net', '--push-to-hub', 'me/net'], ['report a/run']),
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
