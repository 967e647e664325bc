"""Checkpoints: written whole or not at all, found again, checked, and loaded."""
import argparse
import io
import logging
import os
import shutil
import zipfile
import zlib
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

import torch
import yaml
from timm.models import safe_model_name
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver, get_outdir, unwrap_model
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from .._compat import tree_map_only
from ..errors import UNREADABLE, InputError, OptionError, naming, out_of_memory, why
from .flags import create_parser

_logger = logging.getLogger(__name__)

# Names of the checkpoints of a run.
_PATTERNS = ('last.pth.tar', 'checkpoint-*.pth.tar', 'recovery-*.pth.tar')


def create_folder(args, args_text: str, input_size: Sequence[int], resume: str) -> str:
    """Create the folder of a run, named as timm names it, with its args.yaml; --resume auto stays in its folder."""
    root = args.output or './output/train'
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(input_size[-1])])
    with naming(f'--output {root}', OSError):
        if args.resume == 'auto' and resume:
            folder = os.path.dirname(resume)
        else:
            folder = get_outdir(root, name, inc=not args.experiment)
        write_text(os.path.join(folder, 'args.yaml'), args_text)
    return folder


def find_resume(args, args_text: str) -> str:
    """Return the checkpoint that --resume names, or '' for none.

    "auto" is the newest complete one of the --experiment folder; without --experiment, of the newest folder under
    --output whose args.yaml is that of this run.

    Raises:
        OptionError: The file system does not let a checkpoint be read.
    """
    if args.resume != 'auto':
        return args.resume
    root = Path(args.output or './output/train')
    if args.experiment:
        folders = [root / args.experiment]
    else:
        wanted = _settings(args_text)
        # A link may lead out of --output.
        files = [f for f in root.glob('*/args.yaml') if not f.parent.is_symlink()]
        folders = [f.parent for f in files if _settings(f.read_text(errors='replace')) == wanted]
        folders = sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True)[:1]
    for folder in folders:
        files = [file for pattern in _PATTERNS for file in folder.glob(pattern)]
        for file in sorted(files, key=lambda f: f.stat().st_mtime_ns, reverse=True):
            broken = damage(file)
            if not broken:
                return str(file)
            _logger.warning(f'{file} is not complete ({broken}); trying the checkpoint before.')
    _logger.info('--resume auto: no checkpoint yet, starting from the beginning.')
    return ''


def _settings(args_text):
    """Return the settings in an args.yaml, but for those that may be other ones when a run goes on."""
    defaults = vars(create_parser().parse_args([]))  # of flags that came after the file
    may_differ = {name: defaults[name] for name in ('resume', 'stop_epoch', 'save_epochs')}
    try:
        return {**defaults, **yaml.safe_load(args_text), **may_differ}
    except (TypeError, yaml.YAMLError):  # not written to its end, or not by a run
        return None


def damage(path) -> str:
    """Return the damage of a checkpoint, or ''. Read all of it, as torch does not look at the checksums in its files.

    Raises:
        OptionError: The file system does not let it be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
        if part:
            return f'the checksum of {part} is wrong'
        load_checkpoint_metadata(path)
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error) as e:
        if out_of_memory(e):
            raise
        if isinstance(e, OSError):
            raise OptionError(f'--resume {path}: {e.strerror or e}') from None
        return why(e, 200)
    return ''


def load(path, args, task, optimizer, scaler):
    """Load a checkpoint of ours or timm's; return the next epoch, the seconds until then, and RunState's state or None.

    Raises:
        OptionError: It cannot be read, or is not one of this model.
    """
    broken = damage(path)
    if broken:
        raise OptionError(f'--resume {path}: no complete checkpoint ({broken}); --resume auto takes the newest that is')
    checkpoint = load_checkpoint_metadata(path)
    if not isinstance(checkpoint, dict):
        raise OptionError(f'--resume {path}: holds a {type(checkpoint).__name__}; give a checkpoint of a run')
    misfit = (
        f'--resume {path}: holds weights of {checkpoint.get("arch", "another model")} that do not fit '
        f'--model {args.model} with {unwrap_model(task.get_trainable_module()).num_classes} classes; resume with the '
        'model it was made by'
    )
    seconds = getattr(checkpoint.get('args'), 'train_seconds', 0.)
    saver = checkpoint.get('saver')
    run = saver.get('run') if isinstance(saver, dict) and not args.no_resume_opt else None
    try:
        epoch = resume_task_checkpoint(
            task,
            path,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else scaler,
        )
    except InputError as e:
        raise OptionError(f'--resume {path}: {e}') from e
    except (RuntimeError, ValueError) as e:  # torch's, where names or shapes are other ones
        if 'loading state_dict' in str(e):
            raise OptionError(misfit) from e
        if 'parameter group' in str(e):
            raise OptionError(f'--resume {path}: {e}; --no-resume-opt loads the weights only') from e
        raise
    return epoch, seconds, tree_map_only(torch.Tensor, torch.clone, run)  # the file is mapped, not read


class _File(io.BufferedWriter):
    """A file that keeps the error of writing to it, as torch.save raises another one."""
    error: Optional[OSError] = None

    def __init__(self, path):
        super().__init__(io.FileIO(path, 'w'))

    def write(self, data):
        try:
            return super().write(data)
        except OSError as e:
            self.error = e
            raise


def _write(path, write: Callable[[Any], Any]) -> None:
    """Write a file to the disk, and leave nothing behind where that fails with an OSError."""
    file = _File(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as e:
        with suppress(OSError):
            os.unlink(path)
        if file.error is None:
            raise
        raise file.error from e


def _put(source, path) -> None:
    """Rename a file to replace another; after a loss of power one of the two is there."""
    os.replace(source, path)
    with suppress(FileNotFoundError):  # two names of one file stay as they are
        os.unlink(source)
    folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path, text: str) -> None:
    """Write a file that is whole at any time."""
    _write(f'{path}.tmp', lambda file: file.write(text.encode()))
    _put(f'{path}.tmp', path)


class Output:
    """Output of a run that may fail: a warning says so once, and the run goes on."""
    failure = ''  # why it could not be written the last time

    def attempt(self, name: str, write: Callable, *args, **kwargs):
        """Call a function that writes; return its result, or None where it failed."""
        try:
            result = write(*args, **kwargs)
        except OSError as e:
            if not self.failure:
                _logger.warning(f'{name} cannot be written ({e}); training goes on, and the next one is tried.')
            self.failure = f'{name}: {e}'
            return None
        if self.failure:
            _logger.info(f'{name} is written again.')
        self.failure = ''
        return result


class Saver(Output, CheckpointSaver):
    """timm's saver, whose files are whole or not there, and hold the state of the run, its configuration and facts."""
    run: Optional[Dict[str, Any]] = None  # from RunState.collect
    milestones: Sequence[int] = ()  # epochs after which a checkpoint stays
    source = ''  # an existing checkpoint to take in place of writing one

    def __init__(self, *args: Any, facts: Optional[Dict[str, Any]] = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.config, self.facts = self.args, {} if facts is None else facts

    def state_dict(self, epoch=None, metric=None):
        return {**super().state_dict(epoch, metric), 'run': self.run}

    def _save(self, save_path, epoch, metric=None):  # private: timm CheckpointSaver._save, _replace, _duplicate
        if self.source:
            self._duplicate(self.source, save_path)
        else:
            if self.config is not None:
                self.args = argparse.Namespace(**{**vars(self.config), **self.facts})
            _write(save_path, lambda file: super(Saver, self)._save(file, epoch, metric))

    def _replace(self, src, dst):
        _put(src, dst)

    def _duplicate(self, src, dst):
        beside = f'{dst}.tmp'
        with suppress(FileNotFoundError):
            os.unlink(beside)
        try:
            os.link(src, beside)
        except OSError:  # not every file system has links
            with open(src, 'rb') as file:
                _write(beside, lambda copy: shutil.copyfileobj(file, copy))
        _put(beside, dst)

    def save_checkpoint(self, epoch, metric=None):
        def save():
            found = super(Saver, self).save_checkpoint(epoch, metric)
            if epoch + 1 in self.milestones:
                self.save_milestone(epoch + 1)
            return found

        return self.attempt('The checkpoint', save) or (None, None)

    def save_recovery(self, epoch, batch_idx=0):
        self.attempt('The recovery checkpoint', super().save_recovery, epoch, batch_idx)

    def resume(self, path) -> None:
        """Go on with the files beside a checkpoint, and finish the save that it was written in."""
        state = load_checkpoint_metadata(path).get('saver')
        if not state or 'run' not in state:
            self.load_state_dict_from_checkpoint(path)
            return
        epoch, metric = state['pending']
        self.load_state_dict({**state, 'pending': (None, None)})
        recoveries = sorted(map(str, Path(self.recovery_dir).glob(_PATTERNS[-1])), key=os.path.getmtime)
        *older, self.prev_recovery_file, self.curr_recovery_file = ['', '', *recoveries]
        for file in filter(None, older):
            os.remove(file)
        if state['run']['over']:
            self.source, self.run = path, state['run']
            self.save_checkpoint(epoch, metric)
            self.source = ''
