#!/usr/bin/env python3
"""The loop of train.py on synthetic data against the bare training step of step.py: images/s of both, within one run.

    python benchmarks/loop.py                                # writes results/speed/loop-cpu.md, on a GPU loop-cuda.md
    python benchmarks/loop.py --models resnet18:64:32 --turns 20
    python benchmarks/loop.py -- --amp --channels-last       # flags of train.py, for both
    python benchmarks/loop.py --operations                   # also prints what the loop does beyond the step

train.py and the step take turns in one process: some updates of its first epoch up to a line of progress, then as many
bare steps. Start-up, evaluation and checkpoints are not in it; loading, counting and the line are. A model is given as
NAME:SIZE:BATCH.
"""
import argparse
import contextlib
import io
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from step import Step, describe_machine
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
MODELS = dict(
    cpu=['test_resnet:32:16', 'resnet18:64:32', 'resnet50:160:4'],
    cuda=['resnet18:64:1024', 'resnet50:160:256', 'resnet50:224:256'],
)
VARIANTS = {'plain': [], 'DKS': ['--dks']}


class Operations(TorchDispatchMode):
    """Counts the operations on tensors by name, without views and allocations, and those that read one on the host.

    Attributes:
        counts: Of each operation.
        reads: How often a value was asked for. On a GPU each time is one that the host waits for it.
    """
    READING = ('_local_scalar_dense', 'equal', 'nonzero', 'masked_select', '_unique2')

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.reads = 0
        self._conversions = _Conversions(self)

    def __enter__(self):
        self._conversions.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._conversions.__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition('::')[2].partition('.')[0]
        masked = name == 'index' and any(t is not None and t.dtype == torch.bool for t in args[1])
        self.reads += masked or name in self.READING
        if not (func.is_view or name.startswith(('empty', 'new_empty', 'detach', 'lift'))):
            self.counts[name] += 1
        return func(*args, **kwargs or {})


class _Conversions(TorchFunctionMode):
    """Sees what does not come to a dispatch mode: a tensor that turns into numbers as a whole."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.operations.reads += func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
        return func(*args, **kwargs or {})


class Turns(logging.Handler):
    """Hears every line of progress of train.py: takes its time since the last one, and then that of bare steps.

    Args:
        step: The bare step.
        updates: Of train.py between two lines, and calls of the step.
        turns: After so many, operations are counted during one more.
    """

    def __init__(self, step, updates, turns):
        super().__init__()
        self.step, self.updates, self.turns = step, updates, turns
        self.on_cpu = step.device.type == 'cpu'
        self.seconds = []  # of an update of train.py, of a step; the first turn, which warms up, is left out
        self.lines = 0

    def emit(self, record):
        if not record.getMessage().startswith('Epoch 0 ['):
            return
        now = self.now()
        self.lines += 1
        if self.lines == self.turns + 3:
            self.stop_counting()
            return
        if self.lines > 1:
            begin = self.now()
            for _ in range(self.updates):
                self.step()
            end = self.now()
            if self.lines > 2:
                self.seconds.append(((now - self.begin) / self.updates, (end - begin) / self.updates))
        if self.lines == self.turns + 2:
            self.start_counting()
        self.begin = self.now()

    def now(self):
        """Seconds of this process and all its threads on a CPU, by the clock on the wall on a GPU."""
        if self.on_cpu:
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    def start_counting(self):
        self.waits = contextlib.ExitStack()
        if torch.cuda.is_available():  # what really makes the host wait, which the names of operations do not tell
            self.warned = self.waits.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            self.waits.callback(torch.cuda.set_sync_debug_mode, 'default')
        self.loop_operations = self.waits.enter_context(Operations())

    def stop_counting(self):
        self.waits.close()
        with Operations() as self.step_operations:
            self.step()
        # The line of progress reads too, but less often than there are updates.
        reads = self.loop_operations.reads
        if torch.cuda.is_available():
            reads = sum('synchroniz' in str(w.message) for w in self.warned)
        self.reads = reads // self.updates


def measure(case, variant, args):
    """What one model gives in one process: (row of the table, operations of the loop beyond those of the step)."""
    sys.path.insert(0, str(ROOT))
    import train
    torch.set_num_threads(args.threads)
    model, size, batch = case.split(':')
    flags = [
        '--model', model, '--img-size', size, '--batch-size', batch, '--device', args.device, '--opt', 'momentum',
        '--lr', '0.001', *VARIANTS[variant], *args.flags]
    turns = Turns(Step(flags), args.updates, args.turns)
    logging.getLogger('dks_timm.training.console').addHandler(turns)
    samples = int(batch) * (args.updates * (args.turns + 2) + 1)
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as output, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said),
    ):
        train.main([
            *flags, '--dataset', 'synthetic', '--train-num-samples', str(samples), '--val-split', '', '--epochs', '1',
            '--workers', str(args.workers), '--log-interval', str(args.updates), '--output', output])
    ratios = sorted(step / loop for loop, step in turns.seconds)
    loop, step = (statistics.median(s) for s in zip(*turns.seconds, strict=True))
    extra = Counter({
        name: count / args.updates - turns.step_operations.counts[name]
        for name, count in turns.loop_operations.counts.items()})
    row = (
        f'| {model} | {size} | {batch} | {variant} | {int(batch) / step:.1f} | {int(batch) / loop:.1f} | '
        f'{statistics.median(ratios):.3f} | {ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f} | '
        f'{turns.step_operations.counts.total()} | {sum(extra.values()):.0f} | {turns.reads} |'
    )
    return row, [f'    {count:6.1f} {name}' for name, count in extra.most_common() if abs(count) >= 0.5]


def create_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], epilog='Arguments after -- go to train.py.')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--models', nargs='+', metavar='NAME:SIZE:BATCH')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument('--updates', type=int, metavar='N', help='updates of a turn, 4 on a CPU, 50 on a GPU')
    parser.add_argument('--turns', type=int, default=10, metavar='N')
    parser.add_argument('--threads', type=int, default=1, metavar='N', help='of the process')
    parser.add_argument('--workers', type=int, metavar='N', help='of the loader, 0 on a CPU, 8 on a GPU')
    parser.add_argument('--operations', action='store_true', help='print what the loop does beyond the step')
    parser.add_argument('--results', type=Path, metavar='FILE', help='file to write')
    return parser


def main():
    argv = sys.argv[1:]
    flags = []
    if '--' in argv:
        argv, flags = argv[:argv.index('--')], argv[argv.index('--') + 1:]
    args = create_parser().parse_args(argv)
    args.flags = flags
    on_cpu = args.device == 'cpu'
    if args.updates is None:
        args.updates = 4 if on_cpu else 50
    if args.workers is None:
        args.workers = 0 if on_cpu else 8
    clock = 'process time of all threads' if on_cpu else 'wall time'
    lines = [
        f'# The loop on a {"CPU" if on_cpu else "GPU"}', '',
        f'`python benchmarks/loop.py {" ".join(sys.argv[1:])}`'.replace(' `', '`'), '',
        f'{describe_machine(args.device, args.threads)}, {args.workers} workers. Images/s by {clock}; ratio: that of '
        f'train.py over that of the bare step, the median of {args.turns} turns of {args.updates} updates, and their '
        'middle half. Operations: calls into torch of one update that compute something, a GPU\'s launches. Reads: '
        'values that an update asks the device for, and waits.', '',
        '| model | size | batch | | step, images/s | train.py, images/s | ratio | middle half | operations of the step '
        '| more in train.py | reads |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for case in args.models or MODELS[torch.device(args.device).type]:
        for variant in args.variants:
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                row, extra = pool.submit(measure, case, variant, args).result()
            print(row, *(extra if args.operations else ()), sep='\n', flush=True)
            lines.append(row)
    path = args.results or ROOT / 'results' / 'speed' / f'loop-{torch.device(args.device).type}.md'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
