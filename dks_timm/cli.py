"""Console script ``dks-timm``: what is not training."""
import argparse
import sys
from typing import Optional, Sequence

from .options import Parser


def _create_parser() -> Parser:
    parser = Parser(prog='dks-timm', description='What is not training, for models trained with DKS.')
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
    export.add_argument('--overwrite', action='store_true', help='replace a model that is already in the folder')
    export.set_defaults(run=_export)
    return parser


def _export(args: argparse.Namespace):
    from .hub import export_checkpoint

    out_dir = export_checkpoint(args.checkpoint, args.out_dir, use_ema=not args.no_ema, overwrite=args.overwrite)
    print(f"Exported and checked, bit for bit: timm.create_model('local-dir:{out_dir}', pretrained=True)")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0; 2 for bad arguments; 1 where the command itself failed.
    """
    try:
        args = _create_parser().parse_args(argv)
        args.run(args)
    except (ValueError, RuntimeError, OSError) as e:
        print(f'dks-timm: error: {" ".join(str(e).split())}', file=sys.stderr)
        return 2 if isinstance(e, ValueError) else 1
    return 0
