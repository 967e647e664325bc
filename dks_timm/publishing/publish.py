"""Publishing as part of a run of train.py: checks before it, pushes while it goes on, export and push at its end."""
import argparse
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, List, Optional

import torch.nn as nn

from ..errors import ExportError, InputError, PushError, flag, naming, why
from ..training.flags import METRICS
from .card import baseline
from .export import export, export_checkpoint
from .push import check_repository, check_request, finishing_line, hub_flags, push_folder

_logger = logging.getLogger(__name__)

_COMMAND = 'import sys; sys.path.append(sys.argv.pop(1)); from dks_timm.cli import main; sys.exit(main())'


def push_to_hub(
        repo_id: str,
        net_or_model: nn.Module,
        private: bool = True,
        revision: Optional[str] = None,
        overwrite: bool = False,
        timeout: Optional[float] = None,
        **export_kwargs: Any,
) -> str:
    """Export a network's backbone and push it to the Hugging Face Hub, all files in one commit.

    Args:
        repo_id: Repository, owner/name; created if it does not exist.
        net_or_model: A DKSModel, or a timm model.
        private: Make a new repository private. The visibility of an existing one stays.
        revision: Branch to commit to, created from main if it does not exist, or ``tag:NAME`` for a tag of main.
        overwrite: Replace another model that is there: one whose config.json has another architecture or other classes.
        timeout: Most seconds that the push may take; None allows 300, and one more for each half megabyte.
        **export_kwargs: Further arguments of :func:`dks_timm.export`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: See :func:`dks_timm.export`; also a name that no repository can have, a token that is missing or
            may not write, or another model in the repository without ``overwrite``.
        RuntimeError: The export was not kept, or the Hub cannot be reached or did not take it in time.

    Example:
        >>> import timm, dks_timm
        >>> net = dks_timm.create_dks_model('test_resnet', num_classes=10)
        >>> url = dks_timm.push_to_hub('owner/name', net)
        >>> type(timm.create_model('hf-hub:owner/name', pretrained=True)).__name__
        'ResNet'
    """
    check_request(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix='dks-timm-') as folder:
        export(folder, net_or_model, **export_kwargs)
        return push_folder(folder, repo_id, private, revision, overwrite, timeout)


def check_publishing(args: argparse.Namespace, model: nn.Module, label_names: Optional[List[str]]) -> None:
    """Refuse before training what cannot be published. A Hub out of reach is only a warning."""
    if args.card_baseline:
        with naming(f'--card-baseline {args.card_baseline}'):
            baseline(vars(args), args.card_baseline)
    if not args.push_to_hub:
        return
    config = dict(
        architecture=model.pretrained_cfg['architecture'], num_classes=model.num_classes, label_names=label_names)
    try:
        with naming(f'--push-to-hub {args.push_to_hub}'):
            check_repository(args.push_to_hub, config, args.hub_private, args.hub_revision, args.overwrite_repository)
    except PushError as e:
        _logger.warning(f'--push-to-hub {args.push_to_hub}: {e}; training goes on, and the push is tried at its end')


class BackgroundPush:
    """Export and push of the best checkpoint by a process of its own, to be called after each new one.

    While one is under way, a call does nothing: the end of the run pushes the best weights in any case.
    """

    def __init__(self, args: argparse.Namespace, run_dir: str):
        flags = ['--push-to-hub', args.push_to_hub, *_export_flags(args)]
        tagged = (args.hub_revision or '').startswith('tag:')  # for the end alone
        flags += hub_flags(args.hub_private, None if tagged else args.hub_revision, args.overwrite_repository)
        flags += _given(args, 'hub_timeout')
        self.checkpoint, self.flags, self.child = os.path.join(run_dir, 'model_best.pth.tar'), flags, None

    def __call__(self) -> None:
        if self.child is not None:
            if self.child.poll() is None:
                return
            self.close()
        self.folder = tempfile.TemporaryDirectory(prefix='dks-timm-')
        package_dir = str(Path(__file__).parents[2])
        self.child = subprocess.Popen(
            [sys.executable, '-c', _COMMAND, package_dir, 'export', self.checkpoint, self.folder.name, *self.flags],
            # It must not take processors or memory from the training.
            env=dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', HF_HUB_DISABLE_PROGRESS_BARS='1'),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def close(self) -> None:
        """Wait for a push that is under way, which --hub-timeout bounds, and log its outcome."""
        if self.child is None:
            return
        said = self.child.communicate()[0].strip().rpartition('\n')[-1]
        if self.child.returncode == 0:
            _logger.info(f'The best checkpoint so far is on the Hub: {said}')
        else:
            _logger.warning(f'The best checkpoint was not pushed, training goes on: {said}')
        self.child = None
        self.folder.cleanup()


def publish(args: argparse.Namespace, trainer: Any) -> None:
    """Export the best weights of a finished run, and push them if asked; say how to load them, or what is left to do.

    Raises:
        SystemExit: With code 3 if the model was not kept, or the Hub did not take it. What is there by then stays.
    """
    run_dir = trainer.output_dir
    out_dir = args.export_dir or os.path.join(run_dir, 'export')
    without_ema = {os.path.join(run_dir, f'checkpoint-{epoch}.pth.tar'): metrics[METRICS[args.task][0]]
                   for epoch, metrics in trainer.without_ema.items()}
    doing = f'--export-dir {out_dir}'
    left = f'The checkpoints are in {run_dir}. To export the best one:\n    {_export_line(args, run_dir, out_dir)}'
    try:
        export_checkpoint(
            os.path.join(run_dir, 'model_best.pth.tar'),
            out_dir,
            use_ema=not args.model_ema_force_cpu,
            keep_branches=args.keep_branches,
            license=args.card_license,
            baseline_dir=args.card_baseline,
            # Only a run with this very name could have left a model in its folder.
            overwrite=args.overwrite or not args.export_dir,
            without_ema={path: metric for path, metric in without_ema.items() if os.path.exists(path)},
        )
        print(f'Exported to {out_dir}: a fresh process loads it, with bit-identical logits:')
        print(f"    model = timm.create_model('local-dir:{out_dir}', pretrained=True)")
        if args.push_to_hub:
            where = (args.push_to_hub, args.hub_private, args.hub_revision, args.overwrite_repository)
            doing = f'--push-to-hub {args.push_to_hub}'
            left = f'The model is in {out_dir}. To push it:\n    {finishing_line(out_dir, *where)}'
            print(f'Pushed to {push_folder(out_dir, *where, timeout=args.hub_timeout)}')
    except Exception as e:
        print(f'train.py: error: {doing}: {why(e)}\n{left}', file=sys.stderr)
        if not isinstance(e, (ExportError, InputError, OSError, PushError)):
            raise  # the program is at fault
        raise SystemExit(3) from None


def next_steps(args: argparse.Namespace, run_dir: str) -> str:
    """Return the commands that show a run and publish it, without those that its flags have done already."""
    out_dir = args.export_dir or os.path.join(run_dir, 'export')
    steps = [shlex.join(['dks-timm', 'report', run_dir])]
    if not args.export_dir and not args.push_to_hub:
        steps.append(_export_line(args, run_dir, out_dir))
    if not args.push_to_hub:
        steps.append(finishing_line(out_dir, 'OWNER/NAME', args.hub_private))
    return '\n    '.join(['Next:', *steps])


def _export_flags(args: argparse.Namespace) -> List[str]:
    """Flags for exporting the weights that were evaluated: an average kept on the CPU was not."""
    flags = ['--no-ema'] * args.model_ema_force_cpu + ['--keep-branches'] * args.keep_branches
    return flags + _given(args, 'card_license', 'card_baseline')


def _given(args: argparse.Namespace, *names: str) -> List[str]:
    """Return those of some flags that have a value, as words of a command."""
    return [word for n in names if getattr(args, n) is not None for word in (flag(n), str(getattr(args, n)))]


def _export_line(args: argparse.Namespace, run_dir: str, out_dir: str) -> str:
    """Return the shell command that exports the best weights of a run."""
    best = os.path.join(run_dir, 'model_best.pth.tar')
    return shlex.join(['dks-timm', 'export', best, out_dir, *_export_flags(args)])
