"""A page about one run, or about several side by side, with means and bands over seeds."""
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from jinja2 import Environment

from .. import __version__
from ..errors import InputError, naming
from .charts import STYLE, Line, chart, clean, color, number, picture
from .folder import Group, Run, dataset_name, differing, group_runs, read_run
from .sections import describe, duration, percent, top1_of

__all__ = ['write_report']

PathLike = Union[str, os.PathLike]

_PAGE = 'index.html'
_PLUS_MINUS = ' \N{PLUS-MINUS SIGN} '


def write_report(folders: Sequence[PathLike], out_dir: Optional[PathLike] = None) -> Path:
    """Write a page about runs, ``index.html``, with its pictures as SVG files beside it.

    Args:
        folders: Folders of runs; what is missing in them is said on the page.
        out_dir: Where to write; None takes ``report`` in the folder of a single run, ``report`` here for several.

    Returns:
        The page.

    Raises:
        ValueError: A folder is that of no run, or ``out_dir`` holds another page or cannot be written to.
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
    """The page, and its pictures by name."""
    charts: Dict[str, List[str]] = {}
    context: Dict[str, Any] = dict(runs=[])
    if len(runs) > 1:
        groups = group_runs(runs)
        runs = [run for group in groups for run in group.runs]
        context.update(_headline_of_groups(groups), comparison=_comparison(groups))
        context['problems'] = [f'{run.name}: {note}' for run in runs for note in run.notes]
        charts['comparison'] = context['comparison']['charts']
    else:
        context.update(_headline_of_run(runs[0]), problems=runs[0].notes)
    for i, run in enumerate(runs):
        described = describe(run)
        context['runs'].append(described)
        prefix = f'{i + 1}-{re.sub("[^A-Za-z0-9_.-]+", "-", Path(run.name).name)}-' if len(runs) > 1 else ''
        charts.update((f'{prefix}{name}', of) for name, of in described['pictures'].items())
    pictures = {name: picture(of, columns=2) for name, of in charts.items() if of}
    template = Path(__file__).with_suffix('.html').read_text(encoding='utf-8')
    text = Environment(autoescape=True, trim_blocks=True).from_string(template).render(
        **context, version=__version__, style=STYLE, pictures=list(pictures))
    return clean(text), pictures


def _count(number: int, thing: str, things: str = '') -> str:
    return f'{number} {thing if number == 1 else things or f"{thing}s"}'


def _subject(run: Run) -> str:
    return ' on '.join(filter(None, [run.args['model'] if run.known else run.name, dataset_name(run.args)]))


def _headline_of_run(run: Run) -> Dict[str, str]:
    best, branches = run.best, run.heads[1:]
    if run.method in ('DS', 'DKS'):
        names = f' ({", ".join(branches)})' if branches else ''
        lede = f'Trained with {run.method}: {_count(len(branches), "branch", "branches")}{names}, dropped afterwards.'
    else:
        lede = 'Trained without DKS.' if run.known else ''
    if top1_of(best) is None:
        return dict(over=run.name, headline=f'{_subject(run)}: nothing evaluated yet', lede=lede)
    if 'eval_top1_ensemble' in best:
        lede += f' All heads together reach {percent(best["eval_top1_ensemble"])}.'
    where = f'epoch {best["epoch"]:.0f}, the best of {len(run.epochs)} counted from 0'
    return dict(
        over=run.name,
        headline=f'{_subject(run)}: {percent(top1_of(best))} top-1',
        lede=f'The backbone alone in {where}; {percent(top1_of(run.last))} in the last. {lede}',
    )


def _headline_of_groups(groups: Sequence[Group]) -> Dict[str, str]:
    runs = [run for group in groups for run in group.runs]
    subjects = {_subject(run) for run in runs}
    over = f'{_count(len(runs), "run")}: {", ".join(run.name for run in runs)}'
    where = f'{subjects.pop()}. ' if len(subjects) == 1 else ''
    baselines = [group for group in groups if group.method == 'baseline']
    for method in ('DKS', 'DS'):
        mine = [group for group in groups if group.method == method]
        if where and len(mine) == len(baselines) == 1 and mine[0].finished and baselines[0].finished:
            a, b = _mean(mine[0]), _mean(baselines[0])
            counts = ', '.join(f'{g.method}: {_count(len(g.counted), "run")}' for g in (mine[0], baselines[0]))
            return dict(
                over=over,
                headline=f'{method} backbone {percent(a)}, baseline {percent(b)}: {_signed(a - b)} points',
                lede=f'{where}Top-1 of the backbone alone after the last epoch; {counts}. '
                     + _error_of_difference(mine[0], baselines[0]) + _differing_beside_dks([mine[0], baselines[0]]),
            )
    if where and len(groups) == 1 and groups[0].finished:
        return dict(
            over=over,
            headline=f'{groups[0].method} backbone {_spread(groups[0], "last")}\N{NARROW NO-BREAK SPACE}% top-1',
            lede=f'{where}The backbone alone after the last epoch, mean and standard deviation of '
                 f'{_count(len(groups[0].counted), "run")} that differ in their seed only.',
        )
    return dict(
        over=over,
        headline=f'{_count(len(runs), "run")} side by side',
        lede=f'{where}Top-1 of the backbone alone; runs that differ in their seed only are taken together.',
    )


def _values(group: Group, which: str) -> List[float]:
    """Accuracies of a group's counted runs in their 'last' or 'best' epoch."""
    found = [top1_of(getattr(run, which)) for run in group.counted]
    return [value for value in found if value is not None]


def _mean(group: Group) -> float:
    return statistics.fmean(_values(group, 'last'))


def _signed(value: float) -> str:
    return f'{"+" if value >= 0 else ""}{number(value)}'


def _spread(group: Group, which: str) -> str:
    values = _values(group, which)
    deviation = f'{_PLUS_MINUS}{number(statistics.stdev(values))}' if len(values) > 1 else ''
    return f'{number(statistics.fmean(values))}{deviation}' if values else ''


def _error_of_difference(a: Group, b: Group) -> str:
    samples = [_values(group, 'last') for group in (a, b)]
    if min(map(len, samples)) < 2:
        return 'How much of the difference is chance, a single run of a kind cannot tell.'
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in samples))
    return f'The standard error of the difference is {number(error)} points.'


def _comparison(groups: Sequence[Group]) -> Dict[str, Any]:
    baselines = [group for group in groups if group.method == 'baseline']
    free = iter(range(len(groups)))
    shades = [
        color(None if len(baselines) == 1 and group.method == 'baseline' else next(free))
        for group in reversed(groups)][::-1]
    rows = []
    for group, shade in zip(groups, shades, strict=True):
        seconds = [run.noted.get('train_seconds') for run in group.counted]
        compared = len(baselines) == 1 and group.finished and baselines[0].finished and group not in baselines
        rows.append(dict(
            label=group.label,
            color=shade,
            seeds=', '.join(str(run.args['seed']) if run.known else '?' for run in group.runs),
            last=_spread(group, 'last'),
            best=_spread(group, 'best'),
            difference=_signed(_mean(group) - _mean(baselines[0])) if compared else '',
            time=duration(statistics.fmean(seconds)) if all(seconds) else '',
        ))
    charts = [
        chart('Top-1 accuracy of the backbone, %', _group_lines(groups, shades, 'eval_top1'), y_most=100, focus=True),
        chart('Loss of the backbone, evaluation', _group_lines(groups, shades, 'eval_loss'), focus=True),
    ]
    text = 'Lines are means over seeds; bands reach from the lowest to the highest.'
    left_out = [run.name for group in groups for run in group.runs if run not in group.counted]
    if left_out:
        text += f' Not in the means, because unfinished: {", ".join(left_out)}.'
    text += _differing_beside_dks(groups)
    compared = any(row['difference'] for row in rows)
    return dict(rows=rows, compared=compared, charts=[c for c in charts if c], text=text)


def _group_lines(groups: Sequence[Group], shades: Sequence[str], column: str) -> List[Line]:
    lines = []
    for group, shade in zip(groups, shades, strict=True):
        curve = group.curve(column)
        points = [(epoch, statistics.fmean(values)) for epoch, values in curve]
        band = [(epoch, min(values), max(values)) for epoch, values in curve] if len(group.counted) > 1 else ()
        lines.append(Line(group.label, points, shade, value=number(points[-1][1]) if points else None, band=band))
    return lines


def _differing_beside_dks(groups: Sequence[Group]) -> str:
    keys = {key for a in groups for b in groups for key in differing(a.settings, b.settings)}
    keys = sorted(key for key in keys if not key.startswith('dks'))
    return f' Besides DKS, these runs differ in {", ".join(keys)}.' if keys else ''
