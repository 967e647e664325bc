"""A small Hugging Face Hub for tests, over real HTTP on the loopback interface; standard library only.

It answers what ``huggingface_hub`` 1.x and 2.x ask in order to create, upload, read and download a model repository
without Xet, keeps everything in memory, writes down who asked for what, and fails on request::

    with HubServer() as hub:                       # hub.url; user 'alice', member of 'lab', whose token is hub.token
        subprocess.run(command, env=hub.env(tmp_path))                  # logged in, HF_HOME is tmp_path, no Xet
        subprocess.run(command, env=hub.env(tmp_path, token=False))     # not logged in
        bob = hub.add_user('bob', role='read')     # another token
        hub.create('alice/net', {'config.json': b'{}'}, private=True)   # without the client

        hub.files('alice/net')                     # {path: bytes} on main; hub.files('alice/net', 'v1') of a revision
        hub.commits('alice/net')                   # newest first: .id, .parent, .title, .description, .author, .files
        hub.repos['alice/net']                     # .private, .gated, .branches, .tags (name -> commit id)
        hub.requests_to('commit')                  # Requests: .method, .path, .headers, .size, .json, .token, .status

Routes have names, for ``requests_to`` and for faults; '*' is all of them: whoami, create, validate-yaml, preupload,
lfs-batch, lfs-upload, lfs-verify, commit, info, settings, auth-check, tree, paths-info, refs, commits, branch, tag,
resolve (HEAD and GET of a file). A new repository has, as on the Hub, one commit with a ``.gitattributes``.

Faults hit the next ``times`` requests to a route (``None``: all of them), after ``skip`` undisturbed ones; with
``path`` only those whose path contains it. ``hub.recover()`` takes them all back::

    hub.fail('commit', 500)                        # an error answer; the request has no effect
    hub.fail('*', 429, times=None, retry_after=60)
    hub.fail('resolve', 404, code='EntryNotFound', path='model.safetensors')     # code: the X-Error-Code header
    hub.drop('preupload')                          # connection closed instead of an answer, no effect
    hub.drop('lfs-upload', when='upload')          # ... when half of the request's body has arrived
    hub.drop('resolve', when='answer')             # ... when half of the answer's body has left
    hub.lose_response('commit')                    # the commit takes effect, then the connection is closed
    hub.slow('info', 30)                           # seconds before the answer; ends early when the server stops
    hub.slow('*', 600, times=None)                 # a Hub that takes connections and never answers
    hub.stop(), hub.start()                        # connections are refused in between; the port stays

``hub.env`` is for processes of their own, which is the way to test a whole command. In the test's process the client
has read its environment long ago; ``hub.use(monkeypatch, tmp_path)`` changes what it read, for ``huggingface_hub``'s
functions, for timm's, and for ``HfApi(endpoint=hub.url, token=...)``.
"""
import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional, Union
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ('*.bin', '*.ckpt', '*.gz', '*.npy', '*.npz', '*.onnx', '*.pkl', '*.pt', '*.pth', '*.safetensors')
GITATTRIBUTES = ''.join(f'{p} filter=lfs diff=lfs merge=lfs -text\n' for p in LFS_PATTERNS).encode()
MAX_REGULAR_SIZE = 10 * 2 ** 20

ERROR_MESSAGES = {
    401: 'Invalid credentials in Authorization header',
    403: 'Forbidden: you do not have the rights to do this',
    404: 'Repository not found',
    409: 'Conflict with the state of the repository',
    429: 'Too many requests',
    500: 'Internal error',
}
FAILURES = {'fail', 'upload', 'before', 'answer', 'after'}


@dataclass
class Answer:
    status: int = 200
    content: bytes = b''
    headers: Dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, headers: Optional[dict] = None) -> 'Answer':
        return cls(status, json.dumps(value).encode(), {'Content-Type': 'application/json', **(headers or {})})


class HubError(Exception):
    """An answer other than success; ``code`` is what the client tells the kinds of 401, 403 and 404 apart by."""

    def __init__(self, status: int, message: str = '', code: str = '', headers: Optional[dict] = None, **body: Any):
        message = message or ERROR_MESSAGES.get(status, 'Error')
        headers = {'X-Error-Message': message.encode('ascii', 'replace').decode(), **(headers or {})}
        if code:
            headers['X-Error-Code'] = code
        self.answer = Answer.of({'error': message, **body}, status, headers)


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @cached_property
    def oid(self) -> str:
        """What etags and the client's search for unchanged files go by: sha256 in LFS, else git's sha1 of a blob."""
        return hashlib.sha256(self.content).hexdigest() if self.lfs else git_sha1(self.content)

    def info(self) -> Dict[str, Any]:
        if not self.lfs:
            return {'oid': self.oid, 'size': len(self.content)}
        pointer = b'oid sha256:%s\nsize %d\n' % (self.oid.encode(), len(self.content))
        lfs = {'oid': self.oid, 'sha256': self.oid, 'size': len(self.content), 'pointerSize': len(pointer)}
        return {'oid': git_sha1(pointer), 'size': len(self.content), 'lfs': lfs}


@dataclass(frozen=True)
class Commit:
    parent: Optional[str]
    files: Dict[str, File]
    title: str
    description: str
    author: str
    date: str

    @cached_property
    def id(self) -> str:
        listing = sorted((path, f.oid) for path, f in self.files.items())
        return hashlib.sha1(repr((self.parent, listing, self.title, self.description)).encode()).hexdigest()


@dataclass
class Repo:
    id: str
    private: bool
    gated: Any = False  # False, 'auto' or 'manual': owners alone may download
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

    def commit(self, branch: str, files: Dict[str, File], title: str, description: str, author: str) -> Commit:
        date = datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.000Z')
        commit = Commit(self.branches.get(branch), files, title, description, author, date)
        self.by_id[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def history(self, rev: str) -> List[Commit]:
        commits = [self.at(rev)]
        while commits[-1].parent is not None:
            commits.append(self.by_id[commits[-1].parent])
        return commits


@dataclass
class User:
    name: str
    role: str  # of the token: 'write' or 'read'
    orgs: tuple


@dataclass
class Request:
    route: Optional[str]
    method: str
    path: str  # percent-decoded, without the query
    query: Dict[str, List[str]]
    headers: Dict[str, str]  # names in lower case
    body: bytes = b''
    user: Optional[User] = None
    status: Optional[int] = None  # of the answer; None when there was none

    @property
    def token(self) -> Optional[str]:
        return self.headers.get('authorization', '').removeprefix('Bearer ') or None

    @property
    def size(self) -> int:
        return len(self.body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Fault:
    kind: str  # 'slow', 'fail', or when the connection is dropped: 'upload', 'before', 'answer', 'after'
    route: str
    times: Optional[int] = 1
    skip: int = 0
    path: str = ''
    seconds: float = 0.
    error: Optional[HubError] = None

    def takes(self, request: Request) -> bool:
        if self.times == 0 or self.route not in ('*', request.route) or self.path not in request.path:
            return False
        if self.kind == 'answer' and request.method == 'HEAD':
            return False  # has no body to lose half of
        if self.skip:
            self.skip -= 1
            return False
        self.times = None if self.times is None else self.times - 1
        return True


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
        self.faults: List[Fault] = []
        self.token = self.add_user('alice', orgs=('lab',))
        self.port = 0
        self.lock = threading.RLock()

    def __enter__(self) -> 'HubServer':
        self.start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def start(self) -> None:
        self.stopped = threading.Event()
        self.connections = set()
        self._httpd = ThreadingHTTPServer(('127.0.0.1', self.port), _Handler)
        self._httpd.hub = self
        self.port = self._httpd.server_port
        threading.Thread(target=self._httpd.serve_forever, args=(.02,), daemon=True).start()

    def stop(self) -> None:
        if not self.stopped.is_set():
            self.stopped.set()
            self._httpd.shutdown()
            self._httpd.server_close()
            for connection in list(self.connections):
                _hang_up(connection)

    def env(self, home: Any, token: Union[str, bool] = True) -> Dict[str, str]:
        """Environment of a process whose client talks to this server and keeps its cache in the folder ``home``."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_OFFLINE'))}
        env.update(
            HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
            NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
        if token:
            env['HF_TOKEN'] = self.token if token is True else token
        return env

    def use(self, monkeypatch: Any, home: Any, token: Union[str, bool] = True) -> None:
        """The same for the client that this process has imported, while a test lasts."""
        from huggingface_hub import constants, hf_api
        for name, value in dict(
                ENDPOINT=self.url,
                HUGGINGFACE_CO_URL_TEMPLATE=self.url + '/{repo_id}/resolve/{revision}/{filename}',
                HF_HUB_CACHE=os.path.join(home, 'hub'),
                HF_TOKEN_PATH=os.path.join(home, 'token'),
                HF_HUB_OFFLINE=False,
                HF_HUB_DISABLE_XET=True,
                HF_HUB_DISABLE_TELEMETRY=True,
        ).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, 'endpoint', self.url)  # of huggingface_hub.create_repo() and the like
        for name in os.environ.keys() & {'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'}:
            monkeypatch.delenv(name)
        for name in ('HF_TOKEN', 'NO_PROXY', 'no_proxy'):
            if name in (env := self.env(home, token)):
                monkeypatch.setenv(name, env[name])

    def add_user(self, name: str, role: str = 'write', orgs: tuple = ()) -> str:
        """Returns a token; a user may have several."""
        token = f'hf_{name}{role.title()}Token{len(self.users)}'
        self.users[token] = User(name, role, orgs)
        return token

    def create(self, repo_id: str, files: Optional[Dict[str, bytes]] = None, private: bool = False) -> Repo:
        """Create a repository; ``files`` are its second commit."""
        self.repos[repo_id] = repo = Repo(repo_id, private)
        start = repo.commit('main', {'.gitattributes': File(GITATTRIBUTES)}, 'initial commit', '', repo.owner)
        if files:
            new = {path: File(content, _is_lfs(path, content)) for path, content in files.items()}
            repo.lfs.update((f.oid, f.content) for f in new.values() if f.lfs)
            repo.commit('main', {**start.files, **new}, 'Add files', '', repo.owner)
        return repo

    def files(self, repo_id: str, rev: str = 'main') -> Dict[str, bytes]:
        return {path: f.content for path, f in sorted(self.repos[repo_id].at(rev).files.items())}

    def commits(self, repo_id: str, rev: str = 'main') -> List[Commit]:
        return self.repos[repo_id].history(rev)

    def requests_to(self, *routes: str) -> List[Request]:
        return [r for r in self.requests if r.route in routes]

    def fail(
            self, route: str, status: int, times: Optional[int] = 1, *, skip: int = 0, path: str = '',
            message: str = '', code: str = '', retry_after: Optional[int] = None, headers: Optional[dict] = None,
            **body: Any,
    ) -> None:
        """Answer with an error; ``body``: further fields of its JSON body."""
        headers = dict(headers or {})
        if retry_after is not None:
            headers['Retry-After'] = str(retry_after)
        error = HubError(status, message, code, headers, **body)
        self.faults.append(Fault('fail', route, times, skip, path, error=error))

    def drop(self, route: str, times: Optional[int] = 1, *, when: str = 'before', **where: Any) -> None:
        if when not in FAILURES - {'fail'}:
            raise ValueError(f"when is {when!r}; it must be 'upload', 'before', 'answer' or 'after'")
        self.faults.append(Fault(when, route, times, **where))

    def lose_response(self, route: str, times: Optional[int] = 1, **where: Any) -> None:
        self.drop(route, times, when='after', **where)

    def slow(self, route: str, seconds: float, times: Optional[int] = 1, **where: Any) -> None:
        """Wait before answering; goes together with another fault of the same request."""
        self.faults.append(Fault('slow', route, times, seconds=seconds, **where))

    def recover(self) -> None:
        self.faults.clear()

    # What follows runs in the connections' threads.

    def take_faults(self, request: Request) -> Dict[str, Fault]:
        """The faults of a request by kind: at most one wait and one failure."""
        with self.lock:
            taken = {}
            for fault in self.faults:
                same = {'slow'} if fault.kind == 'slow' else FAILURES
                if not taken.keys() & same and fault.takes(request):
                    taken[fault.kind] = fault
            return taken

    def answer(self, request: Request, function: Any, needs: str, args: Dict[str, Any]) -> Answer:
        with self.lock:
            try:
                if request.token is not None and request.token not in self.users:
                    raise HubError(401)
                request.user = self.users.get(request.token)
                if function is None:
                    raise HubError(501, f'{request.method} {request.path} is unknown to this server')
                if needs:
                    args['repo'] = self._repo(args['repo'], request.user, needs)
                result = function(self, request, **args)
            except HubError as e:
                return e.answer
            except (KeyError, ValueError, TypeError) as e:
                return HubError(400, f'Malformed request: {e!r}').answer
        return result if isinstance(result, Answer) else Answer.of(result)

    def _repo(self, repo_id: str, user: Optional[User], needs: str) -> Repo:
        repo = self.repos.get(repo_id)
        missing = repo is None or repo.private and not _is_member(user, repo.owner)
        if user is None and (missing or needs == 'write'):
            # The Hub sends no code here, and the client goes by the status. But it does so for https only.
            raise HubError(401, 'Invalid username or password.', code='RepoNotFound')
        if missing:
            raise HubError(404, code='RepoNotFound')
        if needs == 'write':
            _check_write(user, repo.owner)
        return repo

    @_route('whoami', 'GET', '/api/whoami-v2')
    def _whoami(self, request):
        if request.user is None:
            raise HubError(401, 'Invalid username or password.')
        orgs = [{'type': 'org', 'name': name, 'roleInOrg': 'write'} for name in request.user.orgs]
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': request.user.role}}
        return {'type': 'user', 'name': request.user.name, 'fullname': request.user.name, 'orgs': orgs, 'auth': auth}

    @_route('create', 'POST', '/api/repos/create')
    def _create(self, request):
        if request.user is None:
            raise HubError(401, 'Invalid username or password.')
        owner = request.json.get('organization') or request.user.name
        _check_write(request.user, owner)
        repo_id = f'{owner}/{request.json["name"]}'
        url = f'{self.url}/{repo_id}'
        if repo_id in self.repos:
            raise HubError(409, 'You already created this model repo', url=url, name=repo_id)
        self.create(repo_id, private=_is_private(request.json))
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
            lfs = _is_lfs(path, base64.b64decode(item['sample']), item['size'])
            answer = {'path': path, 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False}
            answers.append({**answer, 'oid': existing[path].oid} if path in existing else answer)
        return {'files': answers, 'commitOid': repo.at(rev).id}

    @_route('lfs-batch', 'POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'write')
    def _lfs_batch(self, request, repo):
        objects = []
        for item in request.json['objects']:
            item = {'oid': item['oid'], 'size': item['size']}
            if item['oid'] not in repo.lfs:
                upload = {'href': f'{self.url}/lfs-storage/{repo.id}/{item["oid"]}?signature=test', 'header': {}}
                item['actions'] = {'upload': upload, 'verify': {'href': f'{self.url}/{repo.id}.git/info/lfs/verify'}}
            objects.append(item)
        return {'transfer': 'basic', 'objects': objects}

    @_route('lfs-upload', 'PUT', '/lfs-storage/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[^/]+)')
    def _lfs_upload(self, request, repo_id, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, 'The content does not match its sha256')
        self.repos[repo_id].lfs[oid] = request.body
        return Answer()

    @_route('lfs-verify', 'POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify', 'write')
    def _lfs_verify(self, request, repo):
        if len(repo.lfs.get(request.json['oid'], b'')) != request.json['size']:
            raise HubError(404, 'The object was not uploaded', code='EntryNotFound')
        return {}

    @_route('commit', 'POST', _MODEL + '/commit/(?P<rev>[^/]+)', 'write')
    def _commit(self, request, repo, rev):
        if 'create_pr' in request.query:
            raise HubError(501, 'Pull requests are unknown to this server')
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if rev not in repo.branches:
            raise HubError(404, f'Invalid rev id: {rev}', code='RevisionNotFound')
        head = repo.at(rev)
        if header['value'].get('parentCommit') not in (None, head.id):
            raise HubError(412, 'A commit has happened since')
        files = dict(head.files)
        for operation in operations:
            kind, value = operation['key'], operation['value']
            path = value['path']
            if kind == 'file':
                files[path] = File(base64.b64decode(value['content']))
            elif kind == 'lfsFile':
                if value['oid'] not in repo.lfs:
                    raise HubError(400, f'{path} points to an LFS object that was not uploaded')
                files[path] = File(repo.lfs[value['oid']], lfs=True)
            else:
                folder = path.rstrip('/') + '/'
                gone = [p for p in files if p == path or kind == 'deletedFolder' and p.startswith(folder)]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", code='EntryNotFound')
                for p in gone:
                    del files[p]
        value = header['value']
        commit = repo.commit(rev, files, value['summary'], value.get('description', ''), request.user.name)
        return {'success': True, 'commitOid': commit.id, 'commitUrl': f'{self.url}/{repo.id}/commit/{commit.id}'}

    @_route('info', 'GET', _MODEL + '(/revision/(?P<rev>[^/]+))?', 'read')
    def _info(self, request, repo, rev):
        commit = repo.at(rev or 'main')
        siblings = [{'rfilename': path} for path in sorted(commit.files)]
        if 'blobs' in request.query:
            for item in siblings:
                info = commit.files[item['rfilename']].info()
                item.update(blobId=info.pop('oid'), **info)
        return {
            '_id': git_sha1(repo.id.encode())[:24], 'id': repo.id, 'modelId': repo.id, 'author': repo.owner,
            'sha': commit.id, 'lastModified': commit.date, 'createdAt': repo.history('main')[-1].date,
            'private': repo.private, 'gated': repo.gated, 'disabled': False, 'downloads': 0, 'likes': 0, 'tags': [],
            'siblings': siblings,
        }

    @_route('settings', 'PUT', _MODEL + '/settings', 'write')
    def _settings(self, request, repo):
        if request.json.keys() & {'private', 'visibility'}:
            repo.private = _is_private(request.json)
        repo.gated = request.json.get('gated', repo.gated)
        return {'private': repo.private, 'gated': repo.gated}

    @_route('auth-check', 'GET', _MODEL + '/auth-check', 'read')
    @_route('auth-check', 'GET', _MODEL + '/auth-check/write', 'write')
    def _auth_check(self, request, repo):
        return {}

    @_route('tree', 'GET', _MODEL + '/tree/(?P<rev>[^/]+)(/(?P<folder>.+))?', 'read')
    def _tree(self, request, repo, rev, folder):
        prefix = f'{folder.rstrip("/")}/' if folder else ''
        entries = {}
        for path, file in repo.at(rev).files.items():
            if path.startswith(prefix):
                parts = path[len(prefix):].split('/')
                parents = [prefix + '/'.join(parts[:n]) for n in range(1, len(parts))]
                for p in parents:
                    entries[p] = {'type': 'directory', 'path': p, 'size': 0, 'oid': git_sha1(p.encode())}
                entries[path] = {'type': 'file', 'path': path, **file.info()}
        if folder and not entries:
            raise HubError(404, f'{folder} does not exist on {rev}', code='EntryNotFound')
        recursive = request.query.get('recursive', ['false'])[0].lower() == 'true'
        return [entry for path, entry in sorted(entries.items()) if recursive or '/' not in path[len(prefix):]]

    @_route('paths-info', 'POST', _MODEL + '/paths-info/(?P<rev>[^/]+)', 'read')
    def _paths_info(self, request, repo, rev):
        files = repo.at(rev).files
        paths = parse_qs(request.body.decode()).get('paths', [])
        return [{'type': 'file', 'path': path, **files[path].info()} for path in paths if path in files]

    @_route('refs', 'GET', _MODEL + '/refs', 'read')
    def _refs(self, request, repo):
        def listing(refs, kind):
            return [{'name': n, 'ref': f'refs/{kind}/{n}', 'targetCommit': c} for n, c in sorted(refs.items())]
        return {'branches': listing(repo.branches, 'heads'), 'tags': listing(repo.tags, 'tags'), 'converts': [],
                'pullRequests': []}

    @_route('commits', 'GET', _MODEL + '/commits/(?P<rev>[^/]+)', 'read')
    def _commits(self, request, repo, rev):
        return [
            {'id': c.id, 'title': c.title, 'message': c.description, 'authors': [{'user': c.author}], 'date': c.date}
            for c in repo.history(rev)
        ]

    @_route('branch', 'POST', _MODEL + '/branch/(?P<name>[^/]+)', 'write')
    def _create_branch(self, request, repo, name):
        _add_ref(repo.branches, name, repo.at(request.json.get('startingPoint') or 'main'))
        return {}

    @_route('tag', 'POST', _MODEL + '/tag/(?P<rev>[^/]+)', 'write')
    def _create_tag(self, request, repo, rev):
        _add_ref(repo.tags, request.json['tag'], repo.at(rev))
        return {}

    @_route('branch', 'DELETE', _MODEL + '/(?P<kind>branch)/(?P<name>[^/]+)', 'write')
    @_route('tag', 'DELETE', _MODEL + '/(?P<kind>tag)/(?P<name>[^/]+)', 'write')
    def _delete_ref(self, request, repo, kind, name):
        if (repo.branches if kind == 'branch' else repo.tags).pop(name, None) is None:
            raise HubError(404, f'Invalid rev id: {name}', code='RevisionNotFound')
        return {}

    @_route('resolve', 'GET', '/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'read')
    def _resolve(self, request, repo, rev, path):
        if repo.gated and not _is_member(request.user, repo.owner):
            raise HubError(403 if request.user else 401, f'Access to model {repo.id} is restricted', code='GatedRepo')
        commit = repo.at(rev)
        headers = {'X-Repo-Commit': commit.id, 'Accept-Ranges': 'bytes'}
        if path not in commit.files:
            raise HubError(404, 'Entry not found', code='EntryNotFound', headers=headers)
        file = commit.files[path]
        headers.update({'ETag': f'"{file.oid}"', 'Content-Type': 'application/octet-stream'})
        size = len(file.content)
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('range', ''))
        if asked is None:
            return Answer(200, file.content, headers)
        start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
        if start >= size:
            raise HubError(416, 'Range not satisfiable', headers={'Content-Range': f'bytes */{size}'})
        headers['Content-Range'] = f'bytes {start}-{end}/{size}'
        return Answer(206, file.content[start:end + 1], headers)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _is_lfs(path: str, content: bytes, size: int = 0) -> bool:
    """Whether the Hub would keep a file in LFS, as it tells from its name, its beginning and its size."""
    named = any(fnmatch(path.split('/')[-1], pattern) for pattern in LFS_PATTERNS)
    return named or b'\0' in content[:512] or max(size, len(content)) > MAX_REGULAR_SIZE


def _is_private(payload: Dict[str, Any]) -> bool:
    return payload.get('visibility') == 'private' or bool(payload.get('private'))


def _is_member(user: Optional[User], owner: str) -> bool:
    return user is not None and owner in (user.name, *user.orgs)


def _check_write(user: User, owner: str) -> None:
    if not _is_member(user, owner):
        raise HubError(403, f'You don\'t have the rights to write under the namespace "{owner}"')
    if user.role != 'write':
        raise HubError(403, 'Forbidden: you must use a write token to upload to a repository.')


def _add_ref(refs: Dict[str, str], name: str, commit: Commit) -> None:
    if name in refs:
        raise HubError(409, f'Reference {name} exists already')
    refs[name] = commit.id


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the client was first


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'  # connections stay open, as the Hub's do
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def finish(self):
        self.server.hub.connections.discard(self.connection)
        super().finish()

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass  # the client hung up

    def handle_request(self):
        hub = self.server.hub
        url = urlsplit(self.path)
        method = 'GET' if self.command == 'HEAD' else self.command
        name, needs, function, args = None, '', None, {}
        for route, route_method, pattern, *handler in _ROUTES:
            match = pattern.fullmatch(url.path)
            if match and route_method == method:
                name, (needs, function) = route, handler
                args = {k: v and unquote(v) for k, v in match.groupdict().items()}
                break
        headers = {k.lower(): v for k, v in self.headers.items()}
        request = Request(name, self.command, unquote(url.path), parse_qs(url.query), headers)
        hub.requests.append(request)
        faults = hub.take_faults(request)

        if 'upload' in faults:
            request.body = self.rfile.read(int(headers.get('content-length', 0)) // 2)
            return self.hang_up()
        request.body = self.read_body(headers)
        if 'slow' in faults:
            hub.stopped.wait(faults['slow'].seconds)
        if 'before' in faults:
            return self.hang_up()
        answer = faults['fail'].error.answer if 'fail' in faults else hub.answer(request, function, needs, args)
        if 'after' in faults:
            return self.hang_up()
        request.status = answer.status
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        size = len(answer.content)
        self.send_header('Content-Length', str(max(size, 1) if 'answer' in faults else size))
        self.end_headers()
        if 'answer' in faults:
            self.wfile.write(answer.content[:size // 2])
            return self.hang_up()
        if self.command != 'HEAD':
            self.wfile.write(answer.content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self, headers: Dict[str, str]) -> bytes:
        if headers.get('transfer-encoding') != 'chunked':
            return self.rfile.read(int(headers.get('content-length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self) -> None:
        self.close_connection = True
        _hang_up(self.connection)


def use(hub, monkeypatch, home):
    """Let this process and the ones it starts talk to the test Hub."""
    hub.use(monkeypatch, home)
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    for name, value in hub.env(home).items():
        monkeypatch.setenv(name, value)
