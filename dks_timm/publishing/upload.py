"""What a push asks of the Hub, as a script of its own: a process can be ended where the client waits without bound.

It reads a request from stdin and writes its answer to stdout, both as JSON; see `push._ask`. It is run by its path and
imports the Hub's client alone, so that it starts within a second.
"""
import json
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # private: huggingface_hub errors.HTTPError, httpx's

_WEIGHTS = ('.bin', '.ckpt', '.gguf', '.h5', '.msgpack', '.onnx', '.pt', '.pth', '.safetensors')


class Refused(Exception):
    """The Hub can be asked, and the same push will never succeed."""


def prepare(api, repo_id, config, private, branch, tag, overwrite):
    """Create the repository if it does not exist, and refuse one that may not take the model.

    Returns:
        The commits of its branches and of its tags by name, and the warnings to show.
    """
    if not api.repo_exists(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
    warnings = []
    if private and not api.repo_info(repo_id).private:
        warnings.append(f'{repo_id} is public, and stays so: only a new repository is made private')
    refs = api.list_repo_refs(repo_id)
    branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
    if tag in tags and tags[tag] != branches.get('main'):
        raise Refused(f"revision 'tag:{tag}': there is such a tag already; choose another name")
    if branch in branches and not overwrite:
        check_same_model(api, repo_id, branches[branch], config)
    return branches, tags, warnings


def check_same_model(api, repo_id, commit, config):
    """Refuse a commit that holds a model of another architecture or for other classes."""
    files = api.list_repo_files(repo_id, revision=commit)
    there = ', '.join(sorted(name for name in files if name.endswith(_WEIGHTS)))
    if 'config.json' in files:
        path = api.hf_hub_download(repo_id, 'config.json', revision=commit)
        try:
            theirs = json.loads(Path(path).read_text())
            there = f'{theirs["architecture"]} with {theirs["num_classes"]} classes'
            labels = [c.get('label_names') for c in (config, theirs)]
            if all(theirs[key] == config[key] for key in ('architecture', 'num_classes')):
                there = 'a model for other classes' if all(labels) and labels[0] != labels[1] else ''
        except (KeyError, TypeError, ValueError):
            there = 'a config.json that is not of timm'
    if there:
        raise Refused(f'repo_id {repo_id!r} holds another model ({there}); choose another name, or --overwrite')


def check(api, repo_id, **request):
    """See that a push will be accepted, also that the token may write, without changing a file."""
    _, _, warnings = prepare(api, repo_id, **request)
    # The Hub answers this only to those who may write.
    api.preupload_lfs_files(repo_id, [CommitOperationAdd('README.md', b'-')])
    return dict(warnings=warnings)


def push(api, repo_id, folder, message, names, **request):
    """Commit a folder's files to a branch, deleting those of the names that it does not have, and tag the commit."""
    branch, tag = request['branch'], request['tag']
    branches, tags, warnings = prepare(api, repo_id, **request)
    if branch not in branches:
        api.create_branch(repo_id, branch=branch)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message, delete_patterns=names)
    if tag and tags.get(tag) != commit.oid:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return dict(url=commit.commit_url, changed=commit.oid != branches.get(branch), warnings=warnings)


def failure(error, repo_id):
    """The answer for an error of the client: a refusal where another attempt would not help."""
    if isinstance(error, RuntimeError):  # of an upload; its cause says more
        error = error.__cause__ or error
    if isinstance(error, HfHubHTTPError):
        answer = error.response
        if answer.status_code == 401:
            return dict(refused=f'repo_id {repo_id!r}: the Hub does not accept the token; log in again: hf auth login')
        if answer.status_code == 403:
            return dict(refused=f'repo_id {repo_id!r}: the token may not write there; use one with write access to '
                                'it, or another repository')
        said = answer.headers.get('X-Error-Message') or answer.reason_phrase
        return dict(failed=f'the Hub answers {answer.status_code} ({said})')
    away = 'the Hub cannot be reached: ' if isinstance(error, (ConnectionError, HTTPError)) else ''
    return dict(failed=f'{away}{type(error).__name__}: {error}')


def main():
    request = json.load(sys.stdin)
    repo_id = request['repo_id']
    api = HfApi(library_name='dks-timm')
    try:
        answer = push(api, **request) if 'folder' in request else check(api, **request)
    except Refused as e:
        answer = dict(refused=str(e))
    except (HTTPError, OSError, RuntimeError, ValueError) as e:
        answer = failure(e, repo_id)
    print(json.dumps(answer).replace(get_token(), '***'))  # a server may say it


if __name__ == '__main__':
    main()
