"""A page about one run, or about several side by side, with means and bands over seeds."""
import itertools
import math
import os
import re
import statistics
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from jinja2 import Environment

from .. import __version__
from ..errors import InputError, naming
from .folder import Group, Run, dataset_name, differing, group_runs, read_run, run_settings
from .pictures import INKS, Chart, Line, clean, column_line, draw, head_color, themed

__all__ = ['write_report']

PathLike = Union[str, os.PathLike]

_PAGE = 'index.html'
_MOST_HEADS = 6  # of which all pairs fit into a chart
_CONFIDENCE = 0.9  # of the table of early exits


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: An explanation.
        finding: A sentence that stands out.
        columns: Heads of the columns of a table.
        rows: The table, each row a colour and its cells.
        charts: Charts by the name of their picture.
    """
    title: str
    text: str = ''
    finding: str = ''
    columns: Sequence[str] = ()
    rows: Sequence[Tuple[str, Sequence[str]]] = ()
    charts: Dict[str, Chart] = field(default_factory=dict)


def write_report(folders: Sequence[PathLike], out_dir: Optional[PathLike] = None) -> Path:
    """Write a page about runs, ``index.html``, with its pictures as SVG files beside it.

    Args:
        folders: Folders of runs; what is missing in them is said on the page.
        out_dir: Where to write; None takes ``report`` in the folder of a single run, ``report`` here for several.

    Returns:
        Path of the page.

    Raises:
        ValueError: A folder holds no run, or ``out_dir`` holds another page or cannot be written to.
    """
    runs = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    out_dir = Path(out_dir or (runs[0].folder / 'report' if len(runs) == 1 else 'report'))
    page = out_dir / _PAGE
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f'--output {out_dir}: is a file; give a folder')
    earlier = page.read_text(encoding='utf-8', errors='replace') if page.exists() else ''
    if earlier and '<meta name="generator" content="dks_timm' not in earlier:
        raise InputError(f'--output {out_dir}: holds an {_PAGE} that is no report; give another folder')

    text, pictures = _render(runs)
    with naming(f'--output {out_dir}', OSError):
        out_dir.mkdir(parents=True, exist_ok=True)
        for old in re.findall(r'href="([\w.-]+\.svg)"', earlier):  # of other runs, perhaps
            (out_dir / old).unlink(missing_ok=True)
        for name, svg in pictures.items():
            (out_dir / f'{name}.svg').write_text(svg, encoding='utf-8')
        page.write_text(text, encoding='utf-8')
    return page


def _render(runs: Sequence[Run]) -> Tuple[str, Dict[str, str]]:
    """Return the page, and its pictures by name."""
    comparison, pictures = [], {}
    notes: Dict[str, List[str]] = {}
    if len(runs) > 1:
        groups = group_runs(runs)
        runs = [run for group in groups for run in group.runs]
        headline, lede = _headline_of_groups(groups)
        comparison = _drawn([_comparison(groups)], pictures)
    else:
        headline, lede = _headline_of_run(runs[0])
    parts = []
    for i, run in enumerate(runs, 1):
        prefix = f'{i}-{Path(run.name).name}-' if comparison else ''
        settings = sorted(run_settings(run.args).items()) if run.known else []
        parts.append(dict(
            run=run, sections=_drawn(_sections(run), pictures, prefix), facts=_facts(run), settings=settings,
            top1=_percent(run.best.get('eval_top1'))))
        for note in run.notes:
            notes.setdefault(note, []).append(run.name)
    template = Path(__file__).with_suffix('.html').read_text(encoding='utf-8')
    text = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        headline=headline, lede=lede, notes=notes, comparison=comparison, parts=parts, pictures=list(pictures),
        inks=INKS, version=__version__)
    return clean(text), pictures


def _drawn(sections: Iterable[Section], pictures: Dict[str, str], prefix: str = '') -> List[Tuple[Section, List[str]]]:
    """Draw the charts of sections, add them to the pictures, and return sections with something to show."""
    found = []
    for section in sections:
        own = {
            re.sub('[^A-Za-z0-9_.-]+', '-', f'{prefix}{name}'): draw([chart])
            for name, chart in section.charts.items() if chart.lines}
        pictures.update(own)
        if own or section.rows:
            found.append((section, [themed(svg) for svg in own.values()]))
    return found


def _number(value: Optional[float], digits: int = 2) -> str:
    return '' if value is None or not math.isfinite(value) else f'{value:.{digits}f}'


def _percent(value: Optional[float], digits: int = 2) -> str:
    return f'{text}%' if (text := _number(value, digits)) else ''


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _subject(run: Run) -> str:
    return ' on '.join(filter(None, [run.args['model'] if run.known else run.name, dataset_name(run.args)]))


# Of one run

def _headline_of_run(run: Run) -> Tuple[str, str]:
    lede = 'Trained without DKS.' if run.method == 'baseline' else ''
    if run.method in ('DS', 'DKS'):
        branches = f' ({", ".join(run.heads[1:])})' if run.heads[1:] else ''
        lede = f'Trained with {run.method}; its branches{branches} are dropped afterwards.'
    top1 = _percent(run.best.get('eval_top1'))
    if not top1:
        return f'{_subject(run)}: nothing evaluated yet', lede
    if ensemble := _percent(run.best.get('eval_top1_ensemble')):
        lede += f' All heads together reach {ensemble}.'
    return f'{_subject(run)}: {top1} top-1', (
        f'The backbone alone in epoch {run.best["epoch"]:.0f}, the best of {len(run.epochs)} counted from 0; '
        f'{_percent(run.last.get("eval_top1"))} in the last. {lede}')


def _sections(run: Run) -> Iterator[Section]:
    colors = {head: head_color(i) for i, head in enumerate(run.heads)}
    yield _heads(run, colors)
    yield _teaching(run, colors)
    yield _agreement(run, colors)
    yield from _exits(run, colors)


def _column(prefix: str, head: str) -> str:
    return prefix if head == 'backbone' else f'{prefix}_{head}'


def _heads(run: Run, colors: Mapping[str, str]) -> Section:
    def lines(column: str, of_backbone: str) -> List[Line]:
        return [
            column_line(run.epochs, of_backbone if head == 'backbone' else f'{column}_{head}', head, color)
            for head, color in colors.items()]

    together = column_line(run.epochs, 'eval_top1_ensemble', 'ensemble', 'muted', dashed=True)
    rows = []
    for head, color in {**colors, 'ensemble': 'muted'}.items():
        top1 = _column('eval_top1', head)
        loss = _number(run.last.get(_column('eval_loss', head)), 3)
        if last := _percent(run.last.get(top1)):
            rows.append((color, [head, _percent(run.best.get(top1)), last, loss]))
    whole_loss = 'train_ce_backbone' if len(colors) > 1 else 'train_loss'
    return Section(
        title='Heads',
        columns=['head', 'top-1, best epoch', 'top-1, last epoch', 'eval loss, last epoch'],
        rows=rows,
        charts={
            'accuracy': Chart('Top-1 accuracy, evaluation, %', [*lines('eval_top1', 'eval_top1'), together]),
            'loss': Chart('Loss, evaluation', lines('eval_loss', 'eval_loss')),
            'accuracy-training': Chart('Top-1 accuracy, training, %', lines('train_top1', 'train_top1_backbone')),
            'loss-training': Chart('Loss of the labels, training', lines('train_ce', whole_loss)),
        },
    )


def _teaching(run: Run, colors: Mapping[str, str]) -> Section:
    lines = {
        student: [
            column_line(run.epochs, f'train_synergy_{teacher}_{student}', teacher, color, digits=3)
            for teacher, color in colors.items() if teacher != student]
        for student in colors}
    settled = [y for of in lines.values() for line in of for _, y in line.points[len(line.points) // 10:]]
    return Section(
        title='Who teaches whom',
        text="Synergy is the Kullback-Leibler divergence of the student's prediction from the teacher's, in nats, as a "
             'mean over the training images of an epoch. At 0 there is nothing left to learn from that teacher. The '
             'charts show all pairs, unweighted, also those that direction and weights leave out.',
        charts={
            # One range for all, so that they can be compared.
            f'teaching-{student}': Chart(f'{student} learns from', of, y_range=(0., max(settled, default=0.)))
            for student, of in lines.items()},
    )


def _agreement(run: Run, colors: Mapping[str, str]) -> Section:
    lines = [
        column_line(run.epochs, f'eval_agree_{a}_{b}', f'{a}, {b}', colors[a], second=colors[b], digits=1)
        for a, b in itertools.combinations(colors, 2) if len(colors) <= _MOST_HEADS or a == 'backbone']
    return Section(
        title='How often heads agree',
        text='The share of evaluation images to which two heads give the same class, right or wrong.',
        charts=dict(agreement=Chart('Same class, %', lines)),
    )


def _exits(run: Run, colors: Mapping[str, str]) -> Iterator[Section]:
    measured, flops, epoch = (run.noted.get(key) for key in ('exits', 'exit_flops', 'exits_epoch'))
    top1 = next((row.get('eval_top1', math.nan) for row in run.epochs if row['epoch'] == epoch), math.nan)
    if not measured or not flops or not math.isfinite(top1) or len(flops['branches']) != len(colors) - 1:
        return
    whole, points = flops['backbone'], []
    rows = [('c0', ['backbone', f'{whole / 1e6:,.1f}', '1.00', '', _percent(top1), '1.00'])]
    lines = [Line('backbone', [(1., top1)], 'c0')]
    for head, cost in zip(run.heads[1:], flops['branches'], strict=True):
        leaving = cost['to_stage'] + cost['branch']
        # Every image pays for the branch that it is asked by, one that stays for the rest of the backbone, too.
        of_head = [
            {**row, 'cost': (leaving + (1 - row['leave'] / 100) * (whole - cost['to_stage'])) / whole}
            for row in measured if row['exit'] == head]
        lines.append(Line(head, [(point['cost'], point['top1']) for point in of_head], colors[head], dots=True))
        rows += [
            (colors[head], [head, f'{leaving / 1e6:,.1f}', _number(leaving / whole), _percent(point['leave'], 1),
                            _percent(point['top1']), _number(point['cost'])])
            for point in of_head if point['threshold'] == _CONFIDENCE]
        points += of_head
    yield Section(
        title='Early exits',
        finding=_finding(points, top1),
        columns=['asked', 'MFLOPs to leave', 'of the backbone', f'leave at confidence {_CONFIDENCE}', 'top-1 then',
                 'mean cost then'],
        rows=rows,
        charts=dict(exits=Chart('Top-1 accuracy by cost, %', lines, x_label='mean cost of an image, backbone = 1')),
        text='Large dots: all images leave at that branch. Along a line, only those leave whose confidence (the '
             'largest softmax probability) reaches a threshold, and the backbone answers for the rest; one branch is '
             f'asked at a time. Accuracies were measured on the evaluation split, with the weights of epoch {epoch}. '
             'Costs are counted in FLOPs, not timed: an exit costs the backbone up to its stage, and the branch.',
    )


def _finding(points: Sequence[Mapping[str, Any]], top1: float) -> str:
    """Return a sentence about the cheapest early exit that loses a point of accuracy at most."""
    good = [point for point in points if point['cost'] < 1 and point['top1'] >= top1 - 1]
    if not good:
        return 'No early exit of this run is both cheaper than the backbone and within a point of its accuracy.'
    best = min(good, key=lambda point: point['cost'])
    return (f'If images leave at {best["exit"]} from a confidence of {best["threshold"]:g} on, '
            f'{_percent(best["leave"], 1)} do: {_percent(best["top1"])} top-1 for {_number(best["cost"])} of the '
            f"backbone's FLOPs, within a point of the backbone ({_percent(top1)}).")


def _facts(run: Run) -> List[Tuple[str, Any]]:
    noted = run.noted
    seconds, commit = noted.get('train_seconds'), noted.get('commit')
    facts = {
        'folder': run.folder,
        'epochs': len(run.epochs),
        'classes': noted.get('num_classes') or run.args['num_classes'],
        'seed': run.args['seed'] if run.known else None,
        'time, with evaluation': seconds and f'{_duration(seconds)} (h:mm:ss)',
        'machine': noted.get('hardware'),
        'versions': noted.get('software'),
        'commit of dks_timm': commit and commit[:12] + commit[40:],  # 40 is the whole of it; ' with changes' may follow
        'started from': noted.get('started_from'),
    }
    return [(name, value) for name, value in facts.items() if value is not None]


# Of several runs

def _baseline(groups: Sequence[Group]) -> Optional[Group]:
    """Return the group to compare others with: the only baseline, where it is finished."""
    found = [group for group in groups if group.method == 'baseline']
    return found[0] if len(found) == 1 and found[0].finished else None


def _headline_of_groups(groups: Sequence[Group]) -> Tuple[str, str]:
    runs = [run for group in groups for run in group.runs]
    subjects, baseline = {_subject(run) for run in runs}, _baseline(groups)
    subject = ', '.join(sorted(subjects))
    for method in ('DKS', 'DS'):
        mine = [group for group in groups if group.method == method]
        if len(subjects) == 1 and baseline and len(mine) == 1 and mine[0].finished:
            a, b = (_percent(statistics.fmean(group.values('last'))) for group in (mine[0], baseline))
            return f'{method} backbone {a}, baseline {b}: {_difference(mine[0], baseline)} points', (
                f'{subject}. Top-1 of the backbone alone after the last epoch, means of {len(mine[0].counted)} '
                f'{method} and {len(baseline.counted)} baseline runs.')
    return f'{len(runs)} runs side by side', f'{subject}. Top-1 of the backbone alone.'


def _spread(group: Group, which: str) -> str:
    values = group.values(which)
    deviation = f' ± {_number(statistics.stdev(values))}' if len(values) > 1 else ''
    return _number(statistics.fmean(values)) + deviation if values else ''


def _difference(a: Group, b: Group) -> str:
    """Return the difference of two means after the last epoch, with its standard error where both have several runs."""
    samples = a.values('last'), b.values('last')
    means = [statistics.fmean(values) for values in samples]
    text = f'{means[0] - means[1]:+.2f}'
    if min(map(len, samples)) > 1:
        text += f' ± {math.sqrt(sum(statistics.variance(values) / len(values) for values in samples)):.2f}'
    return text


def _comparison(groups: Sequence[Group]) -> Section:
    baseline = _baseline(groups)
    colors = ['muted' if group is baseline else head_color(i) for i, group in enumerate(reversed(groups))][::-1]
    rows = []
    for group, color in zip(groups, colors, strict=True):
        seeds = ', '.join(str(run.args['seed']) if run.known else '?' for run in group.runs)
        seconds = [run.noted.get('train_seconds') for run in group.counted]
        compared = baseline and group is not baseline and group.finished
        time = _duration(statistics.fmean(seconds)) if all(seconds) else ''
        rows.append((color, [
            group.label, seeds, _spread(group, 'last'), _difference(group, baseline) if compared else '',
            _spread(group, 'best'), time]))
    text = ('Top-1 accuracy of the backbone alone in %: mean over the seeds and standard deviation; of the difference '
            'to the baseline, after the last epoch, the standard error. Lines are means, bands reach from the lowest '
            'to the highest seed.')
    left_out = [run.name for group in groups for run in group.runs if run not in group.counted]
    if left_out:
        text += f' Not in the means, because unfinished: {", ".join(left_out)}.'
    keys = sorted({key for a in groups for b in groups for key in differing(a.settings, b.settings)})
    if keys := [key for key in keys if not key.startswith('dks')]:
        text += f' Besides DKS, these runs differ in {", ".join(keys)}.'
    return Section(
        title='Comparison',
        text=text,
        columns=['runs', 'seeds', 'last epoch', 'against baseline', 'best epoch', 'mean time, h:mm:ss'],
        rows=rows,
        charts={
            'comparison': Chart('Top-1 accuracy of the backbone, %', _group_lines(groups, colors, 'eval_top1')),
            'comparison-loss': Chart('Loss of the backbone, evaluation', _group_lines(groups, colors, 'eval_loss')),
        },
    )


def _group_lines(groups: Sequence[Group], colors: Sequence[str], column: str) -> List[Line]:
    lines, methods = [], [group.method for group in groups]
    for group, color in zip(groups, colors, strict=True):
        label = group.label if methods.count(group.method) > 1 else group.method
        curve = group.curve(column)
        points = [(epoch, statistics.fmean(values)) for epoch, values in curve]
        band = [(epoch, min(values), max(values)) for epoch, values in curve] if len(group.counted) > 1 else ()
        lines.append(Line(label, points, color, band=band))
    return lines
