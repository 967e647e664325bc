"""The console of a run: a bar or lines while it trains, a line for each epoch, a table at its end."""
import logging
import math
import sys
import time
from datetime import timedelta
from typing import Mapping, Optional, Sequence, Tuple

import torch
from accelerate.utils import tqdm

_logger = logging.getLogger(__name__)

# The metrics that classifiers are compared by, of one label an image and of several, with their titles.
TITLES = dict(top1='top-1', map='mAP')


class Progress:
    """The steps of an epoch or of an evaluation: a bar on the main process's terminal, lines of the log elsewhere.

    Lines of the log erase the bar (see :class:`dks_timm.errors.LogFormatter`), and it is drawn again below them.
    ``done`` of the ``total`` steps were done before the run was resumed.
    """

    def __init__(self, accelerator, title: str, total: int, done: int = 0):
        self.title, self.total, self.done, self.done_before = title, total, done, done
        self.main = accelerator.is_main_process
        self.live = self.main and sys.stderr.isatty()
        self.start = time.monotonic()
        bar_format = '{desc}: {percentage:3.0f}%|{bar:10}| {remaining} left{postfix}'
        self.bar = tqdm(
            total=total, initial=done, desc=title, bar_format=bar_format, leave=False, dynamic_ncols=True,
            disable=not self.live)

    def __enter__(self):
        if self.live:
            logging.captureWarnings(True)  # so that they become lines of the log
        return self

    def __exit__(self, *exc):
        self.bar.close()
        if self.live:
            logging.captureWarnings(False)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def steps_per_second(self) -> float:
        return (self.done - self.done_before) / self.seconds

    def step(self) -> None:
        """Count a step."""
        self.done += 1
        self.bar.update()

    def show(self, text: str) -> None:
        """Show a text beside the bar, or as a line."""
        if self.live:
            self.bar.set_postfix_str(text)
        elif self.main:
            _logger.info(f'{self.title} [{self.done}/{self.total}]: {text}')


def training_text(means: Mapping[str, float], lr: float, images_per_second: float, seconds_left: float) -> str:
    """Describe the training so far, by the means of :meth:`dks_timm.training.metrics.Totals.compute`."""
    top1 = ', '.join(
        f'{name[5:]} {value:.1f}' for name, value in means.items()
        if name.startswith('top1_') and not math.isnan(value))  # branches may not have run yet
    top1 = f'train top-1 {top1}, ' if top1 else ''
    return (
        f'loss {means["loss"]:.4f}, {images_per_second:.0f} images/s, {timedelta(seconds=round(seconds_left))} left, '
        f'{top1}lr {lr:.3g}')


def epoch_text(title: str, names: Sequence[str], metrics: Mapping[str, float], **more: float) -> str:
    """Describe the losses of an epoch and the metric of every classifier; ``metrics`` is {} without an evaluation."""
    parts = [f'{name} {value:.4f}' for name, value in more.items()]
    if metrics:
        metric = next(name for name in TITLES if name in metrics)
        heads = [f'{names[0]} {metrics[metric]:.2f}'] + [
            f'{name.removeprefix(metric)[1:]} {value:.2f}' for name, value in metrics.items()
            if name.startswith(f'{metric}_')]
        parts += [f'eval loss {metrics["loss"]:.4f}', f'{TITLES[metric]} ' + ', '.join(heads)]
    return f'{title}: ' + ', '.join(parts)


def warn_of_long_average(args, updates: int) -> None:
    """Warn where --model-ema averages over more updates than the run has."""
    memory = 1 / max(1 - args.model_ema_decay, 1e-9)
    if args.model_ema and not args.model_ema_warmup and updates < memory:
        _logger.warning(
            f'--model-ema-decay {args.model_ema_decay}: the average is over {memory:,.0f} updates, but the run has '
            f'{updates:,}, so the initial weights stay in it; --model-ema-warmup has it begin short')


def outcome_table(
        rows: Sequence[Mapping[str, str]],
        names: Sequence[str],
        best_epoch: Optional[int],
        without_ema: Mapping[int, Mapping[str, float]],
) -> str:
    """Return a table of every head's accuracy and loss in the best epoch and in the last one.

    Args:
        rows: Of summary.csv.
        names: Names of the classifiers, the backbone's first.
        best_epoch: That of model_best.pth.tar.
        without_ema: Metrics of the weights themselves by epoch, where the rows are of their average.
    """
    last = rows[-1]
    best = next((row for row in rows if row['epoch'] == str(best_epoch)), last)
    epochs = [('Best epoch', best), ('Last epoch', last)]
    heads = [*names, 'ensemble'] if len(names) > 1 else ['model']
    columns = {f'{title} %': (f'eval_{name}', 2) for name, title in TITLES.items() if f'eval_{name}' in last}
    if columns:
        columns['loss'] = ('eval_loss', 4)
    else:
        columns, heads = {'train loss': ('train_loss', 4)}, heads[:1]

    def cells(row, head=''):
        found = [(row.get(f'{column}_{head}' if head else column), digits) for column, digits in columns.values()]
        return [f'{float(value):.{digits}f}' if value not in (None, '') else '' for value, digits in found]

    lines = [
        ('', [f'{title} {row["epoch"]}'.rjust(14 * len(columns)) for title, row in epochs]),
        ('', [*columns] * len(epochs)),
        (heads[0], [cell for _, row in epochs for cell in cells(row)]),
    ]
    plain = [without_ema.get(int(row['epoch']), {}) for _, row in epochs]
    if any(plain):
        plain = [{f'eval_{name}': value for name, value in found.items()} for found in plain]
        lines.append(('without EMA', [cell for found in plain for cell in cells(found)]))
    lines += [(head, [cell for _, row in epochs for cell in cells(row, head)]) for head in heads[1:]]
    first = max(len(title) for title, _ in lines)
    return '\n'.join((title.ljust(first) + ''.join(cell.rjust(14) for cell in row)).rstrip() for title, row in lines)


def cost_text(seconds: float, images_per_second: float, device: torch.device, processes: int = 1) -> str:
    """Describe the cost of a run: time with evaluation, images per second in training (0: unknown), memory."""
    used, where = peak_memory(device)
    speed = f'{images_per_second:,.0f} images/s in training, ' if images_per_second else ''
    first = ' in the first process' if processes > 1 else ''
    return f'{timedelta(seconds=round(seconds))} in all, {speed}at most {used / 2 ** 20:,.0f} MiB of {where}{first}'


def peak_memory(device: torch.device) -> Tuple[int, str]:
    """Return the most memory so far in bytes, of tensors on a GPU or of this process elsewhere, and its name."""
    module = getattr(torch, device.type, None)
    if hasattr(module, 'max_memory_allocated'):
        return module.max_memory_allocated(device), 'GPU memory'
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak, 'memory'
