"""The conversation with the Hub of a push, in a process of its own: see `push`. Nothing here imports torch."""
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from .. import __version__
from .push import FILES, parse_revision

CREATE_SECONDS = 30
ATTEMPTS = 4

_WEIGHTS = ('.bin', '.ckpt', '.gguf', '.h5', '.msgpack', '.onnx', '.pt', '.pth', '.safetensors')

_report = None


class _Refused(Exception):
    """Trying again would not help; becomes a ValueError."""


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
            if isinstance(e, (AttributeError, NameError, TypeError)):
                traceback.print_exc()  # an error of the program
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
    branch, tag = parse_revision(revision)
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
    branch, tag = parse_revision(revision)
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
