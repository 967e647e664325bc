"""Line charts as SVG text: labels at the lines' ends, colours for light and dark, every letter real text."""
import math
import re
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence, Tuple
from xml.sax.saxutils import escape

__all__ = ['MUTED', 'STYLE', 'Line', 'chart', 'color', 'curves_svg', 'number', 'picture']

# Distinguishable without red and green, after Okabe and Ito; each as it looks on a light and on a dark page.
_COLORS = (
    ('#0b62b0', '#64b1f4'), ('#c8500a', '#f5924a'), ('#0a8062', '#3fc59f'), ('#a03f7e', '#e48cc4'),
    ('#8a6a00', '#e0b93a'), ('#5b52c4', '#a8a0ff'), ('#00798c', '#4fc6d8'), ('#7d4b2a', '#cf9a76'),
)
MUTED = 'muted'


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
        second: Colour of the other half of its dashes.
        dashed: For what is derived, or measured only.
        band: (x, low, high), by x.
        dots: Whether each point is marked; label and text of each where texts are given.
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


def color(index: Optional[int]) -> str:
    """Colour of the index-th of several things; None for what stands back."""
    return f'var(--{MUTED})' if index is None else f'var(--c{index % len(_COLORS)})'


def number(value: float, digits: int = 2) -> str:
    """A number for people: fixed digits, a real minus sign."""
    return f'{value:.{digits}f}'.replace('-', '\N{MINUS SIGN}')


def text_of(text: str) -> str:
    """Text as it can stand in XML, which has no place for control characters."""
    return escape(re.sub('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]', '\N{REPLACEMENT CHARACTER}', text))


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
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if digits and abs(step * 10 ** digits - round(step * 10 ** digits)) > 1e-6:
        digits += 1  # 0.25
    return number(round(value, 10) or 0., digits if step < 1 or step == int(step) else 1)


def chart(
        title: str,
        lines: Sequence[Line],
        x_title: str = 'epoch',
        size: Tuple[int, int] = (420, 270),
        y_range: Optional[Tuple[float, float]] = None,
        y_most: float = math.inf,
        focus: bool = False,
) -> Optional[str]:
    """A line chart.

    Args:
        title: What is shown, with its unit.
        lines: The lines.
        x_title: What runs along the x-axis; 'epoch' has whole numbers only.
        size: Width and height in pixels, which the picture may be scaled from.
        y_range: What the y-axis has to show at least; None takes it from the points.
        y_most: Where the y-axis ends at the latest, 100 for percent.
        focus: Whether the y-axis leaves out the first tenth of the x-axis, where a training is still far from its end.

    Returns:
        An ``svg`` element without :data:`STYLE`; None where no line has a point.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    width, height = size
    labels = [f'{line.label} {line.value}' if line.value else line.label for line in lines]
    longest = max(len(label) for label in labels)
    most = width // 17
    left, top, bottom = 42, 34, 40
    right = 18 + round(6.6 * min(longest, most))

    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = min(xs), max(xs)
    first = x_low + 0.1 * (x_high - x_low) if focus else x_low
    ys = [y for line in lines for x, y in line.points if x >= first]
    ys += [y for line in lines for x, *ends in line.band if x >= first for y in ends]
    y_ticks = ticks(min([*ys, *(y_range or ())]), max([*ys, *(y_range or ())]))
    y_ticks = [y for y in y_ticks if y <= y_most]
    x_ticks = [x for x in ticks(x_low, x_high) if x_low <= x <= x_high * (1 + 1e-9)]
    if x_title == 'epoch':
        x_ticks = sorted({round(x) for x in x_ticks if x == round(x)} or {round(x_low)})
    y_low, y_high = y_ticks[0], max([y_ticks[-1], *ys])
    x_span, y_span = (x_high - x_low) or 1, (y_high - y_low) or 1

    def place(x, y):
        return (
            left + (x - x_low) / x_span * (width - left - right),
            height - bottom - (y - y_low) / y_span * (height - top - bottom),
        )

    def path(points):
        return 'M' + 'L'.join(f'{px:.1f} {py:.1f}' for px, py in (place(*p) for p in points))

    parts = [f'<title>{text_of(title)}</title>', f'<text class="title" x="0" y="15">{text_of(title)}</text>']
    step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 1
    for y in y_ticks:
        py = place(x_low, y)[1]
        parts.append(f'<path class="grid" d="M{left} {py:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 7}" y="{py + 4:.1f}" text-anchor="end">{_tick_text(y, step)}</text>')
    step = x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else 1
    for x in x_ticks:
        px = place(x, y_low)[0]
        parts.append(f'<text x="{px:.1f}" y="{height - bottom + 17}" text-anchor="middle">{_tick_text(x, step)}</text>')
    middle = left + (width - left - right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{text_of(x_title)}</text>')

    # A picture of its own cuts off what lies beyond the axes; some room for the width of lines.
    x, y, w, h = left - 6, top - 4, width - left - right + 12, height - top - bottom + 8
    parts.append(f'<svg x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">')
    for line in lines:
        if line.band:
            around = path([(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)])
            parts.append(f'<path d="{around}Z" style="fill:{line.color}" fill-opacity="0.16"/>')
    for line, label in zip(lines, labels, strict=True):
        parts.append(f'<g><title>{text_of(label)}</title>')
        if len(line.points) > 1:
            dashes = ' stroke-dasharray="2 5"' if line.dashed else ''
            parts.append(f'<path class="line" d="{path(line.points)}" style="stroke:{line.color}"{dashes}/>')
            if line.second:
                parts.append(
                    f'<path class="line" d="{path(line.points)}" style="stroke:{line.second};stroke-linecap:butt" '
                    'stroke-dasharray="7 7"/>')
        if line.dots or len(line.points) == 1:
            texts = line.texts or [label] * len(line.points)
            for i, (point, text) in enumerate(zip(line.points, texts, strict=True)):
                px, py = place(*point)
                radius = 4.5 if i == 0 else 2.5
                parts.append(
                    f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" style="fill:{line.color}">'
                    f'<title>{text_of(text)}</title></circle>')
        parts.append('</g>')
    parts.append('</svg>')
    parts += _end_labels(lines, labels, [place(*line.points[-1]) for line in lines], width - right, most,
                         (top - 6, height - bottom + 6))
    inside = '\n'.join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">{inside}</svg>'


def _end_labels(lines, labels, ends, x, most, limits) -> List[str]:
    """Labels right of the lines' ends, pushed apart where they would lie on each other."""
    gap = 15
    order = sorted(range(len(lines)), key=lambda i: ends[i][1])
    ys: Dict[int, float] = {}
    for n, i in enumerate(order):
        ys[i] = max(ends[i][1], ys[order[n - 1]] + gap if n else limits[0])
    over = ys[order[-1]] - limits[1]
    for n, i in reversed(list(enumerate(order))):
        if over > 0:
            below = ys[order[n + 1]] - gap if n + 1 < len(order) else limits[1]
            ys[i] = min(ys[i], below)
    parts = []
    for i, (line, label) in enumerate(zip(lines, labels, strict=True)):
        (px, py), y = ends[i], ys[i]
        if abs(y - py) > 3 or x - px > 4:
            parts.append(
                f'<path d="M{px + 3:.1f} {py:.1f}L{x + 2} {py:.1f}L{x + 10} {y:.1f}" fill="none" stroke-opacity="0.45" '
                f'style="stroke:{line.color}"/>')
        name, value = line.label, f' {line.value}' if line.value else ''
        if len(label) > most:
            name = name[:max(1, most - len(value) - 1)] + '\N{HORIZONTAL ELLIPSIS}'
        second = f'<tspan style="fill:{line.second}">' if line.second else ''
        text = text_of(name)
        if second:
            first, dot, other = text.partition(' \N{MIDDLE DOT} ')
            text = f'{first}{dot}{second}{other}</tspan>'
        parts.append(
            f'<text class="label" x="{x + 13}" y="{y + 4:.1f}" style="fill:{line.color}">{text}'
            f'<tspan style="fill:var(--ink)">{text_of(value)}</tspan></text>')
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
        epochs: From :func:`dks_timm.runs.read_summary`.

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
