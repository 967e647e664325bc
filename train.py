#!/usr/bin/env python3
"""Train a timm model as timm's own script does, and with --dks by Deeply-supervised Knowledge Synergy.

    accelerate launch train.py --config recipes/quickstart.yaml
    accelerate launch train.py --model resnet18 --dks --data-dir DIR --num-classes 100 --export-dir out/resnet18
"""
import sys

from dks_timm import errors
from dks_timm.publishing import push
from dks_timm.training import config


@errors.exit_out_of_memory()
def main(argv=None):
    # Parse. What needs torch is imported after it, so that --help and a mistyped flag answer at once.
    with errors.exit_on_bad_input():
        args, given, args_text = config.parse_args(argv)
        if args.push_to_hub:
            with errors.naming(f'--push-to-hub {args.push_to_hub}'):
                push.check_request(args.push_to_hub, args.hub_revision)
        from timm.data import resolve_data_config
        from timm.layers import set_fast_norm

        from dks_timm.publishing import card, export
        from dks_timm.training import build, checkpoint, data, distributed, loop, stopping

        with distributed.refuse_together():
            # Build, in timm's order and without a random number that timm's script does not draw.
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
                args.num_classes = model.num_classes
                data.check_num_classes(args.num_classes, dataset_train, dataset_eval)
            data_config = resolve_data_config(vars(args), model=model, verbose=accelerator.is_main_process)
            model = build.place_model(args, model, data_config['input_size'], accelerator.device)
            loaders = data.create_loaders(args, dataset_train, dataset_eval, data_config, model, accelerator)
            task = build.create_task(args, model, accelerator.device)
            build.set_learning_rate(args, batch_size=loaders[-1])
            optimizer = build.create_optimizer(args, task.get_trainable_module())
            names = ['backbone', *(f'stage{stage}' for stage in model.stages)] if args.dks else ['backbone']
            trainer = loop.Trainer(args, accelerator, task, optimizer, loaders, names, resume)
            if trainer.finished:
                at_end = f'{resume or "--start-epoch"} is at the end of {trainer.num_epochs} epochs'
                accelerator.print(f'Nothing left to train: {at_end}.')
                return
            if args.export_dir and resume:
                with errors.naming(f'--export-dir {args.export_dir}'):
                    export.check_export_dir(args.export_dir, args.overwrite)
            label_names = data.label_names(dataset_train)
            if accelerator.is_main_process:
                export.check_publishing(args, args_text, model, label_names)
            trainer.open_output(args_text, data_config['input_size'], resume)
            vars(args).update(card.provenance(vars(args), sys.argv[1:] if argv is None else argv, model, label_names))

    # Fit.
    on_best = export.push_every_best(args, trainer.output_dir)
    try:
        trainer.fit(on_best)
    except errors.DataError as e:
        sys.exit(f'train.py: error: {e}')
    except stopping.Fault as e:
        if accelerator.is_main_process:
            print(f'train.py: {e}', file=sys.stderr)
        sys.exit(e.code)
    if not accelerator.is_main_process:
        return
    print(trainer.result())

    # Publish the best weights of the backbone: a folder for plain timm, and a repository on the Hub.
    if on_best:
        on_best.close()
    if args.export_dir or args.push_to_hub:
        export.publish(args, trainer, model, data_config)
    print(export.next_steps(args, trainer.output_dir))


if __name__ == '__main__':
    main()
