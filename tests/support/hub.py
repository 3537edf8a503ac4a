"""A Hub on a loopback port: repositories to read, stream and push to, and failures on request. It does not speak Xet.

The libraries reach it through `HF_ENDPOINT`: in a process of its own by `environment`, in the test's by `redirect`.
"""

import base64
import json
import re
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".parquet", ".safetensors")
REPOSITORY = r"/api/(models|datasets)/([^/]+/[^/]+)"


class Answer(NamedTuple):
    body: bytes | list | dict = b""
    status: int = 200
    headers: Mapping[str, str] = {}


class Request(NamedTuple):
    """What a client asked for; `range` is the header of that name, without `bytes=`."""

    method: str
    path: str
    range: str


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    settings: dict = field(default_factory=dict)  # as in the request that created it

    @property
    def sha(self) -> str:
        return sha1(
            repr(sorted((path, digests(content)) for path, content in self.files.items())).encode()
        ).hexdigest()


@dataclass
class Fault:
    """How the next `times` requests fail whose `METHOD /path` matches the pattern `on` somewhere."""

    on: str
    times: float
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    keep: int | None = None  # bytes of the answer's body
    breaks: bool = False  # whether the connection breaks after them, not the answer ends
    silent: bool = False
    delay: float = 0  # seconds before the answer, which is then whole
    every: int = 1  # so many matching requests, the last of them fails
    seen: int = 0


class Hub:
    """Repositories by (kind, id), with `kind` `models` or `datasets`; `requests` and `waits` are what clients did."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.waits: list[float] = []  # seconds that the libraries in this process would have slept before a retry
        self.unknown: list[Request] = []
        self.faults: list[Fault] = []
        self.uploads: dict[str, bytes] = {}
        self.url, self.cache, self.closed = "", Path(), Event()

    def put(self, name: str, files: Path | dict[str, bytes | str], kind: str = "models", gated: bool = False) -> None:
        """Create or replace a repository with these files, or those of a folder."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        self.repositories[kind, name] = Repository(contents, gated)

    def fail(self, on: str, status: int, times: float = 1, **headers: str) -> None:
        """Answer with `status`; an underscore in a header's name stands for a hyphen."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.faults.append(Fault(on, times, status, named))

    def cut(self, on: str, keep: int, times: float = 1, breaks: bool = True) -> None:
        """Send only `keep` bytes, then break the connection or, without `breaks`, claim that this was all."""
        self.faults.append(Fault(on, times, keep=keep, breaks=breaks))

    def silence(self, on: str = "", times: float = float("inf")) -> None:
        """Take connections and never answer."""
        self.faults.append(Fault(on, times, silent=True))

    def sent(self, path: str) -> list[Request]:
        """The requests for the content of a file."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(f"/{path}")]

    @contextmanager
    def serving(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.hub, server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self
        finally:
            self.closed.set()
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs in its environment to know no other Hub; it keeps its cache in `home`."""
        libraries = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return libraries | {"HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}

    def redirect(self, home: Path, monkeypatch) -> None:
        """The same for the libraries in this process, which have read their environment; they do not sleep."""
        import datasets
        from datasets.utils import file_utils
        from huggingface_hub import HfFileSystem, close_session, constants, file_download, hf_api
        from huggingface_hub.utils import _http

        self.cache = home / "hub"
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        changes = {
            constants: {
                "ENDPOINT": self.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": template,
                "HF_HUB_CACHE": str(self.cache),
                "HF_ASSETS_CACHE": str(home / "assets"),
            }
            | {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True},
            hf_api.api: {"endpoint": self.url},
            datasets.config: {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": home / "datasets"}
            | {"DOWNLOADED_DATASETS_PATH": home / "downloads", "STREAMING_READ_MAX_RETRIES": 3},
        }
        for module, values in changes.items():
            for name, value in values.items():
                monkeypatch.setattr(module, name, value)
        clock = SimpleNamespace(**vars(time) | {"sleep": self.waits.append})
        for module in (_http, file_download, file_utils):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # an earlier one may go through a proxy
        HfFileSystem.clear_instance_cache()

    def answer(self, request: Request, body: bytes, signed_in: bool) -> Answer:
        path = unquote(urlsplit(request.path).path)
        for methods, pattern, respond in ROUTES:
            if request.method in methods and (found := re.fullmatch(pattern, path)):
                return respond(self, Call(request, body, signed_in), *found.groups())
        if re.match(REPOSITORY, path) or request.method != "GET":  # not telemetry and the like
            self.unknown.append(request)
        return refusal(404, "EntryNotFound")

    def take_fault(self, request: Request) -> Fault | None:
        fault = next((f for f in self.faults if f.times and re.search(f.on, f"{request.method} {request.path}")), None)
        if fault:
            fault.seen += 1
            fault.times -= (due := fault.seen % fault.every == 0)
            return fault if due else None
        return None


class Call(NamedTuple):
    request: Request
    body: bytes
    signed_in: bool


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub: Hub = self.server.hub
        request = Request(self.command, self.path, self.headers.get("Range", "").removeprefix("bytes="))
        hub.requests.append(request)
        fault = hub.take_fault(request)
        time.sleep(fault.delay if fault else 0)
        if fault and fault.silent:
            hub.closed.wait()
        elif fault and fault.status:
            self.send(Answer({"error": "on request"}, fault.status, fault.headers), None)
        else:
            self.send(hub.answer(request, body, "Authorization" in self.headers), fault)

    def send(self, answer: Answer, fault: Fault | None) -> None:
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        kept = content if fault is None else content[: fault.keep]
        self.send_response(answer.status)
        length = {"Content-Length": len(content if fault and fault.breaks else kept)}
        for name, value in (length | answer.headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(kept if self.command != "HEAD" else b"")

    do_GET = do_HEAD = do_POST = do_PUT = respond


def refusal(status: int, code: str, message: str = "on request") -> Answer:
    return Answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


def of_repository(respond):
    """`respond` with the repository in place of its kind and id; without one, what the Hub says of private ones."""

    def find(hub: Hub, call: Call, kind: str | None, name: str, *rest: str) -> Answer:
        repository = hub.repositories.get((kind or "models", name))
        if repository is None:
            return refusal(404 if call.signed_in else 401, "RepoNotFound", "Repository not found")
        revision = next(iter(rest), None)
        if revision not in (None, "main", repository.sha):
            return refusal(404, "RevisionNotFound")
        return respond(hub, call, repository, name, *rest[1:])

    return find


@lru_cache(256)  # SHA-1 and SHA-256; large files are listed often
def digests(content: bytes) -> tuple[str, str]:
    return sha1(content).hexdigest(), sha256(content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    """A file as in listings."""
    oid, lfs_oid = digests(content)
    found = {"type": "file", "path": path, "size": len(content), "oid": oid}
    lfs = {"oid": lfs_oid, "size": len(content), "pointerSize": 130}
    return found | ({"lfs": lfs} if path.endswith(LFS) else {})


def listing(repository: Repository) -> dict[str, dict]:
    """All files and folders by path."""
    entries = {path: entry(path, content) for path, content in repository.files.items()}
    folders = {str(parent) for path in entries for parent in PurePosixPath(path).parents if str(parent) != "."}
    return entries | {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders}


@of_repository
def information(hub: Hub, call: Call, repository: Repository, name: str) -> Answer:
    files = [{"rfilename": path} for path in repository.files]
    facts = {"id": name, "sha": repository.sha, "siblings": files, "private": False, "tags": [], "downloads": 0}
    return Answer(facts | {"gated": "auto" if repository.gated else False})


@of_repository
def tree(hub: Hub, call: Call, repository: Repository, name: str, folder: str | None = None) -> Answer:
    deep = parse_qs(urlsplit(call.request.path).query).get("recursive", [""])[0].lower() in ("true", "1")
    place = PurePosixPath(folder or ".")
    listed = {PurePosixPath(path): one for path, one in listing(repository).items()}
    found = [one for path, one in listed.items() if (place in path.parents if deep else place == path.parent)]
    return Answer(found) if found or not folder else refusal(404, "EntryNotFound")


@of_repository
def paths_info(hub: Hub, call: Call, repository: Repository, name: str) -> Answer:
    text = call.body.decode()
    paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
    entries = listing(repository)
    return Answer([entries[path] for path in paths if path in entries])


@of_repository
def content(hub: Hub, call: Call, repository: Repository, name: str, path: str) -> Answer:
    if repository.gated:
        return refusal(403 if call.signed_in else 401, "GatedRepo", f"Access to {name} is restricted")
    if path not in repository.files:
        return refusal(404, "EntryNotFound")
    found = repository.files[path]
    oid = entry(path, found).get("lfs", entry(path, found))["oid"]
    headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    if not call.request.range:
        return Answer(found, headers=headers)
    start, _, end = call.request.range.partition("-")
    part = found[int(start) : int(end or len(found)) + 1]
    within = f"bytes {start}-{int(start) + len(part) - 1}/{len(found)}"
    return Answer(part, 206, headers | {"Content-Range": within}) if part else refusal(416, "RangeNotSatisfiable")


def who_am_i(hub: Hub, call: Call) -> Answer:
    me = {"type": "user", "name": "me", "id": "1", "auth": {}}
    return Answer(me) if call.signed_in else refusal(401, "Unauthorized")


def validation(hub: Hub, call: Call) -> Answer:
    return Answer({"errors": [], "warnings": []})


def create(hub: Hub, call: Call) -> Answer:
    asked = json.loads(call.body)
    key = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or 'me'}/{asked['name']}"
    if not call.signed_in or not key[1].startswith("me/"):
        return refusal(403 if call.signed_in else 401, "Forbidden", "you may write to `me` only")
    exists = key in hub.repositories
    hub.repositories.setdefault(key, Repository({}, settings=asked))
    return Answer({"url": f"{hub.url}/{key[1]}", "name": key[1], "id": key[1]}, 409 if exists else 200)


@of_repository
def upload_modes(hub: Hub, call: Call, repository: Repository, name: str) -> Answer:
    paths = [file["path"] for file in json.loads(call.body)["files"]]
    modes = {path: "lfs" if path.endswith(LFS) else "regular" for path in paths}
    return Answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})


def upload_places(hub: Hub, call: Call, name: str) -> Answer:
    wanted = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(call.body)["objects"]]
    for one in wanted:
        if one["oid"] not in hub.uploads:
            one["actions"] = {"upload": {"href": f"{hub.url}/uploads/{one['oid']}"}}
    return Answer({"transfer": "basic", "objects": wanted})


def upload(hub: Hub, call: Call, oid: str) -> Answer:
    hub.uploads[oid] = call.body
    return Answer() if sha256(call.body).hexdigest() == oid else refusal(400, "BadUpload")


@of_repository
def commit(hub: Hub, call: Call, repository: Repository, name: str) -> Answer:
    changes = [json.loads(line) for line in call.body.splitlines()]
    for value in (change["value"] for change in changes if change["key"] == "file"):
        repository.files[value["path"]] = base64.b64decode(value["content"])
    for value in (change["value"] for change in changes if change["key"] == "lfsFile"):
        repository.files[value["path"]] = hub.uploads[value["oid"]]
    return Answer({"commitUrl": f"{hub.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha})


ROUTES = (
    (("GET",), r"/api/whoami-v2", who_am_i),
    (("GET",), REPOSITORY + r"(?:/revision/([^/]+))?", information),
    (("GET",), REPOSITORY + r"/tree/([^/]+)(?:/(.+))?", tree),
    (("POST",), REPOSITORY + r"/paths-info/([^/]+)", paths_info),
    (("GET", "HEAD"), r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", content),
    (("POST",), r"/api/validate-yaml", validation),
    (("POST",), r"/api/repos/create", create),
    (("POST",), REPOSITORY + r"/preupload/([^/]+)", upload_modes),
    (("POST",), r"/(.+)\.git/info/lfs/objects/batch", upload_places),
    (("PUT",), r"/uploads/(\w+)", upload),
    (("POST",), REPOSITORY + r"/commit/([^/]+)", commit),
)
