"""Line charts as SVG text: labels at the lines' ends, colours for light and dark, every letter real text."""
import math
import re
from dataclasses import dataclass, field
from typing import List, Mapping, Optional, Sequence, Tuple
from xml.sax.saxutils import escape

__all__ = [
    'PAIR', 'STYLE', 'Line', 'chart', 'clean', 'color', 'column_line', 'curves_svg', 'number', 'picture', 'ticks']

# Distinguishable without red and green, after Okabe and Ito; each as it looks on a light and on a dark page.
_COLORS = (
    ('#0b62b0', '#64b1f4'), ('#c8500a', '#f5924a'), ('#0a8062', '#3fc59f'), ('#a03f7e', '#e48cc4'),
    ('#8a6a00', '#e0b93a'), ('#5b52c4', '#a8a0ff'), ('#00798c', '#4fc6d8'), ('#7d4b2a', '#cf9a76'),
)
PAIR = ' \N{MIDDLE DOT} '  # between the two things of a line with two colours


def _variables(shade: int) -> str:
    ink = ({'ink': '#1c1f24', 'muted': '#626a75', 'rule': '#e3e6ea', 'paper': '#ffffff'},
           {'ink': '#e8eaed', 'muted': '#9aa3ae', 'rule': '#32373e', 'paper': '#15181c'})[shade]
    colors = {f'c{i}': pair[shade] for i, pair in enumerate(_COLORS)}
    return ''.join(f'--{name}:{value};' for name, value in {**ink, **colors}.items())


# For the page that charts stand in, or for the file that a picture is by itself.
STYLE = '\n'.join([
    f':root{{color-scheme:light dark;{_variables(0)}}}',
    f'@media(prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}',
    'svg{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}',
    'svg text{fill:var(--muted);font-variant-numeric:tabular-nums}',
    'svg .title{fill:var(--ink);font-weight:600;font-size:13.5px}',
    'svg .grid{stroke:var(--rule);fill:none}',
    'svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}',
    'svg .label{font-weight:500}',
])


@dataclass
class Line:
    """A line of a chart.

    Attributes:
        label: Stands at its end.
        points: (x, y), by x; those that are not finite are left out.
        color: As in CSS, see :func:`color`.
        second: Colour of the other half of its dashes, and of what follows :data:`PAIR` in the label.
        dashed: For what is derived, or measured only.
        band: (x, low, high), by x.
        dots: Whether each point is marked, the first one by a large dot.
        value: What stands behind the label; None for nothing.
        texts: Of its points, shown under the pointer.
    """
    label: str
    points: Sequence[Tuple[float, float]]
    color: str
    second: Optional[str] = None
    dashed: bool = False
    band: Sequence[Tuple[float, float, float]] = ()
    dots: bool = False
    value: Optional[str] = None
    texts: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self):
        self.points = [p for p in self.points if all(map(math.isfinite, p))]

    @property
    def text(self) -> str:
        return f'{self.label} {self.value}' if self.value else self.label


def color(index: Optional[int]) -> str:
    """Colour of the index-th of several things; None for what stands back."""
    return 'var(--muted)' if index is None else f'var(--c{index % len(_COLORS)})'


def number(value: float, digits: int = 2) -> str:
    """A number for people: fixed digits, a real minus sign."""
    return f'{value:.{digits}f}'.replace('-', '\N{MINUS SIGN}')


def clean(text: str) -> str:
    """Text without the control characters and halves of pairs that neither XML nor UTF-8 has a place for."""
    return re.sub('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]', '\N{REPLACEMENT CHARACTER}', text)


def _xml(text: str) -> str:
    return escape(clean(text))


def ticks(low: float, high: float, count: int = 4) -> List[float]:
    """Round numbers about ``count`` steps apart that enclose a range."""
    if high - low <= 1e-9 * abs(high):
        around = 0.02 * abs(high) or 1
        low, high = low - around, high + around
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_text(value: float, step: float) -> str:
    digits = next((d for d in range(6) if math.isclose(step * 10 ** d, round(step * 10 ** d), rel_tol=1e-6)), 6)
    return number(round(value, 10) or 0., digits)  # no minus before a zero


@dataclass
class _Frame:
    """Where a chart's axes lie, in pixels and in what they measure."""
    left: float
    top: float
    right: float
    bottom: float
    x: Tuple[float, float]
    y: Tuple[float, float]

    def place(self, x: float, y: float) -> Tuple[float, float]:
        along = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.left + along * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def path(self, points: Sequence[Tuple[float, float]]) -> str:
        return 'M' + 'L'.join('{:.1f} {:.1f}'.format(*self.place(*point)) for point in points)


def chart(
        title: str,
        lines: Sequence[Line],
        x_title: str = 'epoch',
        size: Tuple[int, int] = (420, 270),
        y_range: Sequence[float] = (),
        y_most: float = math.inf,
        focus: bool = False,
) -> Optional[str]:
    """A line chart.

    Args:
        title: What is shown, with its unit.
        lines: The lines.
        x_title: What runs along the x-axis; 'epoch' has whole numbers only.
        size: Width and height in pixels, which the picture may be scaled from.
        y_range: What the y-axis has to show besides the lines.
        y_most: Where the y-axis ends at the latest, 100 for percent.
        focus: Whether the y-axis leaves out the first tenth of the x-axis, where a training is still far from its end.

    Returns:
        An ``svg`` element without :data:`STYLE`; None where no line has a point.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    width, height = size
    most = width // 17  # letters of a label
    longest = max(len(line.text) for line in lines)

    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = min(xs), max(xs)
    first = x_low + 0.1 * (x_high - x_low) if focus else x_low
    ys = [y for line in lines for x, y in line.points if x >= first]
    ys += [y for line in lines for x, *ends in line.band if x >= first for y in ends]
    y_ticks = [y for y in ticks(min([*ys, *y_range]), max([*ys, *y_range])) if y <= y_most]
    frame = _Frame(
        left=42,
        top=34,
        right=width - 18 - round(6.6 * min(longest, most)),
        bottom=height - 40,
        x=(x_low, x_high),
        y=(y_ticks[0], max([y_ticks[-1], *ys])),
    )
    # A picture of its own cuts off what lies beyond the axes; some room for the width of lines.
    x, y, w, h = frame.left - 6, frame.top - 4, frame.right - frame.left + 12, frame.bottom - frame.top + 8
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f'<title>{_xml(title)}</title>',
        f'<text class="title" x="0" y="15">{_xml(title)}</text>',
        *_axes(frame, y_ticks, x_title),
        f'<svg x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">',
        *[_band(frame, line) for line in lines if line.band],
        *[_line(frame, line) for line in lines],
        '</svg>',
        *_end_labels(frame, lines, most),
        '</svg>',
    ])


def _axes(frame: _Frame, y_ticks: Sequence[float], x_title: str) -> List[str]:
    parts = []
    for value in y_ticks:
        y = frame.place(0, value)[1]
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        text = _tick_text(value, y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else value or 1)
        parts.append(f'<text x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    low, high = frame.x
    x_ticks = [x for x in ticks(low, high) if low <= x <= high * (1 + 1e-9)]
    if x_title == 'epoch':
        x_ticks = [x for x in x_ticks if x == round(x)] or [low]
    for value in x_ticks:
        x = frame.place(value, 0)[0]
        text = _tick_text(value, x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else value or 1)
        parts.append(f'<text x="{x:.1f}" y="{frame.bottom + 17}" text-anchor="middle">{text}</text>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{frame.bottom + 34}" text-anchor="middle">{_xml(x_title)}</text>')
    return parts


def _band(frame: _Frame, line: Line) -> str:
    around = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
    return f'<path d="{frame.path(around)}Z" style="fill:{line.color}" fill-opacity="0.16"/>'


def _line(frame: _Frame, line: Line) -> str:
    parts = [f'<g><title>{_xml(line.text)}</title>']
    if len(line.points) > 1:
        path = frame.path(line.points)
        dashes = ' stroke-dasharray="2 5"' if line.dashed else ''
        parts.append(f'<path class="line" d="{path}" style="stroke:{line.color}"{dashes}/>')
        if line.second:
            style = f'stroke:{line.second};stroke-linecap:butt'
            parts.append(f'<path class="line" d="{path}" style="{style}" stroke-dasharray="7 7"/>')
    if line.dots or len(line.points) == 1:
        for i, point in enumerate(line.points):
            x, y = frame.place(*point)
            text = line.texts[i] if line.texts else line.text
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2.5 if i else 4.5}" style="fill:{line.color}">'
                f'<title>{_xml(text)}</title></circle>')
    return ''.join([*parts, '</g>'])


def _end_labels(frame: _Frame, lines: Sequence[Line], most: int) -> List[str]:
    """Labels right of the lines' ends, pushed apart where they would lie on each other."""
    gap, lowest = 15, frame.bottom + 6
    ends = [frame.place(*line.points[-1]) for line in lines]
    order = sorted(range(len(lines)), key=lambda i: ends[i][1])
    ys: List[float] = []
    for i in order:
        ys.append(max(ends[i][1], ys[-1] + gap if ys else frame.top - 6))
    for n in reversed(range(len(ys))):
        ys[n] = min(ys[n], ys[n + 1] - gap if n + 1 < len(ys) else lowest)
    parts = []
    for i, label_y in zip(order, ys, strict=True):
        line, (x, y) = lines[i], ends[i]
        if abs(label_y - y) > 3 or frame.right - x > 4:
            path = f'M{x + 3:.1f} {y:.1f}L{frame.right + 2} {y:.1f}L{frame.right + 10} {label_y:.1f}'
            parts.append(f'<path d="{path}" fill="none" stroke-opacity="0.45" style="stroke:{line.color}"/>')
        value = f' {line.value}' if line.value else ''
        name = line.label
        if len(name + value) > most:
            name = name[:max(1, most - len(value) - 1)] + '\N{HORIZONTAL ELLIPSIS}'
        name = _xml(name)
        if line.second:
            first, dot, other = name.partition(PAIR)
            name = f'{first}{dot}<tspan style="fill:{line.second}">{other}</tspan>'
        parts.append(
            f'<text class="label" x="{frame.right + 13}" y="{label_y + 4:.1f}" style="fill:{line.color}">{name}'
            f'<tspan style="fill:var(--ink)">{_xml(value)}</tspan></text>')
    return parts


def picture(charts: Sequence[str], columns: int = 1, margin: int = 16) -> str:
    """Text of an SVG file with charts side by side, on a ground of its own."""
    sizes = [tuple(map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', c).groups())) for c in charts]
    cell = tuple(max(side) + margin for side in zip(*sizes, strict=True))
    columns = min(columns, len(charts))
    width, height = columns * cell[0] + margin, -(-len(charts) // columns) * cell[1] + margin
    placed = [
        c.replace('<svg ', f'<svg x="{margin + i % columns * cell[0]}" y="{margin + i // columns * cell[1]}" '
                           f'width="{w}" height="{h}" ', 1)
        for i, (c, (w, h)) in enumerate(zip(charts, sizes, strict=True))]
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{STYLE}</style>',
        '<rect width="100%" height="100%" style="fill:var(--paper)"/>',
        *placed,
        '</svg>',
    ]) + '\n'


def curves_svg(epochs: Sequence[Mapping[str, float]]) -> Optional[str]:
    """Learning curves as a picture for a model card: the losses, and the accuracy of every classifier.

    Args:
        epochs: From :func:`dks_timm.runs.folder.read_summary`.

    Returns:
        Text of an SVG file; None for less than two epochs.
    """
    if len(epochs) < 2:
        return None
    losses = [
        column_line(epochs, f'{label}_loss', label, color(i)) for i, label in enumerate(('train', 'eval'))]
    columns = [name for name in epochs[0] if name.startswith('eval_top1_')]
    accuracies = [column_line(epochs, 'eval_top1', 'backbone', color(0))] + [
        column_line(epochs, name, name.removeprefix('eval_top1_'), color(None if name.endswith('_ensemble') else i + 1))
        for i, name in enumerate(columns)]
    return picture([c for c in (
        chart('Loss', losses),
        chart('Top-1 accuracy on the evaluation split, %', accuracies, y_most=100),
    ) if c], columns=2)


def column_line(
        epochs: Sequence[Mapping[str, float]],
        column: str,
        label: str,
        color: str,
        digits: int = 2,
        **style,
) -> Line:
    """A column of a summary.csv as a line, with its last value behind the label."""
    points = [(row['epoch'], row[column]) for row in epochs if math.isfinite(row.get(column, math.nan))]
    return Line(label, points, color, value=number(points[-1][1], digits) if points else None, **style)
