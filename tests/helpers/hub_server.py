"""A small Hugging Face Hub for tests, over real HTTP on the loopback interface; standard library only.

It answers what ``huggingface_hub`` 1.x and 2.x ask in order to create, upload, read and download a model repository
without Xet, keeps everything in memory, writes down who asked for what, and fails on request::

    with HubServer() as hub:                       # hub.url; a user 'alice', whose token is hub.token
        use(hub, monkeypatch, tmp_path)            # the client of this process and of those it starts; HF_HOME
        hub.create('alice/net', {'config.json': b'{}'}, private=True)   # without the client
        hub.files('alice/net', 'v1')               # {path: bytes} of a revision
        hub.commits('alice/net')                   # newest first: .id, .title, .files
        hub.requests_to('commit')                  # by the names of routes below; '*' is all of them for faults
        hub.fail('commit', 500)                    # the next requests to a route have no effect, until hub.recover()
        hub.slow('info', 30)                       # seconds before the answer; ends early when the server stops
"""
import base64
import hashlib
import json
import os
import re
import threading
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

LFS = ('.bin', '.safetensors')  # endings of the files that the Hub keeps in LFS


@dataclass
class Answer:
    status: int = 200
    content: bytes = b''
    headers: Dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer other than success; ``code`` is what the client tells the kinds of 401 and 404 apart by."""

    def __init__(self, status: int, message: str = '', code: str = '', **body: Any):
        message = message or {401: 'Invalid credentials in Authorization header'}.get(status, f'Error {status}')
        headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self.answer = Answer(status, json.dumps({'error': message, **body}).encode(), headers)


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @cached_property
    def oid(self) -> str:
        """The hash by which the client finds unchanged files: sha256 in LFS, else git's sha1 of a blob."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b'blob %d\0' % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    parent: Optional[str]
    files: Dict[str, File]
    title: str

    @cached_property
    def id(self) -> str:
        listing = sorted((path, f.oid) for path, f in self.files.items())
        return hashlib.sha1(repr((self.parent, listing, self.title)).encode()).hexdigest()


@dataclass
class Repo:
    id: str
    private: bool
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)
    by_id: Dict[str, Commit] = field(default_factory=dict)
    lfs: Dict[str, bytes] = field(default_factory=dict)  # uploaded objects, committed or not

    @property
    def owner(self) -> str:
        return self.id.split('/')[0]

    def at(self, rev: str) -> Commit:
        """The commit that a branch, a tag or a commit id stands for."""
        commit = self.by_id.get(self.branches.get(rev) or self.tags.get(rev) or rev)
        if commit is None:
            raise HubError(404, f'Invalid rev id: {rev}', code='RevisionNotFound')
        return commit

    def commit(self, branch: str, files: Dict[str, File], title: str) -> Commit:
        commit = Commit(self.branches.get(branch), files, title)
        self.by_id[commit.id] = commit
        self.branches[branch] = commit.id
        return commit


User = namedtuple('User', 'name role')  # the role of a token: 'write' or 'read'


@dataclass
class Request:
    route: Optional[str]
    token: Optional[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


_ROUTES = []
_MODEL = '/api/models/(?P<repo>[^/]+/[^/]+)'


def _route(name: str, method: str, pattern: str, needs: str = ''):
    """Register a handler; ``needs``: what the user must be allowed in the path's repository, 'read' or 'write'."""
    def register(function):
        _ROUTES.append((name, method, re.compile(pattern), needs, function))
        return function
    return register


class HubServer:
    """The server, its repositories and its faults; a context manager. See the top of this file."""

    def __init__(self):
        self.repos: Dict[str, Repo] = {}
        self.users: Dict[str, User] = {}  # by token
        self.requests: List[Request] = []
        self.errors: Dict[str, HubError] = {}  # by route
        self.waits: Dict[str, float] = {}
        self.token = self.add_user('alice')
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self._httpd = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self._httpd.hub = self
        self._httpd.handle_error = lambda *_: None  # the client hung up
        self.url = f'http://127.0.0.1:{self._httpd.server_port}'

    def __enter__(self):
        threading.Thread(target=self._httpd.serve_forever, args=(.02,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopped.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def env(self, home: Any) -> Dict[str, str]:
        """Environment of a process whose client talks to this server and keeps its cache in the folder ``home``."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_OFFLINE'))}
        return {
            **env, 'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'HF_TOKEN': self.token, 'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1'}

    def add_user(self, name: str, role: str = 'write') -> str:
        """Returns a token; a user may have several."""
        token = f'hf_{name}{role.title()}Token{len(self.users)}'
        self.users[token] = User(name, role)
        return token

    def create(self, repo_id: str, files: Optional[Dict[str, bytes]] = None, private: bool = False) -> Repo:
        """Create a repository; ``files`` are its second commit."""
        self.repos[repo_id] = repo = Repo(repo_id, private)
        start = repo.commit('main', {'.gitattributes': File(b'')}, 'initial commit')
        if files:
            new = {path: File(content, path.endswith(LFS)) for path, content in files.items()}
            repo.lfs.update((f.oid, f.content) for f in new.values() if f.lfs)
            repo.commit('main', {**start.files, **new}, 'Add files')
        return repo

    def files(self, repo_id: str, rev: str = 'main') -> Dict[str, bytes]:
        return {path: f.content for path, f in sorted(self.repos[repo_id].at(rev).files.items())}

    def commits(self, repo_id: str) -> List[Commit]:
        commits = [self.repos[repo_id].at('main')]
        while commits[-1].parent is not None:
            commits.append(self.repos[repo_id].at(commits[-1].parent))
        return commits

    def requests_to(self, *routes: str) -> List[Request]:
        return [r for r in self.requests if r.route in routes]

    def fail(self, route: str, status: int, message: str = '') -> None:
        self.errors[route] = HubError(status, message, url=f'{self.url}/x')

    def slow(self, route: str, seconds: float) -> None:
        self.waits[route] = seconds

    def recover(self) -> None:
        self.errors.clear()
        self.waits.clear()

    # What follows runs in the connections' threads.

    def answer(self, request: Request, function: Any, needs: str, args: Dict[str, Any]) -> Answer:
        self.requests.append(request)
        self.stopped.wait(self.waits.get(request.route, self.waits.get('*', 0)))
        with self.lock:
            try:
                if error := self.errors.get(request.route, self.errors.get('*')):
                    raise error
                if request.token is not None and request.token not in self.users:
                    raise HubError(401)
                if function is None:
                    raise HubError(501, 'This is unknown to this server')
                if needs:
                    args['repo'] = self._repo(args['repo'], self.users.get(request.token), needs)
                result = function(self, request, **args)
            except HubError as e:
                return e.answer
        if isinstance(result, Answer):
            return result
        return Answer(200, json.dumps(result).encode(), {'Content-Type': 'application/json'})

    def _repo(self, repo_id: str, user: Optional[User], needs: str) -> Repo:
        repo = self.repos.get(repo_id)
        missing = repo is None or repo.private and (user is None or user.name != repo.owner)
        if user is None and (missing or needs == 'write'):
            # The Hub sends no code here, and the client goes by the status. But it does so for https only.
            raise HubError(401, 'Invalid username or password.', code='RepoNotFound')
        if missing:
            raise HubError(404, 'Repository not found', code='RepoNotFound')
        if needs == 'write':
            _check_write(user, repo.owner)
        return repo

    @_route('create', 'POST', '/api/repos/create')
    def _create(self, request):
        user = self.users.get(request.token)
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        owner = request.json.get('organization') or user.name
        _check_write(user, owner)
        repo_id = f'{owner}/{request.json["name"]}'
        url = f'{self.url}/{repo_id}'
        if repo_id in self.repos:
            raise HubError(409, 'You already created this model repo', url=url, name=repo_id)
        self.create(repo_id, private=request.json.get('visibility') == 'private' or bool(request.json.get('private')))
        return {'url': url, 'name': repo_id}

    @_route('validate-yaml', 'POST', '/api/validate-yaml')
    def _validate_yaml(self, request):
        return {'errors': [], 'warnings': []}

    @_route('preupload', 'POST', _MODEL + '/preupload/(?P<rev>[^/]+)', 'write')
    def _preupload(self, request, repo, rev):
        existing = repo.at(rev).files
        answers = []
        for item in request.json['files']:
            path = item['path']
            mode = 'lfs' if path.endswith(LFS) else 'regular'
            answer = {'path': path, 'uploadMode': mode, 'shouldIgnore': False}
            answers.append({**answer, 'oid': existing[path].oid} if path in existing else answer)
        return {'files': answers, 'commitOid': repo.at(rev).id}

    @_route('lfs-batch', 'POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'write')
    def _lfs_batch(self, request, repo):
        objects = []
        for item in request.json['objects']:
            item = {'oid': item['oid'], 'size': item['size']}
            if item['oid'] not in repo.lfs:
                upload = {'href': f'{self.url}/lfs-storage/{repo.id}/{item["oid"]}?signature=test', 'header': {}}
                item['actions'] = {'upload': upload}
            objects.append(item)
        return {'transfer': 'basic', 'objects': objects}

    @_route('lfs-upload', 'PUT', '/lfs-storage/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[^/]+)')
    def _lfs_upload(self, request, repo_id, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, 'The content does not match its sha256')
        self.repos[repo_id].lfs[oid] = request.body
        return Answer()

    @_route('commit', 'POST', _MODEL + '/commit/(?P<rev>[^/]+)', 'write')
    def _commit(self, request, repo, rev):
        if rev not in repo.branches:
            raise HubError(404, f'Invalid rev id: {rev}', code='RevisionNotFound')
        files = dict(repo.at(rev).files)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        for operation in operations:
            kind, value = operation['key'], operation['value']
            if kind == 'file':
                files[value['path']] = File(base64.b64decode(value['content']))
            elif kind == 'lfsFile':
                files[value['path']] = File(repo.lfs[value['oid']], lfs=True)
            else:
                del files[value['path']]
        commit = repo.commit(rev, files, header['value']['summary'])
        return {'success': True, 'commitOid': commit.id, 'commitUrl': f'{self.url}/{repo.id}/commit/{commit.id}'}

    @_route('info', 'GET', _MODEL + '(/revision/(?P<rev>[^/]+))?', 'read')
    def _info(self, request, repo, rev):
        return {'id': repo.id, 'sha': repo.at(rev or 'main').id, 'private': repo.private, 'tags': []}

    @_route('tree', 'GET', _MODEL + '/tree/(?P<rev>[^/]+)', 'read')
    def _tree(self, request, repo, rev):
        files = repo.at(rev).files
        return [{'type': 'file', 'path': path, 'oid': file.oid, 'size': len(file.content)}
                for path, file in sorted(files.items())]

    @_route('refs', 'GET', _MODEL + '/refs', 'read')
    def _refs(self, request, repo):
        def listing(refs, kind):
            return [{'name': n, 'ref': f'refs/{kind}/{n}', 'targetCommit': c} for n, c in sorted(refs.items())]
        return {'branches': listing(repo.branches, 'heads'), 'tags': listing(repo.tags, 'tags'), 'converts': []}

    @_route('branch', 'POST', _MODEL + '/branch/(?P<name>[^/]+)', 'write')
    def _create_branch(self, request, repo, name):
        return _add_ref(repo.branches, name, repo.at(request.json.get('startingPoint') or 'main'))

    @_route('tag', 'POST', _MODEL + '/tag/(?P<rev>[^/]+)', 'write')
    def _create_tag(self, request, repo, rev):
        return _add_ref(repo.tags, request.json['tag'], repo.at(rev))

    @_route('resolve', 'GET', '/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'read')
    def _resolve(self, request, repo, rev, path):
        commit = repo.at(rev)
        if path not in commit.files:
            error = HubError(404, 'Entry not found', code='EntryNotFound')
            error.answer.headers['X-Repo-Commit'] = commit.id
            raise error
        file = commit.files[path]
        return Answer(200, file.content, {'X-Repo-Commit': commit.id, 'ETag': f'"{file.oid}"'})


def _check_write(user: User, owner: str) -> None:
    if user.name != owner:
        raise HubError(403, f'You don\'t have the rights to write under the namespace "{owner}"')
    if user.role != 'write':
        raise HubError(403, 'Forbidden: you must use a write token to upload to a repository.')


def _add_ref(refs: Dict[str, str], name: str, commit: Commit) -> Dict[str, Any]:
    if name in refs:
        raise HubError(409, f'Reference {name} exists already')
    refs[name] = commit.id
    return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'  # connections stay open, as the Hub's do
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def handle_request(self):
        url = urlsplit(self.path)
        method = 'GET' if self.command == 'HEAD' else self.command
        name, needs, function, args = None, '', None, {}
        for route, route_method, pattern, *handler in _ROUTES:
            match = pattern.fullmatch(url.path)
            if match and route_method == method:
                name, (needs, function) = route, handler
                args = {k: v and unquote(v) for k, v in match.groupdict().items()}
                break
        token = self.headers.get('Authorization', '').removeprefix('Bearer ') or None
        request = Request(name, token, self.read_body())
        answer = self.server.hub.answer(request, function, needs, args)
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(answer.content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(answer.content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def use(hub: HubServer, monkeypatch: Any, home: Any) -> None:
    """Let this process, whose client has read its environment long ago, and those it starts talk to the test Hub."""
    for name, value in dict(
            ENDPOINT=hub.url,
            HUGGINGFACE_CO_URL_TEMPLATE=hub.url + '/{repo_id}/resolve/{revision}/{filename}',
            HF_HUB_CACHE=os.path.join(home, 'hub'),
            HF_TOKEN_PATH=os.path.join(home, 'token'),
            HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=True,
            HF_HUB_DISABLE_TELEMETRY=True,
    ).items():
        monkeypatch.setattr(constants, name, value)
    for name in ('HF_HUB_OFFLINE', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    for name, value in hub.env(home).items():
        monkeypatch.setenv(name, value)
