#!/usr/bin/env python3
"""All tables of results/speed.md for one device, one benchmark after another.

    python benchmarks/speed.py                    # on a GPU; its tables are results/speed/*-cuda.md
    python benchmarks/speed.py --minutes 30       # what can be done by then; the same command goes on later
    python benchmarks/speed.py --device cpu

The loss and the step keep every row that is done; the others, once they have begun, are done whole or not at all, and
not again. To measure something anew, delete its table.
"""
import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent


class Benchmark(NamedTuple):
    """A command, and the table that it writes.

    Attributes:
        command: Arguments of Python.
        table: Path in results/; {} is the device.
        keeps_rows: Whether it may be started again when the table exists, and then does what is missing.
        devices: For which it is.
        gpus: That a GPU machine needs for it.
    """
    command: str
    table: str
    keeps_rows: bool = False
    devices: tuple = ('cpu', 'cuda')
    gpus: int = 1


BENCHMARKS = (  # the wanted figures first, the longest last
    Benchmark('benchmarks/loss.py --device {}', 'speed/loss-{}.md'),
    Benchmark(
        'benchmarks/step.py --device {} --dtype bf16 --channels-last --compile', 'speed/step-{}.md', True, ('cuda',)),
    Benchmark('benchmarks/step.py --device {}', 'speed/step-{}.md', True, ('cpu',)),
    Benchmark('benchmarks/loop.py --device {}', 'speed/loop-{}.md'),
    Benchmark('benchmarks/traffic.py --device {}', 'speed/traffic-{}.md', gpus=2),
    Benchmark('benchmarks/engines.py', 'engines.md', devices=('cuda',), gpus=2),
    Benchmark('benchmarks/step.py --device {} --all', 'speed/step-{}.md', True),
)


def run(command, seconds):
    """Run Python in a group of its own, and end all of the group where it takes too long.

    Returns:
        The exit code, None where the time was over.
    """
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def run_all(benchmarks, device, gpus, seconds, results):
    """Run benchmarks until all are done or the time is over.

    Args:
        benchmarks: To run.
        device: 'cpu' or 'cuda'.
        gpus: Of this machine.
        seconds: For all of them; inf for no end.
        results: Folder of the tables.

    Returns:
        Of those that are for this device, lines that tell what became of them, and whether all are done.
    """
    end, lines, complete = time.monotonic() + seconds, [], True
    for benchmark in benchmarks:
        if device not in benchmark.devices:
            continue
        command = benchmark.command.format(device)
        table = results / benchmark.table.format(device)
        left = end - time.monotonic()
        if device != 'cpu' and gpus < benchmark.gpus:
            state = f'left out, needs {benchmark.gpus} GPUs'
        elif table.exists() and not benchmark.keeps_rows:
            state = 'was done already'
        elif left <= 0:
            state, complete = 'not begun', False
        else:
            print(f'$ python {command}', flush=True)
            code = run(shlex.split(command), None if left == float('inf') else left)
            state = {0: 'done', None: 'stopped, as the time was over'}.get(code, f'failed with exit code {code}')
            complete &= code == 0
        lines.append(f'python {command}: {state}; {table}')
    return lines, complete


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda')
    parser.add_argument('--minutes', type=float, default=float('inf'), metavar='N', help='to stop after')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: is not on this machine; use --device cpu')
    lines, complete = run_all(
        BENCHMARKS, args.device, torch.cuda.device_count(), 60 * args.minutes, ROOT / 'results')
    print(*lines, sep='\n')
    sys.exit(not complete)


if __name__ == '__main__':
    main()
