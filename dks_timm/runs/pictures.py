"""Line charts of runs, drawn by matplotlib as SVG whose text stays text."""
import io
import re
import textwrap
from typing import Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import printable

# Each on a light and on a dark page. Those of the lines, c0 to c7, can be told apart without red and green
# (after Okabe and Ito).
INKS = dict(
    ink=('#1c1f24', '#e8eaed'), muted=('#626a75', '#9aa3ae'), rule=('#e3e6ea', '#32373e'), paper=('#ffffff', '#15181c'),
    c0=('#0b62b0', '#64b1f4'), c1=('#c8500a', '#f5924a'), c2=('#0a8062', '#3fc59f'), c3=('#a03f7e', '#e48cc4'),
    c4=('#8a6a00', '#e0b93a'), c5=('#5b52c4', '#a8a0ff'), c6=('#00798c', '#4fc6d8'), c7=('#7d4b2a', '#cf9a76'),
)


TITLES = dict(top1='Top-1 accuracy', map='mAP')
Points = Sequence[Tuple[float, ...]]  # (x, y) along a line, or (x, y, low, high) with a shaded range


class Chart(NamedTuple):
    """A chart.

    Attributes:
        title: What is measured, with its unit.
        lines: Lines by their labels. Each has the colour of its place among them; an empty one keeps its place.
        x_label: What the x-axis measures.
    """
    title: str
    lines: Mapping[str, Points]
    x_label: str = 'epoch'


def column_lines(epochs: Sequence[Mapping[str, float]], columns: Mapping[str, str]) -> Dict[str, Points]:
    """Return columns of ``summary.csv``, given by their labels, as lines of a chart."""
    return {
        label: [(row['epoch'], row[column]) for row in epochs if column in row] for label, column in columns.items()}


def draw(charts: Iterable[Chart]) -> Optional[str]:
    """Draw charts side by side.

    Returns:
        An ``svg`` element, the same bytes for the same charts; None where no line has points.
    """
    import matplotlib  # takes a second that a training does not need to wait for
    from matplotlib.figure import Figure

    charts = [chart for chart in charts if any(chart.lines.values())]
    if not charts:
        return None
    style = {
        'svg.fonttype': 'none', 'svg.hashsalt': 'dks_timm', 'text.parse_math': False, 'font.size': 8.5,
        'figure.facecolor': INKS['paper'][0], 'axes.facecolor': 'none', 'text.color': INKS['ink'][0],
        'axes.titlelocation': 'left', 'axes.titleweight': 'bold', 'axes.titlesize': 9.5, 'legend.frameon': False,
        'grid.color': INKS['rule'][0],
        **dict.fromkeys(('axes.labelcolor', 'xtick.color', 'ytick.color'), INKS['muted'][0]),
    }
    file = io.StringIO()
    with matplotlib.rc_context(style):
        height = max(2.7, 0.8 + 0.3 * max(len(chart.lines) for chart in charts))
        figure = Figure(figsize=(4.4 * len(charts), height), layout='constrained')
        for chart, axes in zip(charts, figure.subplots(1, len(charts), squeeze=False)[0], strict=True):
            _draw_chart(axes, chart)
        figure.savefig(file, format='svg', metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
    svg = file.getvalue()
    return re.sub(r' id="\w+_\d+"', '', svg[svg.index('<svg'):])  # such ids repeat from picture to picture


def _draw_chart(axes, chart: Chart) -> None:
    legend, settled = [], []
    for i, (label, points) in enumerate(chart.lines.items()):
        if not points:
            continue
        color = INKS[f'c{i % 8}'][0]
        x, y, *band = zip(*points, strict=True)
        handle, = axes.plot(x, y, color=color, linewidth=1.5, marker='o' if len(x) < 20 else None, markersize=3)
        if band:
            axes.fill_between(x, *band, color=color, alpha=0.16, linewidth=0)
        label = textwrap.shorten(printable(label), 40, placeholder=' \N{HORIZONTAL ELLIPSIS}')  # else nothing else fits
        legend.append((y[-1], handle, textwrap.fill(f'{label} {y[-1]:#.4g}', 22)))
        settled += [value for values in (y, *band) for value in values[len(values) // 10:]]
    # The first tenth of a training may leave the picture: it is far from the end, where lines differ by little.
    low, high = min(settled), max(settled)
    margin = 0.04 * (high - low) or 0.02 * abs(high) or 1.
    axes.set_ylim(low - margin, high + margin)
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_label)
    axes.xaxis.get_major_locator().set_params(integer=chart.x_label == 'epoch')
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis='y')
    # The legend in the order in which lines end, from the top.
    _, handles, texts = zip(*sorted(legend, key=lambda entry: -entry[0]), strict=True)
    axes.legend(handles, texts, loc='upper left', bbox_to_anchor=(1, 1.05), handlelength=1.4)


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
    metric = 'eval_map' if 'eval_map' in epochs[0] else 'eval_top1'
    heads = {name.removeprefix(f'{metric}_'): name for name in epochs[0] if name.startswith(f'{metric}_')}
    return draw([
        Chart('Loss', column_lines(epochs, dict(train='train_loss', eval='eval_loss'))),
        Chart(f'{TITLES[metric[5:]]}, evaluation, %', column_lines(epochs, {'backbone': metric, **heads})),
    ])
