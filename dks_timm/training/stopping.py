"""Early ends of a run: exit codes, signals, and updates whose loss or gradient is not finite."""
import contextlib
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from math import inf, isfinite
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn
from accelerate.utils import gather_object
from timm.utils import dispatch_clip_grad, unwrap_model
from torch.distributed.tensor import DTensor

from ..errors import DataError

# Exit codes of train.py besides 0, 1 (failed), 2 (bad input) and 3 (push failed).
UNSAVED = 4
NONFINITE = 5
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume auto goes on

MOST_SKIPPED = 100  # updates in a row; more are no accident of single images


class Fault(Exception):
    """The early end of a run: one line with the reason and the way to go on, and the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def exit_on_fault(accelerator):
    """End with one line on stderr, and the exit code of a Fault or 1 for bad data, where a run ends early."""
    try:
        yield
    except DataError as e:
        sys.exit(f'train.py: error: {e}')
    except Fault as e:
        if accelerator.is_main_process:
            print(f'train.py: {e}', file=sys.stderr)
        sys.exit(e.code)


class Signals:
    """Notices SIGTERM and SIGINT, and lets all processes agree to stop. A second signal ends this process at once."""
    AGREE = 10  # batches within which all processes learn that one of them has been told to stop
    ECHO = 1.  # seconds within which a launcher may pass on a signal that the process has got already

    def __init__(self, accelerator, steps: int):
        self.accelerator = accelerator
        self.every = max(1, self.AGREE // steps)
        self.received: Optional[int] = None
        self.group = None
        if accelerator.num_processes > 1:
            # The flag stays on the CPU, so no device has to be waited for.
            self.group = torch.distributed.new_group(backend='gloo')

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _notice(self, number, frame):
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if self.accelerator.is_main_process:
                name = signal.Signals(number).name
                os.write(2, f'\n{name}: stopping after this step; once more ends at once.\n'.encode())
        elif time.monotonic() - self.since > self.ECHO:
            os._exit(128 + number)

    def stop(self, step: int) -> bool:
        """Return True to stop here. All processes call it with the same steps, and get the same answer."""
        if self.group is None:
            return self.received is not None
        if step % self.every:
            return False
        told = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(told)


def outlive_signals() -> None:
    """In a worker of a loader, leave signals sent to all processes of a job to the main one, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigtimedwait'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int):
    """End this worker when its main process says so, or has died: until then its connections would stay open."""
    while os.getppid() == parent:
        told = signal.sigtimedwait([signal.SIGTERM], 1)
        if told is not None and told.si_pid == parent:
            break
    os._exit(0)


def statistics(module: nn.Module) -> Dict[str, torch.Tensor]:
    """Return the running statistics of BatchNorm layers, by name: a forward changes them before its loss is known."""
    names = ('running_mean', 'running_var', 'num_batches_tracked')
    return {name: buffer for name, buffer in module.named_buffers() if name.rpartition('.')[2] in names}


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return True if all numbers of all tensors are finite; of sharded tensors, those that this process holds."""
    held = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    floating = [t.detach() for t in held if t.is_floating_point() and t.numel()]
    return not floating or isfinite(torch.nn.utils.get_total_norm(floating, norm_type=inf))


class Guard:
    """Clips gradients, and keeps updates that are not finite away from the weights.

    All processes come to the same decision. Gradients are the same in all of them, so those of a process whose loss is
    not finite are made NaN, too, and one norm tells all. A gradient scaler leaves out updates by itself where half
    precision overflows; there it is the losses that count. ``skipped`` counts updates that were left out,
    ``skipped_since`` those since the last row of summary.csv.
    """

    def __init__(self, args, accelerator, task, optimizer, names: Sequence[str]):
        self.args, self.accelerator, self.task, self.optimizer, self.names = args, accelerator, task, optimizer, names
        module = task.get_trainable_module()
        self.parameters = list(module.parameters())
        by_dtype = defaultdict(list)  # so that a GPU copies them in a few kernels
        for tensor in statistics(module).values():
            by_dtype[tensor.dtype].append(tensor)
        self.statistics = [(tensors, [t.clone() for t in tensors]) for tensors in by_dtype.values()]
        self.skipped = self.skipped_since = self.skipped_in_a_row = 0

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the statistics, before an update."""
        for tensors, kept in self.statistics:
            torch._foreach_copy_(kept, tensors)  # private: torch _foreach_copy_

    @torch.no_grad()
    def undo(self) -> None:
        """Put the statistics back."""
        for tensors, kept in self.statistics:
            torch._foreach_copy_(tensors, kept)  # private: torch _foreach_copy_

    def skip(self) -> bool:
        """Count an update that is left out; return False if there were too many in a row."""
        self.skipped += 1
        self.skipped_since += 1
        self.skipped_in_a_row += 1
        return self.skipped_in_a_row < MOST_SKIPPED

    def mark(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss, but make all gradients of one that is not finite NaN. A gradient scaler does that itself."""
        return loss if self.accelerator.scaler is not None else loss * (loss.detach() * 0 + 1)

    def clip(self, losses: Sequence[torch.Tensor]) -> bool:
        """Clip gradients as --clip-grad says; return True if they (but for scaled ones) and the losses are finite."""
        args, norm = self.args, None
        scaled = self.accelerator.scaler is not None
        if scaled:
            total = sum(loss.detach() for loss in losses).float()
            if not isfinite(self.accelerator.reduce(total)):
                return False
        if args.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            parameters = self.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            if args.clip_mode == 'norm':
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad)
            else:
                dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        if scaled:
            return True
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def report(self, outputs: Sequence[Dict[str, torch.Tensor]]) -> str:
        """Name a number of an update that is not finite, by the task's outputs. All processes have to call it."""
        found = next(filter(None, map(self._suspect, outputs)), '')
        if self.accelerator.num_processes > 1:
            found = next((f'{what} in process {rank}' for rank, what in enumerate(gather_object([found])) if what), '')
        return found or _bad_gradients(unwrap_model(self.task.get_trainable_module()))

    def _suspect(self, out) -> str:
        """Name the part of a task's output that is not finite; '' if all of it is."""
        ce = out.get('ce', out['loss'][None]).tolist()
        found = [f'the loss of {n} is {loss}' for n, loss in zip(self.names, ce, strict=False) if not isfinite(loss)]
        loss = out['loss'].item()
        if not found and not isfinite(loss):
            found = [f'the loss is {loss}']
        return ', '.join(found)


def _bad_gradients(module: nn.Module) -> str:
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f'the gradient of {", ".join(bad[:3])}{f" and {len(bad) - 3} more" if len(bad) > 3 else ""} is not finite'
