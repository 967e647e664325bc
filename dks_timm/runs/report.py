"""A page about one run, or about several side by side, with means and bands over seeds."""
import itertools
import math
import os
import re
import statistics
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from jinja2 import Environment
from markupsafe import Markup

from .. import __version__
from ..errors import InputError, naming, printable
from ..method.cost import mean_exit_cost
from .folder import Run, dataset_name, group_runs, read_run, run_settings
from .pictures import INKS, TITLES, Chart, Points, column_lines, draw, themed

PathLike = Union[str, os.PathLike]
Section = Dict[str, Any]  # of the page: title, and where it has them: text, columns and rows of a table, charts

_GENERATOR = 'content="dks_timm'  # marks a page of ours
_CONFIDENCE = 0.9  # of the table of early exits


def write_report(folders: Sequence[PathLike], out_dir: Optional[PathLike] = None) -> Path:
    """Write a page about runs, ``index.html``, with its pictures as SVG files beside it.

    Args:
        folders: Folders of runs.
        out_dir: Folder to write to; None takes ``report`` in the folder of a single run, ``report`` here for several.

    Raises:
        ValueError: A folder holds no run, or ``out_dir`` holds another page or cannot be written to.
    """
    runs = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    if len({run.metric for run in runs}) > 1:
        raise InputError('RUN: runs of --task multilabel and others have no metric in common; give them by themselves')
    out_dir = Path(out_dir or (runs[0].folder / 'report' if len(runs) == 1 else 'report'))
    page = out_dir / 'index.html'
    text, pictures = _render(runs)
    with naming(f'--output {out_dir}', OSError):
        out_dir.mkdir(parents=True, exist_ok=True)
        earlier = page.read_text(encoding='utf-8', errors='replace') if page.exists() else _GENERATOR
        if _GENERATOR not in earlier:
            raise InputError('holds an index.html that is no report; give another folder')
        for picture in re.findall(r'href="([\w-]+\.svg)"', earlier):
            (out_dir / picture).unlink(missing_ok=True)
        for name, content in {**pictures, page.name: text}.items():
            (out_dir / name).write_text(content, encoding='utf-8')
    return page


def _render(runs: Sequence[Run]) -> Tuple[str, Dict[str, str]]:
    """Return the page, and its pictures by the names of their files."""
    groups = group_runs(runs)
    parts = {f'{len(runs)} runs side by side': [_comparison(groups)]} if len(runs) > 1 else {}
    parts.update((f'{run.folder}: {run.method}', list(_sections(run))) for group in groups.values() for run in group)
    pictures: Dict[str, str] = {}
    for section in itertools.chain(*parts.values()):
        section['figures'] = []
        for chart in section.get('charts', ()):
            if svg := draw([chart]):
                name = re.sub('[^a-z0-9]+', '-', f'{len(pictures) + 1} {chart.title}'.lower()).strip('-')
                pictures[f'{name}.svg'] = svg
                section['figures'].append(Markup(themed(svg)))
    # What comes from a run is text: control characters are escaped by finalize, markup by autoescape.
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value))
    template = environment.from_string(Path(__file__).with_suffix('.html').read_text(encoding='utf-8'))
    return template.render(
        headline=', '.join(sorted({f'{run.args["model"]} on {dataset_name(run.args)}' for run in runs})),
        notes=[f'{run.folder}: {note}' for run in runs for note in run.notes],
        parts=parts, pictures=pictures, inks=INKS, version=__version__,
    ), pictures


def _number(value: Optional[float], digits: int = 2) -> str:
    return '' if value is None else f'{value:,.{digits}f}'


def _sections(run: Run) -> Iterator[Section]:
    heads, together = run.heads, [*run.heads, 'ensemble']
    metric, title = f'eval_{run.metric}', TITLES[run.metric]

    def chart(title: str, column: str, of: Sequence[str] = heads) -> Chart:
        return Chart(title, column_lines(run.epochs, {head: column.format(head) for head in of}))

    yield dict(
        title='Heads',
        text='Only the backbone stays after training. The ensemble is the mean of the probabilities of all heads.',
        columns=['head', f'{title} in the best epoch, %', f'{title} in the last epoch, %', 'loss in the last epoch'],
        rows=[
            [head, _number(run.best.get(f'{metric}_{head}')), _number(run.last.get(f'{metric}_{head}')),
             _number(run.last.get(f'eval_loss_{head}'), 3)] for head in together if f'{metric}_{head}' in run.last],
        charts=[
            chart(f'{title}, evaluation, %', f'{metric}_{{}}', together),
            chart('Loss, evaluation', 'eval_loss_{}'),
            chart('Top-1 accuracy, training, %', 'train_top1_{}'),
            chart('Loss of the labels, training', 'train_ce_{}'),
        ],
    )
    yield dict(
        title='Who teaches whom',
        text="Synergy is the Kullback-Leibler divergence of the student's prediction from the teacher's, in nats, a "
             'mean over the training images of an epoch, unweighted. At 0 there is nothing left to learn.',
        charts=[chart(f'{student} learns from', f'train_synergy_{{}}_{student}', together) for student in heads],
    )
    pairs = {f'{a}, {b}': f'eval_agree_{a}_{b}' for a, b in itertools.combinations(heads, 2)}
    if run.metric == 'top1':
        yield dict(
            title='How often heads agree',
            text='The share of evaluation images to which two heads give the same class, right or wrong.',
            charts=[Chart('Same class, %', column_lines(run.epochs, pairs))],
        )
    if run.best and run.noted.get('exits'):
        yield _exits(run)
    facts = {key: run.noted.get(key) for key in ('command', 'hardware', 'software', 'commit', 'started_from')}
    if seconds := run.noted.get('train_seconds'):
        facts['time, with evaluation'] = timedelta(seconds=round(seconds))
    settings = {**facts, 'seed': run.args['seed'], **run_settings(run.args)}
    yield dict(
        title='The run, and settings that differ from the defaults',
        rows=[row for row in settings.items() if row[1] is not None])


def _exits(run: Run) -> Section:
    flops, top1 = run.noted['exit_flops'], run.best['eval_top1']
    whole = flops['backbone']
    rows = [['backbone', _number(whole / 1e6, 1), '1.00', '', _number(top1), '1.00']]
    lines = {'backbone': [(1., top1)]}
    for branch, (head, cost) in enumerate(zip(run.heads[1:], flops['branches'], strict=True)):
        leaving = cost['to_stage'] + cost['branch']
        lines[head] = []
        for row in run.noted['exits'][::-1]:
            if row['exit'] == head:
                mean = mean_exit_cost(flops, branch, row['leave'] / 100)
                lines[head].append((mean, row['top1']))
                if row['threshold'] == _CONFIDENCE:
                    rows.append([
                        head, _number(leaving / 1e6, 1), _number(leaving / whole), _number(row['leave'], 1),
                        _number(row['top1']), _number(mean)])
    return dict(
        title='Early exits',
        text='Images leave at a branch from a confidence (the largest softmax probability) on, the backbone answers '
             'for the rest; where a line is cheapest, all leave. One branch is asked at a time. Accuracy was measured '
             'on the evaluation split in the best epoch. Costs are FLOPs: backbone up to the stage, and branch.',
        columns=['asked', 'MFLOPs to leave', 'of the backbone', f'leave from {_CONFIDENCE} on, %', 'top-1, %', 'cost'],
        rows=rows,
        charts=[Chart('Top-1 accuracy by cost, %', lines, x_label='mean cost of an image, backbone = 1')],
    )


def _comparison(groups: Mapping[str, Sequence[Run]]) -> Section:
    metric, = {run.metric for runs in groups.values() for run in runs}
    # No mean over runs that are finished and others that are not.
    counted = {label: [run for run in runs if run.finished] or runs for label, runs in groups.items()}
    baselines = [runs for runs in counted.values() if runs[0].method == 'baseline']
    baseline = _metric(baselines[0]) if len(baselines) == 1 and baselines[0][0].finished else []
    rows, lines = [], {}
    for label, runs in counted.items():
        lines[label] = _mean_line(runs)
        values, best = _metric(runs), [run.best[f'eval_{metric}'] for run in runs if run.best]
        compared = baseline and values and runs[0].finished and runs[0].method != 'baseline'
        rows.append([
            label, ', '.join(str(run.args['seed']) for run in runs), _mean(values),
            _difference(values, baseline) if compared else '', _mean(best)])
    return dict(
        title='Comparison',
        text=f'{TITLES[metric]} of the backbone alone in %: mean over the seeds and standard deviation; of the '
             'difference to the baseline, after the last epoch, the standard error. Lines are means, bands reach from '
             'the lowest to the highest seed. Runs that are not finished are left out where others of their group are.',
        columns=['runs', 'seeds', 'last epoch', 'against baseline', 'best epoch'],
        rows=rows,
        charts=[Chart(f'{TITLES[metric]} of the backbone, %', lines)],
    )


def _metric(runs: Sequence[Run]) -> List[float]:
    return [run.last[f'eval_{run.metric}'] for run in runs if run.last]


def _mean(values: Sequence[float]) -> str:
    """Return the mean, with the standard deviation of several values."""
    deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.2f}{deviation}' if values else ''


def _difference(a: Sequence[float], b: Sequence[float]) -> str:
    """Return the difference of two means, with its standard error where both are of several values."""
    text = f'{statistics.fmean(a) - statistics.fmean(b):+.2f}'
    if min(len(a), len(b)) > 1:
        text += f' ± {math.sqrt(sum(statistics.variance(values) / len(values) for values in (a, b))):.2f}'
    return text


def _mean_line(runs: Sequence[Run]) -> Points:
    """Return the mean metric at the epochs that all runs have, with the lowest and the highest."""
    column = f'eval_{runs[0].metric}'
    tables = [{row['epoch']: row[column] for row in run.epochs if column in row} for run in runs]
    curve = [(epoch, [table[epoch] for table in tables]) for epoch in sorted(set.intersection(*map(set, tables)))]
    return [(epoch, statistics.fmean(values), min(values), max(values)) for epoch, values in curve]
