"""Checkpoints: which one to resume from, and what is in it."""
import logging
from pathlib import Path

import yaml
from timm.task import resume_task_checkpoint
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from .options import UNREADABLE, OptionError, naming

_logger = logging.getLogger(__name__)


def find_resume(args, args_text: str) -> str:
    """The checkpoint that --resume names, or '' for none.

    "auto" is the newest complete one of the --experiment folder; without --experiment, of the newest folder under
    --output whose args.yaml is that of this run.
    """
    if args.resume != 'auto':
        return args.resume
    root = Path(args.output or './output/train')
    if args.experiment:
        folders = [root / args.experiment]
    else:
        wanted = _without_resume(args_text)
        folders = [f.parent for f in root.glob('*/args.yaml') if _without_resume(f.read_text()) == wanted]
        folders = sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True)[:1]
    for folder in folders:
        files = [*folder.glob('last.pth.tar'), *folder.glob('checkpoint-*.pth.tar'), *folder.glob('recovery-*.pth.tar')]
        for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
            try:
                load_checkpoint_metadata(file)
            except UNREADABLE as e:
                _logger.warning(f'{file} is not complete ({e}); trying the checkpoint before.')
            else:
                return str(file)
    _logger.info('--resume auto: no checkpoint yet, starting from the beginning.')
    return ''


def _without_resume(args_text):
    try:
        return {**yaml.safe_load(args_text), 'resume': ''}
    except (TypeError, yaml.YAMLError):  # not written to its end
        return None


def load(path, args, task, optimizer, scaler):
    """Load a checkpoint of ours or timm's.

    Returns:
        The epoch that comes after it, and the seconds of training it took.

    Raises:
        OptionError: It cannot be read, or is not one of this model.
    """
    with naming(f'--resume {path}', *UNREADABLE):
        checkpoint = load_checkpoint_metadata(path)
    seconds = getattr(checkpoint.get('args'), 'train_seconds', 0.) if isinstance(checkpoint, dict) else 0.
    try:
        epoch = resume_task_checkpoint(
            task,
            path,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else scaler,
        )
    except (KeyError, RuntimeError):
        raise OptionError(
            f'--resume {path}: holds weights of {checkpoint.get("arch", "another model")} that do not fit '
            f'--model {args.model} with {args.num_classes} classes; resume with the model it was made by'
        ) from None
    except ValueError as e:
        hint = '; --no-resume-opt loads the weights only' if 'parameter group' in str(e) else ''
        raise OptionError(f'--resume {path}: {e}{hint}') from None
    return epoch, seconds
