"""The test Hub, asked by the real client: it has to answer as the Hub does, or tests against it would prove nothing."""
import subprocess
import sys

import pytest
from helpers.hub_server import HubServer, use
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 2000
FILES = {'README.md': b'---\nlicense: mit\n---\n', 'config.json': b'{}', 'model.safetensors': WEIGHTS}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as hub:
        use(hub, monkeypatch, tmp_path / 'home')
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def read(api, revision):
    with open(api.hf_hub_download('alice/net', 'config.json', revision=revision), 'rb') as file:
        return file.read()


def status(function, *args, **kwargs):
    with pytest.raises(HfHubHTTPError) as e:
        function(*args, **kwargs)
    return e.value.response.status_code


def test_a_folder_is_one_commit_and_its_weights_go_to_a_storage_that_never_sees_the_token(hub, api, folder):
    assert api.create_repo('alice/net', private=True) == f'{hub.url}/alice/net'
    commit = api.upload_folder(repo_id='alice/net', folder_path=folder, commit_message='top-1 9.5')
    assert {name: hub.files('alice/net')[name] for name in FILES} == FILES
    latest, initial = hub.commits('alice/net')
    assert (latest.id, latest.parent, latest.title) == (commit.oid, initial.id, 'top-1 9.5')
    assert commit.commit_url == f'{hub.url}/alice/net/commit/{commit.oid}'
    (upload,) = hub.requests_to('lfs-upload')
    assert upload.token is None and upload.body == WEIGHTS
    assert {r.token for r in hub.requests if r is not upload} == {hub.token}
    assert not hub.requests_to(None)  # nothing was asked that the server does not know


def test_unchanged_files_make_no_commit_and_files_are_deleted_with_one(hub, api, folder):
    hub.create('alice/net', {**FILES, 'old.bin': b'0'}, private=True)
    first = hub.commits('alice/net')[0].id
    assert api.upload_folder(repo_id='alice/net', folder_path=folder).oid == first
    assert not hub.requests_to('commit', 'lfs-upload')
    api.upload_folder(repo_id='alice/net', folder_path=folder, delete_patterns=['old*', 'none'])
    assert sorted(hub.files('alice/net')) == ['.gitattributes', *FILES]


def test_a_private_repository_exists_for_its_owner_alone_and_takes_files_from_a_write_token_only(hub, api):
    hub.create('alice/net', FILES, private=True)
    bob, reader = (HfApi(hub.url, token=hub.add_user(*user)) for user in (('bob',), ('alice', 'read')))
    assert api.model_info('alice/net').private
    for other, code in (bob, 404), (HfApi(hub.url, token=False), 401):
        with pytest.raises(RepositoryNotFoundError):
            other.hf_hub_download('alice/net', 'config.json')
        assert status(other.model_info, 'alice/net') == code and not other.repo_exists('alice/net')
    assert status(HfApi(hub.url, token='hf_unknown').model_info, 'alice/net') == 401
    upload = dict(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='x')
    assert status(reader.upload_file, **upload) == status(reader.create_repo, 'alice/new') == 403
    assert status(bob.create_repo, 'alice/new') == 403
    assert status(api.create_repo, 'alice/net') == 409
    assert api.create_repo('alice/net', exist_ok=True).repo_id == 'alice/net'


def test_content_is_read_by_branch_tag_and_commit_and_what_is_missing_is_told_apart(hub, api):
    hub.create('alice/net', {'config.json': b'1'})
    first = hub.commits('alice/net')[0].id
    api.create_tag('alice/net', tag='v1')
    api.create_branch('alice/net', branch='dev/x', revision='v1')
    upload = dict(repo_id='alice/net', path_in_repo='config.json')
    api.upload_file(**upload, path_or_fileobj=b'2')
    api.upload_file(**upload, path_or_fileobj=b'3', revision='dev/x')
    assert [read(api, rev) for rev in (None, 'v1', first, 'dev/x')] == [b'2', b'1', b'1', b'3']
    refs = api.list_repo_refs('alice/net')
    assert {ref.name for ref in refs.branches} == {'main', 'dev/x'}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [('v1', first)]
    assert status(api.create_tag, 'alice/net', tag='v1') == 409
    assert api.list_repo_files('alice/net', revision='v1') == ['.gitattributes', 'config.json']
    with pytest.raises(RevisionNotFoundError):
        read(api, 'v9')
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download('alice/net', 'missing')


def test_faults_last_until_recovery_and_have_no_effect(hub, api):
    hub.create('alice/net')
    hub.fail('tag', 500, 'gone for a while')
    hub.slow('info', 60)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match='gone for a while'):
            api.create_tag('alice/net', tag='v1')
    with pytest.raises(HTTPError, match='timed out'):
        api.model_info('alice/net', timeout=.2)
    hub.recover()
    api.create_tag('alice/net', tag='v1')
    hub.stop()
    for _ in range(2):  # the first notices the closed connection
        with pytest.raises(HTTPError):
            api.model_info('alice/net')
    hub.start()
    assert api.model_info('alice/net').sha == hub.repos['alice/net'].tags['v1']


def test_a_request_that_the_server_does_not_know_is_an_error(hub, api):
    assert status(api.whoami) == 501 and len(hub.requests_to(None)) == 1


def test_a_process_of_its_own_is_led_to_the_server_by_its_environment(hub, tmp_path):
    hub.create('alice/net', FILES, private=True)
    code = 'import huggingface_hub as h; print(h.hf_hub_download("alice/net", "config.json"))'
    out = subprocess.run([sys.executable, '-c', code], env=hub.env(tmp_path), capture_output=True, text=True)
    assert out.stdout.startswith(str(tmp_path)), out.stderr
    assert {r.token for r in hub.requests} == {hub.token}
