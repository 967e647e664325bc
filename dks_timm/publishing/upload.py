"""The requests of a push, as a script of its own: a process can be ended where the client waits without bound.

It reads a request from stdin and writes the URL of the commit, or what went wrong, to stdout; see `push._ask_hub`. It
is run by its path and imports the Hub's client alone, so that it starts within a second.
"""
import json
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # private: huggingface_hub errors.HTTPError, httpx's

REFUSED, FAILED = 2, 3  # exit codes: the same push will never succeed, or it may succeed later


class Refused(Exception):
    """The repository does not take the model."""


def push(api, repo_id, config, private, branch, tag, overwrite, folder=None, message=None, names=None):
    """Check that a repository, created if need be, takes a model; then commit a folder's files to a branch.

    Files of the names that the folder does not have are deleted; the commit gets the tag.
    """
    api.create_repo(repo_id, private=private, exist_ok=True)
    # The Hub answers this only to those who may write.
    api.preupload_lfs_files(repo_id, [CommitOperationAdd('README.md', b'-')])
    refs = api.list_repo_refs(repo_id)
    branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
    if tag in tags and tags[tag] != branches['main']:
        raise Refused(f'it has a tag {tag} already; choose another name')
    if branch in branches and not overwrite and api.file_exists(repo_id, 'config.json', revision=branch):
        theirs = json.loads(Path(api.hf_hub_download(repo_id, 'config.json', revision=branch)).read_text())
        keys = ['architecture', 'num_classes']
        if config.get('label_names') and theirs.get('label_names'):
            keys.append('label_names')
        differ = [key for key in keys if theirs.get(key) != config[key]]
        if differ:
            raise Refused(f'it holds another model (other {", ".join(differ)}); choose another name, or --overwrite')
    if folder is None:
        return ''
    if branch not in branches:
        api.create_branch(repo_id, branch=branch)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message, delete_patterns=names)
    if tag and tags.get(tag) != commit.oid:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.commit_url


def main():
    request = json.load(sys.stdin)
    try:
        said, code = push(HfApi(library_name='dks-timm'), **request), 0
    except Refused as e:
        said, code = e, REFUSED
    except (HTTPError, OSError, RuntimeError, ValueError) as e:
        error = isinstance(e, RuntimeError) and e.__cause__ or e  # of an upload, the cause says more
        said = f'{type(error).__name__}: {error}'
        not_allowed = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        code = REFUSED if not_allowed else FAILED
    print(' '.join(str(said).split()).replace(get_token(), '***'))  # a server may say it
    sys.exit(code)


if __name__ == '__main__':
    main()
