#!/usr/bin/env python3
"""The paper's CIFAR-100 experiments: each network, method and seed is a run of train.py, continued where it stopped.

    python benchmarks/paper.py --list
    python benchmarks/paper.py --data-dir CIFAR100                # all that is not finished yet, in the order of --list
    python benchmarks/paper.py --data-dir CIFAR100 --rows mini    # the part that a CPU can do
    python benchmarks/paper.py --summarise

CIFAR100 is a folder of images, train/<class>/*.png and validation/<class>/*.png. Checkpoints go to --output, one line
of JSON an epoch to --results; a run whose lines are complete there is not run again, on whatever machine it was. A
second runner may be started beside a first, and takes other runs.
"""
import argparse
import csv
import fcntl
import functools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / 'recipes' / 'cifar100'
sys.path.insert(0, str(ROOT))  # for dks_timm, where it is not installed

# The row's title, and the top-1 errors (%) that the paper reports.
ROWS = dict(
    mini=dict(title='ResNet-20, the mini protocol', classes=20, images=100),
    resnet20=dict(title='ResNet-20'),
    resnet32=dict(title='ResNet-32', paper=dict(baseline=29.97, ds=29.89, dks=26.81)),
    wrn_28_10=dict(title='WRN-28-10', paper=dict(baseline=18.72, dks=17.24)),
    resnet110=dict(title='ResNet-110', paper=dict(baseline=27.66, ds=26.95, dks=24.98)),
    wrn_28_10_dropout=dict(title='WRN-28-10, dropout 0.3', paper=dict(baseline=18.64, dks=16.71)),
    densenet_40_12=dict(title='DenseNet-40-12'),
)

# Three classifiers: the backbone and two branches. Rows of a matrix teach its columns.
METHODS = dict(
    baseline=('baseline', []),
    ds=('DS', ['--dks', '--dks-direction', 'none']),
    dks=('DKS', ['--dks']),
    top_down=('top-down', ['--dks', '--dks-direction', 'top-down']),
    bottom_up=('bottom-up', ['--dks', '--dks-direction', 'bottom-up']),
    byot=('BYOT-style', ['--dks', '--dks-synergy-weight', *'0 1 1 0 0 0 0 0 0'.split()]),
    # The mean divergence from several teachers has the gradient of the divergence from their mean.
    ensemble=('ensemble teaches backbone', ['--dks', '--dks-synergy-weight', *'0 0 0 .5 0 0 .5 0 0'.split()]),
    # Less arithmetic.
    dks_fraction_half=('half of each batch', ['--dks', '--dks-batch-fraction', '0.5']),
    dks_fraction=('10 of 64 images', ['--dks', '--dks-batch-fraction', '0.15625']),
    dks_fraction_weighted=('10 of 64 images, weighted by their share', [
        '--dks', '--dks-batch-fraction', '0.15625',
        '--dks-ce-weight', '1', '0.15625', '0.15625', '--dks-synergy-weight', '0.15625']),
    dks_every=('every 6th update', ['--dks', '--dks-every', '6']),
    **{f'dks_budget_{x}': (f'budget {x}', ['--dks', '--dks-budget', x]) for x in ('1.5', '1.3')},
    dks_conv=('convolutional branches', ['--dks', '--dks-branches', 'conv']),
    dks_budget_bottom_up=('budget 1.3, bottom-up', ['--dks', '--dks-budget', '1.3', '--dks-direction', 'bottom-up']),
    dks_budget_late=('budget 1.3, synergy from epoch 20', ['--dks', '--dks-budget', '1.3', '--dks-start-epoch', '20']),
    # No less of it, but for the synergy.
    dks_late=('synergy from epoch 20', ['--dks', '--dks-start-epoch', '20']),
)
CHEAPER = tuple(method for method in METHODS if method.startswith('dks_'))

# What is run where nothing is chosen, and in which order.
PLAN = (
    ('mini', ('baseline', 'ds', 'dks'), range(5)),
    ('mini', ('top_down', 'bottom_up'), range(3)),
    ('mini', CHEAPER, range(3)),
    ('mini', ('dks_budget_1.3',), range(3, 8)),  # what docs/training.md recommends, and its comparison
    ('mini', ('baseline', 'dks'), range(5, 8)),
    ('resnet32', ('baseline', 'ds', 'dks'), range(3)),
    ('resnet32', ('top_down', 'bottom_up', 'byot', 'ensemble'), range(3)),
    ('wrn_28_10', ('baseline', 'dks'), range(3)),
    ('resnet110', ('baseline', 'ds', 'dks'), range(3)),
    ('wrn_28_10_dropout', ('baseline', 'dks'), range(3)),
    ('densenet_40_12', ('baseline', 'ds', 'dks'), range(3)),
)

KEPT = re.compile(r'lr|train_loss|eval_loss|eval_top[15](_\w+)?')  # of the columns of summary.csv
PROGRESS = re.compile(r'Epoch (\d+) \[(\d+)/(\d+)\]')  # what train.py logs after the first and the last update


class Run:
    """One network, method and seed."""

    def __init__(self, args, row: str, method: str, seed: int):
        self.row, self.method, self.seed = row, method, seed
        self.name = f'{row}-{method}-{seed}'
        self.results = Path(args.results, row, f'{method}-{seed}.jsonl')
        self.folder = Path(args.output, self.name).resolve()
        recipe = RECIPES / f'{row}.yaml'
        self.data_dir = Path(args.output, 'data', row) if 'classes' in ROWS[row] else Path(args.data_dir or 'CIFAR100')
        settings = yaml.safe_load(recipe.read_text())
        self.epochs = settings['epochs']
        self.extra = args.extra
        if args.epochs:
            self.epochs = args.epochs
            self.extra = [*self.extra, '--epochs', str(args.epochs)]
        self.arguments = [
            'train.py', '--config', from_root(recipe), '--data-dir', from_root(self.data_dir),
            '--seed', str(seed), *METHODS[method][1], *self.extra,
            '--output', from_root(args.output), '--experiment', self.name, '--resume', 'auto', '--checkpoint-hist', '1',
        ]

    def lines(self):
        """What is known of its epochs."""
        if not self.results.exists():
            return []
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    @property
    def finished(self):
        return len(self.lines()) >= self.epochs

    def collect(self, seconds, device) -> None:
        """Bring the lines up to date with the run's summary.csv.

        Args:
            seconds: Of an epoch's training, (wall clock, CPU time), by epoch.
            device: What it ran on.
        """
        summary = self.folder / 'summary.csv'
        if not summary.exists():
            return
        old = {line['epoch']: line for line in self.lines()}
        lines = []
        with open(summary, newline='') as f:
            for row in csv.DictReader(f):
                line = dict(epoch=int(row.pop('epoch')))
                line.update((key, float(f'{float(value):.5g}')) for key, value in row.items() if KEPT.fullmatch(key))
                known = old.get(line['epoch'], {})
                if all(known.get(key) == value for key, value in line.items()):
                    line = known  # with its timing
                if line['epoch'] in seconds:
                    wall, cpu = seconds[line['epoch']]
                    line.update(seconds=round(wall, 2), cpu_seconds=round(cpu, 2), device=device)
                lines.append(line)
        if not lines:
            return
        self.results.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.results.with_suffix('.tmp')
        temporary.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        temporary.replace(self.results)


def from_root(path) -> str:
    """The path as seen from the folder of train.py, which is where runs are started."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Job:
    """A run under way. Reads what train.py logs, to know when epochs begin and end."""

    def __init__(self, run: Run, deadline: float, env, device: str):
        self.run, self.deadline, self.device = run, deadline, device
        self.seconds = {}
        self.stopped = False
        run.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(run.folder / 'log.txt', 'a')
        fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second runner beside this one takes other runs
        self.process = subprocess.Popen(
            [sys.executable, *run.arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self):
        usage = psutil.Process(self.process.pid)
        boundary = first = None
        for text in self.process.stdout:
            self.log.write(text)
            self.log.flush()
            match = PROGRESS.search(text)
            if match is None or self.stopped:
                continue
            epoch, update, updates = map(int, match.groups())
            now = time.monotonic()
            try:
                cpu = sum(usage.cpu_times()[:2])
            except psutil.Error:
                cpu = 0.
            if update == 1:
                # The checkpoint of the epoch before is complete: the place to stop.
                self.run.collect(self.seconds, self.device)
                length = now - boundary if boundary else 0.
                if boundary and now + length > self.deadline:
                    self.stop()
                    continue
                boundary, first = now, (now, cpu)
            elif update == updates > 1 and first is not None:
                # The first update is not in it, so neither are evaluation, checkpoint and the start of the program.
                scale = updates / (updates - 1)
                self.seconds[epoch] = ((now - first[0]) * scale, (cpu - first[1]) * scale)

    def stop(self):
        """End it where it is; what is lost is the epoch that has begun."""
        self.stopped = True
        self.process.terminate()

    def poll(self):
        """None while it runs, then whether it went well."""
        if self.process.poll() is None:
            if time.monotonic() > self.deadline and not self.stopped:
                self.stop()
            return None
        self.thread.join()
        self.run.collect(self.seconds, self.device)
        self.log.close()
        return self.stopped or self.process.returncode == 0


def planned(args):
    """Runs that the arguments choose: by row, then seed by seed."""
    if not args.methods and not args.seeds:
        plan = [entry for entry in PLAN if entry[0] in (args.rows or ROWS)]
    else:
        rows, methods = args.rows or list(ROWS), args.methods or ['baseline', 'ds', 'dks']
        plan = [(row, methods, args.seeds or range(3)) for row in rows]
    return [Run(args, row, method, seed) for row, methods, seeds in plan for seed in seeds for method in methods]


def make_subset(source: Path, target: Path, classes: int, images: int) -> None:
    """Link the first classes by name, and of each its first training images by name and all for validation."""
    for name in sorted(p.name for p in (source / 'train').iterdir() if p.is_dir())[:classes]:
        for split, count in (('train', images), ('validation', None)):
            (target / split / name).mkdir(parents=True, exist_ok=True)
            for file in sorted((source / split / name).iterdir())[:count]:
                link = target / split / name / file.name
                if not link.exists():
                    link.unlink(missing_ok=True)
                    link.symlink_to(file.resolve())


def execute(args, runs) -> int:
    """Run what is not finished, several at once, until all is done or time is up. Returns an exit code."""
    import torch
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    waiting = deque(run for run in runs if not run.finished)
    print(f'{len(runs) - len(waiting)} of {len(runs)} runs are finished.', flush=True)
    for row in sorted({run.row for run in waiting if 'classes' in ROWS[run.row]}):
        target = next(run.data_dir for run in waiting if run.row == row)
        make_subset(Path(args.data_dir), target, ROWS[row]['classes'], ROWS[row]['images'])
    threads = os.environ.get('OMP_NUM_THREADS') or str(max(1, os.cpu_count() // args.jobs))
    env = dict(os.environ, OMP_NUM_THREADS=threads, PYTHONUNBUFFERED='1')
    device = f'cpu, threads {threads}'
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name() + (f', {args.jobs} jobs' if args.jobs > 1 else '')

    jobs, failed = [], []

    def interrupt(*_):
        waiting.clear()
        for job in jobs:
            job.stop()

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    while waiting or jobs:
        while waiting and len(jobs) < args.jobs and time.monotonic() < deadline:
            run = waiting.popleft()
            if run.finished:
                continue
            try:
                jobs.append(Job(run, deadline, env, device))
            except BlockingIOError:
                print(f'{time.strftime("%H:%M:%S")} {run.name}: under way already', flush=True)
            else:
                print(f'{time.strftime("%H:%M:%S")} {run.name}: {shlex.join(run.arguments)}', flush=True)
        if not jobs:
            break
        time.sleep(0.2)
        for job in list(jobs):
            well = job.poll()
            if well is None:
                continue
            jobs.remove(job)
            if job.stopped:
                waiting.clear()  # time is up
            lines = job.run.lines()
            state = f'{len(lines)} of {job.run.epochs} epochs'
            if lines:
                state += f', top-1 {lines[-1]["eval_top1"]:.2f}'
            print(f'{time.strftime("%H:%M:%S")} {job.run.name}: {state}' + ('' if well else ', failed'), flush=True)
            if not well:
                failed.append(job.run)
                print((job.run.folder / 'log.txt').read_text()[-1500:], file=sys.stderr, flush=True)
    if failed:
        print(f'failed: {", ".join(run.name for run in failed)}; see log.txt in {args.output}/<run>', file=sys.stderr)
        return 1
    return 0


class Results:
    """The finished runs of a row, and how its methods compare."""

    def __init__(self, args, row: str):
        self.row = row
        runs = [Run(args, row, method, seed) for method, seed in found(args, row)]
        self.unfinished = [run for run in runs if not run.finished]
        self.runs = {method: [run for run in runs if run.method == method and run.finished] for method in METHODS}
        self.top1 = {method: [run.lines()[-1]['eval_top1'] for run in runs] for method, runs in self.runs.items()}

    def gain(self, method: str) -> str:
        """Top-1 accuracy over that of the baseline, with its standard error."""
        ours, base = self.top1[method], self.top1['baseline']
        if not base or method == 'baseline':
            return ''
        text = f'{statistics.mean(ours) - statistics.mean(base):+.2f}'
        if len(ours) > 1 and len(base) > 1:
            text += f' ± {math.sqrt(squared_error(ours) + squared_error(base)):.2f}'
        return text

    def share(self, method: str) -> str:
        """The gain in percent of that of DKS, with its standard error."""
        ours, full, base = (self.top1[name] for name in (method, 'dks', 'baseline'))
        whole = statistics.mean(full) - statistics.mean(base) if full and base else 0.
        if whole <= 0:
            return ''
        share = (statistics.mean(ours) - statistics.mean(base)) / whole
        text = f'{100 * share:.0f}'
        if method != 'dks' and min(map(len, (ours, full, base))) > 1:
            variance = squared_error(ours) + share ** 2 * squared_error(full) + (1 - share) ** 2 * squared_error(base)
            text += f' ± {100 * math.sqrt(variance) / whole:.0f}'
        return text + ' %'

    def time(self, method: str) -> str:
        """Time of an epoch over the baseline's, seed by seed, as seeds may have run on machines of different speed."""
        base = {run.seed: epoch_seconds(run) for run in self.runs['baseline']}
        ratios = []
        for run in self.runs[method]:
            ours, theirs = epoch_seconds(run), base.get(run.seed, {})
            by_device = [ours[device] / theirs[device] for device in ours if device in theirs]
            if by_device:
                ratios.append(statistics.mean(by_device))
        return f'{statistics.mean(ratios):.2f}x' if ratios else ''

    def flops(self, method: str) -> str:
        """FLOPs of a training forward over the baseline's, on average."""
        return f'{training_flops(str(RECIPES / f"{self.row}.yaml"), *METHODS[method][1]):.2f}x'

    def accuracy(self, method: str) -> str:
        """Mean and standard deviation."""
        mean, spread = mean_and_deviation(self.top1[method])
        return f'{mean:.2f}' + (f' ± {spread:.2f}' if len(self.top1[method]) > 1 else '')

    def missing(self, methods):
        """A line on the runs that are not finished, if there are any."""
        others = [
            f'{r.method} {r.seed} ({len(r.lines())} of {r.epochs} epochs)' for r in self.unfinished
            if r.method in methods]
        return ['', f'Not finished, and not in the table: {", ".join(others)}.'] if others else []


@functools.cache
def training_flops(recipe: str, *flags: str) -> float:
    from dks_timm import options
    from dks_timm.inspection import inspect_model
    args, *_ = options.parse_args(['--config', recipe, *flags])
    if not args.dks:
        return 1.
    return inspect_model(
        args.model, stages=args.dks_stages, branches=args.dks_branches, branch_kwargs=args.dks_branch_kwargs,
        budget=args.dks_budget, img_size=args.img_size, batch_fraction=args.dks_batch_fraction, every=args.dks_every,
        num_classes=args.num_classes, **args.model_kwargs)['cost']['flops']


def table(results: Results) -> str:
    """Markdown table of a row's finished runs, with what is known of the others below it."""
    paper = ROWS[results.row].get('paper', {})
    methods = [method for method in METHODS if method not in CHEAPER]
    text = [
        '| method | runs | top-1 % | error % | paper\'s error % | against baseline | training time | training FLOPs |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for method in methods:
        top1 = results.top1[method]
        if top1:
            text.append(
                f'| {METHODS[method][0]} | {len(top1)} | {results.accuracy(method)} | '
                f'{100 - statistics.mean(top1):.2f} | {paper.get(method, "")} | {results.gain(method)} | '
                f'{results.time(method)} | {results.flops(method)} |')
    return '\n'.join(text + results.missing(methods))


def cheaper_table(results: Results) -> str:
    """Markdown table of what less arithmetic costs in accuracy; '' where nothing is known of it."""
    if not any(results.top1[method] for method in CHEAPER):
        return ''
    text = [
        '| setting | flags | runs | training FLOPs | top-1 % | gain | share of the full gain |',
        '|---|---|---|---|---|---|---|',
    ]
    for method in ('ds', 'dks', *CHEAPER):
        if results.top1[method]:
            name, flags = METHODS[method]
            text.append(
                f'| {name} | `{shlex.join(flags)}` | {len(results.top1[method])} | {results.flops(method)} | '
                f'{results.accuracy(method)} | {results.gain(method)} | {results.share(method)} |')
    return '\n'.join(text + results.missing(CHEAPER))


def found(args, row: str):
    """Methods and seeds of a row that have results."""
    for file in sorted(Path(args.results, row).glob('*.jsonl')):
        method, _, seed = file.stem.rpartition('-')
        if method in METHODS:
            yield method, int(seed)


def epoch_seconds(run):
    """Seconds that training one epoch takes, by device: the median."""
    seconds = {}
    for line in run.lines():
        if 'device' in line:
            # On a CPU that others use too, time on the clock says little.
            key = 'cpu_seconds' if line['device'].startswith('cpu') else 'seconds'
            seconds.setdefault(line['device'], []).append(line[key])
    return {device: statistics.median(values) for device, values in seconds.items()}


def mean_and_deviation(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.


def squared_error(values):
    """Of the mean."""
    return statistics.variance(values) / len(values)


def curves(results: Results) -> str:
    """SVG of accuracy against epoch: per method the mean of its runs, and a band of one standard deviation."""
    from dks_timm.charts import Line, chart, color, number, picture
    lines = []
    for method, runs in results.runs.items():
        if runs and method not in CHEAPER:
            by_epoch = zip(*([line['eval_top1'] for line in run.lines()] for run in runs), strict=True)
            points = [(epoch, *mean_and_deviation(values)) for epoch, values in enumerate(by_epoch, 1)]
            lines.append(Line(
                METHODS[method][0], [(epoch, mean) for epoch, mean, _ in points], color(list(METHODS).index(method)),
                value=number(points[-1][1]), band=[(epoch, m - s, m + s) for epoch, m, s in points]))
    title = 'Top-1 accuracy of the backbone on the validation images, %'
    return picture([chart(title, lines, size=(720, 400), y_most=100, focus=True)]) if lines else ''


def summarise(args) -> None:
    """Write README.md with the tables, and a picture of the curves a row, into the results folder."""
    text = [
        '# The paper on CIFAR-100',
        'Written by `python benchmarks/paper.py --summarise` from the lines in these folders, one an epoch.',
        'Accuracy is that of the backbone alone on the validation images after the last epoch, as mean and standard '
        'deviation over seeds. The difference comes with its standard error. Training time is that of an epoch without '
        'evaluation, CPU time where a CPU did it; FLOPs are those of one training forward, on average; both in '
        'multiples of the baseline, for time of that with the same seed on the same device.',
    ]
    for row, what in ROWS.items():
        if not any(found(args, row)):
            continue
        command = f'python benchmarks/paper.py --data-dir CIFAR100 --rows {row}'
        text += [f'## {what["title"]}', f'`{command}`']
        if 'classes' in what:
            text.append(
                f'The first {what["classes"]} classes by name; of each the first {what["images"]} training images by '
                'name, and all validation images.')
        results = Results(args, row)
        text.append(table(results))
        picture = curves(results)
        if picture:
            Path(args.results, f'{row}.svg').write_text(picture)
            text.append(f'![accuracy by epoch]({row}.svg)')
        cheaper = cheaper_table(results)
        if cheaper:
            text += [
                '### Cheaper DKS',
                'What training costs over the baseline, and how much of what DKS gains is left, with standard errors. '
                'Times are not given, as these runs were not trained beside the baseline\'s; '
                '`python benchmarks/step.py --models MODEL -- FLAGS` times such steps beside plain ones.',
                cheaper,
            ]
    Path(args.results, 'README.md').write_text('\n\n'.join(text) + '\n')


def create_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        epilog='Arguments after -- go to train.py, for instance: -- --amp --amp-dtype bfloat16')
    parser.add_argument('--list', action='store_true', help='show the runs with their commands, and stop')
    parser.add_argument('--summarise', action='store_true', help='write tables and curves, and stop')
    parser.add_argument('--data-dir', metavar='DIR', help='CIFAR-100 as folders of images')
    parser.add_argument('--rows', nargs='+', choices=ROWS, metavar='ROW', help=', '.join(ROWS))
    parser.add_argument('--methods', nargs='+', choices=METHODS, metavar='METHOD', help=', '.join(METHODS))
    parser.add_argument('--seeds', nargs='+', type=int, metavar='S')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at once')
    parser.add_argument('--minutes', type=float, metavar='N', help='stop after the last epoch that fits')
    parser.add_argument('--epochs', type=int, metavar='N', help='shorter runs than the recipes\', to try things out')
    parser.add_argument('--output', default=str(ROOT / 'output' / 'paper'), metavar='DIR', help='checkpoints and logs')
    parser.add_argument('--results', default=str(ROOT / 'results' / 'cifar100'), metavar='DIR', help='lines and tables')
    return parser


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    extra = []
    if '--' in argv:
        argv, extra = argv[:argv.index('--')], argv[argv.index('--') + 1:]
    parser = create_parser()
    args = parser.parse_args(argv)
    args.extra = extra
    if args.summarise:
        summarise(args)
        return 0
    runs = planned(args)
    if args.list:
        for run in runs:
            lines = len(run.lines())
            state = 'finished' if run.finished else f'{lines} of {run.epochs} epochs'
            print(f'{run.row:18} {run.method:10} seed {run.seed}  {state:18} python {shlex.join(run.arguments)}')
        return 0
    if not args.data_dir or not Path(args.data_dir, 'train').is_dir():
        parser.error(f'--data-dir {args.data_dir}: must be a folder with train/<class>/* and validation/<class>/*')
    return execute(args, runs)


if __name__ == '__main__':
    sys.exit(main())
