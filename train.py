#!/usr/bin/env python3
"""Train a timm model as timm's own script does, and with --dks by Deeply-supervised Knowledge Synergy.

    accelerate launch train.py --config recipes/quickstart.yaml
    accelerate launch train.py --model resnet18 --dks --data-dir DIR --num-classes 100 --export-dir out/resnet18

Where dks_timm is installed, `dks-timm train` and `accelerate launch -m dks_timm.train` are this program, too.
This file is made to be copied: change `train_update` for a training step of your own.
"""
import os
import sys

from dks_timm import errors
from dks_timm.training import config


def train_update(trainer, update):
    """Train on the batches of one update: forward, loss, backward, clip, step.

    A step of your own iterates over the update once and to its end, calls `update.scale_loss` once for each batch and
    before backward, `update.clip_gradients` once after the last, and steps only where that returns True. With --dks
    the output keeps 'ce' and 'synergy' of the task, which summary.csv is made of.

    Args:
        trainer: The run (dks_timm.training.loop.Trainer).
        update: Its batches (dks_timm.training.update.Update), --grad-accum-steps of them.
    """
    accelerator, task, optimizer = trainer.accelerator, trainer.task, trainer.optimizer
    for images, target in update:  # on the device, augmented and mixed
        with update.no_sync():
            with accelerator.autocast():
                output = task(images, target)  # 'loss' and 'output'; with --dks also 'logits'
            loss = update.scale_loss(output)
            accelerator.backward(loss, create_graph=trainer.second_order)  # as for --opt adahessian
    if update.clip_gradients():  # False where losses or gradients are not finite
        optimizer.step()
    optimizer.zero_grad()


def create_run(args, given, args_text, argv):
    """Create the run that the flags describe, in the order of timm's script and with its random numbers.

    Returns:
        The Trainer (dks_timm.training.loop.Trainer), or None where nothing is left to train.
    """
    from timm.layers import set_fast_norm

    from dks_timm.method.cost import exit_flops
    from dks_timm.publishing import card, export, publish
    from dks_timm.training import build, checkpoint, data, distributed, loop

    with distributed.refuse_together():
        build.check_names(args)
        resume = checkpoint.find_resume(args, args_text)
        if args.export_dir and not resume:
            with errors.naming(f'--export-dir {args.export_dir}'):
                export.check_export_dir(args.export_dir, args.overwrite)
        accelerator = distributed.create_accelerator(args, given)
        dataset_train, dataset_eval = data.create_datasets(args)
        if args.fast_norm:
            set_fast_norm()
        model = build.create_model(args)
        if args.num_classes is None:
            data.check_num_classes(model.num_classes, dataset_train)
        data_config = data.resolve_preprocessing(args, model, verbose=accelerator.is_main_process)
        facts = {}
        if args.dks and accelerator.is_main_process:
            facts['exit_flops'] = exit_flops(model, data_config['input_size'])
        model = build.place_model(args, model, data_config['input_size'], accelerator)
        loaders = data.create_loaders(args, dataset_train, dataset_eval, data_config, model, accelerator)
        class_stats = data.class_stats(args, dataset_train, model.num_classes)
        task = build.create_task(args, model, accelerator, class_stats)
        lr = build.learning_rate(args, loaders[-1], accelerator.num_processes)
        optimizer = build.create_optimizer(args, task.get_trainable_module(), lr)
        names = ['backbone', *(f'stage{stage}' for stage in model.stages)] if args.dks else ['backbone']
        trainer = loop.Trainer(args, accelerator, task, optimizer, loaders, names, resume, facts)
        if not trainer.epochs():
            at_end = f'{resume or "--start-epoch"} is at the end of {trainer.num_epochs} epochs'
            accelerator.print(f'Nothing left to train: {at_end}.')
            return None
        if args.export_dir and resume:
            with errors.naming(f'--export-dir {args.export_dir}'):
                export.check_export_dir(args.export_dir, args.overwrite)
        label_names = data.label_names(dataset_train)
        if accelerator.is_main_process:
            publish.check_publishing(args, model, label_names)
        trainer.open_output(args_text, data_config['input_size'], resume)
        facts.update(
            lr=lr, num_classes=model.num_classes, device=str(accelerator.device), world_size=accelerator.num_processes)
        command = [*(['dks-timm', 'train'] if __package__ else [os.path.basename(__file__)]), *argv]
        facts.update(card.provenance({**vars(args), **facts}, command, model, label_names))
    return trainer


@errors.exit_out_of_memory()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with errors.exit_on_bad_input():
        args, given, args_text = config.parse_args(argv)
        if args.push_to_hub and int(os.environ.get('RANK', 0)) == 0:
            from dks_timm.publishing import push
            with errors.naming(f'--push-to-hub {args.push_to_hub}'):
                push.check_request(args.push_to_hub, args.hub_revision)
        trainer = create_run(args, given, args_text, argv)  # torch is imported here, not for --help
    if trainer is None:
        return

    from dks_timm.publishing import publish
    from dks_timm.training import stopping

    push_best = args.push_every_best and trainer.accelerator.is_main_process
    pushing = publish.BackgroundPush(args, trainer.output_dir) if push_best else None
    with stopping.exit_on_fault(trainer.accelerator), trainer.running():
        for epoch in trainer.epochs():
            for update in trainer.updates(epoch):
                train_update(trainer, update)
            trainer.end_epoch(epoch, on_best=pushing)  # evaluate, record, save, step the schedule
    if not trainer.accelerator.is_main_process:
        return
    print(trainer.outcome())
    if pushing:
        pushing.close()
    if args.export_dir or args.push_to_hub:
        publish.publish(args, trainer)
    print(publish.next_steps(args, trainer.output_dir))


if __name__ == '__main__':
    main()
