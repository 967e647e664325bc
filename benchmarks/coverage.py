#!/usr/bin/env python3
"""Attach branches to every architecture of timm on the meta device, and write down what was attached and what it costs.

    python benchmarks/coverage.py                  # writes results/coverage.csv and results/coverage.md
    python benchmarks/coverage.py --names resnet50 # only these, printed

Rows that are in the file already are kept, so a run that was stopped goes on; delete the file to start over.
"""
import argparse
import csv
import logging
import multiprocessing
import os
import platform
import time
import warnings
from collections import defaultdict

from common import ROOT, table, versions

COLUMNS = ('name', 'family', 'stages', 'supervised', 'kinds', 'parameters', 'parameters_ratio', 'gflops', 'flops_ratio',
           'seconds', 'reason')
RESULTS = ROOT / 'results'
NUM_CLASSES = 1000  # for the architectures that have no classifier by default


def cover(name):
    """Return the row of an architecture."""
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    import timm
    import torch

    from dks_timm.method.cost import inspect_model

    torch.set_num_threads(1)
    started = time.process_time()
    row = dict(name=name, family=timm.models.model_entrypoint(name).__module__.rpartition('.')[2])
    try:
        try:
            found = inspect_model(name)
        except ValueError:
            found = inspect_model(name, num_classes=NUM_CLASSES)
    except Exception as e:  # whatever a model raises is its row
        row.update(kinds='error', reason=' '.join(f'{type(e).__name__}: {e}'.split()))
    else:
        whole, *branches = found['classifiers']
        row.update(
            stages=len(found['stages']),
            supervised=' '.join(str(b['stage']) for b in branches),
            kinds=' '.join(b['kind'] for b in branches),
            parameters=whole['parameters'],
            parameters_ratio=round(found['cost']['parameters'], 3),
            gflops=round(whole['flops'] / 1e9, 3),
            flops_ratio=round(found['cost']['flops'], 3),
            reason='; '.join(sorted({b['made_of'] for b in branches})),
        )
    row['seconds'] = round(time.process_time() - started, 2)
    return row


def summarise(rows):
    """Return the page: totals, branches by family, and the rows without tails."""
    done = [r for r in rows if r['kinds'] != 'error']
    tails = [r for r in done if set(r['kinds'].split()) == {'tail'}]
    some = [r for r in done if 'tail' in r['kinds'].split()]
    lines = [
        '# Coverage of timm', '',
        f'`python benchmarks/coverage.py` attached branches to {len(done):,} of {len(rows):,} architectures '
        f'({versions("timm", "torch")}, {platform.machine()}), each at its own image size '
        f'(once results/coverage.csv is deleted, whose rows it keeps). '
        f'{len(some):,} ({len(some) / len(done):.1%}) got at least one `tail` branch, {len(tails):,} '
        f'({len(tails) / len(done):.1%}) only tails.', '',
        f'CPU time: {sum(float(r["seconds"]) for r in rows) / 60:.0f} minutes in all, {median(rows, "seconds"):.1f} s '
        f'for the median architecture, {max(float(r["seconds"]) for r in rows):.0f} s for the slowest.', '',
        'Cost is the forward FLOPs of backbone and branches over the backbone\'s.', '',
    ]
    families = defaultdict(list)
    for row in rows:
        families[row['family']].append(row)
    cells = []
    for family, members in sorted(families.items()):
        fine = [r for r in members if r['kinds'] != 'error']
        only = sum(set(r['kinds'].split()) == {'tail'} for r in fine)
        costs = sorted(float(r['flops_ratio']) for r in fine)
        cost = ('', '')
        if fine:
            cost = f'{median(fine, "flops_ratio"):.2f}x', f'{costs[0]:.2f}x to {costs[-1]:.2f}x'
        cells.append([family, len(members), only, len(fine) - only, len(members) - len(fine), *cost])
    columns = ('family', 'architectures', 'only tails', 'with conv', 'errors', 'cost, median', 'cost, range')
    lines += table(columns, cells, left=1)
    lines += ['', '## Without a tail on every supervised stage', '']
    lines += table(('architecture', 'branches', 'reason'), [
        (r['name'], r['kinds'], r['reason'].replace('|', '/')) for r in rows if r not in tails])
    return '\n'.join(lines) + '\n'


def median(rows, column):
    return sorted(float(r[column]) for r in rows)[len(rows) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--names', nargs='+', help='only these architectures, printed')
    parser.add_argument('--processes', type=int, default=os.cpu_count(), help='processes to use')
    args = parser.parse_args()
    if args.names:
        for name in args.names:
            print(cover(name))
        return

    import timm
    path = RESULTS / 'coverage.csv'
    RESULTS.mkdir(exist_ok=True)
    rows = list(csv.DictReader(path.open(newline=''))) if path.exists() else []
    missing = sorted(set(timm.list_models()) - {r['name'] for r in rows})
    # A fresh process now and then gives memory back that the meta device's caches hold.
    with path.open('a', newline='') as file, multiprocessing.Pool(args.processes, maxtasksperchild=50) as pool:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if not rows:
            writer.writeheader()
        for i, row in enumerate(pool.imap_unordered(cover, missing, chunksize=5)):
            writer.writerow(row)
            file.flush()
            print(f'{i + 1}/{len(missing)} {row["name"]}: {row["kinds"]}, {row["seconds"]} s', flush=True)
    rows = sorted(csv.DictReader(path.open(newline='')), key=lambda r: r['name'])
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / 'coverage.md').write_text(summarise(rows))
    print(summarise(rows).split('|')[0])


if __name__ == '__main__':
    main()
