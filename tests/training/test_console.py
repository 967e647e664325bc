"""What a run shows while it trains: a bar on a terminal, lines elsewhere."""
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
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.train import image_folder, main

from dks_timm.errors import LogFormatter
from dks_timm.training.console import Bar, Progress, Speed

MEANS = dict(loss=1.25, top1_backbone=50., top1_stage2=40.)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def moments(text, columns):
    """What a terminal shows of a text whenever the cursor goes back, and at the end: lists of lines."""
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
    with Progress(SimpleNamespace(is_main_process=main), 0, 2, updates, log_interval=3) as progress:
        for i in range(updates):
            if progress.step(last=i == updates - 1):
                progress.show(MEANS, [dict(lr=0.1)], images=8 * progress.done)
            between(i)


def test_progress_is_a_line_now_and_then_where_nobody_watches(caplog, capsys):
    with caplog.at_level(logging.INFO):
        show_progress(5)
    assert [m.partition(':')[0] for m in caplog.messages] == ['Epoch 0 [1/5]', 'Epoch 0 [4/5]', 'Epoch 0 [5/5]']
    for word in ('loss 1.2500', 'backbone 50.0', 'stage2 40.0', 'images/s', 'left', 'lr 0.1'):
        assert word in caplog.messages[-1]
    assert 'Epoch' not in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal_and_leaves_nothing(terminal):
    screen = terminal(80)
    show_progress(5)
    assert not any(screen.close())
    bar, below = next(moment for moment in reversed(screen.moments) if 'loss' in ''.join(moment))
    assert re.fullmatch(r'100%\|█{10}\| Epoch 0, \d+ images/s, \d:\d\d:\d\d left', bar)
    assert below.split(', ') == ['  loss 1.2500', 'train top-1 backbone 50.0', 'stage2 40.0', 'lr 0.1']


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
    assert sum('%|' in '\n'.join(moment[-2:]) for moment in screen.moments) >= 4
    for moment in screen.moments:  # one bar at most, and below all lines
        bars = [i for i, line in enumerate(moment) if '%|' in line]
        assert not bars or bars == [len(moment) - 2] or bars == [len(moment) - 1], moment


def test_a_bar_without_text_below_it_says_how_long_it_takes(terminal):
    screen = terminal(60)
    with Bar(Accelerator(cpu=True), 'Evaluation, {remaining} left', 2) as bar:
        bar.update()
        bar.update()
    assert not any(screen.close())
    assert any(re.match(r' +0%\|.*Evaluation, .* left', line) for moment in screen.moments for line in moment)


def test_speed_is_that_of_the_images_since_the_run_was_resumed():
    speed = Speed()
    assert speed.average == speed.last == 0
    speed.add(SimpleNamespace(done=6, done_before=2, seconds=4.), images=60)
    assert speed.average == speed.last == 10
    speed.add(SimpleNamespace(done=6, done_before=0, seconds=1.), images=60)
    assert speed.average == 20 and speed.last == 60
    speed.add(SimpleNamespace(done=6, done_before=6, seconds=1.), images=60)  # nothing was left to train
    assert speed.average == 20


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
    for words in ('Epoch 0, ', 'Epoch 1, ', 'images/s', 'Evaluation, '):
        assert any(words in line for line in seen)
    below = [line for moment in screen.moments for line in moment if line.startswith('  loss ')]
    assert all(name in below[-1] for name in ('backbone', 'stage2', 'stage3'))
