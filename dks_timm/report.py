"""Pictures of a run: its learning curves."""
import csv
import math
import os
from typing import Dict, List, Optional, Tuple, Union
from xml.sax.saxutils import escape

__all__ = ['curves_svg', 'read_summary']

_COLORS = ('#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#8c564b', '#e377c2', '#17becf')
_WIDTH, _HEIGHT = 420, 260  # of a panel, with room for labels around the plot
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 28, 34

Curves = Dict[str, List[Tuple[float, float]]]  # label -> points (epoch, value)


def read_summary(path: Union[str, os.PathLike]) -> List[Dict[str, float]]:
    """The epochs in a run's ``summary.csv``, without empty cells; [] where there is no such file."""
    if not os.path.isfile(path):
        return []
    with open(path, newline='') as f:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(f)]


def curves_svg(epochs: List[Dict[str, float]]) -> Optional[str]:
    """Learning curves as a picture: the losses, and the accuracy of every classifier on the evaluation split.

    Args:
        epochs: From :func:`read_summary`.

    Returns:
        Text of an SVG file; None for less than two epochs.
    """
    if len(epochs) < 2:
        return None

    def points(column):
        return [(row['epoch'], row[column]) for row in epochs if math.isfinite(row.get(column, math.nan))]

    losses = {label: points(f'{label}_loss') for label in ('train', 'eval')}
    top1 = {'backbone': points('eval_top1')}
    top1.update(
        (name.removeprefix('eval_top1_'), points(name)) for name in epochs[0] if name.startswith('eval_top1_'))
    panels = [
        (title, {label: curve for label, curve in curves.items() if curve})
        for title, curves in (('loss', losses), ('top-1 on the evaluation split (%)', top1))
    ]
    panels = [_panel(title, curves, offset=i * _WIDTH) for i, (title, curves) in enumerate(panels) if curves]
    width = _WIDTH * len(panels)
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *panels,
        '</svg>',
    ]) + '\n'


def _panel(title: str, curves: Curves, offset: int) -> str:
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x, y):
        return (
            offset + _LEFT + (x - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y0) / ((y1 - y0) or 1) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<text x="{offset + _LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        x, y = place(x0, value)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{offset + _WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value, anchor in ((x0, 'start'), (x1, 'end')):
        x, y = place(value, y0)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="{anchor}">epoch {value:.0f}</text>')
    for i, (label, curve) in enumerate(curves.items()):
        color = _COLORS[i % len(_COLORS)]
        path = ' '.join('{:.1f},{:.1f}'.format(*place(x, y)) for x, y in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        x = offset + _LEFT + 60 + i * (_WIDTH - _LEFT - 130) / max(1, len(curves) - 1)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 5}" fill="{color}">{escape(label)}</text>')
    return '\n'.join(parts)
