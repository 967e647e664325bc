#!/usr/bin/env python3
"""Kills a run at random moments, again and again, and compares its end with that of a run that nothing happened to.

    python benchmarks/soak.py --kills 20 --results results/reliability/kills.md

The run trains on the built-in digits, with what draws random numbers or keeps a state: DKS, Mixup, erasing, workers,
an average, drop path, accumulation, a schedule per update. It is killed by SIGKILL, workers and all, and started again
by the same command; every fifth time while it starts, every fifth time while it writes a file. Exit code 1 where a bit
differs.
"""
import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from timm.utils.checkpoint_saver import load_checkpoint_metadata  # noqa: E402

FLAGS = (
    '--dataset digits --num-classes 10 --model test_resnet --img-size 24 --device cpu -b 32 --epochs 6 --workers 2 '
    '--opt adamw --lr 2e-3 --warmup-epochs 1 --sched-on-updates --mixup 0.2 --cutmix 1 --mixup-mode elem --reprob 0.3 '
    '--remode pixel --drop-path 0.1 --model-ema --model-ema-decay 0.99 --model-ema-warmup --dks --grad-accum-steps 2 '
    '--recovery-interval 4 --log-interval 1 --checkpoint-hist 3 --output {output} --experiment {name} --resume auto'
)


def start(flags, processes):
    launcher = [] if processes == 1 else [
        '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / 'train.py'), *flags.split()],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})


def follow(process, updates=None):
    """Read what a run says until it has done so many updates, or has ended: place, updates, what it resumed from."""
    place, done, resumed = 'before the first update', 0, 'nothing'
    for line in process.stderr:
        if line.startswith('Loaded checkpoint'):
            resumed = Path(line.split("'")[1]).name
        if 'images/s' in line:
            place = line.partition(':')[0]
            done += 1
            if done == updates:
                break
    return place, done, resumed


def kill(process):
    """Kill a run, launcher, processes and workers."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def unfinished(folder: Path):
    """Files that are being written, or were when a run was killed: names, and times of the last write."""
    found = set()
    for file in folder.glob('*tmp*'):
        with contextlib.suppress(FileNotFoundError):
            found.add((file.name, file.stat().st_mtime_ns))
    return found


def tensors(value, name=''):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from tensors(v, f'{name}.{key}')
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from tensors(v, f'{name}.{i}')


def differing(whole: Path, parts: Path):
    """What is not the same at the end of two runs."""
    found = []
    if (whole / 'summary.csv').read_bytes() != (parts / 'summary.csv').read_bytes():
        found.append('summary.csv')
    for file in ('last.pth.tar', 'model_best.pth.tar'):
        a, b = (dict(tensors(load_checkpoint_metadata(folder / file))) for folder in (whole, parts))
        same = {name for name in {*a} & {*b} if torch.equal(a[name], b[name])}
        found += [f'{file}{name}' for name in {**a, **b} if name not in same]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, help='how often to kill the run')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--processes', type=int, default=1, help='processes of the run, connected over gloo')
    parser.add_argument('--results', type=Path, metavar='FILE', help='file for the table')
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as output:
        flags = FLAGS.format(output=output, name='{name}')
        began = time.monotonic()
        process = start(flags.format(name='whole'), args.processes)
        _, total, _ = follow(process)
        assert process.wait() == 0 and total
        pace = (time.monotonic() - began) / total

        rows, left = [], total
        folder = Path(output, 'killed')
        for number in range(args.kills):
            before = unfinished(folder)
            process = start(flags.format(name='killed'), args.processes)
            if number % 5 == 0:
                place, done, resumed = 'while it started', 0, 'not known'
                time.sleep(rng.random() * 10)
            else:
                # On average, as many updates as leave some for the kills to come.
                updates = rng.randint(1, max(1, 2 * left // (args.kills - number + 1)))
                place, done, resumed = follow(process, updates)
                time.sleep(rng.random() * pace)
                while number % 5 == 1 and process.poll() is None and unfinished(folder) <= before:
                    time.sleep(1e-4)
            assert process.poll() is None, 'the run ended too early; give fewer --kills'
            kill(process)
            if number % 5 == 1:
                left_there = sorted(name for name, _ in unfinished(folder) - before)
                place += f'; {", ".join(left_there) or "nothing"} left unfinished'
            left -= done
            rows.append((number + 1, place, resumed))
            print(f'kill {number + 1}: {place}; had gone on from {resumed}', flush=True)
        process = start(flags.format(name='killed'), args.processes)
        place, _, resumed = follow(process)
        assert process.wait() == 0 and not unfinished(folder)
        rows.append(('-', 'to the end', resumed))
        found = differing(Path(output, 'whole'), Path(output, 'killed'))

    verdict = f'{len(found)} differences' if found else 'the same, bit for bit'
    command = ' '.join(['python', *sys.argv])
    lines = [
        f'`{command}`', '',
        f'{args.kills} kills of a run of {total} updates, processes: {args.processes}. Its end and that of a run that',
        f'was not killed: **{verdict}** (summary.csv, and every tensor of last.pth.tar and model_best.pth.tar:',
        'weights, branches, optimizer, average, random states).', '',
        *found[:10], '| kill | after (last line of the log) | had gone on from |', '|---|---|---|',
        *(f'| {" | ".join(map(str, row))} |' for row in rows),
    ]
    print('\n'.join(lines))
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text('\n'.join(lines) + '\n')
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
