#!/usr/bin/env python3
"""Lets one of several processes of a run die, and measures how long the others outlive it.

    python benchmarks/deaths.py --times 5 --results results/reliability/deaths.md

They train on the built-in digits, connected over gloo and with two workers each. One process is killed by SIGKILL, the
first time while all of them start, or one of its workers is (as by a system that is out of memory), or it raises an
exception within an update; at random moments. Exit code 1 where another process lives for 30 s or the cause is
not shown.
"""
import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from soak import FLAGS, ROOT

MOST = 30  # seconds
KINDS = {
    'SIGKILL': 'exitcode  : -9',
    'SIGKILL of a worker': 'is killed by signal',
    'exception': 'this process has met a fault',
}


def launch(output, processes, fault=None):
    """Start a run; of an exception, it is told beforehand."""
    flags = FLAGS.format(output=output, name='x').split()
    script = [ROOT / 'train.py', *flags]
    if fault:
        runs = Path(output, 'runs.json')
        runs.write_text(json.dumps([dict(argv=flags, fault=fault)]))
        script = [ROOT / 'tests/helpers/several_runs.py', Path(output, 'out.pt'), runs]
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes),
         *map(str, script)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def living(processes):
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if alive(process):
                found.append(process)
    return found


def by_rank(launcher):
    """The processes of a run that have begun, in the order of their ranks."""
    found = {}
    for process in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if rank := process.environ().get('RANK'):  # a child has it once it is no longer a copy of the launcher
                found[int(rank)] = process
    return [found[rank] for rank in sorted(found)]


def family(ranks):
    """The processes of a run, with their workers."""
    found = set(ranks)
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(process.children(recursive=True))
    return found


def measure(kind, processes, rng, early):
    """One death: what the run was doing, seconds until no process of it was left, and whether its cause was shown."""
    with tempfile.TemporaryDirectory() as output:
        rank = rng.randrange(processes)
        fault = dict(rank=rank, batch=rng.randint(2, 60), kind='raise') if kind == 'exception' else None
        launcher = launch(output, processes, fault)
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(launcher.stderr), daemon=True)
        reader.start()
        updates = 0 if early else rng.randint(1, 60)
        while len(ranks := by_rank(launcher)) < processes:
            time.sleep(0.05)
        if not fault:
            while sum('images/s' in line for line in list(lines)) < updates:
                assert launcher.poll() is None, ''.join(lines)
                time.sleep(0.05)
            time.sleep(rng.random() * (10 if early else 1))
        place = next((line.partition(':')[0] for line in reversed(lines) if 'images/s' in line), '')
        place = place or (f'batch {fault["batch"]}' if fault else 'while they started')
        every = family(ranks)
        if kind == 'SIGKILL':
            ranks[rank].kill()
        elif kind != 'exception':
            rng.choice(ranks[rank].children()).kill()
        while len(living(ranks)) == processes:
            every |= family(ranks) if fault else set()
            time.sleep(0.02)
        began = time.monotonic()
        while living(every):
            time.sleep(0.02)
            if time.monotonic() - began > 300:
                break
        seconds = time.monotonic() - began
        launcher.wait()
        reader.join(10)
    return place, seconds, KINDS[kind] in ''.join(lines) and launcher.returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--times', type=int, default=5, help='deaths of each kind')
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=list(KINDS), help='of deaths')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--results', type=Path, metavar='FILE', help='file for the table')
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows, good = [], True
    for kind in args.kinds:
        for number in range(args.times):
            place, seconds, shown = measure(kind, args.processes, rng, early=kind == 'SIGKILL' and not number)
            good = good and seconds < MOST and shown
            rows.append((kind, place, f'{seconds:.1f} s', 'yes' if shown else 'NO'))
            print(*rows[-1], sep='; ', flush=True)
    command = ' '.join(['python', *sys.argv])
    lines = [
        f'`{command}`', '', f'Processes: {args.processes}, with two workers each.', '',
        '| one dies by | after (last line of the log) | the last of the others ended after | cause shown |',
        '|---|---|---|---|', *(f'| {" | ".join(row)} |' for row in rows)]
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text('\n'.join(lines) + '\n')
    sys.exit(not good)


if __name__ == '__main__':
    main()
