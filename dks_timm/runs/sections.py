"""What a report says about one run: its heads, who teaches whom, how often they agree, early exits, its settings."""
import math
from datetime import timedelta
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from .charts import PAIR, Line, chart, color, column_line, number
from .folder import Epoch, Run, run_settings

__all__ = ['describe', 'duration', 'percent', 'top1_of']

_MOST_HEADS = 6  # whose teaching is drawn; of more, the matrix says it better
_CONFIDENCE = 0.9  # of the table of early exits
_TIMES = '\N{MULTIPLICATION SIGN}'


def percent(value: Optional[float], digits: int = 2) -> str:
    return '' if value is None else f'{number(value, digits)}\N{NARROW NO-BREAK SPACE}%'


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def top1_of(epoch: Epoch, head: str = 'backbone') -> Optional[float]:
    """Accuracy of a head on the evaluation split."""
    return epoch.get(_column('eval_top1', head))


def _column(prefix: str, head: str) -> str:
    return prefix if head == 'backbone' else f'{prefix}_{head}'


def describe(run: Run) -> Dict[str, Any]:
    """What the template shows of a run, with its charts by the name of their picture in ``pictures``."""
    colors = {head: color(i) for i, head in enumerate(run.heads)}
    exits = _exits(run, colors)
    curves = _curves(run, colors)
    teaching = _teaching(run, colors)
    agreement = _agreement(run, colors)
    top1 = top1_of(run.best)
    return dict(
        name=run.name,
        notes=run.notes,
        summary=', '.join([run.method] + [f'{percent(top1)} in the best epoch'] * (top1 is not None)),
        heads=_heads(run, colors, exits),
        curves=[c for pair in zip(*curves.values(), strict=True) for c in pair if c],  # evaluation above training
        teaching=teaching,
        agreement=agreement,
        exits=exits,
        command=run.noted.get('command'),
        facts=_facts(run),
        settings=[(key, _text(value)) for key, value in sorted(run_settings(run.args).items())] if run.known else [],
        pictures=dict(
            **{name: [c for c in charts if c] for name, charts in curves.items()},
            teaching=teaching['charts'] if teaching else [],
            agreement=[agreement['chart']] if agreement else [],
            exits=[exits['chart']] if exits else [],
        ),
    )


def _text(value: Any) -> str:
    """A setting as a recipe has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ' '.join(f'{k}={v}' for k, v in value.items())
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _facts(run: Run) -> List[Tuple[str, Any]]:
    noted = run.noted
    seconds, commit = noted.get('train_seconds'), noted.get('commit')
    facts = {
        'folder': run.folder,
        'epochs': len(run.epochs),
        'classes': noted.get('num_classes') or run.args['num_classes'],
        'seed': run.args['seed'] if run.known else None,
        'time, with evaluation': seconds and f'{duration(seconds)} (h:mm:ss)',
        'machine': noted.get('hardware'),
        'versions': noted.get('software'),
        'commit of dks_timm': commit and commit[:12] + commit[40:],  # 40 is the whole of it; ' with changes' may follow
        'started from': noted.get('started_from'),
    }
    return [(name, value) for name, value in facts.items() if value is not None]


def _heads(run: Run, colors: Mapping[str, str], exits: Optional[Mapping[str, Any]]) -> List[Dict[str, str]]:
    rows = []
    for head in [*run.heads, 'ensemble']:
        cost = exits['costs'].get(head) if exits else None
        row = dict(
            best=percent(top1_of(run.best, head)),
            last=percent(top1_of(run.last, head)),
            loss=number(loss, 3) if (loss := run.last.get(_column('eval_loss', head))) is not None else '',
            flops=exits['shown'](cost) if cost else '',
            share=f'{number(cost / exits["costs"]["backbone"])}{_TIMES}' if cost else '',
        )
        if row['last']:
            rows.append(dict(name=head, color=colors.get(head, color(None)), **row))
    return rows


def _curves(run: Run, colors: Mapping[str, str]) -> Dict[str, List[Optional[str]]]:
    """Charts of accuracy and loss, each in evaluation and training; None for one without numbers."""
    def lines(column: Callable[[str], str]) -> List[Line]:
        return [column_line(run.epochs, column(head), head, shade) for head, shade in colors.items()]

    together = column_line(run.epochs, 'eval_top1_ensemble', 'ensemble', color(None), dashed=True)
    whole = column_line(run.epochs, 'train_loss', 'backbone', colors['backbone'])
    accuracy = (
        ('Top-1 accuracy, evaluation, %', [*lines(lambda head: _column('eval_top1', head)), together]),
        ('Top-1 accuracy, training, %', lines(lambda head: f'train_top1_{head}')),
    )
    loss = (
        ('Loss, evaluation', lines(lambda head: _column('eval_loss', head))),
        ('Loss of the labels, training', lines(lambda head: f'train_ce_{head}') if len(colors) > 1 else [whole]),
    )
    return dict(
        accuracy=[chart(title, of, y_most=100, focus=True) for title, of in accuracy],
        loss=[chart(title, of, focus=True) for title, of in loss],
    )


def _matrix(
        colors: Mapping[str, str],
        caption: str,
        value: Callable[[str, str], float],
        digits: int,
        low: float,
) -> Dict[str, Any]:
    """A table of pairs of heads; the larger a value is, the deeper its shade, from ``low`` on."""
    cells = {(a, b): value(a, b) for a in colors for b in colors if a != b}
    span = max(cells.values()) - low or 1
    shown = {
        pair: dict(text=number(v, digits), shade=round(6 + 44 * max(0., (v - low) / span)))
        for pair, v in cells.items()}
    heads = [dict(name=head, color=shade) for head, shade in colors.items()]
    return dict(caption=caption, heads=heads, rows=[
        dict(**head, cells=[shown.get((head['name'], b), {}) for b in colors]) for head in heads])


def _teaching(run: Run, colors: Mapping[str, str]) -> Optional[Dict[str, Any]]:
    def column(teacher: str, student: str) -> str:
        return f'train_synergy_{teacher}_{student}'

    rows = _complete(run, [column(a, b) for a in colors for b in colors if a != b])
    if not rows:
        return None
    settled = [v for row in rows[len(rows) // 10:] for name, v in row.items() if name.startswith('train_synergy_')]
    charts = [
        chart(
            f'{student} learns from',
            [column_line(rows, column(a, student), a, shade, digits=3) for a, shade in colors.items() if a != student],
            size=(300, 230),
            y_range=(0., max(settled)),  # one for all, to be compared
            focus=True,
        ) for student in colors] if len(colors) <= _MOST_HEADS else []
    text = (
        "Synergy is the Kullback-Leibler divergence of the student's prediction from the teacher's, in nats, as a mean "
        'over the training images of an epoch. At 0 there is nothing left to learn from that teacher.')
    direction, weight = run.args['dks_direction'], _text(run.args['dks_synergy_weight'])
    if run.method == 'DS':
        text += ' In this run nobody taught: it is shown how far the heads are from each other by themselves.'
    elif direction != 'both' or weight != '1.0':
        text += f' This run has direction {direction} and weight {weight}; shown are all pairs, unweighted.'
    last = rows[-1]
    caption = f'Epoch {last["epoch"]:.0f}, in nats: rows teach columns'
    return dict(text=text, charts=[c for c in charts if c], matrix=_matrix(
        colors, caption, lambda a, b: last[column(a, b)], digits=3, low=0))


def _agreement(run: Run, colors: Mapping[str, str]) -> Optional[Dict[str, Any]]:
    heads = list(colors)
    pairs = {(a, b): f'eval_agree_{a}_{b}' for i, a in enumerate(heads) for b in heads[i + 1:]}
    rows = _complete(run, list(pairs.values()))
    if not rows:
        return None
    drawn = {pair: c for pair, c in pairs.items() if len(heads) <= _MOST_HEADS or 'backbone' in pair}
    lines = [
        column_line(rows, column, f'{a}{PAIR}{b}', colors[a], second=colors[b])
        for (a, b), column in drawn.items()]
    last = rows[-1]
    return dict(
        text='The share of evaluation images to which two heads give the same class, right or wrong.',
        chart=chart('Same class, %', lines, y_most=100, focus=True),
        matrix=_matrix(colors, f'Epoch {last["epoch"]:.0f}, in % of the images',
                       lambda a, b: last[pairs.get((a, b)) or pairs[b, a]], digits=1,
                       low=min(last[c] for c in pairs.values()) - 5),
    )


def _complete(run: Run, columns: Sequence[str]) -> List[Epoch]:
    """The epochs in which all of these columns have a number."""
    return [row for row in run.epochs if columns and all(math.isfinite(row.get(c, math.nan)) for c in columns)]


def _exits(run: Run, colors: Mapping[str, str]) -> Optional[Dict[str, Any]]:
    rows, flops, epoch = (run.noted.get(key) for key in ('exits', 'exit_flops', 'exits_epoch'))
    top1 = next((top1_of(row) for row in run.epochs if row['epoch'] == epoch), None)
    if not rows or not flops or top1 is None or len(flops['branches']) != len(colors) - 1:
        return None
    whole = flops['backbone']
    divisor, unit = next((d, u) for d, u in ((1e9, 'GFLOPs'), (1e6, 'MFLOPs'), (1, 'FLOPs')) if whole >= d)

    def shown(cost: float) -> str:
        return number(cost / divisor, 3 if whole < 10 * divisor else 1)

    costs, lines, points = {'backbone': whole}, [], []
    for head, cost in zip(run.heads[1:], flops['branches'], strict=True):
        costs[head] = cost['to_stage'] + cost['branch']
        of_head = []
        for row in (row for row in rows if row['exit'] == head):
            # Every image pays for the branch that it is asked by, one that stays for the rest of the backbone, too.
            mean = costs[head] + (1 - row['leave'] / 100) * (whole - cost['to_stage'])
            of_head.append(dict(
                head=head,
                color=colors[head],
                mean=mean,
                accuracy=row['top1'],
                threshold=row['threshold'],
                leave=percent(row['leave'], 1),
                top1=percent(row['top1']),
                flops=shown(mean),
                share=f'{number(mean / whole)}{_TIMES}',
            ))
        texts = [
            '{head}, from a confidence of {threshold:g} on: {leave} leave, {top1} top-1, {flops} {unit}'.format(
                unit=unit, **point) for point in of_head]
        curve = [(point['mean'] / divisor, point['accuracy']) for point in of_head]
        lines.append(Line(head, curve, colors[head], dots=True, texts=texts))
        points += of_head
    lines.append(Line('backbone', [(whole / divisor, top1)], colors['backbone'], value=number(top1)))
    return dict(
        unit=unit,
        costs=costs,
        shown=shown,
        rows=[point for point in points if point['threshold'] == _CONFIDENCE],
        at=_CONFIDENCE,
        finding=_finding(points, whole, top1),
        chart=chart('Top-1 accuracy by mean cost of an image, %', lines, x_title=unit, y_most=100),
        text='Large dots: all images leave at that branch. Along a line, only those leave whose confidence (the '
             'largest softmax probability) reaches a threshold, and the backbone answers for the rest; one branch is '
             f'asked at a time. Accuracies were measured on the evaluation split, with the weights of epoch {epoch}. '
             'Costs are counted in FLOPs, not timed: an exit costs the backbone up to its stage, and the branch.',
    )


def _finding(points: Sequence[Mapping[str, Any]], whole: float, top1: float) -> str:
    """The cheapest early exit without a loss, else the cheapest that loses a point at most."""
    for loss, words in ((0, 'no less accurate than'), (1, 'within a point of')):
        good = [point for point in points if point['mean'] < whole and point['accuracy'] >= top1 - loss]
        if good:
            best = min(good, key=lambda point: point['mean'])
            if best['threshold'] == 0:
                who = f'If all images leave at {best["head"]}'
            else:
                who = (f'If images leave at {best["head"]} from a confidence of {best["threshold"]:g} on, '
                       f'{best["leave"]} do')
            return (f"{who}: {best['top1']} top-1 for {number(best['mean'] / whole)} of the backbone's FLOPs, {words} "
                    f'the backbone ({percent(top1)}).')
    return 'No early exit of this run is both cheaper than the backbone and within a point of its accuracy.'
