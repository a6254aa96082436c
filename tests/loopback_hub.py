"""A small Hugging Face Hub on 127.0.0.1, so that the tests' uploads and downloads are `huggingface_hub`'s own.

It speaks what huggingface_hub 2.4 sends without Xet (`HF_HUB_DISABLE_XET=1`): whoami, create repository, validate the
card, preupload, LFS batch, upload and verify, commit, branches, info, tree, resolve with ETag and ranges. As on the
Hub, large and binary files are redirected to a storage host, where no token is sent. Every request is kept as it came.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopback" * 4
USER = "gardener"


class Request(NamedTuple):
    """What came over the socket."""

    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case
    body: bytes


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}


class Refused(Exception):
    """An answer that ends the handling of a request."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None):
        self.answer = Answer(
            status,
            json.dumps({"error": message or code}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message or code, **(headers or {})},
        )


@dataclass
class Blob:
    """A file's content; `lfs` where the Hub keeps it outside git."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repository:
    """Commits by their hash, each a whole tree, and what the names of revisions stand for."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, revision: str, files: dict[str, Blob], message: str) -> str:
        """A new commit on a branch; its hash."""
        seed = f"{len(self.commits)} {revision} {message}"
        sha = hashlib.sha1(seed.encode() + b"".join(files[name].oid.encode() for name in sorted(files))).hexdigest()
        self.commits[sha] = files
        self.revisions[revision] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = self.revisions.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]

    @property
    def files(self) -> dict[str, bytes]:
        """What the main branch holds now."""
        return {path: blob.content for path, blob in self.find("main")[1].items()}


class LoopbackHub:
    """The server, for as long as the context lasts.

    Attributes:
        requests: each one, in order of arrival.
        repositories: by `user/name`.
        interrupt: asked before a request is answered; where it returns a number of bytes, only so many of the answer's
            body are sent before the connection is cut, and with -1 nothing at all.
    """

    def __init__(self):
        self.requests: list[Request] = []
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS: what has been uploaded, by its sha256
        self.interrupt: Callable[[Request], int | None] = lambda request: None
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage_url(self) -> str:
        """The same server by another name, as large files lie on another host than the Hub."""
        return f"http://localhost:{self._server.server_port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """This process's variables for a subprocess whose Hub is this one and whose caches are in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def sent(self) -> list[bytes]:
        """All that clients have sent, request by request, without the token that logs them in."""
        whole = []
        for request in self.requests:
            headers = {name: value for name, value in request.headers.items() if name != "authorization"}
            whole.append(f"{request.method} {request.path} {headers}\n".encode() + request.body)
            whole += [base64.b64decode(content) for content in _inline_contents(request)]
        return whole

    def answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            url = urlsplit(request.path)
            for method, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and request.method in method:
                    arguments = {name: unquote(value) for name, value in match.groupdict().items()}
                    try:
                        return handle(self, request, **arguments)
                    except Refused as refused:
                        return refused.answer
        return Answer(404, json.dumps({"error": f"no such route: {request.method} {request.path}"}).encode())

    # Who may do what

    def _log_in(self, request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise Refused(401, message="Invalid username or password.")

    def _repository(self, request: Request, repo_id: str, write: bool = False) -> Repository:
        repository = self.repositories.get(repo_id)
        logged_in = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not logged_in):
            raise Refused(404 if logged_in else 401, "RepoNotFound", "Repository not found")
        if write:
            self._log_in(request)
            if not repo_id.startswith(f"{USER}/"):
                raise Refused(403, message="You don't have the rights to write to this repository")
        return repository

    # Uploads

    def _whoami(self, request: Request) -> Answer:
        self._log_in(request)
        return _json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _create(self, request: Request) -> Answer:
        self._log_in(request)
        asked = json.loads(request.body)
        namespace = asked.get("organization") or USER
        if namespace != USER:
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {namespace}")
        repo_id = f"{namespace}/{asked['name']}"
        made = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return _json({"error": "You already created this model repo", **made}, 409)
        repository = self.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return _json(made)

    def _auth_check(self, request: Request, repo_id: str) -> Answer:
        self._repository(request, repo_id, write=True)
        return _json({})

    def _validate_card(self, request: Request) -> Answer:
        content = json.loads(request.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            valid = match is None or isinstance(yaml.safe_load(match[1]) or {}, dict)
        except yaml.YAMLError:
            valid = False
        if not valid:
            return _json({"errors": [{"message": "the front matter is no YAML mapping"}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        _, files = self._repository(request, repo_id, write=True).find(revision)
        answers = []
        for asked in json.loads(request.body)["files"]:
            binary = b"\0" in base64.b64decode(asked["sample"])
            lfs = binary or asked["path"].endswith(".safetensors") or asked["size"] > 10_000_000
            there = files.get(asked["path"])
            mode = "lfs" if lfs else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
                           | ({"oid": there.etag} if there else {}))  # fmt: skip
        return _json({"files": answers})

    def _lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self._repository(request, repo_id, write=True)
        answers = []
        for asked in json.loads(request.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            links = {
                "upload": {"href": f"{self.storage_url}/storage/{oid}", "header": {}},
                "verify": {"href": f"{self.url}/{repo_id}/lfs-verify", "header": {}},
            }
            answers.append({"oid": oid, "size": size} | ({} if oid in self.objects else {"actions": links}))
        return _json({"transfer": "basic", "objects": answers})

    def _lfs_upload(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, message="BadDigest")
        self.objects[oid] = request.body
        return Answer(200, headers={"ETag": f'"{oid}"'})

    def _lfs_verify(self, request: Request, repo_id: str) -> Answer:
        self._repository(request, repo_id, write=True)
        asked = json.loads(request.body)
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="object not uploaded")
        return Answer()

    def _commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        repository = self._repository(request, repo_id, write=True)
        files = dict(repository.find(revision)[1])
        message = ""
        for line in request.body.decode().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, message=f"{value['path']} points to an LFS object that wasn't uploaded")
                files[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise Refused(400, message=f"unknown operation {key}")
        sha = repository.commit(revision, files, message)
        return _json({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"})

    def _branch(self, request: Request, repo_id: str, branch: str) -> Answer:
        repository = self._repository(request, repo_id, write=True)
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        repository.revisions[branch] = repository.find(start)[0]
        return _json({})

    # Downloads

    def _info(self, request: Request, repo_id: str, revision: str = "main") -> Answer:
        repository = self._repository(request, repo_id)
        sha, files = repository.find(revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return _json({"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": sha, "tags": [],
                      "private": repository.private, "disabled": False, "siblings": siblings})  # fmt: skip

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Answer:
        _, files = self._repository(request, repo_id).find(revision)
        recursive = parse_qs(urlsplit(request.path).query).get("recursive", [""])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        entries, folders = [], set()
        for path, blob in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            inside = path[len(prefix) :].split("/")
            folders.update(prefix + "/".join(inside[:depth]) for depth in range(1, len(inside) if recursive else 2))
            if recursive or len(inside) == 1:
                folders.discard(path)
                entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
                lfs = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
                entries.append(entry | ({"lfs": lfs} if blob.lfs else {}))
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        return _json(entries)

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        sha, files = self._repository(request, repo_id).find(revision)
        commit = {"X-Repo-Commit": sha}
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found", commit)
        blob = files[path]
        if not blob.lfs:
            return _content(request, blob, commit)
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return Answer(302, headers=commit | linked | {"Location": f"{self.storage_url}/storage/{blob.sha256}"})

    def _lfs_download(self, request: Request, oid: str) -> Answer:
        assert "authorization" not in request.headers  # the client keeps the token from other hosts
        return _content(request, Blob(self.objects[oid], True), {})


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_MODEL = rf"/api/models/{_REPO}"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", LoopbackHub._whoami),
    (("POST",), r"/api/repos/create", LoopbackHub._create),
    (("GET",), rf"{_MODEL}/auth-check/write", LoopbackHub._auth_check),
    (("POST",), r"/api/validate-yaml", LoopbackHub._validate_card),
    (("POST",), rf"{_MODEL}/preupload/(?P<revision>[^/]+)", LoopbackHub._preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch),
    (("PUT",), r"/storage/(?P<oid>\w+)", LoopbackHub._lfs_upload),
    (("POST",), rf"/{_REPO}/lfs-verify", LoopbackHub._lfs_verify),
    (("POST",), rf"{_MODEL}/commit/(?P<revision>[^/]+)", LoopbackHub._commit),
    (("POST",), rf"{_MODEL}/branch/(?P<branch>[^/]+)", LoopbackHub._branch),
    (("GET",), _MODEL, LoopbackHub._info),
    (("GET",), rf"{_MODEL}/revision/(?P<revision>[^/]+)", LoopbackHub._info),
    (("GET",), rf"{_MODEL}/tree/(?P<revision>[^/]+)", LoopbackHub._tree),
    (("GET",), rf"{_MODEL}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", LoopbackHub._tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", LoopbackHub._resolve),
    (("GET", "HEAD"), r"/storage/(?P<oid>\w+)", LoopbackHub._lfs_download),
]


def _inline_contents(request: Request) -> list[str]:
    """The base64 texts that a request carries: a commit's files, and the first bytes that decide how to upload."""
    if "/commit/" in request.path:
        lines = [json.loads(line) for line in request.body.decode().splitlines()]
        return [line["value"]["content"] for line in lines if line["key"] == "file"]
    if "/preupload/" in request.path:
        return [file["sample"] for file in json.loads(request.body)["files"]]
    return []


def _json(value, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _content(request: Request, blob: Blob, headers: dict[str, str]) -> Answer:
    headers = headers | {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Answer(200, blob.content, headers)
    first, last = int(asked[1]), int(asked[2] or len(blob.content) - 1)
    place = {"Content-Range": f"bytes {first}-{last}/{len(blob.content)}"}
    return Answer(206, blob.content[first : last + 1], headers | place)


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else None
            if body is None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, body)
            cut = hub.interrupt(request)
            if cut == -1:
                self.close_connection = True
                return
            answer = hub.answer(request)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[:cut])
            self.close_connection |= cut is not None

        def _read_chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def log_message(self, *_) -> None:
            pass

    return Handler
