"""Console script ``dks-timm``: export, push, inspect, report."""
import argparse
import json
import sys
from typing import Optional, Sequence

from .errors import ExportError, InputError, PushError, flag, naming, one_line
from .training.flags import Parser, add_branch_flags, add_card_flags, add_hub_flags, add_input_flags


def _create_parser() -> Parser:
    parser = Parser(prog='dks-timm', description='Export, publish and look into models trained with DKS.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)

    export = commands.add_parser(
        'export',
        help='turn a training checkpoint into a folder that timm.create_model loads',
        description='Write the backbone of a training checkpoint as config.json, model.safetensors and README.md, '
                    'and check that timm alone loads it with the same logits.',
    )
    export.add_argument('checkpoint', metavar='CKPT', help='a checkpoint of a run, such as model_best.pth.tar')
    export.add_argument('out_dir', metavar='DIR', help='folder to write to')
    export.add_argument('--no-ema', action='store_true', help='take the trained weights where there are averaged ones')
    export.add_argument('--overwrite', action='store_true',
                        help='replace a model that the folder or the repository already holds')
    add_card_flags(export.add_argument)
    export.add_argument('--push-to-hub', metavar='OWNER/NAME', help='push the folder to this repository, too')
    add_hub_flags(export.add_argument)
    export.set_defaults(run=_export)

    push = commands.add_parser(
        'push',
        help='push an exported folder to the Hugging Face Hub',
        description='Push an exported folder to the Hugging Face Hub in one commit; nothing happens where nothing has '
                    'changed.',
    )
    push.add_argument('folder', metavar='DIR', help='folder of an exported model')
    push.add_argument('push_to_hub', metavar='OWNER/NAME', help='repository, created if need be')
    push.add_argument('--overwrite', action='store_true', help='replace another model that the repository holds')
    add_hub_flags(push.add_argument)
    push.set_defaults(run=_push)

    inspect = commands.add_parser(
        'inspect',
        help='show the stages of a model, the branches DKS attaches, and what they cost',
        description='Attach branches to a model without allocating weights, and show its stages, what was attached '
                    'and what a training step costs over the plain model.',
    )
    inspect.add_argument('model', metavar='MODEL', help='timm model name, also hf-hub:owner/name and local-dir:path')
    add_input_flags(inspect.add_argument)
    add_branch_flags(inspect.add_argument)
    inspect.add_argument('--json', action='store_true', help='print it for machines')
    inspect.set_defaults(run=_inspect)

    report = commands.add_parser(
        'report',
        help='write a page with pictures about a run, or about several side by side',
        description='Write an HTML page about runs of train.py: accuracy and loss of every head, who teaches whom, how '
                    'often heads agree, what early exits cost, and means over seeds. It needs no network; its pictures '
                    'lie beside it as SVG files.',
    )
    report.add_argument('runs', metavar='RUN', nargs='+', help='folder of a run, with its args.yaml and summary.csv')
    report.add_argument('--output', metavar='DIR',
                        help='where to write; if not given, RUN/report, and ./report for several runs')
    report.set_defaults(run=_report)
    return parser


def _report(args: argparse.Namespace):
    from .runs.report import write_report

    print(write_report(args.runs, args.output))


def _inspect(args: argparse.Namespace):
    from .method.cost import backbone_without_weights, format_inspection, inspect_model
    from .training.build import check_model_name, naming_model

    check_model_name(args.model)
    given = f' with --model-kwargs {args.model_kwargs}' if args.model_kwargs else ''
    subject = f'MODEL {args.model}{given}'
    of_timm = dict(img_size=args.img_size, num_classes=args.num_classes, in_chans=args.in_chans)
    for name in of_timm.keys() & args.model_kwargs.keys():
        raise InputError(f'--model-kwargs {name}={args.model_kwargs[name]}: use {flag(name)}')
    of_timm.update(args.model_kwargs)
    with naming_model(subject, args.model):
        backbone_without_weights(args.model, **of_timm)
    with naming(subject):
        found = inspect_model(
            args.model,
            stages=args.dks_stages,
            branches=args.dks_branches,
            branch_kwargs=args.dks_branch_kwargs,
            budget=args.dks_budget,
            batch_fraction=args.dks_batch_fraction,
            every=args.dks_every,
            **of_timm,
        )
    print(json.dumps(found, indent=2) if args.json else format_inspection(found))


def _export(args: argparse.Namespace):
    from .publishing.export import export_checkpoint
    from .publishing.push import check_request, finishing_line

    if args.push_to_hub:
        check_request(args.push_to_hub, args.hub_revision)
    out_dir = export_checkpoint(
        args.checkpoint,
        args.out_dir,
        use_ema=not args.no_ema,
        keep_branches=args.keep_branches,
        license=args.card_license,
        baseline_dir=args.card_baseline,
        overwrite=args.overwrite,
    )
    print(f"Exported and checked, bit for bit: timm.create_model('local-dir:{out_dir}', pretrained=True)")
    if args.push_to_hub:
        try:
            _push(args, out_dir)
        except (InputError, PushError):
            line = finishing_line(out_dir, args.push_to_hub, args.hub_private, args.hub_revision, args.overwrite)
            print(f'The model is in {out_dir}. To push it: {line}', file=sys.stderr)
            raise


def _push(args: argparse.Namespace, folder=None):
    from .publishing.push import push_folder

    print(push_folder(
        folder or args.folder,
        args.push_to_hub,
        private=args.hub_private,
        revision=args.hub_revision,
        overwrite=args.overwrite,
        timeout=args.hub_timeout,
    ))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0; 2 for bad input; 3 where a push did not get through; 1 where an exported model was not kept.
    """
    try:
        args = _create_parser().parse_args(argv)
        args.run(args)
    except (ExportError, InputError, PushError) as e:
        print(f'dks-timm: error: {one_line(e)}', file=sys.stderr)
        return 2 if isinstance(e, InputError) else 3 if isinstance(e, PushError) else 1
    return 0
