"""The Accelerate loop: one epoch, one evaluation, checkpoints."""
import argparse
import logging
import os
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import datetime

import torch
import torchvision.utils
from timm import utils
from timm.models import load_checkpoint, safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import evaluation_sample_limit, load_task_ema_checkpoint
from torch.utils.data import IterableDataset

from ..errors import naming
from ..method.model import prune
from . import build, checkpoint, distributed, outcome, sharding, stopping
from .console import Bar, Progress, Speed, Totals
from .data import model_dtype
from .guard import Guard
from .metrics import HeadMetrics
from .records import Records, epoch_line
from .resume import Fetches, pack, prepare_evaluation, random_state, set_random_state
from .run_state import RunState

_logger = logging.getLogger(__name__)


class _Stop(Exception):
    """Leaves an evaluation."""


class Trainer:
    """Trains a task: epochs, evaluations, checkpoints, summary.csv and progress, in timm's order and with its digits.

    Args:
        args: The command line, completed by :func:`distributed.create_accelerator`.
        accelerator: From :func:`distributed.create_accelerator`.
        task: A timm TrainingTask whose module is on the accelerator's device.
        optimizer: The module's optimizer.
        loaders: What ``create_loaders`` returns.
        names: Names of the classifiers, the backbone's first; more than one with --dks.
        resume: Checkpoint to continue from, or ''.
    """

    def __init__(self, args, accelerator, task, optimizer, loaders, names=('backbone',), resume=''):
        self.args = args
        self.accelerator = accelerator
        self.task = task
        self.names = names
        self.loader_train, self.loader_eval, self.mixup_fn, self.batch_size_reference = loaders
        self.eval_metric = args.eval_metric if self.loader_eval is not None else 'loss'

        self.scaler = accelerator.scaler
        if self.scaler is not None:
            self.scaler.state_dict_key = utils.NativeScaler.state_dict_key  # what timm's saver asks for
        resume_epoch, self.earlier_seconds, run = None, 0., None
        if resume:
            resume_epoch, self.earlier_seconds, run = checkpoint.load(resume, args, task, optimizer, self.scaler)
        if args.model_ema:
            # Before DDP wraps the module, as the average has to be of the plain one.
            task.setup_ema(
                decay=args.model_ema_decay,
                use_warmup=args.model_ema_warmup,
                device='cpu' if args.model_ema_force_cpu else None,
            )
            if resume:
                load_task_ema_checkpoint(task, resume)
        if args.torchcompile:
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            if task.has_ema():
                task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
        self.without_ema = {}  # evaluations by epoch, where the average's are the ones that count
        self.eval_model = task.get_eval_model()
        distributed.share(facts={
            '--resume': f'{resume} up to epoch {resume_epoch}' if resume else 'no checkpoint',
            '--data-dir': f'{len(self.loader_train)} batches',
        })
        self.shards = None
        self.engine = sharding.started(accelerator)
        if self.engine:
            self.shards = sharding.Shards(self.engine, accelerator, task, optimizer)
            self.optimizer = self.shards.optimizer
        else:
            task.trainable_module, self.optimizer = accelerator.prepare(task.get_trainable_module(), optimizer)

        batches = len(self.loader_train)
        self.updates_per_epoch = -(-batches // args.grad_accum_steps)
        with naming(f'--sched {args.sched}', AssertionError, ValueError):  # timm's checks of its arguments
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer,
                **scheduler_kwargs(args, decreasing_metric=self.eval_metric == 'loss'),
                updates_per_epoch=self.updates_per_epoch,
            )
        self._go_on(run, resume, resume_epoch)

    def _go_on(self, run, path, resume_epoch):
        """Start where a checkpoint says: exactly, or where it does not say so much at the beginning of an epoch."""
        args = self.args
        prefetched = hasattr(self.loader_train, 'loader')
        fetches = Fetches(
            self.loader_train.loader if prefetched else self.loader_train,
            self.accelerator.device,
            memory=args.grad_accum_steps + prefetched,
        )
        if prefetched:
            self.loader_train.loader = fetches
        else:
            self.loader_train = fetches
        prepare_evaluation(self.loader_eval)
        self.fetches = fetches
        self.signals = stopping.Signals(self.accelerator, args.grad_accum_steps)
        self.peers = stopping.Peers(self.accelerator)
        self.guard = Guard(args, self.accelerator, self.task, self.optimizer, self.names)
        self.state = RunState(self)

        if args.start_epoch is not None:
            run = None
        self.run = self.state.restore(run, path)
        begun = self.run is not None and (self.run['over'] or self.run['epoch'] + self.run['done'] > 0)
        self.unsettled = args.distributed and not self.engine and begun
        self.start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
        if run is not None and not run['over']:
            self.start_epoch = run['epoch']
        if self.scheduler is None or self.start_epoch == 0:
            return
        if self.run is None and args.sched_on_updates:
            self.scheduler.step_update(self.start_epoch * self.updates_per_epoch)
        elif self.run is None or self.run['over']:
            self.scheduler.step(self.start_epoch, self.run and self.run['metric'])

    @property
    def finished(self) -> bool:
        """Whether the checkpoint resumed from is the last one of its run."""
        return self.start_epoch >= self.num_epochs

    def open_output(self, args_text: str, input_size, resume: str):
        """Create the run's folder with its args.yaml, checkpoint saver and trackers; the first thing that is written.

        Args:
            args_text: What goes into args.yaml.
            input_size: Named in the folder's name where --experiment does not name it.
            resume: Checkpoint the run continues from, or ''; with --resume auto the run stays in its folder.
        """
        args = self.args
        self.input_size = input_size
        self.output_dir = self.saver = self.records = None
        if not self.accelerator.is_main_process:
            return
        root = args.output or './output/train'
        name = args.experiment or '-'.join(
            [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(input_size[-1])])
        with naming(f'--output {root}', OSError):
            if args.resume == 'auto' and resume:
                self.output_dir = os.path.dirname(resume)
            else:
                self.output_dir = utils.get_outdir(root, name, inc=not args.experiment)
            checkpoint.write_text(os.path.join(self.output_dir, 'args.yaml'), args_text)
        self.saver = checkpoint.Saver(
            model=self.task.get_trainable_module(),
            optimizer=self.shards or self.optimizer,
            args=args,
            amp_scaler=self.scaler,
            checkpoint_dir=self.output_dir,
            recovery_dir=self.output_dir,
            decreasing=self.eval_metric == 'loss',
            max_history=args.checkpoint_hist,
            task=self.shards or self.task,
        )
        logging.getLogger(utils.checkpoint_saver.__name__).setLevel(logging.WARNING)  # it lists all files every epoch
        self.records = Records(args, self.accelerator, self.names, self.output_dir, name, self.start_epoch)
        self.pictures = checkpoint.Output()
        if resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(self.output_dir):
            self.saver.resume(resume)

    def fit(self, on_best=None):
        """Train from the start epoch to the last one.

        Args:
            on_best: Called on the main process when a checkpoint is the best so far.

        Raises:
            Fault: The run had to stop before its end, or could not be saved.
        """
        self.began = time.monotonic()
        self.speed = Speed()
        self._warn_of_a_long_average()
        try:
            with self.signals, self.peers:
                for epoch in range(self.start_epoch, self.num_epochs):
                    self._fit_epoch(epoch, on_best)
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

    def _warn_of_a_long_average(self):
        args, updates = self.args, self.num_epochs * self.updates_per_epoch
        if not args.model_ema or args.model_ema_warmup or not self.accelerator.is_main_process:
            return
        memory = 1 / max(1 - args.model_ema_decay, 1e-9)
        if updates < memory:
            _logger.warning(
                f'--model-ema-decay {args.model_ema_decay}: the average is over {memory:,.0f} updates, but the run has '
                f'{updates:,}, so the initial weights stay in it; --model-ema-warmup has it begin short')

    def _fit_epoch(self, epoch, on_best):
        """Train, evaluate and save, or what of it a checkpoint has left to do."""
        args, task = self.args, self.task
        evaluated = not (epoch + 1) % args.val_interval or epoch + 1 == self.num_epochs
        ema = task.has_ema() and not args.model_ema_force_cpu
        run, self.run = self.run, None
        self.speed.last = 0.
        train_metrics = run['metrics'] if run and not run['over'] else None
        if train_metrics is None:
            train_metrics = self.train_one_epoch(epoch, run if run and not run['over'] else None)
            self._distribute_bn(task.get_trainable_module())
            if evaluated and ema and self.loader_eval is not None:
                self._distribute_bn(task.get_trainable_module(ema=True))
        if not evaluated:
            if self.scheduler is not None:
                self.scheduler.step(epoch + 1, metric=None)
            return

        eval_metrics = {}
        if self.loader_eval is not None:
            trained = self.state.mark(len(self.fetches))
            try:
                eval_metrics = self.evaluate()
                if ema:
                    _logger.info(epoch_line(f'Epoch {epoch} without EMA', self.names, eval_metrics))
                    self.without_ema[epoch] = eval_metrics
                    eval_metrics = self.evaluate(ema=True)
                    args.top1_by_ema = {  # for the export
                        False: self.without_ema[epoch]['top1'], True: eval_metrics['top1']}
            except _Stop:
                self._stop_as_told(trained, epoch=epoch, metrics=train_metrics, done=self.updates_per_epoch)
        metric = (eval_metrics or train_metrics)[self.eval_metric]
        _logger.info(epoch_line(f'Epoch {epoch}', self.names, eval_metrics, train_loss=train_metrics['loss']))
        if self.saver is not None:
            skipped = self.guard.skipped_since if args.on_nonfinite == 'skip' else None
            groups = self.optimizer.param_groups
            self.records.write(epoch, train_metrics, eval_metrics, groups, skipped, self.speed.last)
        self.guard.skipped_since = 0
        best_epoch = self._save(self.state.mark(len(self.fetches)), epoch=epoch, metric=metric, over=True)
        if on_best is not None and best_epoch == epoch:
            on_best()
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)

    def _save(self, mark, totals=None, **place):
        """Save a recovery checkpoint, or where the epoch is over its checkpoint. All processes have to call it.

        Args:
            mark: Where each process stands.
            totals: Of the epoch's training, while it goes on.
            **place: See :meth:`RunState.collect`.

        Returns:
            The best epoch, or None.
        """
        run = self.state.collect(mark, totals, **place)
        if self.shards:
            self.shards.gather()
        if self.saver is None:
            return None
        self.args.train_seconds = self.earlier_seconds + time.monotonic() - self.began  # for the card of an export
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

    def train_one_epoch(self, epoch: int, run=None) -> OrderedDict:
        """Train one epoch, or the rest of one.

        Args:
            epoch: Its number.
            run: The state in which a run was saved within the epoch.

        Returns:
            ``loss`` as timm averages it; with --dks also the mean losses and training accuracies of the classifiers.
        """
        args, accelerator, task, optimizer, loader = (
            self.args, self.accelerator, self.task, self.optimizer, self.loader_train)
        self._set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            if args.prefetcher and getattr(loader, 'mixup_enabled', False):
                loader.mixup_enabled = False
            elif self.mixup_fn is not None:
                self.mixup_fn.mixup_enabled = False

        module = task.get_trainable_module()
        module.train()
        batches = len(loader)
        accum = args.grad_accum_steps
        last_accum = batches % accum
        deepspeed = self.engine == sharding.DEEPSPEED  # it divides, clips and steps within backward()
        begin, done, num_updates = 0, 0, epoch * self.updates_per_epoch
        totals = Totals(accelerator, self.names)
        if run is not None:
            begin, done, num_updates = run['batch'], run['done'], run['updates']
            totals.load_state_dict(run['processes'][accelerator.process_index]['totals'])
            if last_accum and begin > batches - last_accum and not deepspeed:
                accum = last_accum
        group = []  # the batches of the next update: (output, loss, target, size)
        optimizer.zero_grad()
        with Progress(accelerator, epoch, self.num_epochs, self.updates_per_epoch, args.log_interval, done) as progress:
            for batch_idx, (x, y) in enumerate(loader if begin < batches else (), begin):
                if not group:
                    before = self.state.mark(batch_idx, now=False)
                    self.guard.keep()
                # timm's rule, to the letter: the last group, where shorter, is divided by its own length, and from its
                # second batch on an update also falls due where that length divides the number of batches seen.
                last_batch = batch_idx == batches - 1
                need_update = last_batch or (batch_idx + 1) % accum == 0
                if last_accum and batch_idx >= batches - last_accum and not deepspeed:
                    accum = last_accum
                x, y = self._to_device(x, y)
                if self.mixup_fn is not None:
                    x, y = self.mixup_fn(x, y)
                batch_size = (x['patches'] if args.naflex_loader else x).shape[0]

                if len(self.names) > 1:
                    task.begin_update(epoch, num_updates)
                if self.unsettled:
                    self._settle(x, y)
                with nullcontext() if need_update or deepspeed else accelerator.no_sync(module):
                    with sharding.autocast(accelerator):
                        out = task(x, y)
                    divisor = 1 if deepspeed else accum
                    loss = out['loss'] / divisor if divisor > 1 else out['loss']
                    scaled_loss = self._scale_loss(loss, batch_size)
                    group.append((out, loss * divisor if divisor > 1 else loss, y, batch_size))
                    finite = self.guard.backward(scaled_loss, need_update)
                if finite and not need_update:
                    continue

                finite = finite and self.guard.clip([loss for _, loss, *_ in group])
                if finite:
                    for batch in group:
                        totals.update(*batch)
                    optimizer.step()
                    optimizer.zero_grad()
                    self.guard.skipped_in_a_row = 0
                else:
                    self._leave_out(group, before, batch_idx + 1 - len(group), progress.done, epoch=epoch,
                                    updates=num_updates, totals=totals)
                group.clear()
                num_updates += 1
                if finite:
                    task.update_ema(step=num_updates)
                if args.synchronize_step and accelerator.device.type != 'cpu':
                    torch.accelerator.synchronize()
                if progress.step(last_batch) and totals.count:
                    progress.show(totals.compute(), optimizer.param_groups, totals.count * args.world_size)
                    if args.save_images and self.output_dir:
                        path = os.path.join(self.output_dir, f'train-batch-{batch_idx}.jpg')
                        self.pictures.attempt(
                            'A picture', torchvision.utils.save_image, x, path, padding=0, normalize=True)
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=num_updates)
                place = dict(epoch=epoch, batch=batch_idx + 1, done=progress.done, updates=num_updates, totals=totals)
                if self.signals.stop(num_updates):
                    self._stop_as_told(self.state.mark(batch_idx + 1), **place)
                if args.recovery_interval and progress.done % args.recovery_interval == 0:
                    self._save(self.state.mark(batch_idx + 1), **place)

        self.speed.add(progress, totals.count * args.world_size)
        if not totals.count:
            raise stopping.Fault(f'every update of epoch {epoch} had a non-finite loss or gradient', stopping.NONFINITE)
        raw_optimizer = getattr(optimizer, 'optimizer', optimizer)
        if hasattr(raw_optimizer, 'sync_lookahead'):
            raw_optimizer.sync_lookahead()
        return totals.compute(reduce=True)

    def _settle(self, x, y):
        """Let DDP lay gradients out as after the first step of a run: sums over processes depend on the order."""
        self.unsettled = False
        random = pack(random_state(self.accelerator.device))
        with sharding.autocast(self.accelerator):
            loss = self.task(x, y)['loss']
        self.accelerator.backward(loss)
        self.optimizer.zero_grad()
        self.guard.undo()
        set_random_state(random, self.accelerator.device)

    def _leave_out(self, group, before, batch, done, **place):
        """Say which update was not finite; then leave it out, or save what was before it and stop."""
        self.guard.undo()
        text, lines = self.guard.report([out for out, *_ in group], batch, self.fetches)
        text = f'epoch {place["epoch"]}, update {done + 1} of {self.updates_per_epoch}: {text}'
        if self.saver is not None and lines:
            path = os.path.join(self.output_dir, f'nonfinite-{place["epoch"]}-{done}.txt')
            self.saver.attempt(path, checkpoint.write_text, path, '\n'.join([*lines, '']))
            text += f' (all in {path})'
        if self.args.on_nonfinite == 'stop' or not self.guard.skip():
            self._stop(f'{text}; --on-nonfinite skip leaves such updates out', stopping.NONFINITE, before, batch=batch,
                       done=done, **place)
        _logger.warning(f'{text}; left out.')

    @torch.inference_mode()
    def evaluate(self, ema: bool = False) -> OrderedDict:
        """Evaluate the model or its average.

        Returns:
            See :meth:`HeadMetrics.compute`. Sets ``exits`` in args, for the checkpoint.
        """
        args, accelerator = self.args, self.accelerator
        if len(self.names) > 1:
            net = utils.unwrap_model(self.task.get_trainable_module(ema=ema))
            net.eval()
            forward = net.exits
        else:
            model = self.task.get_eval_model(ema=True) if ema else self.eval_model
            model.eval()
            forward = model
        limit = evaluation_sample_limit(self.loader_eval)
        metrics = HeadMetrics(self.task, self.names, accelerator.device, limit, args.tta)
        # Of a stream, processes may have different numbers of batches.
        uneven = args.distributed and isinstance(self.loader_eval.dataset, IterableDataset)
        # The bar does not get the loader to iterate: it would start it a second time, which draws a random number.
        text = f'Evaluation{" of the average" if ema else ""}, {{remaining}} left'
        with Bar(accelerator, text, len(self.loader_eval)) as bar:
            for i, (x, y) in enumerate(self.loader_eval):
                if not uneven and self.signals.stop(i):
                    raise _Stop
                x, y = self._to_device(x, y)
                with sharding.autocast(accelerator):
                    logits = forward(x)
                metrics.update(logits, y)
                bar.update()
        found, exits = metrics.compute(distributed=args.distributed)
        if exits is not None:
            args.exits = exits
        return found

    def _to_device(self, x, y):
        if not self.args.prefetcher:
            x, y = x.to(self.accelerator.device, model_dtype(self.args)), y.to(self.accelerator.device)
        if self.args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y

    def _scale_loss(self, loss, batch_size):
        """Scale the loss of a batch whose size varies, by the size that the learning rate is for."""
        args = self.args
        if not (args.naflex_loader or args.train_img_sizes):
            return loss
        mode = args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale
        scale = {'none': 0., 'sqrt': 0.5, 'linear': 1.}[mode]
        loss = loss * (batch_size / self.batch_size_reference) ** scale
        if args.naflex_loader and args.distributed:
            # Processes hold batches of different sizes: DDP's mean over them has to become one over samples.
            sizes = torch.tensor(batch_size, device=self.accelerator.device, dtype=torch.float32)
            loss = loss * (args.world_size * batch_size / self.accelerator.reduce(sizes))
        return loss

    def _set_epoch(self, epoch):
        loader = self.loader_train
        sampler = loader.batch_sampler if hasattr(loader.batch_sampler, 'set_epoch') else loader.sampler
        for part in (loader.dataset, sampler):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)

    def _distribute_bn(self, module):
        if self.args.distributed and self.args.dist_bn:
            utils.distribute_bn(module, self.args.world_size, self.args.dist_bn == 'reduce')

    def result(self) -> str:
        """What came out: every head in the best and the last epoch, and what that took."""
        args = self.args
        took = outcome.cost_line(args.train_seconds, self.speed.average, self.accelerator.device, args.world_size)
        table = outcome.outcome_table(
            self.records.summary.rows, self.names, self.saver.best_epoch, self.without_ema)
        return f'{table}\n{took}\nEverything of the run is in {self.output_dir}'

    def load_best(self, model):
        """Load the best weights into the model's backbone, those of the average if that is what was evaluated.

        Returns:
            The model; a new one where the processes, of which only the main one gets here, hold parts of the given one.
        """
        if self.engine == sharding.FSDP2:
            elsewhere = dict(pretrained=False, pretrained_path=None, initial_checkpoint='')
            args = argparse.Namespace(**{**vars(self.args), **elsewhere})
            cpu = argparse.Namespace(device='cpu', num_processes=self.accelerator.num_processes)
            model = build.place_model(args, build.create_model(args), self.input_size, cpu)
        else:
            self.accelerator.unwrap_model(self.task.get_trainable_module(), keep_fp32_wrapper=False)
        load_checkpoint(
            prune(model),
            os.path.join(self.output_dir, 'model_best.pth.tar'),
            use_ema=self.task.has_ema() and not self.args.model_ema_force_cpu,
        )
        return model


