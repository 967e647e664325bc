"""The console of a run: a bar on a terminal, lines elsewhere, a table at its end."""
import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.train import image_folder, main

from dks_timm.errors import LogFormatter
from dks_timm.training.console import Progress, cost_text, outcome_table, peak_memory, training_text

MEANS = dict(loss=1.25, top1_backbone=50., top1_stage2=40.)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def moments(text, columns):
    """Return the screens of a terminal that prints a text, each time the cursor goes back and at the end, as lines."""
    grid, row, column, found = [[]], 0, 0, []
    for sign in re.findall(r'\x1b\[[A-Z]|[^\x1b]', text):
        if sign in ('\r', '\x1b[A'):
            found.append([''.join(line).rstrip() for line in grid])
        if sign == '\r':
            column = 0
        elif sign == '\n':
            row += 1
        elif sign == '\x1b[A':
            row -= 1
        elif sign == '\x1b[J':
            del grid[row + 1:], grid[row][column:]
        else:
            assert len(sign) == 1, sign
            if column == columns:
                row, column = row + 1, 0
            while len(grid) <= row:
                grid.append([])
            grid[row] += [' '] * (column + 1 - len(grid[row]))
            grid[row][column] = sign
            column += 1
        while len(grid) <= row:
            grid.append([])
    return [*found, [''.join(line).rstrip() for line in grid]]


class Terminal:
    """A pseudo-terminal in the place of stderr.

    Attributes:
        moments: What stood on its screen whenever the cursor went back; after `close` its end.
    """

    def __init__(self, columns):
        self.columns = columns
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
        self.stderr = os.fdopen(self.slave, 'w', buffering=1, encoding='utf-8')
        self.received = b''
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        try:
            while more := os.read(self.master, 4096):
                self.received += more
        except OSError:  # nobody holds the other side any more
            pass

    def close(self):
        self.stderr.close()
        self.reader.join()
        os.close(self.master)
        self.moments = moments(self.received.decode(), self.columns)
        return self.moments[-1]


@pytest.fixture
def terminal(monkeypatch):
    opened = []

    def open_terminal(columns=100):
        opened.append(Terminal(columns))
        monkeypatch.setattr(sys, 'stderr', opened[0].stderr)
        handler = logging.StreamHandler()
        handler.setFormatter(LogFormatter())
        monkeypatch.setattr(logging.root, 'handlers', [handler])
        monkeypatch.setattr(logging.root, 'level', logging.INFO)
        return opened[0]

    yield open_terminal
    if opened and not opened[0].stderr.closed:
        opened[0].close()


def show_progress(updates, between=lambda i: None, main=True):
    Accelerator(cpu=True)  # tqdm asks for its state
    with Progress(SimpleNamespace(is_main_process=main), 'Epoch 0', updates) as progress:
        for i in range(updates):
            progress.step()
            progress.show(training_text(MEANS, lr=0.1, images_per_second=80., seconds_left=90.))
            between(i)


def test_progress_is_lines_where_nobody_watches(caplog, capsys):
    with caplog.at_level(logging.INFO):
        show_progress(2)
    text = 'loss 1.2500, 80 images/s, 0:01:30 left, train top-1 backbone 50.0, stage2 40.0, lr 0.1'
    assert caplog.messages == [f'Epoch 0 [1/2]: {text}', f'Epoch 0 [2/2]: {text}']
    assert 'Epoch' not in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal_and_leaves_nothing(terminal):
    screen = terminal(150)
    show_progress(5)
    assert not any(screen.close())
    bar, = next(moment for moment in reversed(screen.moments) if 'loss' in ''.join(moment))
    assert re.fullmatch(r'Epoch 0: 100%\|█{10}\| [\d:]+ left, loss 1.2500, .*lr 0.1', bar)


@pytest.mark.parametrize('columns', [20, 40, 41, 100])
def test_log_lines_and_warnings_stay_whole_above_the_bar(terminal, columns):
    def interrupt(i):
        logging.getLogger('x').info(f'line {i}')
        warnings.warn(f'warning {i}', stacklevel=1)
        sys.stderr.flush()

    screen = terminal(columns)
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        show_progress(4, interrupt)
    end = '\n'.join(screen.close())
    said = [int(number) for number in re.findall(r'^(?:line |WARNING: )(\d)?', end, re.MULTILINE) if number]
    assert said == [0, 1, 2, 3] and '%|' not in end and 'loss' not in end
    assert sum('%|' in moment[-1] for moment in screen.moments) >= 4
    for moment in screen.moments:  # one bar at most, and below all lines
        bars = [i for i, line in enumerate(moment) if '%|' in line]
        assert not bars or bars == [len(moment) - 1], moment


def test_other_processes_than_the_main_one_show_nothing(terminal):
    screen = terminal()
    show_progress(5, main=False)
    screen.close()
    assert not screen.received


def test_a_run_shows_training_and_evaluation_and_keeps_the_lines_of_its_workers_whole(terminal, tmp_path):
    data = image_folder(tmp_path / 'data')
    for broken in ('train/0/3.png', 'validation/1/5.png'):
        (data / broken).write_bytes(b'no image')
    screen = terminal(600)
    main('--data-dir', data, '--num-classes', 2, '--img-size', 32, '--device', 'cpu', '--workers', 1, '-b', 4,
         '--epochs', 2, '--model', 'test_resnet', '--dks', '--lr', 0.01, '--no-aug', '--output', tmp_path)
    end = screen.close()
    assert [line for line in end if '%|' in line or 'images/s' in line] == []
    bad = [line for line in end if 'Bad image' in line]
    assert [re.sub(r'(image )\S*/(\w+/\d/\d)', r'\1\2', line).partition('.png: ')[0] for line in bad] == [
        'WARNING: Bad image train/0/3', 'WARNING: Bad image validation/1/5']
    assert all(line.endswith('.') for line in bad)
    assert [line.partition(':')[0] for line in end if line.startswith('Epoch')] == ['Epoch 0', 'Epoch 1']
    seen = [line for moment in screen.moments for line in moment if '%|' in line]
    for words in ('Epoch 0: ', 'Epoch 1: ', 'images/s', 'Evaluation: ', 'backbone', 'stage2', 'stage3'):
        assert any(words in line for line in seen)


ROWS = [
    {'epoch': str(epoch), 'train_loss': '3.0', 'eval_loss': str(1 / top1), 'eval_top1': str(top1),
     'eval_top1_stage1': str(top1 - 1), 'eval_loss_stage1': '0.5', 'eval_top1_ensemble': str(top1 + 1)}
    for epoch, top1 in enumerate([50., 62.5, 60.])]


def test_the_table_has_every_head_in_the_best_and_in_the_last_epoch():
    assert outcome_table(ROWS, ['backbone', 'stage1'], 1, {}).splitlines() == [
        '                        Best epoch 1                Last epoch 2',
        '               top-1 %          loss       top-1 %          loss',
        'backbone         62.50        0.0160         60.00        0.0167',
        'stage1           61.50        0.5000         59.00        0.5000',
        'ensemble         63.50                       61.00',
    ]


def test_the_table_of_a_plain_run_has_its_model_alone_and_without_evaluation_its_training_loss():
    table = outcome_table(ROWS, ['backbone'], 1, {}).splitlines()
    assert [line.split()[0] for line in table] == ['Best', 'top-1', 'model']
    rows = [{'epoch': '0', 'train_loss': '2.5', 'lr': '0.1'}, {'epoch': '1', 'train_loss': '1.25', 'lr': '0.1'}]
    assert outcome_table(rows, ['backbone', 'stage1'], 0, {}).splitlines()[1:] == [
        '            train loss    train loss', 'backbone        2.5000        1.2500']


def test_beside_an_average_the_table_has_the_weights_themselves_where_they_were_evaluated():
    assert outcome_table(ROWS, ['backbone'], 1, {2: dict(top1=70., loss=0.25)}).splitlines()[2:] == [
        'model               62.50        0.0160         60.00        0.0167',
        'without EMA                                     70.00        0.2500',
    ]


def test_an_epoch_that_the_summary_does_not_have_is_not_shown_as_the_best():
    assert 'Best epoch 2' in outcome_table(ROWS, ['backbone'], None, {})


def test_what_a_run_took_is_said_in_a_line():
    before, _ = peak_memory(torch.device('cpu'))
    block = torch.ones(64, 2 ** 20)  # 256 MiB, written to
    after, where = peak_memory(torch.device('cpu'))
    assert where == 'memory' and after >= block.nbytes and after >= before
    line = cost_text(3725.4, 1234.5, torch.device('cpu'))
    assert line.startswith('1:02:05 in all, 1,234 images/s in training, at most ') and line.endswith(' MiB of memory')
    assert 'images/s' not in cost_text(1., 0., torch.device('cpu'))
    assert cost_text(1., 0., torch.device('cpu'), processes=2).endswith('in the first process')


def test_on_a_gpu_memory_is_that_of_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 3 * 2 ** 30)
    assert cost_text(1., 0., torch.device('cuda')) == '0:00:01 in all, at most 3,072 MiB of GPU memory'
