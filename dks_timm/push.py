"""Pushing an exported folder to the Hugging Face Hub: one commit, with a bound on how long it may take.

The conversation with the Hub runs in a process of its own. The client waits without bound in places (a Retry-After of
an hour, an upload that stalls), and a process can be ended wherever it waits. Nothing here imports torch.
"""
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .errors import why

__all__ = [
    'FILES', 'BackgroundPush', 'PushError', 'check_repository', 'check_request', 'finishing_line', 'push_folder',
    'push_to_hub',
]

PathLike = Union[str, os.PathLike]

_logger = logging.getLogger(__name__)

CHECK_SECONDS = 8  # a Hub that takes longer to answer, with the start of a process, holds no training up
CREATE_SECONDS = 30
ATTEMPTS = 4

_PACKAGE_DIR = str(Path(__file__).parents[1])
_SERVE = 'import sys; sys.path.append(sys.argv[1]); from dks_timm.push import serve; serve()'
_COMMAND = 'import sys; sys.path.append(sys.argv.pop(1)); from dks_timm.cli import main; sys.exit(main())'

# What an export consists of, in the order in which it is put in place: timm does not load a folder without config.json,
# so an interrupted replacement never looks like a model.
FILES = ('model.safetensors', 'branches.safetensors', 'dks_config.json', 'curves.svg', 'README.md', 'config.json')
_WEIGHTS = ('.bin', '.ckpt', '.gguf', '.h5', '.msgpack', '.onnx', '.pt', '.pth', '.safetensors')


class PushError(RuntimeError):
    """The Hub could not be reached, or did not take the files. Nothing is lost: the same push may work later."""


class _Refused(Exception):
    """Trying again would not help; becomes a ValueError."""


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
        raise ValueError(f'repo_id {repo_id!r} is not the name of a repository; give owner/name')
    if revision is not None and not re.fullmatch(r'(tag:)?[\w.][\w./-]*', revision):
        raise ValueError(f'revision {revision!r} is not a name; give a branch, or tag:NAME')
    if not get_token():
        raise ValueError(f'repo_id {repo_id!r} needs a login: run `hf auth login`, or set HF_TOKEN')


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
        raise ValueError(f'folder {str(folder)!r} is not an exported model: it has no {", ".join(missing)}')
    check_request(repo_id, revision)
    size = sum((folder / name).stat().st_size for name in FILES if (folder / name).is_file())
    if timeout is None:
        timeout = 300 + size / 5e5
    branch, tag = _parse_revision(revision)
    try:
        readme, message = _card_for(folder, repo_id, tag or branch), _commit_message(folder)
    except Exception as e:
        raise ValueError(f'folder {str(folder)!r} is not an exported model: {why(e)}') from e
    pushed = _ask(
        'push', timeout,
        repo_id=repo_id,
        folder=str(folder.absolute()),
        readme=readme,
        message=message,
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
    from .hub import export

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


def _parse_revision(revision: Optional[str]) -> Tuple[Optional[str], Optional[str]]:
    """Branch and tag, None for main and for no tag."""
    kind, _, name = (revision or '').rpartition(':')
    if kind == 'tag':
        return None, name
    return (None if name in ('', 'main') else name), None


def _card_for(folder: Path, repo_id: str, revision: Optional[str]) -> str:
    """The folder's card, with the model's place on the Hub where it says how to load it."""
    source = f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')
    sections = re.split(r'(?m)^(?=## )', (folder / 'README.md').read_text())
    return ''.join(
        # The command that trained it may name another model.
        text if text.startswith('## Training') else
        re.sub(r"(?:local-dir|hf-hub):[^'\n]+?(?='| --pretrained)", lambda match: source, text)
        for text in sections)


def _commit_message(folder: Path) -> str:
    config = json.loads((folder / 'config.json').read_text())
    results = ModelCard.load(folder / 'README.md').data.eval_results or []
    measured = [f'{r.metric_name} {r.metric_value:.2f} on {r.dataset_name} ({r.dataset_split})' for r in results[:1]]
    return ': '.join([f'{config["architecture"]} with {config["num_classes"]} classes', *measured])


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
        raise ValueError(answer['refused'])
    if 'failed' in answer:
        raise PushError(answer['failed'])
    if 'result' not in answer:
        doing = answer.get('doing', 'starting')
        raise PushError(
            f'no end of {doing} after {timeout:.0f} s' if timed_out else f'the process ended while {doing}')
    return answer['result']


# From here on: what runs in the process of its own.

_report = None


def serve() -> None:
    """Carry out the action on stdin, and report on stdout what is being done and what came of it, a JSON line each."""
    global _report
    lines = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever else wants to print
    request = json.load(sys.stdin)
    token = request.pop('token')

    def report(**line):
        lines.write(json.dumps(line).replace(token, '***') + '\n')
        lines.flush()

    _report = report
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    action = dict(check=_check, push=_push)[request.pop('action')]
    api = HfApi(token=token, library_name='dks-timm', library_version=__version__)
    try:
        report(result=action(api, **request))
    except _Refused as e:
        report(refused=str(e))
    except Exception as e:
        status = getattr(_response(e), 'status_code', None)
        repo_id = request['repo_id']
        if status == 401:
            report(refused=f'repo_id {repo_id!r}: the Hub does not accept the token; log in again: hf auth login')
        elif status == 403:
            report(refused=f'repo_id {repo_id!r}: the token may not write there; use one with write access to it, '
                           'or another repository')
        else:
            report(failed=_reason(e))
    os._exit(0)  # whatever threads of the client still wait for


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _check(api, repo_id, config, private, revision, overwrite):
    head, warnings = _prepare(api, repo_id, config, private, revision, overwrite)
    # The Hub answers this, too, only to those who may write, and nothing changes by it.
    api.preupload_lfs_files(repo_id, [CommitOperationAdd('README.md', b'-')])
    return warnings


def _push(api, repo_id, folder, readme, message, private, revision, overwrite, seconds):
    branch, tag = _parse_revision(revision)
    config = json.loads(Path(folder, 'config.json').read_text())
    contents = {name: Path(folder, name) for name in FILES if Path(folder, name).is_file()}
    contents['README.md'] = readme.encode()
    heads = []

    def attempt():
        # All of it once more after a failure: what has been done already is left alone by the client, also a commit
        # that took effect while its answer got lost.
        head, warnings = _prepare(api, repo_id, config, private, revision, overwrite)
        heads.append(head)
        if branch:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        there = {file.rfilename for file in api.model_info(repo_id, revision=branch).siblings or ()}
        stale = there & {*FILES, 'pytorch_model.bin'} - contents.keys()
        _report(doing='uploading')
        commit = api.create_commit(
            repo_id,
            [*(CommitOperationAdd(name, content) for name, content in contents.items()),
             *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=message,
            revision=branch,
        )
        if tag:
            _report(doing='tagging')
            api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)
            if api.model_info(repo_id, revision=tag).sha != commit.oid:
                raise _Refused(f'revision {revision!r}: the tag is on another commit already; choose another name')
        return dict(url=commit.commit_url, changed=commit.oid != heads[0], warnings=warnings)

    return _patiently(attempt, time.monotonic() + seconds)


def _prepare(api, repo_id, config, private, revision, overwrite):
    """See that the repository is there and may take the model; returns the commit to build on, and warnings."""
    _report(doing='asking for the repository')
    branch, tag = _parse_revision(revision)
    warnings = []
    info = _info(api, repo_id)
    if info is None:
        _report(doing='creating the repository')
        with _at_most(CREATE_SECONDS, 'creating the repository'):
            api.create_repo(repo_id, private=private, exist_ok=True)
        return None, warnings
    if private and info.private is False:
        warnings.append(f'{repo_id} is public, and stays so: only a new repository is made private')
    if tag:
        tagged = _info(api, repo_id, tag)
        if tagged is not None and tagged.sha != info.sha:
            raise _Refused(f'revision {revision!r}: there is such a tag already; choose another name')
    if branch:
        info = _info(api, repo_id, branch)
        if info is None:
            return None, warnings
    if not overwrite:
        _check_same_model(api, repo_id, info, config)
    return info.sha, warnings


def _info(api, repo_id, revision=None):
    try:
        return api.model_info(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        if e.response.status_code != 404:
            raise
        return None


def _check_same_model(api, repo_id, info, config):
    """Refuse a repository with a model of another architecture or for other classes."""
    files = {file.rfilename for file in info.siblings or ()}
    there = ', '.join(sorted(name for name in files if name.endswith(_WEIGHTS)))
    if 'config.json' in files:
        with tempfile.TemporaryDirectory() as cache:
            path = hf_hub_download(repo_id, 'config.json', revision=info.sha, cache_dir=cache, token=api.token)
            try:
                theirs = json.loads(Path(path).read_text())
                there = f'{theirs["architecture"]} with {theirs["num_classes"]} classes'
                labels = [c.get('label_names') for c in (config, theirs)]
                if all(theirs[key] == config[key] for key in ('architecture', 'num_classes')):
                    there = 'a model for other classes' if all(labels) and labels[0] != labels[1] else ''
            except (AttributeError, KeyError, TypeError, ValueError):
                there = 'a config.json that is not of timm'
    if there:
        raise _Refused(f'repo_id {repo_id!r} holds another model ({there}); choose another name, or --overwrite')


def _patiently(attempt, deadline):
    """The result of an attempt, of one more where the failure may pass."""
    for wait in [2 ** i for i in range(ATTEMPTS - 1)] + [None]:
        try:
            return attempt()
        except Exception as e:
            if wait is None or not _may_pass(e):
                raise
            wait = _retry_after(e) or wait
            if time.monotonic() + wait > deadline:
                raise _GaveUp(f'{_reason(e)}, and there is no time to wait {wait} s for the next attempt') from e
            print(f'{_reason(e)}; trying again in {wait} s', file=sys.stderr)
            time.sleep(wait)


class _GaveUp(Exception):
    pass


def _may_pass(error):
    status = getattr(_response(error), 'status_code', None)
    if status is None:
        return not isinstance(error, (_GaveUp, _Refused, OfflineModeIsEnabled, ValueError))
    return status in (408, 409, 412, 429) or status >= 500


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException):
    """The Hub's answer behind an error, None where there was none."""
    return next((e.response for e in _chain(error) if getattr(e, 'response', None) is not None), None)


def _retry_after(error) -> int:
    value = _response(error).headers.get('Retry-After', '') if _response(error) is not None else ''
    return int(value) + 1 if value.isdigit() else 0


def _reason(error: BaseException) -> str:
    if isinstance(error, _GaveUp):
        return str(error)
    response = _response(error)
    if response is None:
        origin = list(_chain(error))[-1]
        text = f'{type(origin).__name__}: {" ".join(str(origin).split())[:200]}'
        from_network = type(origin).__module__.startswith(('http', 'h11')) or isinstance(origin, ConnectionError)
        return f'the Hub cannot be reached ({text})' if from_network else text
    said = response.headers.get('X-Error-Message') or response.reason_phrase
    return f'the Hub answers {response.status_code} ({said})'


@contextmanager
def _at_most(seconds: float, doing: str):
    """Interrupt what takes longer: the client repeats some requests for as long as they are refused."""
    def stop(*_):
        raise _GaveUp(f'no end of {doing} after {seconds} s')

    if not hasattr(signal, 'setitimer'):
        yield
        return
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
