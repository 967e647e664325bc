"""What a run needs, besides weights and optimizer, to go on in other processes as if it had not stopped."""
import logging
import weakref
from typing import Any, Dict, Optional

import torch
from timm.utils import unwrap_model

from . import guard, resume, stopping
from .console import Totals

_logger = logging.getLogger(__name__)

# Of torch's ReduceLROnPlateau, the only schedule that is no function of epoch or update.
PLATEAU = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')


class RunState:
    """Collects the state of a run from all processes for a checkpoint, and puts it back.

    Args:
        trainer: The Trainer that it is about.
    """

    def __init__(self, trainer):
        self.trainer = weakref.proxy(trainer)  # in a cycle, loaders would wait seconds for each worker to end
        # Where these differ, a position within an epoch means nothing.
        self.shape = dict(
            processes=trainer.accelerator.num_processes,
            batches=len(trainer.fetches),
            batch_size=trainer.args.batch_size,
            accumulation=trainer.args.grad_accum_steps,
        )

    def _modules(self):
        task = self.trainer.task
        modules = dict(module=task.get_trainable_module(), ema=task.get_trainable_module(ema=True))
        return {name: unwrap_model(module) for name, module in modules.items() if module is not None}

    def _rounding(self) -> Optional[torch.Generator]:
        """What rounds an average in bfloat16, which happens at random."""
        return getattr(self.trainer.task.get_trainable_module(ema=True), '_sr_generator', None)

    def mark(self, done: int, now: bool = True) -> Dict[str, Any]:
        """Where this process stands, of what changes in a way that cannot be undone. Takes next to no time.

        Args:
            done: Batches of the epoch that the loop is through with.
            now: Whether that is where it is, else it has just got the batch after them.
        """
        trainer = self.trainer
        return dict(
            loader=trainer.fetches.state(done, now),
            evaluation_started=resume.evaluation_started(trainer.loader_eval),
        )

    def collect(
            self,
            mark: Dict[str, Any],
            totals: Optional[Totals],
            epoch: int,
            over: bool = False,
            metric: Optional[float] = None,
            metrics: Optional[Dict[str, float]] = None,
            batch: int = 0,
            done: int = 0,
            updates: int = 0,
    ) -> Dict[str, Any]:
        """Put a state together, of numbers, text and tensors. All processes have to call it.

        Args:
            mark: From :meth:`mark`.
            totals: Of the epoch's training, while it goes on.
            epoch: Its number.
            over: Whether it has been evaluated.
            metric: What it is ranked by then.
            metrics: Of its training, when that is complete.
            batch: Batches of the epoch that are done.
            done: Updates of the epoch that are done.
            updates: Those since the beginning of the run.

        Raises:
            Fault: There are non-finite weights, which are not to be saved.
        """
        trainer = self.trainer
        modules = self._modules()
        rounding = self._rounding()
        process = dict(
            loader=resume.packed(mark['loader']),
            evaluation_started=mark['evaluation_started'],
            totals=None if totals is None else totals.state_dict(),
            # Statistics of BatchNorm are each process's own between one exchange and the next.
            statistics={
                name: {key: t.cpu() for key, t in guard.statistics(module).items()} for name, module in modules.items()
            } if not trainer.accelerator.is_main_process else {},
            rounding=None if rounding is None else rounding.get_state(),
            finite=guard.all_finite([p for module in modules.values() for p in module.parameters()]),
        )
        processes = [process]
        if self.shape['processes'] > 1:
            processes = [None] * self.shape['processes']
            torch.distributed.all_gather_object(processes, process)
        if not all(process.pop('finite') for process in processes):
            raise stopping.Fault(
                f'epoch {epoch}, after update {done}: weights are not finite any more; they are not saved, and the '
                'newest checkpoint is from before', stopping.NONFINITE)
        plateau = getattr(trainer.scheduler, 'lr_scheduler', None)
        return dict(
            epoch=epoch,
            over=over,
            metric=metric,
            metrics=metrics and dict(metrics),
            batch=batch,
            done=done,
            updates=updates,
            skipped=[trainer.guard.skipped, trainer.guard.skipped_since],
            shape=self.shape,
            lr=[float(group['lr']) for group in trainer.optimizer.param_groups],
            plateau=plateau and {name: getattr(plateau, name) for name in PLATEAU},
            plateau_lr=getattr(trainer.scheduler, 'restore_lr', None),
            processes=processes,
        )

    def restore(self, run: Optional[Dict[str, Any]], path: str) -> Optional[Dict[str, Any]]:
        """Put a state back, once all of the trainer is there.

        Args:
            run: What :meth:`collect` returned, or None.
            path: The checkpoint that it is from.

        Returns:
            The state, or None where the run cannot go on from there exactly, which is said.
        """
        trainer = self.trainer
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
        process = run['processes'][trainer.accelerator.process_index]
        for name, module in self._modules().items():
            held = process['statistics'].get(name, {})
            for key, t in guard.statistics(module).items():
                t.copy_(held.get(key, t))
        if process['rounding'] is not None and self._rounding() is not None:
            self._rounding().set_state(process['rounding'])
        for group, lr in zip(trainer.optimizer.param_groups, run['lr'], strict=True):
            group['lr'] = lr
        if run['plateau'] and hasattr(trainer.scheduler, 'lr_scheduler'):
            vars(trainer.scheduler.lr_scheduler).update(run['plateau'])
            trainer.scheduler.restore_lr = run['plateau_lr']
        trainer.guard.skipped, trainer.guard.skipped_since = run['skipped']
        if process['evaluation_started']:
            resume.start_evaluation_undrawn(trainer.loader_eval)
        if process['loader']['num_workers'] != trainer.fetches.num_workers:
            _logger.warning(
                f'{path} is of a run with {process["loader"]["num_workers"]} workers a process: augmentation differs.')
        trainer.fetches.resume(process['loader'])
        resume.set_random_state(process['loader']['random'], trainer.accelerator.device)
        return run
