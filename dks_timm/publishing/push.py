"""Pushing an exported folder to the Hugging Face Hub: one commit, with a bound on how long it may take.

The conversation with the Hub runs in a process of its own (`push_process`). The client waits without bound in places
(a Retry-After of an hour, an upload that stalls), and a process can be ended wherever it waits. Nothing here imports
torch.
"""
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

from huggingface_hub import ModelCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError, PushError, why

__all__ = [
    'FILES', 'BackgroundPush', 'PushError', 'check_repository', 'check_request', 'finishing_line', 'push_folder',
    'push_to_hub',
]

PathLike = Union[str, os.PathLike]

_logger = logging.getLogger(__name__)

CHECK_SECONDS = 8  # a Hub that takes longer to answer, with the start of a process, holds no training up

_PACKAGE_DIR = str(Path(__file__).parents[2])
_SERVE = 'import sys; sys.path.append(sys.argv[1]); from dks_timm.publishing.push_process import serve; serve()'
_COMMAND = 'import sys; sys.path.append(sys.argv.pop(1)); from dks_timm.cli import main; sys.exit(main())'

# What an export consists of, in the order in which it is put in place: timm does not load a folder without config.json,
# so an interrupted replacement never looks like a model.
FILES = ('model.safetensors', 'branches.safetensors', 'dks_config.json', 'curves.svg', 'README.md', 'config.json')


def check_request(repo_id: str, revision: Optional[str] = None) -> None:
    """Check what can be checked without the Hub.

    Raises:
        ValueError: If the name is not one of a repository, or nobody is logged in on this machine.
    """
    try:
        validate_repo_id(repo_id)
        good = repo_id.count('/') == 1
    except HFValidationError:
        good = False
    if not good:
        raise InputError(f'repo_id {repo_id!r} is not the name of a repository; give owner/name')
    if revision is not None and not re.fullmatch(r'(tag:)?[\w.][\w./-]*', revision):
        raise InputError(f'revision {revision!r} is not a name; give a branch, or tag:NAME')
    if not get_token():
        raise InputError(f'repo_id {repo_id!r} needs a login: run `hf auth login`, or set HF_TOKEN')


def check_repository(
        repo_id: str,
        config: Mapping[str, Any],
        private: bool = True,
        revision: Optional[str] = None,
        overwrite: bool = False,
) -> List[str]:
    """Check that a push will be welcome, within seconds. A repository that does not exist yet is created.

    Args:
        repo_id: Repository, owner/name.
        config: The model: ``architecture``, ``num_classes`` and, where known, ``label_names``.
        private: Whether a new repository is private.
        revision: Branch, or ``tag:NAME``; see :func:`push_folder`.
        overwrite: Whether another model that is there may be replaced.

    Returns:
        What is worth a warning.

    Raises:
        ValueError: If the token is not accepted, may not write there, or the repository holds another model.
        PushError: If the Hub cannot be asked now.
    """
    check_request(repo_id, revision)
    return _ask(
        'check', CHECK_SECONDS, quiet=True,
        repo_id=repo_id, config=dict(config), private=private, revision=revision, overwrite=overwrite)


def push_folder(
        folder: PathLike,
        repo_id: str,
        private: bool = True,
        revision: Optional[str] = None,
        overwrite: bool = False,
        timeout: Optional[float] = None,
) -> str:
    """Push an exported folder in one commit; files of the export alone, and only those that have changed.

    Args:
        folder: Folder that :func:`dks_timm.export` wrote.
        repo_id: Repository, owner/name; it is created if need be. The card is made to name it.
        private: Whether a new repository is private. The visibility of an existing one stays.
        revision: Branch to commit to, created from main if need be; or ``tag:NAME`` for a commit on main with a tag.
        overwrite: Replace another model that is there. Its revisions stay in the history.
        timeout: Most seconds that it may take; None for five minutes, and one more second for each half megabyte.

    Returns:
        URL of the commit; of the present one where nothing has changed.

    Raises:
        ValueError: If the folder is no export, the token is not accepted, or the repository holds another model.
        PushError: If the Hub cannot be reached, or did not take it in time.
    """
    folder = Path(folder)
    missing = [name for name in ('config.json', 'model.safetensors', 'README.md') if not (folder / name).is_file()]
    if missing:
        raise InputError(f'folder {str(folder)!r} is not an exported model: it has no {", ".join(missing)}')
    check_request(repo_id, revision)
    size = sum((folder / name).stat().st_size for name in FILES if (folder / name).is_file())
    if timeout is None:
        timeout = 300 + size / 5e5
    branch, tag = parse_revision(revision)
    from .card import local_name  # brings torch along, for which the process that talks to the Hub would wait
    try:
        config, card = json.loads((folder / 'config.json').read_text()), ModelCard.load(folder / 'README.md')
        classes = f'{config["architecture"]} with {config["num_classes"]} classes'
        results = card.data.eval_results or []
        measured = [
            f'{r.metric_name} {r.metric_value:.2f} on {r.dataset_name} ({r.dataset_split})' for r in results[:1]]
        given = local_name(config['architecture'], results, card.data.datasets)
    except Exception as e:  # YAML raises what it likes
        raise InputError(f'folder {str(folder)!r} is not an exported model: {why(e)}') from e
    pushed = _ask(
        'push', timeout,
        repo_id=repo_id,
        folder=str(folder.absolute()),
        readme=_pushed_card(card, given, repo_id, tag or branch),
        message=': '.join([classes, *measured]),
        private=private,
        revision=revision,
        overwrite=overwrite,
        seconds=timeout,
    )
    for warning in pushed['warnings']:
        _logger.warning(warning)
    _logger.info(f'Pushed {size / 1e6:.1f} MB to {repo_id}.' if pushed['changed'] else f'{repo_id} is up to date.')
    return pushed['url']


def push_to_hub(
        repo_id: str,
        net_or_model: Any,
        private: bool = True,
        revision: Optional[str] = None,
        overwrite: bool = False,
        timeout: Optional[float] = None,
        **export_kwargs: Any,
) -> str:
    """Export a network's backbone and push it to the Hugging Face Hub, all files in one commit.

    Args:
        repo_id: Repository, owner/name; created if need be.
        net_or_model: A DKSModel, or a timm model.
        private: Whether a new repository is private.
        revision: Branch to commit to, made from main if need be, or ``tag:NAME`` for a tag of main.
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
    from .export import export

    check_request(repo_id, revision)
    card = {'repo_id': repo_id, **(export_kwargs.pop('card', None) or {})}
    with tempfile.TemporaryDirectory() as folder:
        export(folder, net_or_model, card=card, overwrite=True, **export_kwargs)
        return push_folder(folder, repo_id, private, revision, overwrite, timeout)


def finishing_line(
        folder: PathLike,
        repo_id: str,
        private: bool = True,
        revision: Optional[str] = None,
        overwrite: bool = False,
) -> str:
    """The shell command that pushes a folder."""
    flags = [] if private else ['--no-hub-private']
    if revision:
        flags += ['--hub-revision', revision]
    return shlex.join(['dks-timm', 'push', str(folder), repo_id, *flags, *(['--overwrite'] if overwrite else [])])


class BackgroundPush:
    """Export and push a checkpoint while training goes on, whenever called; the newest state where calls pile up.

    Args:
        checkpoint: Checkpoint to push, whatever is in it at the time.
        flags: Flags of ``dks-timm export``, with ``--push-to-hub``.
    """

    def __init__(self, checkpoint: PathLike, flags: Sequence[str]):
        self._checkpoint = str(checkpoint)
        self._flags = list(flags)
        self._wanted = threading.Event()
        self._child: Optional[subprocess.Popen] = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self) -> None:
        self._wanted.set()

    def _run(self):
        while self._wanted.wait() and not self._closing:
            self._wanted.clear()
            # It must not take processors or memory from the training.
            env = dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', HF_HUB_DISABLE_PROGRESS_BARS='1')
            try:
                with tempfile.TemporaryDirectory(prefix='dks-timm-') as folder:
                    command = [sys.executable, '-c', _COMMAND, _PACKAGE_DIR, 'export', self._checkpoint, folder]
                    self._child = subprocess.Popen(
                        [*command, *self._flags], env={**os.environ, **env}, text=True,
                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                    lines = self._child.communicate()[0].strip().splitlines() or ['']
            except OSError as e:
                _logger.warning(f'The best checkpoint was not pushed, training goes on: {e}')
                continue
            if self._child.returncode == 0:
                _logger.info(f'The best checkpoint so far is on the Hub: {lines[-1]}')
            elif not self._closing:
                _logger.warning(f'The best checkpoint was not pushed, training goes on: {lines[-1]}')

    def close(self, grace: float = 30) -> None:
        """Let a push that is under way finish, for so many seconds at most."""
        self._closing = True
        self._wanted.set()
        self._thread.join(grace)
        if self._thread.is_alive() and self._child is not None:
            self._child.terminate()
            self._thread.join()


def parse_revision(revision: Optional[str]) -> Tuple[Optional[str], Optional[str]]:
    """Branch and tag, None for main and for no tag."""
    kind, _, name = (revision or '').rpartition(':')
    if kind == 'tag':
        return None, name
    return (None if name in ('', 'main') else name), None


def _pushed_card(card: ModelCard, given: str, repo_id: str, revision: Optional[str]) -> str:
    """A card with the model's place on the Hub, where it says how to load it, and its name there.

    A name that someone chose, and not the export, stays.
    """
    source = f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')
    pipeline = f"model='{repo_id}'" + (f", revision='{revision}'" if revision else '')
    name = repo_id.rpartition('/')[2]
    if card.data.model_name == given:
        card.data.model_name = name
    sections = re.split(r'(?m)^(?=## )', str(card).replace(f'\n# {given}\n', f'\n# {name}\n', 1))
    return ''.join(
        # The command that trained it may name another model.
        text if text.startswith('## Training') else
        re.sub(r"(?<='image-classification', )model='[^'\n]+'(, revision='[^'\n]+')?", lambda match: pipeline,
               re.sub(r"(?:local-dir|hf-hub):[^'\n]+?(?='| --pretrained)", lambda match: source, text))
        for text in sections)


def _ask(action: str, timeout: float, quiet: bool = False, **request: Any) -> Any:
    """Let a process of its own carry out an action; it never takes longer than the timeout."""
    token = get_token()
    child = subprocess.Popen(
        [sys.executable, '-c', _SERVE, _PACKAGE_DIR], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if quiet else None)
    try:
        # The token goes through the pipe: other users of the machine may see command lines.
        out, _ = child.communicate(json.dumps({'action': action, 'token': token, **request}), timeout)
        timed_out = False
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        child.kill()
    if timed_out:
        out, _ = child.communicate()
    answers = [json.loads(line) for line in out.rpartition('\n')[0].splitlines() if line.startswith('{')]
    answer = answers[-1] if answers else {}
    if 'refused' in answer:
        raise InputError(answer['refused'])
    if 'failed' in answer:
        raise PushError(answer['failed'])
    if 'result' not in answer:
        doing = answer.get('doing', 'starting')
        raise PushError(
            f'no end of {doing} after {timeout:.0f} s' if timed_out else f'the process ended while {doing}')
    return answer['result']
