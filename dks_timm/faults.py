"""What can end a run before its time: signals, and numbers that are none."""
import os
import signal
import threading
import time
from math import inf, isfinite
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn

# Exit codes of train.py besides 0, 1 (failed), 2 (bad input) and 3 (push failed).
UNSAVED = 4
NONFINITE = 5
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume auto goes on

MOST_SKIPPED = 100  # updates in a row; more are no accident of single images


class Fault(Exception):
    """The end of a run, said in one line.

    Args:
        message: What happened, and what would do.
        code: Exit code.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Signals:
    """Notices SIGTERM and SIGINT, and lets all processes agree to stop. A second signal ends this process at once.

    Args:
        accelerator: Of the processes.
        steps: Batches in an update.
    """
    AGREE = 10  # batches within which processes find out that one of them has been told to stop
    ECHO = 1.  # seconds within which a launcher may pass on what the process has got already

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
                os.write(2, f'{name}: stopping after this step; once more ends at once.\n'.encode())
        elif time.monotonic() - self.since > self.ECHO:
            os._exit(128 + number)

    def stop(self, step: int) -> bool:
        """Whether to stop here. All processes call it with the same steps, and get the same answer."""
        if self.group is None:
            return self.received is not None
        if step % self.every:
            return False
        told = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(told)


def gradient_norm(module: nn.Module) -> torch.Tensor:
    """The norm of all gradients, which is no number where any of them is none."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers in all tensors are numbers."""
    floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    return not floating or isfinite(torch.nn.utils.get_total_norm(floating, norm_type=inf))


def statistics(module: nn.Module) -> Dict[str, torch.Tensor]:
    """The running statistics of a module's BatchNorm layers, which a forward pass changes before its loss is known."""
    names = ('running_mean', 'running_var', 'num_batches_tracked')
    return {name: buffer for name, buffer in module.named_buffers() if name.rpartition('.')[2] in names}


class Keeper:
    """A copy of tensors as they were before an update.

    Args:
        tensors: That are changed in place.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self.tensors = list(tensors)
        self.kept = [t.clone() for t in self.tensors]

    @torch.no_grad()
    def keep(self) -> None:
        if self.tensors:
            torch._foreach_copy_(self.kept, self.tensors)

    @torch.no_grad()
    def restore(self) -> None:
        if self.tensors:
            torch._foreach_copy_(self.tensors, self.kept)


def suspects(outputs: Sequence[Dict[str, torch.Tensor]], names: Sequence[str]) -> Dict[int, str]:
    """Which batches gave a loss that is no number, and what of it is none.

    Args:
        outputs: What the task returned for each batch.
        names: Of the classifiers.
    """
    found = {}
    for i, out in enumerate(outputs):
        ce, synergy = out.get('ce', out['loss'][None]).tolist(), out.get('synergy')
        parts = [f'the loss of {name} is {loss}' for name, loss in zip(names, ce, strict=False) if not isfinite(loss)]
        if synergy is not None and not parts:
            pairs = (~synergy.isfinite()).nonzero().tolist()
            parts = [f'the synergy from {names[p]} to {names[q]} is {synergy[p, q]}' for p, q in pairs]
        if not parts and not isfinite(out['loss']):
            parts = [f'the loss is {out["loss"]}']
        if parts:
            found[i] = ', '.join(parts)
    return found


def bad_gradients(module: nn.Module) -> str:
    """Which parameters have gradients that are no numbers."""
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f'the gradient of {", ".join(bad[:3])}{f" and {len(bad) - 3} more" if len(bad) > 3 else ""} is not finite'
