"""The loop of a run around the training step: updates, evaluations, checkpoints."""
import contextlib
import logging
import os
import time
from itertools import chain, islice
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

import torch
import torchvision.utils
from timm import utils
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import evaluation_sample_limit, load_task_ema_checkpoint
from torch.utils.data import IterableDataset

from ..errors import given_flags, naming
from . import checkpoint, console, distributed, fsdp2, stopping
from .data import model_dtype
from .flags import METRICS
from .loader_state import Fetches, begin_epoch
from .metrics import HeadMetrics, Totals
from .records import Records, mean_lr
from .resume import RunState
from .update import Update, group_batches

_logger = logging.getLogger(__name__)


class Trainer:
    """A run: its parts, and all that surrounds the training step, in timm's order and with timm's digits.

    Args:
        args: The configuration.
        accelerator: From :func:`dks_timm.training.distributed.create_accelerator`.
        task: A timm TrainingTask whose module is on the accelerator's device; ``optimizer`` is the module's.
        loaders: From :func:`dks_timm.training.data.create_loaders`.
        names: Names of the classifiers, the backbone's first; more than one with --dks.
        resume: Checkpoint to continue from, or ''.
        facts: Findings of the run, which checkpoints hold beside the configuration; added to while it goes on.
    """

    def __init__(self, args, accelerator, task, optimizer, loaders, names=('backbone',), resume='', facts=None):
        self.args, self.accelerator, self.task, self.names = args, accelerator, task, names
        self.facts: Dict[str, Any] = {} if facts is None else facts
        self.loader_train, self.loader_eval, self.mixup_fn, self.batch_size_reference = loaders
        self.eval_metric = args.eval_metric if self.loader_eval is not None else 'loss'
        self.second_order = getattr(optimizer, 'is_second_order', False)
        self.scaler = accelerator.scaler
        if self.scaler is not None:
            self.scaler.state_dict_key = utils.NativeScaler.state_dict_key  # timm's saver asks for it
        resume_epoch, self.earlier_seconds, run = None, 0., None
        if resume:
            resume_epoch, self.earlier_seconds, run = checkpoint.load(resume, args, task, optimizer, self.scaler)
        self._create_averages(resume)
        distributed.share(facts={
            '--resume': f'{resume} up to epoch {resume_epoch}' if resume else 'no checkpoint',
            '--data-dir': f'{len(self.loader_train)} batches',
        })
        self._prepare(optimizer)
        self.updates_per_epoch = -(-len(self.loader_train) // args.grad_accum_steps)
        about = 'sched', 'epochs', 'warmup_epochs', 'decay_epochs', 'lr_stable_timescale'
        with naming(given_flags(args, *about), AssertionError, ValueError):  # timm's checks of its arguments
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer,
                **scheduler_kwargs(args, decreasing_metric=self.eval_metric == 'loss'),
                updates_per_epoch=self.updates_per_epoch,
            )
        self.num_epochs = min(self.num_epochs, args.stop_epoch or self.num_epochs)
        self.signals = stopping.Signals(accelerator, args.grad_accum_steps)
        self.guard = stopping.Guard(args, accelerator, task, self.optimizer, names)
        self.state = RunState(
            args, accelerator, task, self.optimizer, self.scheduler, self.fetches, self.loader_eval, self.guard)
        self._go_on(run, resume, resume_epoch)
        self.output_dir = self.saver = self.records = None
        self.without_ema = {}  # metrics of the weights themselves by epoch, where the average's are the ones that count
        self.train_images = self.train_seconds = 0.

    def _create_averages(self, resume: str):
        """Set the average up, of the module before DDP wraps it, and compile."""
        args, task = self.args, self.task
        if args.model_ema:
            device = 'cpu' if args.model_ema_force_cpu else None
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
            if resume:
                load_task_ema_checkpoint(task, resume)
        if args.torchcompile:
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            if task.has_ema():
                task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
        self.eval_model = task.get_eval_model()

    def _prepare(self, optimizer):
        """Prepare module, optimizer and loaders for the processes, and for going on from a checkpoint."""
        args, accelerator, task = self.args, self.accelerator, self.task
        self.shards = None
        if accelerator.is_fsdp2:
            self.shards = fsdp2.Shards(accelerator, task, optimizer)
            self.optimizer = self.shards.optimizer
        else:
            task.trainable_module, self.optimizer = accelerator.prepare(task.get_trainable_module(), optimizer)
        prefetched = hasattr(self.loader_train, 'loader')
        inner = self.loader_train.loader if prefetched else self.loader_train
        self.fetches = Fetches(inner, accelerator.device, memory=args.grad_accum_steps + prefetched)
        if prefetched:
            self.loader_train.loader = self.fetches
        else:
            self.loader_train = self.fetches

    def _go_on(self, run, path: str, resume_epoch: Optional[int]):
        """Start where a checkpoint was written, within an epoch or after one; from one of timm's, after its epoch."""
        args = self.args
        self.run = self.state.restore(run if args.start_epoch is None else None, path)
        begun = self.run is not None and (self.run['over'] or self.run['epoch'] + self.run['done'] > 0)
        self.unsettled = self.accelerator.num_processes > 1 and self.shards is None and begun
        self.start_epoch = resume_epoch or 0
        if args.start_epoch is not None:
            self.start_epoch = args.start_epoch
        elif run is not None and not run['over']:
            self.start_epoch = run['epoch']
        if self.scheduler is None or self.start_epoch == 0:
            return
        if self.run is None and args.sched_on_updates:
            self.scheduler.step_update(self.start_epoch * self.updates_per_epoch)
        elif self.run is None or self.run['over']:
            self.scheduler.step(self.start_epoch, self.run and self.run['metric'])

    def open_output(self, args_text: str, input_size: Sequence[int], resume: str) -> None:
        """Create the run's folder with its args.yaml, checkpoint saver and trackers. Nothing is written before."""
        args = self.args
        if not self.accelerator.is_main_process:
            return
        self.output_dir = checkpoint.create_folder(args, args_text, input_size, resume)
        self.saver = checkpoint.Saver(
            args=args,
            facts=self.facts,
            model=self.task.get_trainable_module(),
            optimizer=self.shards or self.optimizer,
            amp_scaler=self.scaler,
            checkpoint_dir=self.output_dir,
            recovery_dir=self.output_dir,
            decreasing=self.eval_metric == 'loss',
            max_history=args.checkpoint_hist,
            task=self.shards or self.task,
        )
        self.saver.milestones = args.save_epochs or ()
        logging.getLogger(utils.checkpoint_saver.__name__).setLevel(logging.WARNING)  # it lists all files every epoch
        self.records = Records(args, self.accelerator, self.output_dir, self.start_epoch)
        self.pictures = checkpoint.Output()
        if resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(self.output_dir):
            self.saver.resume(resume)

    @contextlib.contextmanager
    def running(self):
        """Context of the run: signals end it after an update; a Fault is raised if its end could not be saved."""
        self.began = time.monotonic()
        if self.accelerator.is_main_process:
            console.warn_of_long_average(self.args, self.num_epochs * self.updates_per_epoch)
        try:
            with self.signals:
                yield
            failure = self.saver and (self.saver.failure or self.records.summary.failure)
            if failure:
                raise stopping.Fault(f'training is over, but was not saved to the end: {failure}', stopping.UNSAVED)
        except stopping.Fault:
            self.accelerator.end_training()
            raise
        finally:
            if self.guard.skipped:
                _logger.warning(f'{self.guard.skipped} updates with a non-finite loss or gradient were left out.')
        self.accelerator.end_training()

    def epochs(self) -> range:
        """Return the epochs that are left; none where the checkpoint resumed from is the last one of its run."""
        return range(self.start_epoch, self.num_epochs)

    def updates(self, epoch: int) -> Iterator[Update]:
        """Yield the updates of an epoch, or those that are left of it, and look after each when it is done.

        After an update come the average, the schedule, progress, checkpoints of --recovery-interval, and signals.
        """
        args, accelerator = self.args, self.accelerator
        run = self.run if self.run and not self.run['over'] else None
        self.run, self.train_metrics, self.images_per_second = None, run and run['metrics'], 0.
        if self.train_metrics is not None:
            return
        begin_epoch(args, self.loader_train, self.mixup_fn, epoch)
        self.task.get_trainable_module().train()
        first, done, updates = 0, 0, epoch * self.updates_per_epoch
        totals = Totals(accelerator, self.names, args.task == 'multilabel')
        if run is not None:
            first, done, updates = run['batch'], run['done'], run['updates']
            totals.load_state_dict(run['processes'][accelerator.process_index]['totals'])
        batches = iter(self.loader_train) if first < len(self.loader_train) else iter(())
        self.optimizer.zero_grad()
        with console.Progress(accelerator, f'Epoch {epoch}', self.updates_per_epoch, done) as progress:
            for size, divisor in group_batches(first, len(self.loader_train), args.grad_accum_steps):
                head = [*islice(batches, 1)]
                if not head:  # a stream that is shorter than it says
                    break
                place = dict(epoch=epoch, batch=first, done=progress.done, updates=updates)
                update = Update(self, chain(head, batches), size, divisor, totals, **place)
                yield update
                first, updates = first + size, updates + 1
                if update.finite:
                    for part in update.parts:
                        totals.update(*part)
                    self.task.update_ema(step=updates)
                if args.synchronize_step and accelerator.device.type != 'cpu':
                    torch.accelerator.synchronize()
                progress.step()
                self._show(progress, update)
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=updates)
                place = dict(epoch=epoch, batch=first, done=progress.done, updates=updates, totals=totals)
                if self.signals.stop(updates):
                    self._stop_as_told(self.state.mark(first), **place)
                if args.recovery_interval and progress.done % args.recovery_interval == 0:
                    self._save(self.state.mark(first), **place)
            next(batches, None)  # the iterator ends the epoch of the loader
        self._end_training(epoch, progress, totals)

    def _end_training(self, epoch: int, progress: console.Progress, totals: Totals):
        if progress.done > progress.done_before:
            images = totals.count * self.accelerator.num_processes
            self.images_per_second = images / progress.done * progress.steps_per_second
            self.train_images += self.images_per_second * progress.seconds
            self.train_seconds += progress.seconds
        if not totals.count:
            raise stopping.Fault(f'every update of epoch {epoch} had a non-finite loss or gradient', stopping.NONFINITE)
        if hasattr(self.optimizer.optimizer, 'sync_lookahead'):
            self.optimizer.optimizer.sync_lookahead()
        self.train_metrics = totals.compute(reduce=True)
        args, processes = self.args, self.accelerator.num_processes
        if processes > 1 and args.dist_bn and not args.sync_bn:  # with --sync-bn statistics are the same already
            of_ema = self.task.has_ema() and not args.model_ema_force_cpu and self._evaluates(epoch)
            for ema in (False, True)[:1 + of_ema]:
                utils.distribute_bn(self.task.get_trainable_module(ema=ema), processes, args.dist_bn == 'reduce')

    def _show(self, progress: console.Progress, update: Update):
        """Show how training goes, and save a picture of the batch, now and then."""
        totals = update.totals
        due = progress.done == progress.total or (progress.done - 1) % self.args.log_interval == 0
        if not (progress.main and due and totals.count):
            return
        images = totals.count * self.accelerator.num_processes / progress.done
        left = self.updates_per_epoch * (self.num_epochs - update.place['epoch']) - progress.done
        progress.show(console.training_text(
            totals.compute(),
            lr=mean_lr(self.optimizer.param_groups),
            images_per_second=images * progress.steps_per_second,
            seconds_left=left / progress.steps_per_second,
        ))
        if self.args.save_images and self.output_dir:
            path = os.path.join(self.output_dir, f'train-batch-{update.place["batch"] + update.size - 1}.jpg')
            self.pictures.attempt(
                'A picture', torchvision.utils.save_image, update.images, path, padding=0, normalize=True)

    def leave_out(self, update: Update) -> None:
        """Name the numbers of an update that are not finite, then go on or, with --on-nonfinite stop, save and stop.

        Raises:
            Fault: The run stops; saved is the state before the update.
        """
        place = update.place
        text = self.guard.report([output for output, *_ in update.parts])
        text = f'epoch {place["epoch"]}, update {place["done"] + 1} of {self.updates_per_epoch}: {text}'
        if self.args.on_nonfinite == 'stop' or not self.guard.skip():
            self._stop(f'{text}; --on-nonfinite skip leaves such updates out', stopping.NONFINITE, update.mark,
                       totals=update.totals, **place)
        _logger.warning(f'{text}; left out.')

    def _evaluates(self, epoch: int) -> bool:
        done = epoch + 1
        return not done % self.args.val_interval or done == self.num_epochs or done in (self.args.save_epochs or ())

    def end_epoch(self, epoch: int, on_best: Optional[Callable[[], None]] = None) -> None:
        """Evaluate, record, save and step the schedule, where it is time to.

        Args:
            epoch: The one just trained.
            on_best: Called on the main process when a checkpoint is the best so far.
        """
        args = self.args
        if not self._evaluates(epoch):
            if self.scheduler is not None:
                self.scheduler.step(epoch + 1, metric=None)
            return
        eval_metrics = {} if self.loader_eval is None else self._evaluate_all(epoch)
        metric = (eval_metrics or self.train_metrics)[self.eval_metric]
        _logger.info(console.epoch_text(
            f'Epoch {epoch}', self.names, eval_metrics, train_loss=self.train_metrics['loss']))
        if self.saver is not None:
            skipped = self.guard.skipped_since if args.on_nonfinite == 'skip' else None
            lr = mean_lr(self.optimizer.param_groups)
            self.records.write(epoch, self.train_metrics, eval_metrics, lr, skipped, self.images_per_second)
        self.guard.skipped_since = 0
        best_epoch = self._save(self.state.mark(len(self.fetches)), epoch=epoch, metric=metric, over=True)
        if on_best is not None and best_epoch == epoch:
            on_best()
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)

    def _evaluate_all(self, epoch: int) -> Dict[str, float]:
        """Evaluate the weights, and their average unless it is kept on the CPU; return the metrics of the last."""
        trained = dict(mark=self.state.mark(len(self.fetches)), epoch=epoch, metrics=self.train_metrics)
        metrics = self.evaluate(trained)
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            _logger.info(console.epoch_text(f'Epoch {epoch} without EMA', self.names, metrics))
            self.without_ema[epoch] = metrics
            metrics = self.evaluate(trained, ema=True)
            self.facts['metric_by_ema'] = {
                ema: found[METRICS[self.args.task][0]] for ema, found in enumerate((self.without_ema[epoch], metrics))}
        return metrics

    @torch.inference_mode()
    def evaluate(self, trained: Dict[str, Any], ema: bool = False) -> Dict[str, float]:
        """Evaluate the model or its average by HeadMetrics; a signal ends the run with the state ``trained`` saved."""
        args, accelerator = self.args, self.accelerator
        if len(self.names) > 1:
            net = utils.unwrap_model(self.task.get_trainable_module(ema=ema))
            net.eval()
            forward = net.exits
        else:
            forward = self.task.get_eval_model(ema=True) if ema else self.eval_model
            forward.eval()
        several = accelerator.num_processes > 1
        metrics = HeadMetrics(
            self.task, self.names, accelerator.device, evaluation_sample_limit(self.loader_eval), args.tta)
        # Of a stream, processes may have different numbers of batches.
        uneven = several and isinstance(self.loader_eval.dataset, IterableDataset)
        # The bar does not get the loader to iterate: it would start it a second time, which draws a random number.
        title = 'Evaluation of the average' if ema else 'Evaluation'
        with console.Progress(accelerator, title, len(self.loader_eval)) as progress:
            for i, (images, target) in enumerate(self.loader_eval):
                if not uneven and self.signals.stop(i):
                    self._stop_as_told(**trained, done=self.updates_per_epoch)
                images, target = self.to_device(images, target)
                with accelerator.autocast():
                    logits = forward(images)
                metrics.update(logits, target)
                progress.step()
        found, exits = metrics.compute(distributed=several)
        if exits is not None:
            self.facts['exits'] = exits
        return found

    def to_device(self, images, target):
        """Bring a batch to the device, dtype and memory format of the model."""
        if not self.args.prefetcher:
            images = images.to(self.accelerator.device, model_dtype(self.args))
            target = target.to(self.accelerator.device)
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, target

    def _save(self, mark, totals=None, **place):
        """Save a recovery checkpoint, or that of an epoch that is over; return the best epoch or None.

        All processes have to call it, with arguments as of :meth:`RunState.collect`.
        """
        run = self.state.collect(mark, totals, **place)
        if self.shards:
            self.shards.gather()
        if self.saver is None:
            return None
        self.facts['train_seconds'] = self.earlier_seconds + time.monotonic() - self.began
        self.saver.run = run
        if run['over']:
            return self.saver.save_checkpoint(run['epoch'], metric=run['metric'])[1]
        return self.saver.save_recovery(run['epoch'], batch_idx=max(0, run['done'] - 1))

    def _stop(self, reason, code, mark, **place):
        """Save, and end the run."""
        self._save(mark, **place)
        if self.saver is not None and self.saver.failure:
            raise stopping.Fault(f'{reason}; not saved: {self.saver.failure}', stopping.UNSAVED)
        raise stopping.Fault(f'{reason}; saved, and the same command with --resume auto goes on from there', code)

    def _stop_as_told(self, mark, epoch, done, **place):
        reason = f'told to stop, in epoch {epoch} after update {done} of {self.updates_per_epoch}'
        self._stop(reason, stopping.STOPPED, mark, epoch=epoch, done=done, **place)

    def outcome(self) -> str:
        """Describe the outcome: every head in the best and the last epoch, the cost, the folder."""
        speed = self.train_images / self.train_seconds if self.train_seconds else 0.
        accelerator = self.accelerator
        return '\n'.join([
            console.outcome_table(self.records.summary.rows, self.names, self.saver.best_epoch, self.without_ema),
            console.cost_text(self.facts['train_seconds'], speed, accelerator.device, accelerator.num_processes),
            f'Everything of the run is in {self.output_dir}',
        ])
