"""Tables and pictures of the CIFAR-100 experiments, from the lines that their runs left."""
import contextlib
import functools
import math
import statistics
from pathlib import Path

from common import table
from paper_plan import METHODS, RECIPES, ROWS, THREE, flags_of, found, recipe

INTRODUCTION = '''\
# CIFAR-100

Written by `python benchmarks/paper.py --summarise` from the lines in these folders, one an epoch.
`python benchmarks/paper.py --list` shows the command of every run. Runs that are finished here are left out;
`--results FOLDER` makes them again.

Top-1 accuracy on the validation images, in percent, after the last epoch, as mean and standard deviation over seeds: of
the backbone, which is what remains; of each branch; and of the ensemble, the mean of all their probabilities.
Differences are those of the backbones, with their standard error. Losses are the backbone's cross-entropy. Training
time is that of an epoch without evaluation, CPU time where a CPU did it; FLOPs are those of training, in which a
backward costs two forwards; both in multiples of the baseline, time of that with the same seed on the same device. Of
the baseline over more epochs, both are those of the whole training.'''


class Section:
    """The finished runs of a row at one length, and how its methods compare."""

    def __init__(self, row: str, epochs: int, runs):
        self.row, self.epochs = row, epochs
        self.name = runs[0].section
        self.unfinished = [run for run in runs if not run.finished]
        self.runs = {method: [run for run in runs if run.method == method and run.finished] for method in METHODS}
        self.last = {method: [run.lines()[-1] for run in runs] for method, runs in self.runs.items()}
        self.methods = [method for method in METHODS if self.runs[method]]
        self.branches = sorted(
            {key for method in self.methods for last in self.last[method] for key in last
             if key.startswith('eval_top1_stage')}, key=lambda key: int(key.removeprefix('eval_top1_stage')))
        self.title = f'{ROWS[row]["title"]}, {epochs} epochs'

    def values(self, method: str, key: str = 'eval_top1'):
        """After the last epoch, one a seed."""
        return [last[key] for last in self.last[method] if key in last]

    @property
    def shown(self):
        """The methods that pictures compare: baseline, DS, DKS, and the best of the others at full cost."""
        others = [m for m in self.methods if m not in THREE and self.flops(m) >= self.flops('dks')]
        best = max(others, key=lambda m: statistics.mean(self.values(m)), default=None)
        return [method for method in (*THREE, best) if method in self.methods]

    def gain(self, method: str, other: str) -> str:
        """Top-1 accuracy over that of another method."""
        return '' if method in ('baseline', other) else self.difference(self.values(method), other)

    def difference(self, ours, other: str) -> str:
        """Top-1 accuracies over those of a method, with the standard error."""
        base = self.values(other)
        if not base:
            return ''
        text = f'{statistics.mean(ours) - statistics.mean(base):+.2f}'
        if len(ours) > 1 and len(base) > 1:
            text += f' ± {math.sqrt(squared_error(ours) + squared_error(base)):.2f}'
        return text

    def training_loss(self, method: str) -> str:
        """The backbone's cross-entropy in the last epoch of training, where lines have it."""
        losses = self.values(method, 'train_loss' if method == 'baseline' else 'train_ce_backbone')
        return f'{statistics.mean(losses):.3f}' if losses else ''

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

    def flops(self, method: str) -> float:
        """FLOPs of training over the baseline's; a backward costs two forwards."""
        teacher = 4 / 3 if 'ema' in METHODS[method][1] else 1  # one more forward, without backward
        return teacher * forward_flops(self.row, *flags_of(method, recipe(self.row)['epochs']))[1]

    @property
    def columns(self):
        """Titles of the table, and functions from a method to its cell."""
        paper = ROWS[self.row].get('paper', {})
        return {
            'method': lambda m: METHODS[m][0],
            'runs': lambda m: str(len(self.runs[m])),
            'backbone': lambda m: spread(self.values(m)),
            **{f'branch on {key.removeprefix("eval_top1_").replace("stage", "stage ")}':
               functools.partial(lambda m, key: spread(self.values(m, key)), key=key) for key in self.branches},
            'ensemble': lambda m: spread(self.values(m, 'eval_top1_ensemble')),
            'the paper\'s backbone': lambda m: f'{100 - paper[m]:.2f}' if m in paper else '',
            'against baseline': functools.partial(self.gain, other='baseline'),
            'against DS': functools.partial(self.gain, other='ds'),
            'loss': lambda m: f'{statistics.mean(self.values(m, "eval_loss")):.3f}',
            'loss in training': self.training_loss,
            'training time': self.time,
            'training FLOPs': lambda m: f'{self.flops(m):.2f}x',
        }

    def longer_baseline(self, of_row):
        """Rows of the baseline over more epochs, compared with the methods here."""
        for other in of_row:
            if other.epochs > self.epochs and other.runs['baseline']:
                top1, times = other.values('baseline'), f'{other.epochs / self.epochs:.2f}x'
                yield {
                    **{title: cell('baseline') for title, cell in other.columns.items()},
                    'method': f'baseline, {other.epochs} epochs',
                    'against baseline': self.difference(top1, 'baseline'),
                    'against DS': self.difference(top1, 'ds'),
                    'training time': times,
                    'training FLOPs': times,
                }

    def table(self, of_row=()) -> str:
        """Markdown table of the finished runs, with what is known of the others below it."""
        rows = [{title: cell(m) for title, cell in self.columns.items()} for m in self.methods]
        rows += self.longer_baseline(of_row)
        cells = {title: [row.get(title, '') for row in rows] for title in self.columns}
        cells = {title: column for title, column in cells.items() if any(column[:len(self.methods)])}
        text = []
        if self.methods:
            text += [*table(cells, zip(*cells.values(), strict=True)), '', self.origin()]
        if self.unfinished:
            text += ['', 'Not finished: ' + ', '.join(
                f'{METHODS[run.method][0]}, seed {run.seed} ({len(run.lines())} of {run.epochs} epochs, '
                f'backbone {run.lines()[-1]["eval_top1"]:.2f})' for run in self.unfinished) + '.']
        return '\n'.join(text).strip()

    def origin(self) -> str:
        """Devices and commits of the runs, as far as their lines name them."""
        lines = [line for runs in self.runs.values() for run in runs for line in run.lines()]
        devices, commits = (sorted({line[key] for line in lines if key in line}) for key in ('device', 'commit'))
        text = f'Trained on {"; ".join(devices) or "devices not noted"}'
        return text + (f', at commit {", ".join(commits)}.' if commits else '.')


def spread(values) -> str:
    """Mean and standard deviation."""
    if not values:
        return ''
    return f'{statistics.mean(values):.2f}' + (f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else '')


def squared_error(values) -> float:
    """Of the mean."""
    return statistics.variance(values) / len(values)


@functools.cache
def forward_flops(row: str, *flags: str):
    """FLOPs of the plain model's forward of one image, and of a training forward over them, on average."""
    from dks_timm.method.cost import inspect_model
    from dks_timm.training import build, config
    args, *_ = config.parse_args(['--config', str(RECIPES / f'{row}.yaml'), *flags])
    inspected = inspect_model(
        args.model, stages=args.dks_stages, branches=args.dks_branches, branch_kwargs=args.dks_branch_kwargs,
        budget=args.dks_budget, batch_fraction=args.dks_batch_fraction, share=build.share_of_updates(args),
        num_classes=args.num_classes, **{'img_size': args.img_size, **args.model_kwargs})
    return inspected['classifiers'][0]['flops'], inspected['cost']['flops'] if args.dks else 1.


def epoch_seconds(run):
    """Seconds that training one epoch takes, by device: the median."""
    seconds = {}
    for line in run.lines():
        if 'commit' in line:  # older ones were timed in other ways
            # On a CPU that others use too, time on the clock says little.
            key = 'cpu_seconds' if line['device'].startswith('cpu') else 'seconds'
            seconds.setdefault(line['device'], []).append(line[key])
    return {device: statistics.median(values) for device, values in seconds.items()}


@contextlib.contextmanager
def picture(file: Path, height: float = 4.5, **axis):
    """Context with the axes of an SVG, written at its end."""
    import matplotlib
    matplotlib.use('svg')
    from matplotlib import pyplot as plt
    with plt.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'dks_timm', 'font.family': 'sans-serif'}):
        figure, axes = plt.subplots(figsize=(8, height), layout='constrained')
        yield axes
        axes.set(**axis)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(file, metadata={'Date': None})
        plt.close(figure)


def draw(file: Path, lines, **axis) -> None:
    """Write an SVG of accuracy: lines are (label, x, mean, deviation), the last three lists of one length."""
    with picture(file, ylabel='top-1 accuracy of the backbone, %', **axis) as axes:
        for label, x, mean, deviation in lines:
            (line,) = axes.plot(x, mean, marker='o' if len(x) < 10 else None, label=f'{label}: {mean[-1]:.2f}')
            if any(deviation):
                low, high = zip(*((m - d, m + d) for m, d in zip(mean, deviation, strict=True)), strict=True)
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_classifiers(file: Path, section: Section) -> None:
    """Accuracy of every classifier after the last epoch: a line per method, a mark per classifier."""
    methods = section.methods[::-1]
    with picture(file, 1.5 + 0.35 * len(methods), title=section.title, xlabel='top-1 accuracy, %') as axes:
        axes.set_yticks(range(len(methods)), [METHODS[method][0] for method in methods])
        for key, marker in zip(('eval_top1', *section.branches, 'eval_top1_ensemble'), 'os^vDP*', strict=False):
            found = [(section.values(method, key), y) for y, method in enumerate(methods)]
            x, y = zip(*((statistics.mean(values), y) for values, y in found if values), strict=True)
            label = key.removeprefix('eval_top1_').replace('stage', 'branch on stage ').replace('eval_top1', 'backbone')
            axes.plot(x, y, marker, label=label, linestyle='none')


def mean_and_deviation(columns):
    """Of each column of values: two lists."""
    return ([statistics.mean(c) for c in columns], [statistics.stdev(c) if len(c) > 1 else 0. for c in columns])


def draw_curves(file: Path, section: Section) -> None:
    """Accuracy by epoch: per method the mean of its runs, and a band of one standard deviation."""
    lines = []
    for method in section.shown:
        columns = list(zip(*([line['eval_top1'] for line in run.lines()] for run in section.runs[method]), strict=True))
        lines.append((METHODS[method][0], range(1, section.epochs + 1), *mean_and_deviation(columns)))
    draw(file, lines, title=section.title, xlabel='epoch')


def draw_arithmetic(file: Path, row: str, sections) -> None:
    """Accuracy against training FLOPs: a curve per method over the lengths that were trained."""
    images = ROWS[row].get('classes', 100) * ROWS[row].get('images', 500)
    main = next((s for s in sections if s.epochs == recipe(row)['epochs']), sections[0])
    lines = []
    for method in main.shown:
        trained = [section for section in sections if section.runs[method]]
        # A backward costs two forwards.
        flops = [3 * forward_flops(row)[0] * s.flops(method) * images * s.epochs for s in trained]
        lines.append((METHODS[method][0], flops, *mean_and_deviation([s.values(method) for s in trained])))
    lengths = ', '.join(str(section.epochs) for section in sections)
    title = f'{ROWS[row]["title"]}, {lengths} epochs'
    draw(file, lines, title=title, xlabel='FLOPs of the whole training', xscale='log')


def summarise(results: str) -> None:
    """Write README.md with the tables, and pictures for each row, into the results folder."""
    text = [INTRODUCTION]
    sections = [Section(row, epochs, runs) for (row, epochs), runs in found(results).items() if runs]
    for row, about in ROWS.items():
        of_row = [section for section in sections if section.row == row]
        finished = [section for section in of_row if section.methods]
        for section in of_row:
            precision = recipe(row).get('amp_dtype', 'float32')
            length = '' if section.name == row else f' --epochs {section.epochs}'
            text += [
                f'## {section.title}, {precision}',
                f'`python benchmarks/paper.py --rows {row}{length}`' + (
                    f': the first {about["classes"]} classes by name; of each the first {about["images"]} training '
                    'images by name, and all validation images.' if 'classes' in about else ''),
                section.table(of_row)]
            if section.methods:
                draw_curves(Path(results, f'{section.name}.svg'), section)
                text.append(f'![accuracy by epoch]({section.name}.svg)')
            if section.branches:
                draw_classifiers(Path(results, f'{section.name}_classifiers.svg'), section)
                text.append(f'![accuracy of every classifier]({section.name}_classifiers.svg)')
        if len(finished) > 1:
            draw_arithmetic(Path(results, f'{row}_arithmetic.svg'), row, finished)
            text.append(f'Accuracy against arithmetic, by method:\n\n![accuracy against FLOPs]({row}_arithmetic.svg)')
    Path(results, 'README.md').write_text('\n\n'.join(text) + '\n')
