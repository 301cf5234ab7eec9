"""A Hub on the loopback interface: what huggingface_hub asks of one, for models and Spaces, kept in memory.

It creates repositories, takes commits (inline or by LFS), serves files, trees and refs, knows who may do what and
fails when it is told to: `hub.fail("POST", "/commit/", "drop")`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_" + "a" * 34: ("ann", "write"), "hf_" + "r" * 34: ("ann", "read"), "hf_" + "b" * 34: ("bob", "write")}
TOKEN, READ_TOKEN, OTHER_TOKEN = TOKENS
KINDS = {"model": "", "space": "spaces/", "dataset": "datasets/"}


@dataclass
class Repo:
    """Revisions of files, and their names."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        content = "".join(f"{name} {blob_id(body)}\n" for name, body in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)} {branch}\n{content}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.find(revision) or ""]


@dataclass
class Failure:
    """What goes wrong, how often, for which requests."""

    method: str
    part: str
    kind: str | int
    headers: dict[str, str]
    left: int


class LoopbackHub:
    """The state of the Hub.

    `fail(method, part, kind, times, **headers)`: the next `times` requests by that method whose path has `part` get the
    status `kind`, are dropped ("drop" before they are read, "midway" when half is read, "late" when all is done) or get
    no answer ("hang") until `goes_on` is set; `is_hanging` tells that one has come.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self.is_hanging, self.goes_on = threading.Event(), threading.Event()
        self.lfs = False
        self.endpoint = ""

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", files, "initial commit")
        return self.repos[name]

    def fail(self, method: str, part: str, kind: str | int, times: int = 1, **headers: str) -> None:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append(Failure(method, part, kind, headers, times))

    def failure_of(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.left and failure.method == method and failure.part in path:
                    failure.left -= 1
                    return failure
        return None


def blob_id(body: bytes) -> str:
    return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    routes = (
        ("GET", r"api/whoami-v2", "whoami"),
        ("POST", r"api/repos/create", "create"),
        ("POST", r"api/validate-yaml", "validate"),
        ("GET", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", "info"),
        ("GET", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/auth-check(?P<write>/write)?", "check"),
        ("GET", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", r"api/(?P<kind>\w+)s/(?P<name>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "tag"),
        ("POST", r"(?P<prefix>spaces/|datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"lfs/(?P<oid>\w+)", "lfs_put"),
        (
            "GET",
            r"(?P<prefix>spaces/|datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
            "file",
        ),
    )

    def do_HEAD(self) -> None:
        self.handle_one("GET", with_body=False)

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PUT(self) -> None:
        self.handle_one("PUT")

    def handle_one(self, method: str, with_body: bool = True) -> None:
        split = urlsplit(self.path)
        raw = split.path.strip("/")
        self.query = {name: values[0] for name, values in parse_qs(split.query).items()}
        self.with_body = with_body
        self.hub.asked.append(unquote(raw))
        self.hub.requests.append((method, unquote(raw)))
        failure = self.hub.failure_of(method, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if failure is not None and failure.kind in ("drop", "midway"):
            self.rfile.read(length // 2 if failure.kind == "midway" else 0)
            return self.drop()
        self.body = self.rfile.read(length)
        if failure is not None and isinstance(failure.kind, int):
            return self.send({"error": f"made to fail with {failure.kind}"}, failure.kind, headers=failure.headers)
        if failure is not None and failure.kind == "hang":
            self.hub.is_hanging.set()
            self.hub.goes_on.wait()
            return self.drop()
        self.is_dropped_late = failure is not None
        for wanted, pattern, name in self.routes:
            match = re.fullmatch(pattern, raw)
            if wanted == method and match:
                given = {key: unquote(value) if value else value for key, value in match.groupdict().items()}
                try:
                    with self.hub.lock:
                        return getattr(self, name)(**given)
                except RefusedError as problem:
                    headers = {"X-Error-Code": problem.code} if problem.code else {}
                    return self.send({"error": str(problem)}, problem.status, headers=headers)
        return self.send({"error": "Not found"}, 404)

    # ---- Who may do what ----

    def user(self) -> str | None:
        parts = self.headers.get("Authorization", "").split()
        if not parts:
            return None
        if parts[-1] not in TOKENS:
            raise RefusedError(401, "Invalid username or password.")
        return TOKENS[parts[-1]][0]

    def may_write(self, name: str) -> bool:
        parts = self.headers.get("Authorization", "").split()
        return bool(parts) and TOKENS.get(parts[-1]) == (name.split("/")[0], "write")

    def repo(self, kind: str, name: str, to_write: bool = False) -> Repo:
        repo = self.hub.repos.get(KINDS[kind] + name)
        if repo is None or (repo.private and self.user() != name.split("/")[0]):
            # the Hub does not tell strangers whether there is such a repository
            raise RefusedError(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        if to_write and not self.may_write(name):
            if self.user() is None:
                raise RefusedError(401, "Invalid username or password.")
            raise RefusedError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision)
        if oid is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # ---- What is asked for ----

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        role = TOKENS[self.headers["Authorization"].split()[-1]][1]
        token = {"displayName": "test", "role": role}
        self.send({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not self.may_write(name):
            raise RefusedError(
                403, f'You don\'t have the rights to create a model under the namespace "{name.split("/")[0]}"'
            )
        key = KINDS[asked.get("type") or "model"] + name
        answer = {"url": f"{self.hub.endpoint}/{key}", "name": name, "id": name}
        if key in self.hub.repos:
            return self.send({"error": "You already created this model repo", **answer}, 409)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.hub.add(key, {".gitattributes": attributes}, private=asked.get("visibility") == "private")
        return self.send(answer)

    def validate(self) -> None:
        try:
            _metadata(json.loads(self.body)["content"].encode())
        except yaml.YAMLError as error:
            return self.send({"errors": [{"message": f"Invalid metadata: {error}"}], "warnings": []}, 400)
        return self.send({"errors": [], "warnings": []})

    def info(self, kind: str, name: str, revision: str | None) -> None:
        repo = self.repo(kind, name)
        oid = self.commit_of(repo, revision or "main")
        files = repo.commits[oid]
        card = _metadata(files.get("README.md", b""))
        self.send({
            "id": name, "sha": oid, "private": repo.private, "tags": card.get("tags") or [], "cardData": card,
            "pipeline_tag": card.get("pipeline_tag"), "library_name": card.get("library_name"),
            "siblings": [{"rfilename": file} for file in sorted(files)],
        })  # fmt: skip

    def check(self, kind: str, name: str, write: str | None) -> None:
        self.repo(kind, name, to_write=bool(write))
        self.send({})

    def refs(self, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        self.send({
            "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()],
            "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()],
            "converts": [],
        })  # fmt: skip

    def entries(self, kind: str, name: str, revision: str) -> dict[str, dict]:
        """Files and the folders above them, by path."""
        repo = self.repo(kind, name)
        files = repo.commits[self.commit_of(repo, revision)]
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        found = [{"type": "directory", "path": path, "size": 0, "oid": blob_id(path.encode())} for path in folders]
        found += [
            {"type": "file", "path": path, "size": len(body), "oid": blob_id(body)} for path, body in files.items()
        ]
        return {entry["path"]: entry for entry in sorted(found, key=lambda entry: entry["path"])}

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        entries, start = self.entries(kind, name, revision), f"{folder}/" if folder else ""
        depth = 99 if self.query.get("recursive", "").lower() == "true" else start.count("/")
        self.send([e for path, e in entries.items() if path.startswith(start) and path.count("/") <= depth])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        entries, asked = self.entries(kind, name, revision), json.loads(self.body)["paths"]
        self.send([entries[path] for path in asked if path in entries])

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name, to_write=True)
        here = repo.commits[self.commit_of(repo, revision)]
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            by_lfs = self.hub.lfs and path.endswith(".safetensors")
            body = here.get(path)
            oid = None if body is None else hashlib.sha256(body).hexdigest() if by_lfs else blob_id(body)
            mode = "lfs" if by_lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})})
        self.send({"files": answer})

    def lfs_batch(self, prefix: str | None, name: str) -> None:
        kind = {"spaces/": "space", "datasets/": "dataset"}.get(prefix or "", "model")
        self.repo(kind, name, to_write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}", "header": {}}}
            objects.append({**item, **({} if item["oid"] in self.hub.blobs else {"actions": upload})})
        self.send({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "The content does not fit its hash")
        self.hub.blobs[oid] = self.body
        self.send({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name, to_write=True)
        if revision not in repo.branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(repo.files(revision)), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise RefusedError(400, "LFS pointer points to a file that does not exist")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:  # deletedFolder
                files = {path: body for path, body in files.items() if not path.startswith(value["path"])}
        oid = repo.commit(revision, files, message)
        url = f"{self.hub.endpoint}/{KINDS[kind]}{name}/commit/{oid}"
        self.send({"commitUrl": url, "commitOid": oid, "success": True})

    def branch(self, kind: str, name: str, branch: str) -> None:
        repo = self.repo(kind, name, to_write=True)
        if branch in repo.branches:
            raise RefusedError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = self.commit_of(repo, start)
        self.send({})

    def tag(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name, to_write=True)
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise RefusedError(409, "Reference already exists")
        repo.tags[tag] = self.commit_of(repo, revision)
        self.send({})

    def file(self, prefix: str | None, name: str, revision: str, file: str) -> None:
        kind = {"spaces/": "space", "datasets/": "dataset"}.get(prefix or "", "model")
        repo = self.repo(kind, name)
        oid = self.commit_of(repo, revision)
        body = repo.commits[oid].get(file)
        headers = {"X-Repo-Commit": oid}
        if body is None:
            return self.send({"error": "Entry not found"}, 404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        return self.send(body, headers=headers)

    # ---- Answers ----

    def send(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "is_dropped_late", False):
            return self.drop()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.with_body:
            self.wfile.write(body)
        return None

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        pass


def _metadata(card: bytes) -> dict:
    parts = card.decode().split("---\n")
    return yaml.safe_load(parts[1]) or {} if len(parts) > 2 and not parts[0].strip() else {}


@contextmanager
def running_hub():
    """A Hub without repositories; gives the [`LoopbackHub`]."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.goes_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def loopback_hub(repos: dict[str, Path]):
    """Serve `{"user/name": folder}`; gives the endpoint's address and the list of paths that were asked for."""
    with running_hub() as hub:
        for name, folder in repos.items():
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
            hub.add(name, files)
        yield hub.endpoint, hub.asked
