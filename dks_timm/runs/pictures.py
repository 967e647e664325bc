"""Line charts of runs, drawn by matplotlib as SVG whose text stays text."""
import io
import math
import re
import textwrap
from dataclasses import dataclass
from typing import Any, List, Mapping, Optional, Sequence, Tuple

__all__ = ['INKS', 'Chart', 'Line', 'clean', 'column_line', 'curves_svg', 'draw', 'head_color', 'themed']

# Each on a light and on a dark page. Those of the lines, c0 to c7, can be told apart without red and green
# (after Okabe and Ito).
INKS = dict(
    ink=('#1c1f24', '#e8eaed'), muted=('#626a75', '#9aa3ae'), rule=('#e3e6ea', '#32373e'), paper=('#ffffff', '#15181c'),
    c0=('#0b62b0', '#64b1f4'), c1=('#c8500a', '#f5924a'), c2=('#0a8062', '#3fc59f'), c3=('#a03f7e', '#e48cc4'),
    c4=('#8a6a00', '#e0b93a'), c5=('#5b52c4', '#a8a0ff'), c6=('#00798c', '#4fc6d8'), c7=('#7d4b2a', '#cf9a76'),
)


@dataclass
class Line:
    """A line of a chart.

    Attributes:
        label: Its name in the legend, followed by the last value, or by that of the large dot.
        points: (x, y) by x, all finite.
        color: Name of one of :data:`INKS`.
        second: The colour between the dashes of a line that stands for two things.
        dashed: True for a line that is derived from the others.
        band: (x, low, high) by x, a shaded range around the line.
        dots: True to mark each point, the first one by a large dot.
        digits: Digits of the last value in the legend.
    """
    label: str
    points: Sequence[Tuple[float, float]]
    color: str
    second: Optional[str] = None
    dashed: bool = False
    band: Sequence[Tuple[float, float, float]] = ()
    dots: bool = False
    digits: int = 2


@dataclass
class Chart:
    """A chart of some lines.

    Attributes:
        title: What is measured, with its unit.
        lines: The lines; those without points are left out.
        x_label: What the x-axis measures.
        y_range: Values that the y-axis has to include, such as those of a neighbouring chart.
    """
    title: str
    lines: Sequence[Line]
    x_label: str = 'epoch'
    y_range: Sequence[float] = ()

    def __post_init__(self):
        self.lines = [line for line in self.lines if line.points]


def head_color(index: int) -> str:
    """Return the name of the index-th colour for lines."""
    return f'c{index % 8}'


def column_line(epochs: Sequence[Mapping[str, float]], column: str, label: str, color: str, **style: Any) -> Line:
    """Return the finite values of a column of ``summary.csv`` as a line."""
    points = [(row['epoch'], row[column]) for row in epochs if math.isfinite(row.get(column, math.nan))]
    return Line(label, points, color, **style)


def draw(charts: Sequence[Chart]) -> str:
    """Draw charts side by side.

    matplotlib is imported here and not with the module: a training needs none of it.

    Returns:
        An ``svg`` element, the same bytes for the same charts.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        'svg.fonttype': 'none', 'svg.hashsalt': 'dks_timm', 'text.parse_math': False, 'font.size': 8.5,
        'figure.facecolor': INKS['paper'][0], 'axes.facecolor': 'none', 'grid.color': INKS['rule'][0],
        'axes.titlecolor': INKS['ink'][0], 'axes.titlelocation': 'left', 'axes.titleweight': 'bold',
        'axes.titlesize': 9.5, 'axes.axisbelow': True, 'legend.frameon': False, 'legend.labelcolor': INKS['ink'][0],
        **dict.fromkeys(('axes.labelcolor', 'xtick.color', 'ytick.color'), INKS['muted'][0]),
    }
    file = io.StringIO()
    with matplotlib.rc_context(style):
        most = max(sum(_legend_text(line).count('\n') + 1 for line in chart.lines) for chart in charts)
        figure = Figure(figsize=(4.4 * len(charts), max(2.7, 0.8 + 0.18 * most)), layout='constrained')
        for chart, axes in zip(charts, figure.subplots(1, len(charts), squeeze=False)[0], strict=True):
            _draw_chart(axes, chart)
        figure.savefig(file, format='svg', metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
    svg = file.getvalue()
    return re.sub(r' id="\w+_\d+"', '', svg[svg.index('<svg'):])  # such ids repeat from picture to picture


def _draw_chart(axes, chart: Chart) -> None:
    handles = []
    for line in chart.lines:
        color, second = INKS[line.color][0], line.second and INKS[line.second][0]
        x, y = zip(*line.points, strict=True)
        handles += axes.plot(
            x, y, color=color, gapcolor=second, linewidth=1.5, marker='o' if line.dots or len(x) == 1 else None,
            markersize=3, linestyle=(0, (4, 4)) if second else ':' if line.dashed else '-')
        if line.dots or len(x) == 1:
            axes.plot(x[:1], y[:1], 'o', color=color, markersize=6)
        if line.band:
            axes.fill_between(*zip(*line.band, strict=True), color=color, alpha=0.16, linewidth=0)
    axes.set_title(clean(chart.title))
    axes.set_xlabel(chart.x_label)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis='y')
    if chart.x_label == 'epoch':
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(*_settled_range(chart))
    # The legend in the order in which lines end, from the top.
    order = sorted(range(len(handles)), key=lambda i: -chart.lines[i].points[-1][1])
    axes.legend(
        [handles[i] for i in order], [_legend_text(chart.lines[i]) for i in order], loc='upper left',
        bbox_to_anchor=(1, 1.05), handlelength=1.4)


def _legend_text(line: Line) -> str:
    label = textwrap.shorten(clean(line.label), 60, placeholder=' \N{HORIZONTAL ELLIPSIS}')
    value = line.points[0 if line.dots else -1][1]
    return textwrap.fill(f'{label} {value:.{line.digits}f}', 22)


def _settled_range(chart: Chart) -> Tuple[float, float]:
    """Return limits of the y-axis that leave out the first tenth of the epochs, far from the end of a training."""
    xs = [x for line in chart.lines for x, _ in line.points]
    first = min(xs) + 0.1 * (max(xs) - min(xs))
    ys: List[float] = [y for line in chart.lines for x, y in line.points if x >= first]
    ys += [y for line in chart.lines for x, *ends in line.band if x >= first for y in ends]
    low, high = min([*ys, *chart.y_range]), max([*ys, *chart.y_range])
    margin = 0.04 * (high - low) or 0.02 * abs(high) or 1.
    return low - margin, high + margin


def clean(text: str) -> str:
    """Return text without the control characters and halves of pairs that neither XML nor UTF-8 has a place for."""
    return re.sub('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]', '\N{REPLACEMENT CHARACTER}', text)


def themed(svg: str) -> str:
    """Return a picture in the colours of the page that it stands in, as CSS variables named by :data:`INKS`."""
    for name, (light, _) in INKS.items():
        svg = svg.replace(light, f'var(--{name})')
    return svg


def curves_svg(epochs: Sequence[Mapping[str, float]]) -> Optional[str]:
    """Draw learning curves for a model card: the losses, and the accuracy of every head.

    Args:
        epochs: From :func:`dks_timm.runs.folder.read_summary`.

    Returns:
        Text of an SVG file; None for less than two epochs.
    """
    if len(epochs) < 2:
        return None
    losses = [column_line(epochs, f'{of}_loss', of, head_color(i)) for i, of in enumerate(('train', 'eval'))]
    heads = [name.removeprefix('eval_top1_') for name in epochs[0] if name.startswith('eval_top1_')]
    accuracies = [column_line(epochs, 'eval_top1', 'backbone', 'c0')] + [
        column_line(epochs, f'eval_top1_{head}', head, 'muted', dashed=True) if head == 'ensemble'
        else column_line(epochs, f'eval_top1_{head}', head, head_color(i)) for i, head in enumerate(heads, 1)]
    charts = [Chart('Loss', losses), Chart('Top-1 accuracy, evaluation, %', accuracies)]
    return draw([chart for chart in charts if chart.lines]) if any(chart.lines for chart in charts) else None
