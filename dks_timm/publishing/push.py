"""Pushing an exported folder to the Hugging Face Hub: one commit, with a bound on how long it may take.

Nothing here imports torch at module level.
"""
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import yaml
from huggingface_hub import EvalResult, ModelCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError, PushError, why

__all__ = ['FILES', 'check_repository', 'check_request', 'finishing_line', 'local_name', 'push_folder']

PathLike = Union[str, os.PathLike]

_logger = logging.getLogger(__name__)

CHECK_SECONDS = 8  # a Hub that takes longer to answer does not hold training up

# The files of an export, in the order in which they are put in place: timm does not load a folder without config.json,
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
    """Check within seconds that a push of a model will be accepted. A repository that does not exist is created.

    Args:
        repo_id: Repository, owner/name; this and what follows the model as in :func:`push_folder`.
        config: The model: ``architecture``, ``num_classes`` and, where known, ``label_names``.

    Returns:
        Warnings to show.

    Raises:
        ValueError: If the token is not accepted, may not write there, or the repository holds another model.
        PushError: If the Hub cannot be asked now.
    """
    check_request(repo_id, revision)
    answer = _ask(
        CHECK_SECONDS, repo_id=repo_id, config=dict(config), private=private, overwrite=overwrite,
        **_branch_and_tag(revision))
    return answer['warnings']


def push_folder(
        folder: PathLike,
        repo_id: str,
        private: bool = True,
        revision: Optional[str] = None,
        overwrite: bool = False,
        timeout: Optional[float] = None,
) -> str:
    """Push an exported folder in one commit: files of the export alone, and only those that have changed.

    Args:
        folder: Folder that :func:`dks_timm.export` wrote.
        repo_id: Repository, owner/name; created if it does not exist. The card on the Hub names it.
        private: Make a new repository private. The visibility of an existing one stays.
        revision: Branch to commit to, created from main if it does not exist; or ``tag:NAME`` to tag a commit on main.
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
    files = [(folder / name).absolute() for name in FILES if (folder / name).is_file()]
    size = sum(file.stat().st_size for file in files)
    request = dict(repo_id=repo_id, private=private, overwrite=overwrite, **_branch_and_tag(revision))
    config, card, message = _read_export(folder)
    given = local_name(config['architecture'], card.data.eval_results, card.data.datasets)
    with tempfile.TemporaryDirectory(prefix='dks-timm-') as staged:
        for file in files:
            if file.name != 'README.md':
                Path(staged, file.name).symlink_to(file)
        Path(staged, 'README.md').write_text(_pushed_card(card, given, repo_id, revision), encoding='utf-8')
        pushed = _ask(
            300 + size / 5e5 if timeout is None else timeout,
            folder=staged, config=config, message=message, names=[*FILES, 'pytorch_model.bin'], **request)
    for warning in pushed['warnings']:
        _logger.warning(warning)
    _logger.info(f'Pushed {size / 1e6:.1f} MB to {repo_id}.' if pushed['changed'] else f'{repo_id} is up to date.')
    return pushed['url']


def finishing_line(
        folder: PathLike,
        repo_id: str,
        private: bool = True,
        revision: Optional[str] = None,
        overwrite: bool = False,
) -> str:
    """Return the shell command that pushes a folder."""
    flags = [] if private else ['--no-hub-private']
    if revision:
        flags += ['--hub-revision', revision]
    return shlex.join(['dks-timm', 'push', str(folder), repo_id, *flags, *(['--overwrite'] if overwrite else [])])


def local_name(architecture: str, results: Optional[Sequence[EvalResult]], datasets: Optional[Sequence[str]]) -> str:
    """Return the name of a model that has no repository yet: its architecture and, where known, its data."""
    names = [result.dataset_name for result in results or ()] or list(datasets or ())
    return f'{architecture} on {names[0]}' if names else architecture


def _read_export(folder: Path) -> Tuple[Dict[str, Any], ModelCard, str]:
    """Return an exported folder's config, its card, and the message of the commit that pushes it."""
    try:
        config, card = json.loads((folder / 'config.json').read_text()), ModelCard.load(folder / 'README.md')
        message = f'{config["architecture"]} with {config["num_classes"]} classes'
        for r in (card.data.eval_results or [])[:1]:
            message += f': {r.metric_name} {r.metric_value:.2f} on {r.dataset_name} ({r.dataset_split})'
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as e:
        raise InputError(f'folder {str(folder)!r} is not an exported model: {why(e)}') from e
    return config, card, message


def _branch_and_tag(revision: Optional[str]) -> Dict[str, Optional[str]]:
    kind, _, name = (revision or 'main').rpartition(':')
    return dict(branch='main', tag=name) if kind == 'tag' else dict(branch=name, tag=None)


def _pushed_card(card: ModelCard, given: str, repo_id: str, revision: Optional[str]) -> str:
    """Return a card that names the model's place on the Hub where it says how to load it.

    Its title becomes the name of the repository, unless someone chose another one than the export gives.
    """
    revision = (revision or 'main').removeprefix('tag:')
    source, pipeline = f'hf-hub:{repo_id}', f"model='{repo_id}'"
    if revision != 'main':
        source, pipeline = f'{source}@{revision}', f"{pipeline}, revision='{revision}'"
    name = repo_id.rpartition('/')[2]
    if card.data.model_name == given:
        card.data.model_name = name
    sections = re.split(r'(?m)^(?=## )', str(card).replace(f'\n# {given}\n', f'\n# {name}\n', 1))
    for i, text in enumerate(sections):
        if not text.startswith('## Training'):  # the command that trained it may name another model
            text = re.sub(r"(?:local-dir|hf-hub):[^'\n]+?(?='| --pretrained)", source, text)
            sections[i] = re.sub(
                r"(?<='image-classification', )model='[^'\n]+'(, revision='[^'\n]+')?", pipeline, text)
    return ''.join(sections)


def _ask(timeout: float, **request: Any) -> Dict[str, Any]:
    """Let a process of its own carry out a request to the Hub, and end it at the timeout, in seconds."""
    script = Path(__file__).with_name('upload.py')
    try:
        child = subprocess.run(
            [sys.executable, script], input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True,
            timeout=timeout)
    except subprocess.TimeoutExpired:
        raise PushError(f'the Hub took longer than {timeout:.0f} s') from None
    answer = json.loads(child.stdout.splitlines()[-1])
    if 'refused' in answer:
        raise InputError(answer['refused'])
    if 'failed' in answer:
        raise PushError(' '.join(answer['failed'].split()))
    return answer
