"""Publishing as part of a run of train.py: checks before it, pushes while it goes on, export and push at its end."""
import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, List, Optional, Sequence, Union

import torch.nn as nn
import yaml

from ..errors import ExportError, InputError, PushError, naming, why
from .card import baseline
from .export import export, export_checkpoint
from .push import check_repository, check_request, finishing_line, push_folder

__all__ = ['BackgroundPush', 'check_publishing', 'next_steps', 'publish', 'push_every_best', 'push_to_hub']

PathLike = Union[str, os.PathLike]

_logger = logging.getLogger(__name__)

_PACKAGE_DIR = str(Path(__file__).parents[2])
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
        overwrite: Replace another model that is there: another architecture, other classes, or not one of timm's.
        timeout: Most seconds that the push may take; None allows 300, and one more for each half megabyte.
        **export_kwargs: Further arguments of :func:`dks_timm.export`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: See :func:`dks_timm.export`; also a name that no repository can have, a token that is missing or
            may not write, or another model in the repository without ``overwrite``.
        PushError: The Hub cannot be reached, or did not take it in time; a RuntimeError.
    """
    check_request(repo_id, revision)
    card = {'repo_id': repo_id, **(export_kwargs.pop('card', None) or {})}
    with tempfile.TemporaryDirectory(prefix='dks-timm-') as folder:
        export(folder, net_or_model, card=card, overwrite=True, **export_kwargs)
        return push_folder(folder, repo_id, private, revision, overwrite, timeout)


def check_publishing(args: argparse.Namespace, args_text: str, model: nn.Module, label_names: Optional[List[str]]):
    """Check before training that what the flags ask for can be published. A Hub out of reach is only a warning.

    Args:
        args: The command line.
        args_text: Text of args.yaml.
        model: The model to be trained.
        label_names: Class names in the order of the classifier's outputs.

    Raises:
        OptionError: If it cannot.
    """
    if args.card_baseline:
        with naming(f'--card-baseline {args.card_baseline}'):
            baseline(yaml.safe_load(args_text), args.card_baseline)
    if not args.push_to_hub:
        return
    config = dict(
        architecture=model.pretrained_cfg['architecture'], num_classes=model.num_classes, label_names=label_names)
    try:
        with naming(f'--push-to-hub {args.push_to_hub}'):
            warnings = check_repository(
                args.push_to_hub, config, args.hub_private, args.hub_revision, args.overwrite_repository)
    except PushError as e:
        warnings = [f'{e}; training goes on, and the push is tried at its end']
    for warning in warnings:
        _logger.warning(f'--push-to-hub {args.push_to_hub}: {warning}')


def push_every_best(args: argparse.Namespace, run_dir: Optional[str]) -> Optional['BackgroundPush']:
    """Create the background push of a run, to be called after each new best checkpoint; None if it is not asked for."""
    if not args.push_every_best or run_dir is None:
        return None
    flags = ['--push-to-hub', args.push_to_hub]
    for name in ('hub_timeout', 'card_license', 'card_baseline'):
        if getattr(args, name) is not None:
            flags += [f'--{name.replace("_", "-")}', str(getattr(args, name))]
    if args.hub_revision and not args.hub_revision.startswith('tag:'):
        flags += ['--hub-revision', args.hub_revision]
    flags += ['--no-hub-private'] * (not args.hub_private) + ['--overwrite'] * args.overwrite_repository
    return BackgroundPush(Path(run_dir, 'model_best.pth.tar'), [*flags, *_export_flags(args)])


class BackgroundPush:
    """Export and push of a checkpoint while training goes on, whenever called; calls that pile up become one.

    Args:
        checkpoint: Checkpoint to push, whatever is in it at the time.
        flags: Flags of ``dks-timm export``, with ``--push-to-hub``.
    """

    def __init__(self, checkpoint: PathLike, flags: Sequence[str]):
        self._arguments = [str(checkpoint), *flags]
        self._wanted = threading.Event()
        self._closing = False
        self._child: Optional[subprocess.Popen] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self) -> None:
        self._wanted.set()

    def _run(self):
        # It must not take processors or memory from the training.
        env = dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', HF_HUB_DISABLE_PROGRESS_BARS='1')
        while self._wanted.wait() and not self._closing:
            self._wanted.clear()
            with tempfile.TemporaryDirectory(prefix='dks-timm-') as folder:
                checkpoint, *flags = self._arguments
                self._child = subprocess.Popen(
                    [sys.executable, '-c', _COMMAND, _PACKAGE_DIR, 'export', checkpoint, folder, *flags], env=env,
                    text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    start_new_session=True)
                said = self._child.communicate()[0].strip().rpartition('\n')[-1]
            if self._child.returncode == 0:
                _logger.info(f'The best checkpoint so far is on the Hub: {said}')
            elif not self._closing:
                _logger.warning(f'The best checkpoint was not pushed, training goes on: {said}')

    def close(self, grace: float = 30) -> None:
        """Wait at most so many seconds for a push that is under way, then end it."""
        self._closing = True
        self._wanted.set()
        self._thread.join(grace)
        if self._thread.is_alive() and self._child is not None:
            os.killpg(self._child.pid, signal.SIGTERM)  # with the upload, which is a process of its own
            self._thread.join()


def publish(args: argparse.Namespace, trainer: Any) -> None:
    """Export the best weights of a finished run, and push them if asked; say how to load them, or what is left to do.

    Args:
        args: The command line.
        trainer: The Trainer, for its ``output_dir`` and ``without_ema``.

    Raises:
        SystemExit: With code 3 if the model was not kept, or the Hub did not take it. The checkpoints stay, and so
            does the exported folder if the push failed.
    """
    run_dir = trainer.output_dir
    out_dir = args.export_dir or os.path.join(run_dir, 'export')
    kept = {os.path.join(run_dir, f'checkpoint-{epoch}.pth.tar'): metrics['top1']
            for epoch, metrics in trainer.without_ema.items()}
    kept = {path: top1 for path, top1 in kept.items() if os.path.exists(path)}
    try:
        export_checkpoint(
            os.path.join(run_dir, 'model_best.pth.tar'),
            out_dir,
            use_ema=not args.model_ema_force_cpu,
            keep_branches=args.keep_branches,
            license=args.card_license,
            baseline_dir=args.card_baseline,
            repo_id=args.push_to_hub,
            # Only a run with this very name could have left a model in its folder.
            overwrite=args.overwrite or not args.export_dir,
            top1_without_ema=kept,
        )
    except Exception as e:
        _fail(f'--export-dir {out_dir}', e, f'The checkpoints are in {run_dir}. To export the best one:',
              _export_line(args, run_dir, out_dir))
    print(f'Exported to {out_dir}: a fresh process loads it, with bit-identical logits:')
    print(f"    model = timm.create_model('local-dir:{out_dir}', pretrained=True)")
    if not args.push_to_hub:
        return
    where = (args.push_to_hub, args.hub_private, args.hub_revision, args.overwrite_repository)
    try:
        print(f'Pushed to {push_folder(out_dir, *where, timeout=args.hub_timeout)}')
    except Exception as e:
        _fail(f'--push-to-hub {args.push_to_hub}', e, f'The model is in {out_dir}. To push it:',
              finishing_line(out_dir, *where))


def next_steps(args: argparse.Namespace, run_dir: str) -> str:
    """Return the commands that show a run and publish it, without those that its flags have done already.

    Args:
        args: The command line of the run.
        run_dir: Its folder.
    """
    out_dir = args.export_dir or os.path.join(run_dir, 'export')
    steps = [shlex.join(['dks-timm', 'report', run_dir])]
    if not args.export_dir and not args.push_to_hub:
        steps.append(_export_line(args, run_dir, out_dir))
    if not args.push_to_hub:
        steps.append(finishing_line(out_dir, 'OWNER/NAME', args.hub_private))
    return '\n'.join(['Next:', *(f'    {command}' for command in steps)])


def _export_line(args: argparse.Namespace, run_dir: str, out_dir: str) -> str:
    """Return the shell command that exports the best weights of a run."""
    return shlex.join(
        ['dks-timm', 'export', os.path.join(run_dir, 'model_best.pth.tar'), out_dir, *_export_flags(args)])


def _export_flags(args: argparse.Namespace) -> List[str]:
    """Flags for exporting the weights that were evaluated: an average kept on the CPU was not."""
    return ['--no-ema'] * args.model_ema_force_cpu + ['--keep-branches'] * args.keep_branches


def _fail(subject: str, error: Exception, where: str, command: str):
    """Say what is left to do, and end with code 3; by the error itself where the program is at fault."""
    print(f'train.py: error: {subject}: {why(error)}\n{where}\n    {command}', file=sys.stderr)
    if not isinstance(error, (ExportError, InputError, OSError, PushError)):
        raise error
    raise SystemExit(3)
