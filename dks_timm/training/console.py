"""What is counted and shown while a model trains."""
import logging
import math
import sys
import time
from collections import OrderedDict
from datetime import timedelta
from functools import partial
from itertools import permutations

import torch
from accelerate.utils import tqdm

_logger = logging.getLogger(__name__)


class Totals:
    """Sums over the samples of an epoch, kept on the device until they are asked for.

    A branch's means are over the samples that it ran on.
    """

    def __init__(self, accelerator, names):
        self.accelerator = accelerator
        self.names = names
        self.count = self.branch_count = 0  # samples
        zeros = partial(torch.zeros, device=accelerator.device)
        dtype = torch.float32 if accelerator.device.type == 'mps' else torch.float64  # as timm's evaluator
        self.loss = zeros((), dtype=dtype)
        self.hits = zeros(len(names), dtype=torch.int64)
        self.ce = zeros(len(names), dtype=dtype)
        self.synergy = zeros(len(names), len(names), dtype=dtype)

    @torch.no_grad()
    def update(self, out, loss, target, batch_size):
        # Little happens for each classifier by itself: on a GPU, every operation is a kernel to launch.
        logits = out.get('logits') or [out['output']]
        if isinstance(logits[0], (tuple, list)):
            logits = logits[0][:1]
        if target.ndim > 1:
            target = target.argmax(dim=-1)
        running, part = len(logits), len(logits[-1])  # branches may rest, or run on the first samples only
        predicted = [z.argmax(dim=-1) for z in logits]
        hits = (torch.stack([p[:part] for p in predicted]) == target[:part]).sum(dim=1)
        if part < len(logits[0]):
            hits[0].add_((predicted[0][part:] == target[part:]).sum())
        self.hits[:running].add_(hits)
        self.loss.add_(loss, alpha=batch_size)
        self.count += batch_size
        if len(self.names) > 1:
            self.ce[:1].add_(out['ce'][:1], alpha=batch_size)
        if running > 1:
            self.ce[1:].add_(out['ce'][1:], alpha=part)
            self.synergy.add_(out['synergy'], alpha=part)
            self.branch_count += part

    def state_dict(self):
        """The sums and counts so far, of this process."""
        state = {name: value for name, value in vars(self).items() if name not in ('accelerator', 'names')}
        return {name: value.to('cpu', copy=True) if torch.is_tensor(value) else value for name, value in state.items()}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value.to(self.accelerator.device) if torch.is_tensor(value) else value)

    def compute(self, reduce=False):
        """Means so far, of this process or of all."""
        branches = [self.branch_count] * (len(self.names) - 1)
        names, sums = ['loss', *(f'top1_{name}' for name in self.names)], [self.loss[None], 100 * self.hits]
        counts = [self.count, self.count, *branches]
        if branches:
            pairs = list(permutations(self.names, 2))
            names += [*(f'ce_{name}' for name in self.names), 'synergy']
            names += [f'synergy_{teacher}_{student}' for teacher, student in pairs]
            sums += [self.ce, self.synergy.sum()[None] / len(pairs), _off_diagonal(self.synergy)]
            counts += [self.count, *branches, self.branch_count, *[self.branch_count] * len(pairs)]
        sums = torch.cat(sums)
        totals = torch.stack([sums, sums.new_tensor(counts)])
        if reduce:
            totals = self.accelerator.reduce(totals)
        means = (totals[0] / totals[1]).tolist()
        return OrderedDict(zip(names, means, strict=True))


def _off_diagonal(matrix):
    """The entries of a square matrix beside its diagonal, row by row."""
    size = len(matrix)
    return matrix.flatten()[1:].view(size - 1, size + 1)[:, :-1].flatten()


class Bar:
    """A bar at the bottom of the main process's terminal, and a line below it; elsewhere nothing.

    Lines of the log erase it (see :class:`dks_timm.errors.LogFormatter`), and warnings become such lines; it is drawn
    again below them. What does not fit into the terminal's width is cut off.

    Args:
        accelerator: Of the run.
        text: What stands beside the bar, with fields of tqdm's ``bar_format``.
        total: Steps in all.
        done: Steps that were done before.
    """

    def __init__(self, accelerator, text: str, total: int, done: int = 0):
        self.live = accelerator.is_main_process and sys.stderr.isatty()
        how = dict(leave=False, dynamic_ncols=True, disable=not self.live)
        self.bar = tqdm(total=total, initial=done, bar_format=f'{{percentage:3.0f}}%|{{bar:10}}| {text}', **how)
        self.below = tqdm(bar_format='{desc}', **how)

    def __enter__(self):
        if self.live:
            logging.captureWarnings(True)
        return self

    def __exit__(self, *exc):
        self.below.close()
        self.bar.close()
        if self.live:
            logging.captureWarnings(False)

    def update(self):
        """Count a step."""
        if self.bar.update():  # it was drawn, perhaps for the first time since a line of the log
            self.below.refresh()

    def show(self, beside: str, below: str):
        """Show a text beside the bar, its ``desc``, and one below it."""
        self.bar.set_description_str(beside)
        self.below.set_description_str(f'  {below}')


class Speed:
    """Images per second of training.

    Attributes:
        last: Of the last epoch, 0 where it was not trained here.
    """
    last = 0.

    def __init__(self):
        self.images = self.seconds = 0.

    def add(self, progress: 'Progress', images: int):
        """Count an epoch, of which so many images were trained on, those before the run was resumed included."""
        if progress.done > progress.done_before:
            here = images * (progress.done - progress.done_before) / progress.done
            self.images += here
            self.seconds += progress.seconds
            self.last = here / progress.seconds

    @property
    def average(self) -> float:
        return self.images / self.seconds if self.seconds else 0.


class Progress:
    """Progress of an epoch's training on the main process: a bar on a terminal, a line now and then elsewhere.

    Attributes:
        done: Updates of the epoch.
        done_before: Those before the run was resumed.
        seconds: Since then, up to the end of the epoch's training.
    """

    def __init__(self, accelerator, epoch, num_epochs, updates, log_interval, done=0):
        self.shown = accelerator.is_main_process
        self.epoch, self.num_epochs, self.updates, self.log_interval = epoch, num_epochs, updates, log_interval
        self.bar = Bar(accelerator, f'Epoch {epoch}{{desc}}', updates, done)
        self.done = self.done_before = done
        self.start = time.monotonic()
        self.end = None

    @property
    def seconds(self):
        return (self.end or time.monotonic()) - self.start

    def __enter__(self):
        self.bar.__enter__()
        return self

    def __exit__(self, *exc):
        self.end = time.monotonic()
        self.bar.__exit__(*exc)

    def step(self, last: bool) -> bool:
        """Count an update; returns whether it is time to show how things stand."""
        self.done += 1
        self.bar.update()
        return self.shown and (last or (self.done - 1) % self.log_interval == 0)

    def show(self, means, param_groups, images):
        pace = (self.done - self.done_before) / self.seconds
        left = (self.updates - self.done + self.updates * (self.num_epochs - self.epoch - 1)) / pace
        top1 = ', '.join(
            f'{name[5:]} {value:.1f}' for name, value in means.items()
            if name.startswith('top1_') and not math.isnan(value))  # branches may not have run yet
        lr = sum(group['lr'] for group in param_groups) / len(param_groups)
        loss = f'loss {means["loss"]:.4f}'
        speed = f'{images / self.done * pace:.0f} images/s, {timedelta(seconds=round(left))} left'
        learned = f'train top-1 {top1}, lr {lr:.3g}'
        if self.bar.live:
            self.bar.show(f', {speed}', f'{loss}, {learned}')
        else:
            _logger.info(f'Epoch {self.epoch} [{self.done}/{self.updates}]: {loss}, {speed}, {learned}')
