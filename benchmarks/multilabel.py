#!/usr/bin/env python3
"""Do branches help where an image has several labels? Runs of recipes/multilabel.yaml by method and seed, and a table.

    python benchmarks/multilabel.py                     # all that has no result yet; a few minutes each on a CPU core
    python benchmarks/multilabel.py --results FOLDER    # all of them again
"""
import argparse
import csv
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT, describe_machine, table
from paper_plan import METHODS
from paper_tables import spread, squared_error

COMPARED = ('baseline', 'ds', 'dks', 'to_backbone_t3')
INTRODUCTION = '''\
# Several labels an image

Written by `python benchmarks/multilabel.py`, which trains what is not here yet: `{recipe}` with a method's
flags and seeds {seeds}, {epochs} epochs in bfloat16; a .csv is the summary.csv of a run. The data is built in
(`--dataset multidigits`): two or three of ten digits on a canvas of 32x32 pixels, 4,000 to train with and 1,000
others, made of other digits, to validate with. After the last epoch, in percent, mean and standard deviation over the
seeds: mean average precision (mAP) of the backbone, of each branch and of all together (the mean of their
probabilities), and the backbone's F1 over all labels from a probability of 0.5 on. The difference to the baseline is
that of the backbones' mAP, with its standard error.'''


def command(method: str, seed: int, output: str):
    """Return the words that start a run, from the folder of train.py."""
    return [
        'train.py', '--config', 'recipes/multilabel.yaml', '--seed', str(seed), '--amp', '--amp-dtype', 'bfloat16',
        '--channels-last', *(METHODS[method][1] or ['--no-dks']), '--output', output,
        '--experiment', f'{method}-{seed}']


def last_row(file: Path):
    with open(file, newline='') as f:
        return {name: float(value) for name, value in list(csv.DictReader(f))[-1].items()}


def write_table(results: Path, seeds) -> None:
    rows = {method: [last_row(results / f'{method}-{seed}.csv') for seed in seeds] for method in COMPARED}
    base = [row['eval_map'] for row in rows['baseline']]

    def gain(method):
        ours = [row['eval_map'] for row in rows[method]]
        error = (squared_error(ours) + squared_error(base)) ** 0.5 if len(ours) > 1 else 0.
        return '' if method == 'baseline' else f'{statistics.mean(ours) - statistics.mean(base):+.2f} ± {error:.2f}'

    columns = {
        'mAP, backbone': 'eval_map', 'branch on stage 1': 'eval_map_stage1', 'branch on stage 2': 'eval_map_stage2',
        'ensemble': 'eval_map_ensemble', 'F1, backbone': 'eval_micro_f1'}
    cells = [
        [METHODS[method][0], *(spread([row[c] for row in rows[method] if c in row]) for c in columns.values()),
         gain(method), f'`{shlex.join(METHODS[method][1]) or "--no-dks"}`'] for method in COMPARED]
    epochs = int(rows['baseline'][0]['epoch']) + 1
    (results / 'README.md').write_text('\n'.join([
        INTRODUCTION.format(recipe='recipes/multilabel.yaml', seeds=', '.join(map(str, seeds)), epochs=epochs), '',
        *table(['method', *columns, 'against baseline', 'flags'], cells), '',
        f'Trained on {describe_machine("cpu", 1)}.']) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='S')
    parser.add_argument('--output', default=str(ROOT / 'output' / 'multilabel_runs'), metavar='DIR')
    parser.add_argument('--results', default=str(ROOT / 'results' / 'multilabel'), metavar='DIR')
    args, more = parser.parse_known_args()  # the rest goes to train.py
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in COMPARED:
            file = results / f'{method}-{seed}.csv'
            if not file.exists():
                words = [*command(method, seed, args.output), *more]
                print(shlex.join(words), flush=True)
                subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env={
                    **os.environ, 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})
                file.write_bytes(Path(args.output, f'{method}-{seed}', 'summary.csv').read_bytes())
    write_table(results, args.seeds)


if __name__ == '__main__':
    main()
