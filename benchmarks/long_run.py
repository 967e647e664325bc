#!/usr/bin/env python3
"""Watches a run of hundreds of epochs: memory, open files, threads, time and checkpoints after every epoch.

    python benchmarks/long_run.py --epochs 300 --results results/reliability/long_run

A tiny model trains on the built-in digits with what could pile up: DKS, workers, Mixup, an average, accumulation, an
evaluation, checkpoints and recovery checkpoints. Writes FILE.csv with a row for each epoch, and FILE.md. Exit code 1
where, between the first quarter and the last, memory or open files grow, or where there is a checkpoint too many.
"""
import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
from soak import start

HISTORY = 3
FLAGS = (
    '--dataset digits --num-classes 10 --model test_resnet --img-size 16 --device cpu -b 128 --workers 2 --lr 0.01 '
    '--opt adamw --warmup-epochs 1 --sched-on-updates --mixup 0.2 --reprob 0.3 --remode pixel --drop-path 0.1 '
    '--model-ema --model-ema-decay 0.99 --dks --grad-accum-steps 2 --recovery-interval 2 --log-interval 1000 '
    '--checkpoint-hist {history} --output {output} --experiment x --epochs {epochs}'
)
MOST = dict(main_mb=1.02, workers_mb=1.02, files=1., threads=1.)  # last quarter over first


def sample(process, epoch, began, folder):
    """What a run holds on to, and what it has used."""
    workers = process.children(recursive=True)
    every = [process, *workers]
    times = [p.cpu_times() for p in every]
    return dict(
        epoch=epoch,
        main_mb=process.memory_info().rss / 1e6,
        workers_mb=sum(p.memory_info().rss for p in workers) / 1e6,
        processes=len(every),
        files=sum(p.num_fds() for p in every),
        threads=sum(p.num_threads() for p in every),
        cpu_s=sum(t.user + t.system for t in times),
        wall_s=time.monotonic() - began,
        checkpoints=len(list(folder.glob('checkpoint-*'))),
        recoveries=len(list(folder.glob('recovery-*'))),
    )


def watch(epochs, minutes):
    """Train; a sample for each epoch, in which times are those of the epoch."""
    rows = []
    with tempfile.TemporaryDirectory() as output:
        run = start(FLAGS.format(output=output, epochs=epochs, history=HISTORY), processes=1)
        process, began = psutil.Process(run.pid), time.monotonic()
        for line in run.stderr:
            if line.startswith(f'Epoch {len(rows)}:') and len(rows) < epochs - 1:  # after the last one it may be gone
                rows.append(sample(process, len(rows), began, Path(output, 'x')))
                if time.monotonic() - began > 60 * minutes:
                    run.terminate()
        assert run.wait() == 0 and len(rows) == epochs - 1 or time.monotonic() - began > 60 * minutes
    for row, before in reversed(list(zip(rows[1:], rows, strict=False))):
        row.update((name, row[name] - before[name]) for name in ('cpu_s', 'wall_s'))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=300)
    parser.add_argument('--minutes', type=float, default=float('inf'), help='stop then')
    parser.add_argument('--results', type=Path, metavar='FILE', help='samples and table, no suffix')
    args = parser.parse_args()
    rows = watch(args.epochs, args.minutes)

    quarter = len(rows) // 4
    parts = [rows[quarter * i + (not i):quarter * (i + 1)] for i in range(4)]  # the first epoch starts the workers
    table = [{name: median(row[name] for row in part) for name in rows[0]} for part in parts]
    bad = [name for name, most in MOST.items() if table[3][name] > most * table[0][name]]
    kept = max(row['checkpoints'] for row in rows), max(row['recoveries'] for row in rows)
    if kept[0] > HISTORY or kept[1] > 2:
        bad.append('checkpoints')
    shown = ' '.join(sys.argv[:1] + ['--epochs', str(args.epochs)])
    lines = [
        f'`python {shown}`', '',
        f'{len(rows)} epochs with two workers for training and two for evaluation; medians of each quarter (RSS).',
        f'At most {kept[0]} checkpoints (`--checkpoint-hist {HISTORY}`) and {kept[1]} recovery checkpoints were there.',
        f'**Grew: {", ".join(bad)}.**' if bad else '**Nothing grew.**', '',
        '| epochs | main process, MB | workers, MB | processes | open files | threads | CPU s an epoch | wall s |',
        '|---|---:|---:|---:|---:|---:|---:|---:|',
        *(f'| {part[0]["epoch"]} to {part[-1]["epoch"]} | {row["main_mb"]:.1f} | {row["workers_mb"]:.1f} '
          f'| {row["processes"]:.0f} | {row["files"]:.0f} | {row["threads"]:.0f} | {row["cpu_s"]:.2f} '
          f'| {row["wall_s"]:.2f} |' for part, row in zip(parts, table, strict=True)),
    ]
    print('\n'.join(lines))
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.with_suffix('.md').write_text('\n'.join(lines) + '\n')
        with args.results.with_suffix('.csv').open('w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: round(v, 3) for k, v in row.items()} for row in rows)
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
