"""A Hub on this machine: as much of its HTTP API as pushing and pulling need, LFS included."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import yaml


RELATIONS = {"adapter", "merge", "quantized", "finetune"}


class Hub:
    """Repositories as lists of commits: ``(sha, branch, files)``."""

    def __init__(self, lfs_suffixes: tuple[str, ...]) -> None:
        self.repositories: dict[str, list[tuple[str, str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.lfs_files: set[str] = set()
        self.lfs_suffixes = lfs_suffixes
        self.url = ""

    def head(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """The last commit of a branch, or the commit with that sha."""
        for sha, branch, files in reversed(self.repositories.get(repository, [])):
            if revision in (branch, sha):
                return sha, files
        return None

    def commit(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit; returns its sha."""
        commits = self.repositories.setdefault(repository, [])
        sha = hashlib.sha1(f"{repository}{len(commits)}".encode()).hexdigest()
        commits.append((sha, branch, files))
        return sha


def validate_card(text: str) -> list[str]:
    """What the Hub refuses in the head of a card."""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    fields = yaml.safe_load(match[1]) if match else {}
    strings = ("license", "library_name")
    errors = [f"{key} must be a string" for key in strings if not isinstance(fields.get(key, ""), str)]
    if fields.get("base_model_relation", "quantized") not in RELATIONS:
        errors.append("base_model_relation")
    if not all(isinstance(tag, str) for tag in fields.get("tags", [])):
        errors.append("tags must be strings")
    return errors


class Handler(BaseHTTPRequestHandler):
    """Answers requests for ``self.server.hub``."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, code: int, content: Any = b"", headers: dict[str, str] | None = None, kind: str = "json") -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Type", f"application/{kind}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def missing(self, code: str) -> None:
        self.answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def handle_any(self) -> None:
        path, data = unquote(urlparse(self.path).path), self.body()
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, path):
                return action(self, self.server.hub, data, *match.groups())
        return self.missing("RepoNotFound")

    do_GET = do_POST = do_HEAD = do_PUT = handle_any


def who(handler: Handler, hub: Hub, data: bytes) -> None:
    handler.answer(200, {"name": "tester", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def validate(handler: Handler, hub: Hub, data: bytes) -> None:
    errors = validate_card(json.loads(data)["content"])
    handler.answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})


def create(handler: Handler, hub: Hub, data: bytes) -> None:
    fields = json.loads(data)
    name = f"{fields.get('organization') or 'tester'}/{fields['name']}"
    answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        return handler.answer(409, {"error": "exists", **answer})
    hub.commit(name, {".gitattributes": b""})
    hub.private[name] = bool(fields.get("private")) or fields.get("visibility") == "private"
    return handler.answer(200, answer)


def branch(handler: Handler, hub: Hub, data: bytes, name: str, revision: str) -> None:
    sha_files = hub.head(name)
    assert sha_files is not None
    hub.commit(name, sha_files[1], revision)
    handler.answer(200, {})


def preupload(handler: Handler, hub: Hub, data: bytes, name: str, revision: str) -> None:
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if hub.lfs_suffixes and file["path"].endswith(hub.lfs_suffixes) else "regular",
            "shouldIgnore": False,
        }
        for file in json.loads(data)["files"]
    ]
    handler.answer(200, {"files": files})


def lfs_batch(handler: Handler, hub: Hub, data: bytes, name: str) -> None:
    objects = [
        {**entry, "actions": {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}}
        for entry in json.loads(data)["objects"]
    ]
    handler.answer(200, {"transfer": "basic", "objects": objects}, kind="vnd.git-lfs+json")


def lfs_put(handler: Handler, hub: Hub, data: bytes, oid: str) -> None:
    assert hashlib.sha256(data).hexdigest() == oid
    hub.blobs[oid] = data
    handler.answer(200)


def commit(handler: Handler, hub: Hub, data: bytes, name: str, revision: str) -> None:
    found = hub.head(name, revision)
    if found is None:
        return handler.missing("RevisionNotFound")
    files = dict(found[1])
    for line in data.decode().splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
            hub.lfs_files.add(value["path"])
        elif entry["key"] == "deletedFile":
            del files[value["path"]]
    request = "create_pr=1" in handler.path
    sha = hub.commit(name, files, "refs/pr/1" if request else revision)
    answer = {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
    if request:
        answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/1"
    return handler.answer(200, answer)


def tree(handler: Handler, hub: Hub, data: bytes, name: str, revision: str, prefix: str) -> None:
    found = hub.head(name, revision)
    if found is None:
        return handler.missing("RepoNotFound")
    entries = [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in found[1].items()
        if path.startswith(prefix.strip("/"))
    ]
    return handler.answer(200, entries)


def info(handler: Handler, hub: Hub, data: bytes, name: str, revision: str | None) -> None:
    found = hub.head(name, revision or "main")
    if found is None:
        return handler.missing("RepoNotFound")
    siblings = [{"rfilename": path} for path in found[1]]
    fields = {"id": name, "sha": found[0], "private": hub.private.get(name, False), "tags": [], "siblings": siblings}
    return handler.answer(200, fields | {"modelId": name, "downloads": 0, "likes": 0})


def resolve(handler: Handler, hub: Hub, data: bytes, name: str, revision: str, path: str) -> None:
    found = hub.head(name, revision)
    if found is None:
        return handler.missing("RepoNotFound")
    sha, files = found
    if path not in files:
        return handler.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
    content = files[path]
    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if wanted := re.match(r"bytes=(\d+)-", handler.headers.get("Range") or ""):
        start = int(wanted[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return handler.answer(206, content[start:], headers, "octet-stream")
    return handler.answer(200, content, headers, "octet-stream")


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", who),
    (r"/api/validate-yaml", validate),
    (r"/api/repos/create", create),
    (rf"/api/models/{NAME}/branch/(.+)", branch),
    (rf"/api/models/{NAME}/preupload/(.+)", preupload),
    (rf"/{NAME}\.git/info/lfs/objects/batch", lfs_batch),
    (r"/lfs/(\w+)", lfs_put),
    (rf"/api/models/{NAME}/commit/(.+)", commit),
    (rf"/api/models/{NAME}/tree/([^/]+)(/?.*)", tree),
    (rf"/api/models/{NAME}(?:/revision/(.+))?", info),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]


@contextmanager
def serving(*lfs_suffixes: str) -> Iterator[Hub]:
    """A running Hub; files with these suffixes go through LFS."""
    hub = Hub(lfs_suffixes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
