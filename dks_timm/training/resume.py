"""The state of a run besides weights and optimizer, with which another process goes on as if it had not stopped."""
import logging
from typing import Any, Dict, Optional

import torch
from accelerate.utils import gather_object
from timm.utils import unwrap_model

from .._compat import has_started, rounding_generator
from .loader_state import Fetches, packed, persistent_loader, set_random_state
from .metrics import Totals
from .stopping import NONFINITE, Fault, Guard, all_finite, statistics

_logger = logging.getLogger(__name__)

# State of torch's ReduceLROnPlateau, the only schedule that is no function of epoch or update.
_PLATEAU = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')


class RunState:
    """Collects the state of a run from all processes for a checkpoint, and restores it."""

    def __init__(self, args, accelerator, task, optimizer, scheduler, fetches: Fetches, loader_eval, guard: Guard):
        self.accelerator, self.optimizer, self.scheduler = accelerator, optimizer, scheduler
        self.fetches, self.evaluation, self.guard = fetches, persistent_loader(loader_eval), guard
        modules = dict(module=task.get_trainable_module(), ema=task.get_trainable_module(ema=True))
        self.modules = {name: unwrap_model(module) for name, module in modules.items() if module is not None}
        # An average in bfloat16 is rounded at random.
        self.rounding = rounding_generator(modules['ema'])
        # A position within an epoch means nothing where one of these differs.
        self.shape = dict(
            processes=accelerator.num_processes,
            batches=len(fetches),
            batch_size=args.batch_size,
            accumulation=args.grad_accum_steps,
            workers=fetches.num_workers,
        )

    def mark(self, done: int, now: bool = True) -> Dict[str, Any]:
        """Return the part of this process's state that cannot be had later; arguments as of :meth:`Fetches.state`."""
        evaluation = self.evaluation  # it draws the seeds of its workers once
        started = evaluation is not None and (has_started(evaluation) or evaluation.generator is not None)
        return dict(loader=self.fetches.state(done, now), evaluation_started=started)

    def collect(self, mark: Dict[str, Any], totals: Optional[Totals], epoch: int, **place: Any) -> Dict[str, Any]:
        """Return the state of all processes, made of numbers, text and tensors. All processes have to call it.

        In ``place``, ``over`` says that the epoch has been evaluated, by ``metric``; ``metrics`` are of
        its training when that is complete; ``batch`` and ``done`` count its batches and updates so far, ``updates``
        those since the beginning of the run. ``mark`` is from :meth:`mark`, ``totals`` of the epoch's training.

        Raises:
            Fault: A weight is not finite, so the state is not to be saved.
        """
        process = dict(
            loader=packed(mark['loader']),
            evaluation_started=mark['evaluation_started'],
            totals=None if totals is None else totals.state_dict(),
            # Statistics of BatchNorm are each process's own between one exchange and the next.
            statistics={
                name: {key: t.cpu() for key, t in statistics(module).items()} for name, module in self.modules.items()
            } if not self.accelerator.is_main_process else {},
            rounding=None if self.rounding is None else self.rounding.get_state(),
            finite=all_finite([p for module in self.modules.values() for p in module.parameters()]),
        )
        processes = gather_object([process])
        place = {**dict(over=False, metric=None, metrics=None, batch=0, done=0, updates=0), **place}
        if not all(process.pop('finite') for process in processes):
            raise Fault(
                f'epoch {epoch}, after update {place["done"]}: weights are not finite any more; they are not saved, '
                'and the newest checkpoint is from before', NONFINITE)
        plateau = getattr(self.scheduler, 'lr_scheduler', None)
        return dict(
            epoch=epoch,
            **place,
            skipped=[self.guard.skipped, self.guard.skipped_since],
            shape=self.shape,
            lr=[float(group['lr']) for group in self.optimizer.param_groups],
            plateau=plateau and {name: getattr(plateau, name) for name in _PLATEAU},
            plateau_lr=getattr(self.scheduler, 'restore_lr', None),
            processes=processes,
        )

    def restore(self, run: Optional[Dict[str, Any]], path: str) -> Optional[Dict[str, Any]]:
        """Restore a state that :meth:`collect` returned; return None where the run cannot go on from it exactly."""
        if run is None:
            return None
        differ = [
            f'{name} {there} there and {self.shape[name]} here' for name, there in run['shape'].items()
            if there != self.shape[name]
        ]
        if differ:
            then = '' if run['over'] else f' Epoch {run["epoch"]} starts again.'
            _logger.warning(f'{path} is of a run that is different ({", ".join(differ)}), so random numbers are.{then}')
            return None
        process = run['processes'][self.accelerator.process_index]
        for name, module in self.modules.items():
            held = process['statistics'].get(name, {})
            for key, t in statistics(module).items():
                t.copy_(held.get(key, t))
        if process['rounding'] is not None and self.rounding is not None:
            self.rounding.set_state(process['rounding'])
        for group, lr in zip(self.optimizer.param_groups, run['lr'], strict=True):
            group['lr'] = lr
        if run['plateau'] and hasattr(self.scheduler, 'lr_scheduler'):
            vars(self.scheduler.lr_scheduler).update(run['plateau'])
            self.scheduler.restore_lr = run['plateau_lr']
        self.guard.skipped, self.guard.skipped_since = run['skipped']
        if process['evaluation_started'] and self.evaluation is not None:
            self.evaluation.generator = torch.Generator()  # the seeds of its workers have been drawn
        self.fetches.resume(process['loader'])
        set_random_state(process['loader']['random'], self.accelerator.device)
        return run
