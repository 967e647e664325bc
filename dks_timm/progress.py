"""What is counted and shown while a model trains."""
import logging
import sys
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import timedelta

import torch
from accelerate.utils import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_logger = logging.getLogger(__name__)


class Totals:
    """Sums over the samples of an epoch, kept on the device until they are asked for.

    A branch's means are over the samples that it ran on.
    """

    def __init__(self, accelerator, names):
        self.accelerator = accelerator
        self.names = names
        self.dtype = torch.float32 if accelerator.device.type == 'mps' else torch.float64  # as timm's evaluator
        self.sums = None
        self.counts = []  # of the samples in each sum
        self.weights = {}

    @property
    def count(self):
        return self.counts[0]

    @torch.no_grad()
    def update(self, out, loss, target, batch_size):
        logits = out.get('logits') or [out['output']]
        if isinstance(logits[0], (tuple, list)):
            logits = logits[0][:1]
        if target.ndim > 1:
            target = target.argmax(dim=-1)
        top1 = [100 * (z.argmax(dim=-1) == target[:len(z)]).to(self.dtype).mean() for z in logits]
        idle = [loss.new_zeros((), dtype=self.dtype)] * (len(self.names) - len(logits))
        values = [loss.to(self.dtype), *top1, *idle]
        counts = [batch_size, batch_size, *(len(z) for z in logits[1:]), *(0 for _ in idle)]
        if len(self.names) > 1:
            pairs = len(self.names) * (len(self.names) - 1)
            synergy = idle[:1] or [out['synergy'].to(self.dtype).sum() / pairs]
            values += [*out['ce'].to(self.dtype), *idle, *synergy]
            counts += [*counts[1:], counts[-1]]
        key = tuple(counts)
        if key not in self.weights:  # there are few, and each is a transfer to the device
            self.weights[key] = torch.tensor(counts, dtype=self.dtype, device=self.accelerator.device)
        sums = torch.stack([v.to(self.accelerator.device) for v in values]) * self.weights[key]
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = [a + b for a, b in zip(self.counts or [0] * len(counts), counts, strict=True)]

    def compute(self, reduce=False):
        """Means so far, of this process or of all."""
        totals = torch.stack([self.sums, self.sums.new_tensor(self.counts)])
        if reduce:
            totals = self.accelerator.reduce(totals)
        means = (totals[0] / totals[1]).tolist()
        names = ['loss', *(f'top1_{name}' for name in self.names)]
        if len(self.names) > 1:
            names += [*(f'ce_{name}' for name in self.names), 'synergy']
        return OrderedDict(zip(names, means, strict=True))


class Progress:
    """Progress of an epoch on the main process: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, accelerator, epoch, num_epochs, updates, log_interval):
        self.shown = accelerator.is_main_process
        self.epoch, self.num_epochs, self.updates, self.log_interval = epoch, num_epochs, updates, log_interval
        self.bar = tqdm(
            total=updates,
            desc=f'Epoch {epoch}',
            bar_format='{desc}: {percentage:3.0f}%|{bar:10}|{postfix}',
            leave=False,
            disable=not (self.shown and sys.stderr.isatty()),
        )
        self.done = 0
        self.start = time.monotonic()

    def __enter__(self):
        self.redirect = logging_redirect_tqdm() if not self.bar.disable else nullcontext()
        self.redirect.__enter__()
        return self

    def __exit__(self, *exc):
        self.bar.close()
        self.redirect.__exit__(*exc)

    def step(self, last: bool) -> bool:
        """Count an update; returns whether it is time to show how things stand."""
        self.done += 1
        self.bar.update()
        return self.shown and (last or (self.done - 1) % self.log_interval == 0)

    def show(self, means, param_groups, images):
        seconds = time.monotonic() - self.start
        left = seconds / self.done * (self.updates - self.done + self.updates * (self.num_epochs - self.epoch - 1))
        top1 = ', '.join(f'{name[5:]} {value:.1f}' for name, value in means.items() if name.startswith('top1_'))
        lr = sum(group['lr'] for group in param_groups) / len(param_groups)
        text = (
            f'loss {means["loss"]:.4f}, {images / seconds:.0f} images/s, {timedelta(seconds=round(left))} left, '
            f'train top-1 {top1}, lr {lr:.3g}'
        )
        if self.bar.disable:
            _logger.info(f'Epoch {self.epoch} [{self.done}/{self.updates}]: {text}')
        else:
            self.bar.set_postfix_str(text)
