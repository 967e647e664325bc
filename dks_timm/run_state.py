"""What a run needs, besides weights and optimizer, to go on in other processes as if it had not stopped."""
import logging
from typing import Any, Dict, Optional

import torch
from timm.utils import unwrap_model

from . import faults, resumable

_logger = logging.getLogger(__name__)

# Of torch's ReduceLROnPlateau, the only schedule that is no function of epoch or update.
PLATEAU = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')


class RunState:
    """Collects the state of a run from all processes for a checkpoint, and puts it back.

    Args:
        trainer: The Trainer that it is about.
        fetches: What its train loader gets batches from.
    """

    def __init__(self, trainer, fetches: resumable.Fetches):
        self.trainer, self.fetches = trainer, fetches
        # Where these differ, a position within an epoch means nothing.
        self.shape = dict(
            processes=trainer.accelerator.num_processes,
            batches=len(fetches),
            batch_size=trainer.args.batch_size,
            accumulation=trainer.args.grad_accum_steps,
        )

    def collect(self, loader: Dict[str, Any], totals=None, **position) -> Dict[str, Any]:
        """Put a state together, of numbers, text and tensors. All processes have to call it.

        Args:
            loader: State of the fetches.
            totals: Of the epoch, while it goes on.
            **position: What all processes agree on: epoch, batch, updates and whatever else names the place.

        Raises:
            Fault: There are weights that are no numbers, which are not to be saved.
        """
        trainer = self.trainer
        modules = dict(module=trainer.task.get_trainable_module(), ema=trainer.task.get_trainable_module(ema=True))
        modules = {name: unwrap_model(module) for name, module in modules.items() if module is not None}
        process = dict(
            loader=resumable.packed(loader),
            totals=None if totals is None else totals.state_dict(),
            evaluation_started=resumable.evaluation_started(trainer.loader_eval),
            # Statistics of BatchNorm are each process's own between one exchange and the next.
            statistics={
                name: {key: t.cpu() for key, t in faults.statistics(module).items()} for name, module in modules.items()
            } if not trainer.accelerator.is_main_process else {},
            finite=faults.all_finite([p for module in modules.values() for p in module.parameters()]),
        )
        processes = [process]
        if self.shape['processes'] > 1:
            processes = [None] * self.shape['processes']
            torch.distributed.all_gather_object(processes, process)
        if not all(process.pop('finite') for process in processes):
            raise faults.Fault('weights are no numbers any more; they were not saved', faults.NONFINITE)
        plateau = getattr(trainer.scheduler, 'lr_scheduler', None)
        return dict(
            position,
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
        modules = dict(module=trainer.task.get_trainable_module(), ema=trainer.task.get_trainable_module(ema=True))
        for name, held in process['statistics'].items():
            for key, t in faults.statistics(unwrap_model(modules[name])).items():
                t.copy_(held[key])
        for group, lr in zip(trainer.optimizer.param_groups, run['lr'], strict=True):
            group['lr'] = lr
        if run['plateau']:
            vars(trainer.scheduler.lr_scheduler).update(run['plateau'])
            trainer.scheduler.restore_lr = run['plateau_lr']
        if process['evaluation_started']:
            resumable.start_evaluation_undrawn(trainer.loader_eval)
        if process['loader']['num_workers'] != self.fetches.num_workers:
            _logger.warning(
                f'{path} is of a run with {process["loader"]["num_workers"]} workers a process: augmentation differs.')
        self.fetches.resume(process['loader'])
        resumable.set_random_state(process['loader']['random'], trainer.accelerator.device)
        return run
