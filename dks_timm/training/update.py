"""An update of the weights: its batches, its loss, its gradients."""
import contextlib
from itertools import islice
from typing import Any, Dict, Iterator, Tuple

import torch

from .loader_state import random_state, set_random_state


def group_batches(first: int, batches: int, accum: int) -> Iterator[Tuple[int, int]]:
    """Yield the number of batches of each update of an epoch, and the divisor of their losses.

    This is the rule of timm's script, to the letter: the last group, where shorter, is divided by its own length, and
    from its second batch on an update also falls due where that length divides the number of batches seen. ``first`` is
    the batch of the epoch to begin with, after a whole update.
    """
    rest = batches % accum
    size = 0
    for i in range(first, batches):
        size += 1
        every = rest if rest and i > batches - rest else accum
        if i == batches - 1 or (i + 1) % every == 0:
            yield size, rest if rest and i >= batches - rest else accum
            size = 0


class Update:
    """The batches of one optimizer step; they come from the loader while it is iterated over.

    Iterating gives images (B, C, H, W) and target, class indices (B,) or dense (B, num_classes), on the device.

    Attributes:
        place: Numbers before the update: ``epoch``, ``batch`` and ``done`` updates in it, ``updates`` of the run.
        finite: False once :meth:`clip_gradients` has found a number that is not finite.
        parts: For each batch the task's output, its loss, target and number of images.
        mark: State of this process before the update.
    """

    def __init__(self, trainer, batches: Iterator, size: int, divisor: int, totals, **place: int):
        self.trainer, self.batches, self.size, self.divisor = trainer, batches, size, divisor
        self.totals, self.place = totals, place
        self.parts, self.finite = [], True

    def __iter__(self):
        trainer, place = self.trainer, self.place
        for i, (images, target) in enumerate(islice(self.batches, self.size)):
            if i == 0:
                self.mark = trainer.state.mark(place['batch'], now=False)
                trainer.guard.keep()
                if len(trainer.names) > 1:
                    trainer.task.begin_update(place['epoch'], place['updates'])
            images, target = trainer.to_device(images, target)
            if trainer.mixup_fn is not None:
                images, target = trainer.mixup_fn(images, target)
            if trainer.unsettled:
                self._settle(images, target)
            self.images, self.target, self.is_last = images, target, i == self.size - 1
            yield images, target

    def _settle(self, images, target):
        """Let DDP lay gradients out as after the first step of a run: sums over processes depend on the order."""
        trainer = self.trainer
        trainer.unsettled = False
        device = trainer.accelerator.device
        random = random_state(device)
        with trainer.accelerator.autocast():
            loss = trainer.task(images, target)['loss']
        trainer.accelerator.backward(loss)
        trainer.optimizer.zero_grad()
        trainer.guard.undo()
        set_random_state(random, device)

    def no_sync(self):
        """Return the context of a batch: but for the last one, DDP exchanges no gradients in it."""
        module = self.trainer.task.get_trainable_module()
        return contextlib.nullcontext() if self.is_last else self.trainer.accelerator.no_sync(module)

    def scale_loss(self, output: Dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of the last batch for backward: divided by the number of batches, scaled by its size."""
        args = self.trainer.args
        loss, divisor = output['loss'], self.divisor
        if divisor > 1:
            loss = loss / divisor
        batch_size = (self.images['patches'] if args.naflex_loader else self.images).shape[0]
        self.parts.append((output, loss * divisor if divisor > 1 else loss, self.target, batch_size))
        if args.naflex_loader or args.train_img_sizes:
            loss = loss * self._size_scale(batch_size)
        return self.trainer.guard.mark(loss)

    def _size_scale(self, batch_size: int) -> Any:
        """Return the factor of the loss of a batch, by the batch size that the learning rate is for."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        mode = args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale
        scale = (batch_size / self.trainer.batch_size_reference) ** {'none': 0., 'sqrt': 0.5, 'linear': 1.}[mode]
        if args.naflex_loader and accelerator.num_processes > 1:
            # Processes hold batches of different sizes: DDP's mean over them has to become one over samples.
            sizes = torch.tensor(batch_size, device=accelerator.device, dtype=torch.float32)
            scale = scale * (accelerator.num_processes * batch_size / accelerator.reduce(sizes))
        return scale

    def clip_gradients(self) -> bool:
        """Clip gradients as --clip-grad says; return False where the update is left out, as it is not finite."""
        if len(self.parts) != self.size:
            raise RuntimeError('the training step has to call update.scale_loss(output) once for each batch')
        guard = self.trainer.guard
        self.finite = guard.clip([loss for _, loss, *_ in self.parts])
        if self.finite:
            guard.skipped_in_a_row = 0
        else:
            guard.undo()
            self.trainer.leave_out(self)
        return self.finite
