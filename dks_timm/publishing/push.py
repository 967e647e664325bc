"""Pushing an exported folder to the Hugging Face Hub: one commit, with a bound on how long it may take.

Nothing here imports torch at module level.
"""
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import InputError, PushError, one_line
from .upload import FAILED, REFUSED

CHECK_SECONDS = 8  # a Hub that takes longer to answer does not hold training up

# The files of an export, in the order in which they are put in place: timm does not load a folder without config.json,
# so an interrupted replacement never looks like a model.
FILES = (
    'model.safetensors', 'branches.safetensors', 'dks_config.json', 'model.onnx', 'model.onnx.data', 'curves.svg',
    'README.md', 'config.json')


def check_request(repo_id, revision=None):
    """Check what can be checked without the Hub.

    Raises:
        ValueError: If the name is not one of a repository, or nobody is logged in on this machine.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise InputError(f'repo_id {repo_id!r} is not the name of a repository; give owner/name ({e})') from e
    if '/' not in repo_id:
        raise InputError(f'repo_id {repo_id!r} has no owner; give owner/name')
    if revision is not None and not re.fullmatch(r'(tag:)?[\w.][\w./-]*', revision):
        raise InputError(f'revision {revision!r} is not a name; give a branch, or tag:NAME')
    if not get_token():
        raise InputError(f'repo_id {repo_id!r} needs a login: run `hf auth login`, or set HF_TOKEN')


def check_repository(repo_id, config, private=True, revision=None, overwrite=False):
    """Check within seconds that a push of a model will be accepted, and raise what it would. Create the repository."""
    check_request(repo_id, revision)
    _ask_hub(CHECK_SECONDS, repo_id, revision, config=dict(config), private=private, overwrite=overwrite)


def push_folder(folder, repo_id, private=True, revision=None, overwrite=False, timeout=None):
    """Push an exported folder in one commit: files of the export alone, and only those that have changed.

    The arguments and errors are those of :func:`dks_timm.push_to_hub`.

    Returns:
        URL of the commit; of the present one where nothing has changed.
    """
    folder = Path(folder).absolute()
    missing = [name for name in ('config.json', 'model.safetensors', 'README.md') if not (folder / name).is_file()]
    if missing:
        raise InputError(f'folder {str(folder)!r} is not an exported model: it has no {", ".join(missing)}')
    files = [folder / name for name in FILES if (folder / name).is_file()]
    check_request(repo_id, revision)
    config, card = json.loads((folder / 'config.json').read_text()), ModelCard.load(folder / 'README.md')
    message = f'{config["architecture"]} with {config["num_classes"]} classes'
    for result in (card.data.eval_results or [])[:1]:
        message += f': {result.metric_name} {result.metric_value:.2f} on {result.dataset_name} ({result.dataset_split})'
    if timeout is None:
        timeout = 300 + sum(file.stat().st_size for file in files) / 5e5
    with tempfile.TemporaryDirectory(prefix='dks-timm-') as staged:
        for file in files:
            if file.name != 'README.md':
                Path(staged, file.name).symlink_to(file)
        Path(staged, 'README.md').write_text(_pushed_card(str(card), repo_id, revision), encoding='utf-8')
        return _ask_hub(
            timeout, repo_id, revision, config=config, private=private, overwrite=overwrite, folder=staged,
            message=message, names=FILES)


def hub_flags(private=True, revision=None, overwrite=False):
    """Return the flags of ``dks-timm`` for a push."""
    flags = ['--no-hub-private'] * (not private) + ['--overwrite'] * overwrite
    return flags + (['--hub-revision', revision] if revision else [])


def finishing_line(folder, repo_id, *request):
    """Return the shell command that pushes a folder; ``request`` as in :func:`hub_flags`."""
    return shlex.join(['dks-timm', 'push', str(folder), repo_id, *hub_flags(*request)])


def _pushed_card(text, repo_id, revision):
    """Return a card that names the model's place on the Hub where it says how to load it."""
    found = re.search(r"create_model\('((?:local-dir|hf-hub):(.+))', pretrained", text)
    revision = (revision or 'main').removeprefix('tag:')
    source, pipeline = f'hf-hub:{repo_id}', f"model='{repo_id}'"
    if revision != 'main':
        source, pipeline = f'{source}@{revision}', f"{pipeline}, revision='{revision}'"
    if found:
        text = text.replace(f"model='{found[2]}'", pipeline)
        text = re.sub(rf"{re.escape(found[1])}(?='| --pretrained)", source, text)
    return text


def _ask_hub(timeout, repo_id, revision, **request):
    """Let a process of its own carry out a request to the Hub, end it at the timeout (s), and return its answer."""
    kind, _, name = (revision or 'main').rpartition(':')
    request.update(repo_id=repo_id, branch='main' if kind else name, tag=name if kind else None)
    try:
        child = subprocess.run(
            [sys.executable, Path(__file__).with_name('upload.py')], input=json.dumps(request), stdout=subprocess.PIPE,
            text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise PushError(f'the Hub took longer than {timeout:.0f} s') from None
    said = one_line(child.stdout.strip().rpartition('\n')[-1])
    if child.returncode == REFUSED:
        raise InputError(f'repo_id {repo_id!r}: {said}')
    if child.returncode == FAILED:
        raise PushError(f'the Hub did not take it: {said}')
    child.check_returncode()
    return said
