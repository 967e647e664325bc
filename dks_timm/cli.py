"""Console script ``dks-timm``: train, validate, export, push, inspect, report."""
import argparse
import json
import sys
from typing import Optional, Sequence

from .errors import ExportError, InputError, OptionError, PushError, given_flags, naming, one_line
from .training.flags import add_branch_flags, add_card_flags, add_hub_flags, add_input_flags, add_validation_flags
from .training.parser import Parser


def _create_parser() -> Parser:
    parser = Parser(prog='dks-timm', description='Train models with DKS, evaluate, publish and look into them.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)

    def add_command(run, description):
        command = commands.add_parser(run.__name__.lstrip('_'), help=description, description=description)
        command.set_defaults(run=run)
        return command.add_argument

    # Listed here for --help; main hands its flags to train.py.
    description = 'train a model; the flags are those of train.py, see dks-timm train --help'
    commands.add_parser('train', help=description, description=description, add_help=False)

    add = add_command(_validate, 'evaluate a model as timm\'s validate.py, and the early exits of one with branches')
    add('model', metavar='MODEL', help='exported folder, checkpoint, hf-hub:owner/name, or name of a timm model')
    add('--no-ema', action='store_true', help='take the trained weights where a checkpoint has averaged ones')
    add('--json', action='store_true', help='print it for machines')
    add_validation_flags(add)

    add = add_command(_export, 'turn a checkpoint into a folder that timm.create_model loads, and check that it does')
    add('checkpoint', metavar='CKPT', help='a checkpoint of a run, such as model_best.pth.tar, or any with --model')
    add('out_dir', metavar='DIR', help='folder to write to')
    add('--model', metavar='NAME', help='timm model that weights from elsewhere are of, as of torchvision\'s script')
    add('--num-classes', type=int, at_least=1, help='its classes, if not those of the classifier in the file')
    add('--no-ema', action='store_true', help='take the trained weights where there are averaged ones')
    add('--overwrite', action='store_true', help='replace a model that the folder or the repository already holds')
    add_card_flags(add)
    add('--onnx', action='store_true', help='write model.onnx, too: float32, for batches of any size')
    add('--push-to-hub', metavar='OWNER/NAME', help='push the folder to this repository, too')
    add_hub_flags(add)

    add = add_command(_push, 'push an exported folder to the Hugging Face Hub in one commit, if anything has changed')
    add('folder', metavar='DIR', help='folder of an exported model')
    add('push_to_hub', metavar='OWNER/NAME', help='repository, created if need be')
    add('--overwrite', action='store_true', help='replace another model that the repository holds')
    add_hub_flags(add)

    add = add_command(_inspect, 'show the stages of a model, the branches DKS attaches, and what they cost in training')
    add('model', metavar='MODEL', help='timm model name, also hf-hub:owner/name and local-dir:path')
    add_input_flags(add)
    add_branch_flags(add)
    add('--json', action='store_true', help='print it for machines')

    add = add_command(_report, 'write an HTML page with pictures about a run, or about several side by side')
    add('runs', metavar='RUN', nargs='+', help='folder of a run, with its args.yaml and summary.csv')
    add('--output', metavar='DIR', help='where to write; if not given, RUN/report, and ./report for several runs')
    return parser


def _validate(args: argparse.Namespace):
    from .training.validate import format_validation, validate

    apart = ('command', 'run', 'model', 'no_ema', 'json')
    given = {name: value for name, value in vars(args).items() if name not in apart}
    found = validate(args.model, given, use_ema=not args.no_ema)
    print(json.dumps(found, indent=2) if args.json else format_validation(found))


def _report(args: argparse.Namespace):
    from .runs.report import write_report

    print(write_report(args.runs, args.output))


def _inspect(args: argparse.Namespace):
    from .method.cost import backbone_without_weights, format_inspection, inspect_model
    from .training.build import check_model_name, naming_model

    check_model_name(args.model)
    subject = f'MODEL {args.model}' + (f' with --model-kwargs {args.model_kwargs}' if args.model_kwargs else '')
    of_timm = dict(img_size=args.img_size, num_classes=args.num_classes, in_chans=args.in_chans)
    with naming_model(subject, args.model_kwargs):
        backbone_without_weights(args.model, **of_timm, **args.model_kwargs)
    with naming(subject):
        found = inspect_model(
            args.model, args.dks_stages, args.dks_branches, args.dks_branch_kwargs, args.dks_budget,
            batch_fraction=args.dks_batch_fraction, share=1 / args.dks_every, **of_timm, **args.model_kwargs)
    print(json.dumps(found, indent=2) if args.json else format_inspection(found))


def _export(args: argparse.Namespace):
    from .publishing.convert import convert_checkpoint
    from .publishing.export import export_checkpoint
    from .publishing.push import check_request, finishing_line

    of_runs = '--keep-branches' if args.keep_branches else given_flags(args, 'card_baseline')
    if args.model and of_runs:
        raise OptionError(f'{of_runs}: only for a checkpoint of a run, not with --model {args.model}')
    if args.num_classes and not args.model:
        raise OptionError(f'--num-classes {args.num_classes}: only with --model; a run knows its classes')
    if args.push_to_hub:
        check_request(args.push_to_hub, args.hub_revision)
    common = dict(use_ema=not args.no_ema, license=args.card_license, onnx=args.onnx, overwrite=args.overwrite)
    if args.model:
        out_dir = convert_checkpoint(args.checkpoint, args.out_dir, args.model, args.num_classes, **common)
    else:
        out_dir = export_checkpoint(
            args.checkpoint, args.out_dir, keep_branches=args.keep_branches, baseline_dir=args.card_baseline, **common)
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

    settings = dict(private=args.hub_private, revision=args.hub_revision, timeout=args.hub_timeout)
    print(push_folder(folder or args.folder, args.push_to_hub, overwrite=args.overwrite, **settings))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0; 2 for bad input; 3 if a push failed; 1 if the exported model failed its check.

    Raises:
        SystemExit: with an exit code of train.py, for ``train``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ['train']:
        from . import train
        train.main(argv[1:])
        return 0
    try:
        args = _create_parser().parse_args(argv)
        args.run(args)
    except (ExportError, InputError, PushError) as e:
        print(f'dks-timm: error: {one_line(e)}', file=sys.stderr)
        return 2 if isinstance(e, InputError) else 3 if isinstance(e, PushError) else 1
    return 0
