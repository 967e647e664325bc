"""Non-finite losses and gradients, noticed before they reach the weights.

Every process has to come to the same decision. Gradients are the same in all of them, so those of a process whose loss
is not finite are made NaN, too, and one norm tells all. A gradient scaler leaves out updates by itself where half
precision overflows; there it is the losses that count.
"""
from collections import defaultdict
from math import inf, isfinite
from typing import Dict, Iterable, List, Sequence, Tuple

import torch
import torch.nn as nn
from timm.utils import dispatch_clip_grad, unwrap_model
from torch.distributed.tensor import DTensor

from .resume import Fetches
from .sharding import DEEPSPEED, started

MOST_SKIPPED = 100  # updates in a row; more are no accident of single images


def statistics(module: nn.Module) -> Dict[str, torch.Tensor]:
    """The running statistics of a module's BatchNorm layers, which a forward pass changes before its loss is known."""
    names = ('running_mean', 'running_var', 'num_batches_tracked')
    return {name: buffer for name, buffer in module.named_buffers() if name.rpartition('.')[2] in names}


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers in all tensors are numbers; of sharded tensors, those in the part that this process holds."""
    held = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    floating = [t.detach() for t in held if t.is_floating_point() and t.numel()]
    return not floating or isfinite(torch.nn.utils.get_total_norm(floating, norm_type=inf))


class Guard:
    """Backward passes and clipping that tell whether what came out is numbers.

    Args:
        args: The command line.
        accelerator: Of the run.
        task: Whose module is trained, prepared.
        optimizer: Of that module, prepared.
        names: Of the classifiers.

    Attributes:
        skipped: Updates that were left out.
        skipped_since: Of them, those since the last row of summary.csv.
    """

    def __init__(self, args, accelerator, task, optimizer, names: Sequence[str]):
        self.args, self.accelerator, self.task, self.optimizer, self.names = args, accelerator, task, optimizer, names
        self.deepspeed = started(accelerator) == DEEPSPEED  # it divides, clips and steps within backward()
        raw_optimizer = getattr(optimizer, 'optimizer', optimizer)
        self.second_order = getattr(raw_optimizer, 'is_second_order', False)
        module = task.get_trainable_module()
        self.parameters = list(module.parameters())
        by_dtype = defaultdict(list)  # so that a GPU copies them in a few kernels
        for tensor in statistics(module).values():
            by_dtype[tensor.dtype].append(tensor)
        self.statistics = [(tensors, [t.clone() for t in tensors]) for tensors in by_dtype.values()]
        self.skipped = self.skipped_since = self.skipped_in_a_row = 0

    @torch.no_grad()
    def keep(self) -> None:
        """Remember what forward passes change."""
        for tensors, kept in self.statistics:
            torch._foreach_copy_(kept, tensors)

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what forward passes have changed."""
        for tensors, kept in self.statistics:
            torch._foreach_copy_(tensors, kept)

    def skip(self) -> bool:
        """Leave an update out; returns whether these are not too many by now."""
        self.optimizer.zero_grad()
        self.skipped += 1
        self.skipped_since += 1
        self.skipped_in_a_row += 1
        return self.skipped_in_a_row < MOST_SKIPPED

    def backward(self, loss: torch.Tensor, last: bool) -> bool:
        """Compute gradients.

        Args:
            loss: Of a batch.
            last: Whether an update follows.

        Returns:
            Whether the loss is finite, as far as that has to be known so early.
        """
        if self.deepspeed:
            if not self._finite(loss):
                return False
            self.accelerator.sync_gradients = last
            self.accelerator.backward(loss)
        elif self.accelerator.scaler is not None:
            self.accelerator.backward(loss, create_graph=self.second_order)
        else:
            one = loss.detach() * 0 + 1  # nan where the loss is not finite
            self.accelerator.backward(loss, create_graph=self.second_order, gradient=one)
        return True

    def clip(self, losses: Sequence[torch.Tensor]) -> bool:
        """Clip gradients, as --clip-grad says.

        Args:
            losses: Of the batches of the update.

        Returns:
            Whether gradients and losses are finite, in all processes.
        """
        args, norm = self.args, None
        if self.deepspeed:
            return True
        scaled = self.accelerator.scaler is not None
        if scaled and not self._finite(sum(loss.detach() for loss in losses)):
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

    def _finite(self, loss) -> bool:
        """Whether a loss is finite in every process."""
        return isfinite(self.accelerator.reduce(loss.detach().float()))

    def report(self, outputs: Sequence[Dict[str, torch.Tensor]], batch: int, fetches: Fetches) -> Tuple[str, List[str]]:
        """Say what of an update is not finite, and for which images. All processes have to call it.

        Args:
            outputs: What the task returned for each batch.
            batch: Number of the first of them within the epoch.
            fetches: Which know the images.

        Returns:
            What is not finite and where, shortly; and line by line with all images, empty where they are not known.
        """
        found = [(self._suspect(out), fetches.names(batch + i)) for i, out in enumerate(outputs)]
        reports = [found]
        if self.accelerator.num_processes > 1:
            reports = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(reports, found)
            reports = [
                [(what and f'{what} in process {rank}', images) for what, images in found]
                for rank, found in enumerate(reports)
            ]
        batches = [entry for found in reports for entry in found]
        suspects = [(what, images) for what, images in batches if what]
        if not suspects:
            gradient = _bad_gradients(unwrap_model(self.task.get_trainable_module()))
            suspects = [(gradient, [image for _, images in batches for image in images])]
        what, images = suspects[0]
        if images:
            what += f', on {", ".join(images[:3])}' + (f' and {len(images) - 3} more' if len(images) > 3 else '')
        return what, [line for what, images in suspects if images for line in (f'{what}:', *images)]

    def _suspect(self, out) -> str:
        """What of a task's output is not finite, or ''."""
        ce, synergy = out.get('ce', out['loss'][None]).tolist(), out.get('synergy')
        parts = [
            f'the loss of {name} is {loss}' for name, loss in zip(self.names, ce, strict=False) if not isfinite(loss)]
        if synergy is not None and not parts:
            pairs = (~synergy.isfinite()).nonzero().tolist()
            parts = [f'the synergy from {self.names[p]} to {self.names[q]} is {synergy[p, q]}' for p, q in pairs]
        loss = out['loss'].item()
        if not parts and not isfinite(loss):
            parts = [f'the loss is {loss}']
        return ', '.join(parts)


def _bad_gradients(module: nn.Module) -> str:
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f'the gradient of {", ".join(bad[:3])}{f" and {len(bad) - 3} more" if len(bad) > 3 else ""} is not finite'
