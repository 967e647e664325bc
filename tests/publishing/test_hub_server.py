"""The test Hub, asked by the real client. Runs under huggingface_hub 1.x and 2.x, without torch too (--noconftest)."""
import importlib
import os
import subprocess
import sys
import time

import huggingface_hub
import pytest
from helpers.hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# httpx under huggingface_hub 1.x, httpx2 under 2.x.
httpx = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition('.')[0])

WEIGHTS = bytes(range(256)) * 2000
CARD = b'---\nlicense: mit\n---\n'
FILES = {'README.md': CARD, 'config.json': b'{}', 'model.safetensors': WEIGHTS, 'sub/empty.txt': b''}
UPLOAD_ROUTES = ('preupload', 'lfs-batch', 'lfs-upload', 'lfs-verify')


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / 'home')
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def waits(monkeypatch):
    """The client's waits before it tries again, written down instead of waited for."""
    waits = []
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', waits.append)
    return waits


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / 'folder', FILES)


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def pushed(hub, repo_id='alice/net', rev='main'):
    """Files of a repository without the one that every repository begins with."""
    return {path: content for path, content in hub.files(repo_id, rev).items() if path != '.gitattributes'}


def read(api, path='config.json', **kwargs):
    with open(api.hf_hub_download('alice/net', path, **kwargs), 'rb') as file:
        return file.read()


def test_a_folder_comes_back_as_it_was_pushed_in_one_commit(hub, api, folder):
    assert api.create_repo('alice/net', private=True) == f'{hub.url}/alice/net'
    commit = api.upload_folder(
        repo_id='alice/net', folder_path=folder, commit_message='top-1 9.5', commit_description='d')
    assert pushed(hub) == FILES
    latest, initial = hub.commits('alice/net')
    assert (latest.id, latest.parent, latest.title) == (commit.oid, initial.id, 'top-1 9.5')
    assert (latest.description, latest.author) == ('d', 'alice')
    assert commit.commit_url == f'{hub.url}/alice/net/commit/{commit.oid}'
    snapshot = api.snapshot_download('alice/net')
    assert os.path.basename(snapshot) == commit.oid
    assert {path: open(os.path.join(snapshot, path), 'rb').read() for path in FILES} == FILES
    assert not hub.requests_to(None)  # nothing was asked that the server does not know


def test_weights_go_through_lfs_and_the_storage_never_sees_the_token(hub, api, folder):
    api.create_repo('alice/net')
    api.upload_folder(repo_id='alice/net', folder_path=folder)
    (upload,) = hub.requests_to('lfs-upload')
    assert (upload.method, upload.size, upload.token) == ('PUT', len(WEIGHTS), None)
    assert {r.token for r in hub.requests if r.route != 'lfs-upload'} == {hub.token}
    (commit,) = hub.requests_to('commit')
    assert commit.size < len(WEIGHTS)
    assert [path for path, file in hub.commits('alice/net')[0].files.items() if file.lfs] == ['model.safetensors']
    siblings = {s.rfilename: s for s in api.model_info('alice/net', files_metadata=True).siblings}
    assert siblings['model.safetensors'].lfs.size == len(WEIGHTS) and siblings['config.json'].lfs is None


def test_unchanged_files_make_no_commit_and_a_changed_one_is_sent_alone(hub, api, folder):
    api.create_repo('alice/net')
    first = api.upload_folder(repo_id='alice/net', folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id='alice/net', folder_path=folder).oid == first.oid
    assert len(hub.commits('alice/net')) == 2 and not hub.requests_to('commit', 'lfs-upload')
    write(folder, {'config.json': b'{"a": 1}', 'copy.safetensors': WEIGHTS})
    api.upload_folder(repo_id='alice/net', folder_path=folder)
    assert len(hub.commits('alice/net')) == 3 and not hub.requests_to('lfs-upload')
    (commit,) = hub.requests_to('commit')
    assert commit.body.count(b'\n') == 3 and b'README.md' not in commit.body
    assert pushed(hub)['copy.safetensors'] == WEIGHTS


def test_files_are_deleted_with_a_commit(hub, api, folder):
    hub.create('alice/net', {'old.bin': b'0', 'sub/old.txt': b'1'})
    api.upload_folder(repo_id='alice/net', folder_path=folder, delete_patterns=['*old*'])
    assert pushed(hub) == FILES
    api.delete_folder('sub', repo_id='alice/net')
    assert 'sub/empty.txt' not in pushed(hub)
    with pytest.raises(EntryNotFoundError):
        api.delete_file('missing', repo_id='alice/net')


def test_an_existing_repo_is_a_conflict_unless_it_may_exist(hub, api):
    url = api.create_repo('alice/net', private=True)
    with pytest.raises(HfHubHTTPError) as e:
        api.create_repo('alice/net')
    assert e.value.response.status_code == 409
    assert api.create_repo('alice/net', exist_ok=True, private=False) == url
    assert hub.repos['alice/net'].private  # exist_ok changes nothing
    assert api.create_repo('own').repo_id == 'alice/own' and not hub.repos['alice/own'].private


def test_a_private_repo_exists_for_its_owners_only(hub, api):
    hub.create('alice/net', FILES, private=True)
    hub.create('lab/net', private=True)
    bob, nobody, stranger = (HfApi(hub.url, token=t) for t in (hub.add_user('bob'), False, 'hf_unknown'))
    assert api.model_info('alice/net').private and api.model_info('lab/net').id == 'lab/net'
    for other, status in (bob, 404), (nobody, 401):
        with pytest.raises(RepositoryNotFoundError) as e:
            other.model_info('alice/net')
        assert e.value.response.status_code == status and not other.repo_exists('alice/net')
        with pytest.raises(RepositoryNotFoundError):
            other.hf_hub_download('alice/net', 'config.json')
    with pytest.raises(HfHubHTTPError, match='Invalid credentials') as e:
        stranger.model_info('alice/net')
    assert not isinstance(e.value, RepositoryNotFoundError)
    api.update_repo_settings('alice/net', private=False)
    assert not nobody.model_info('alice/net').private


def test_writing_needs_a_write_token_of_the_owner(hub, api):
    hub.create('alice/net')
    bob, reader = hub.add_user('bob'), hub.add_user('alice', role='read')
    assert api.whoami()['auth']['accessToken']['role'] == 'write' and api.whoami()['orgs'][0]['name'] == 'lab'
    api.auth_check('alice/net', write=True)
    for token in bob, reader:
        other = HfApi(hub.url, token=token)
        other.auth_check('alice/net')
        for attempt in (
                lambda o=other: o.auth_check('alice/net', write=True),
                lambda o=other: o.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='f'),
                lambda o=other: o.create_repo('alice/new'),
                lambda o=other: o.create_tag('alice/net', tag='v1'),
        ):
            with pytest.raises(HfHubHTTPError) as e:
                attempt()
            assert e.value.response.status_code == 403
    nobody = HfApi(hub.url, token=False)
    with pytest.raises(RepositoryNotFoundError):
        nobody.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='f')
    with pytest.raises(HfHubHTTPError) as e:
        nobody.create_repo('alice/new')
    assert e.value.response.status_code == 401
    assert pushed(hub) == {} and list(hub.repos) == ['alice/net']


def test_old_content_is_read_by_tag_branch_and_commit_id(hub, api, tmp_path):
    hub.create('alice/net', {'config.json': b'1'})
    first = hub.commits('alice/net')[0].id
    api.create_tag('alice/net', tag='v1', tag_message='the first')
    api.create_branch('alice/net', branch='dev/x', revision='v1')
    api.upload_file(repo_id='alice/net', path_or_fileobj=b'2', path_in_repo='config.json')
    on_branch = api.upload_file(
        repo_id='alice/net', path_or_fileobj=b'3', path_in_repo='config.json', revision='dev/x').oid
    for rev, content in (None, b'2'), ('main', b'2'), ('v1', b'1'), (first, b'1'), ('dev/x', b'3'), (on_branch, b'3'):
        assert read(api, revision=rev, cache_dir=tmp_path / str(content)) == content
    assert [c.parent for c in hub.commits('alice/net', 'dev/x')][0] == first
    assert [c.commit_id for c in api.list_repo_commits('alice/net', revision='dev/x')][:2] == [on_branch, first]
    refs = api.list_repo_refs('alice/net')
    assert {b.name: b.target_commit for b in refs.branches}['dev/x'] == on_branch
    assert [(t.name, t.target_commit) for t in refs.tags] == [('v1', first)]
    assert api.model_info('alice/net', revision='v1').sha == first
    assert api.list_repo_files('alice/net', revision='v1') == ['.gitattributes', 'config.json']
    with pytest.raises(HfHubHTTPError) as e:
        api.create_tag('alice/net', tag='v1')
    assert e.value.response.status_code == 409
    api.create_tag('alice/net', tag='v1', exist_ok=True)
    api.delete_tag('alice/net', tag='v1')
    with pytest.raises(RevisionNotFoundError):
        api.model_info('alice/net', revision='v1')


def test_a_commit_upon_an_outdated_parent_is_refused(hub, api):
    hub.create('alice/net')
    start = hub.commits('alice/net')[0].id
    api.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='a', parent_commit=start)
    with pytest.raises(HfHubHTTPError) as e:
        api.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='b', parent_commit=start)
    assert e.value.response.status_code == 412 and 'b' not in pushed(hub)


def test_what_is_missing_or_restricted_is_told_apart(hub, api):
    hub.create('alice/net', FILES)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download('alice/other', 'config.json')
    with pytest.raises(RevisionNotFoundError):
        read(api, revision='v9')
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='f', revision='v9')
    with pytest.raises(EntryNotFoundError) as e:
        read(api, 'missing.json')
    assert not isinstance(e.value, LocalEntryNotFoundError) and not api.file_exists('alice/net', 'missing.json')
    api.update_repo_settings('alice/net', gated='auto')
    with pytest.raises(GatedRepoError):
        HfApi(hub.url, token=hub.add_user('bob')).hf_hub_download('alice/net', 'config.json')
    assert read(api) == b'{}'


def test_trees_list_folders_and_what_is_in_them(hub, api):
    hub.create('alice/net', FILES)
    assert [e.path for e in api.list_repo_tree('alice/net')] == [
        '.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'sub']
    assert [e.path for e in api.list_repo_tree('alice/net', 'sub')] == ['sub/empty.txt']
    (info,) = api.get_paths_info('alice/net', ['model.safetensors', 'missing'])
    assert info.lfs.size == len(WEIGHTS) and info.lfs.sha256 == hub.commits('alice/net')[0].files[info.path].oid


@pytest.mark.parametrize('status', [401, 403, 404, 409, 500])
@pytest.mark.parametrize('route', ['whoami', 'create', 'info', 'commit', 'tag', 'branch', 'settings', 'validate-yaml'])
def test_an_error_reaches_the_caller_at_once_and_has_no_effect(hub, api, waits, route, status):
    hub.create('alice/net')
    hub.fail(route, status)
    attempt = {
        'whoami': api.whoami,
        'create': lambda: api.create_repo('alice/new', exist_ok=False),
        'info': lambda: api.model_info('alice/net'),
        'commit': lambda: api.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='f'),
        'tag': lambda: api.create_tag('alice/net', tag='v1'),
        'branch': lambda: api.create_branch('alice/net', branch='dev'),
        'settings': lambda: api.update_repo_settings('alice/net', private=True),
        'validate-yaml': lambda: api.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='README.md'),
    }[route]
    with pytest.raises(HfHubHTTPError) as e:
        attempt()
    assert e.value.response.status_code == status and [r.status for r in hub.requests_to(route)] == [status]
    assert waits == []
    repo = hub.repos['alice/net']
    assert (list(hub.repos), len(repo.by_id), list(repo.branches), repo.tags) == (['alice/net'], 1, ['main'], {})
    assert not repo.private
    attempt()  # a fault hits once


@pytest.mark.parametrize('code, kind', [
    ('RepoNotFound', RepositoryNotFoundError),
    ('RevisionNotFound', RevisionNotFoundError),
    ('EntryNotFound', EntryNotFoundError),
    ('GatedRepo', GatedRepoError),
    ('', HfHubHTTPError),
])
def test_an_error_code_decides_upon_the_exception(hub, api, code, kind):
    hub.create('alice/net')
    hub.fail('info', 404, code=code, message='gone for a while')
    with pytest.raises(HfHubHTTPError, match='gone for a while') as e:
        api.model_info('alice/net')
    assert isinstance(e.value, kind) and (code or type(e.value) is HfHubHTTPError)


def test_invalid_metadata_of_a_card_is_refused_with_the_reason(hub, api):
    hub.create('alice/net')
    hub.fail('validate-yaml', 400, errors=[{'message': 'license is unknown'}])
    with pytest.raises(ValueError, match='license is unknown') as e:
        api.upload_file(repo_id='alice/net', path_or_fileobj=b'', path_in_repo='README.md')
    assert isinstance(e.value.__cause__, BadRequestError) and pushed(hub) == {}


@pytest.mark.parametrize('route', UPLOAD_ROUTES)
def test_a_rate_limit_is_waited_for_as_long_as_it_asks(hub, api, folder, waits, route):
    hub.create('alice/net')
    hub.fail(route, 429, retry_after=3000)
    api.upload_folder(repo_id='alice/net', folder_path=folder)
    assert waits == [3001.] and pushed(hub) == FILES


@pytest.mark.parametrize('route', UPLOAD_ROUTES)
def test_a_lasting_server_error_ends_an_upload_after_six_attempts(hub, api, folder, waits, route):
    hub.create('alice/net')
    hub.fail(route, 500, times=None)
    with pytest.raises((HfHubHTTPError, RuntimeError)):  # RuntimeError: what the client makes of a failed LFS upload
        api.upload_folder(repo_id='alice/net', folder_path=folder)
    assert waits == [1, 2, 4, 8, 8] and len(hub.requests_to(route)) == 6 and pushed(hub) == {}
    hub.recover()
    api.upload_folder(repo_id='alice/net', folder_path=folder)
    assert pushed(hub) == FILES


@pytest.mark.parametrize('when', ['upload', 'before', 'answer', 'after'])
@pytest.mark.parametrize('route', UPLOAD_ROUTES)
def test_an_upload_survives_a_dropped_connection(hub, api, folder, waits, route, when):
    hub.create('alice/net')
    hub.drop(route, when=when)
    api.upload_folder(repo_id='alice/net', folder_path=folder)
    assert pushed(hub) == FILES and len(hub.commits('alice/net')) == 2
    assert len(waits) == 1


@pytest.mark.parametrize('when', ['upload', 'before'])
def test_a_commit_whose_connection_drops_is_not_made_nor_tried_again(hub, api, folder, waits, when):
    hub.create('alice/net')
    hub.drop('commit', when=when)
    with pytest.raises(httpx.TransportError):
        api.upload_folder(repo_id='alice/net', folder_path=folder)
    assert [r.status for r in hub.requests_to('commit')] == [None] and pushed(hub) == {} and waits == []


def test_a_commit_whose_response_is_lost_is_made_and_pushing_again_changes_nothing(hub, api, folder, waits):
    hub.create('alice/net')
    hub.lose_response('commit')
    with pytest.raises(httpx.TransportError):
        api.upload_folder(repo_id='alice/net', folder_path=folder)
    assert pushed(hub) == FILES and len(hub.requests_to('commit')) == 1
    assert api.upload_folder(repo_id='alice/net', folder_path=folder).oid == hub.commits('alice/net')[0].id
    assert len(hub.commits('alice/net')) == 2


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, api, waits, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE', 1000)
    hub.create('alice/net', FILES)
    hub.drop('resolve', when='answer')
    assert read(api, 'model.safetensors') == WEIGHTS
    head, broken, rest = hub.requests_to('resolve')
    assert (head.method, broken.status, rest.status) == ('HEAD', 200, 206)
    assert rest.headers['range'] == f'bytes={len(WEIGHTS) // 2}-'


def test_a_server_that_stops_refuses_connections_until_it_starts_again(hub, api):
    hub.create('alice/net')
    api.model_info('alice/net')  # leaves an open connection behind
    url = hub.url
    hub.stop()
    for _ in range(2):  # the first notices the closed connection
        with pytest.raises(httpx.TransportError):
            api.model_info('alice/net')
    with pytest.raises(httpx.ConnectError):
        api.model_info('alice/net')
    hub.start()
    assert hub.url == url and api.model_info('alice/net').id == 'alice/net'


def test_a_slow_server_runs_into_the_callers_time_out_and_does_not_delay_its_own_end(hub, api):
    hub.create('alice/net')
    hub.slow('info', 60)
    hub.fail('info', 500, skip=1)
    start = time.monotonic()
    with pytest.raises(httpx.TimeoutException):
        api.model_info('alice/net', timeout=.2)
    with pytest.raises(HfHubHTTPError):
        api.model_info('alice/net')
    hub.stop()
    assert time.monotonic() - start < 30


def test_faults_are_aimed_by_count_and_path(hub, api):
    hub.create('alice/net', FILES)
    hub.fail('resolve', 403, times=2, skip=1, path='config')
    found = [api.file_exists('alice/net', 'README.md')]
    for _ in range(4):
        try:
            found.append(api.file_exists('alice/net', 'config.json'))
        except HfHubHTTPError as e:
            found.append(e.response.status_code)
    assert found == [True, True, 403, 403, True]
    with pytest.raises(ValueError, match="when is 'later'"):
        hub.drop('info', when='later')


def test_a_request_that_the_server_does_not_know_is_an_error(hub, api):
    hub.create('alice/net')
    with pytest.raises(HfHubHTTPError) as e:
        api.get_repo_discussions('alice/net').__next__()
    assert e.value.response.status_code == 501 and len(hub.requests_to(None)) == 1
    with pytest.raises(HfHubHTTPError):
        api.create_commit('alice/net', [CommitOperationAdd('f', b'')], commit_message='m', create_pr=True)
    assert pushed(hub) == {}


def test_a_process_of_its_own_is_led_to_the_server_by_its_environment(hub, tmp_path):
    hub.create('alice/net', FILES, private=True)
    code = 'import huggingface_hub as h; print(h.whoami()["name"], h.hf_hub_download("alice/net", "config.json"))'

    def run(**kwargs):
        env = hub.env(tmp_path, **kwargs)
        return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)

    name, path = run().stdout.split()
    assert name == 'alice' and path.startswith(str(tmp_path))
    assert {r.token for r in hub.requests} == {hub.token}
    hub.requests.clear()
    assert 'LocalTokenNotFoundError' in run(token=False).stderr and hub.requests == []


def test_the_client_of_this_process_is_led_to_the_server_too(hub, tmp_path, monkeypatch):
    hub.create('alice/net', FILES, private=True)
    assert huggingface_hub.whoami()['name'] == 'alice'
    assert huggingface_hub.hf_hub_download('alice/net', 'config.json').startswith(str(tmp_path))
    hub.use(monkeypatch, tmp_path / 'other', token=False)
    with pytest.raises(LocalTokenNotFoundError):
        huggingface_hub.whoami()
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.model_info('alice/net')


TIMM_LOADS = """
import sys, timm, torch
for name in sys.argv[2:]:
    model = timm.create_model('hf-hub:' + name, pretrained=True).eval()
    with torch.inference_mode():
        print(model.num_classes, model(torch.load(sys.argv[1])).sum().item())
"""


def test_timm_loads_a_pushed_model_and_an_old_revision_of_it(hub, api, tmp_path):
    timm, torch = pytest.importorskip('timm'), pytest.importorskip('torch')
    api.create_repo('alice/net', private=True)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / 'x.pt')
    sums = []
    for rev in 'v1', 'v2':
        model = timm.create_model('test_resnet', num_classes=10).eval()
        timm.models.save_for_hf(model, str(tmp_path / rev), safe_serialization=True)
        api.upload_folder(repo_id='alice/net', folder_path=tmp_path / rev)
        api.create_tag('alice/net', tag=rev)
        with torch.inference_mode():
            sums.append(model(x).sum().item())
    assert sums[0] != sums[1]
    result = subprocess.run(
        [sys.executable, '-c', TIMM_LOADS, str(tmp_path / 'x.pt'), 'alice/net', 'alice/net@v1'],
        env=hub.env(tmp_path / 'home'), capture_output=True, text=True)
    assert result.stdout.split() == ['10', str(sums[1]), '10', str(sums[0])], result.stderr
    assert 'model.safetensors' in hub.requests[-1].path and not hub.requests_to(None)
