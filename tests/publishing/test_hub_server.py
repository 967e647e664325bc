"""The test Hub, asked by the real client: it has to answer as the Hub does, or tests against it would prove nothing."""
import pytest
from helpers.hub_server import HubServer, use
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

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


def status(function, *args, **kwargs):
    with pytest.raises(HfHubHTTPError) as e:
        function(*args, **kwargs)
    return e.value.response.status_code


def test_a_folder_is_one_commit_and_its_weights_go_to_a_storage_that_never_sees_the_token(hub, api, tmp_path):
    (tmp_path / 'folder').mkdir()
    for name, content in FILES.items():
        (tmp_path / 'folder' / name).write_bytes(content)
    assert api.create_repo('alice/net', private=True) == f'{hub.url}/alice/net'
    commit = api.upload_folder(repo_id='alice/net', folder_path=tmp_path / 'folder', commit_message='top-1 9.5')
    assert {name: hub.files('alice/net')[name] for name in FILES} == FILES
    latest, initial = hub.commits('alice/net')
    assert (latest.id, latest.parent, latest.title) == (commit.oid, initial.id, 'top-1 9.5')
    (upload,) = hub.requests_to('lfs-upload')
    assert upload.token is None and upload.body == WEIGHTS
    assert {r.token for r in hub.requests if r is not upload} == {hub.token}
    assert not hub.requests_to(None)  # nothing was asked that the server does not know
    assert api.upload_folder(repo_id='alice/net', folder_path=tmp_path / 'folder').oid == commit.oid
    assert len(hub.requests_to('commit')) == len(hub.requests_to('lfs-upload')) == 1


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


def test_revisions_hold_what_was_there_and_what_is_missing_is_told_apart(hub, api):
    hub.create('alice/net', {'config.json': b'1'})
    api.create_tag('alice/net', tag='v1')
    api.create_branch('alice/net', branch='dev/x', revision='v1')
    api.upload_file(repo_id='alice/net', path_in_repo='config.json', path_or_fileobj=b'2', revision='dev/x')
    for revision, content in (None, '1'), ('v1', '1'), ('dev/x', '2'):
        with open(api.hf_hub_download('alice/net', 'config.json', revision=revision)) as file:
            assert file.read() == content
    assert status(api.create_tag, 'alice/net', tag='v1') == 409
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download('alice/net', 'config.json', revision='v9')
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download('alice/net', 'missing')
