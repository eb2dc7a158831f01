"""A stand-in for the Hugging Face hub: as much of its HTTP API as huggingface_hub asks when a folder is shared.

It is written from what the client sends and reads, not from the hub's own code. Large files go by the LFS protocol, not
by Xet. Nothing is kept on disk; one account may write to the owners it is given.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInTokenThatNobodyMaySee"


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    def name_of(self, index: int) -> str:
        return hashlib.sha1(f"{id(self)} {index}".encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        names = {self.name_of(index): index for index in range(len(self.commits))}
        index = len(self.commits) - 1 if revision == "main" else names.get(revision)
        return (self.name_of(index), self.commits[index]) if index is not None else None


@dataclass
class Hub:
    """`before_commit` is called when a commit arrives, before it is judged; `failing` is a status for every request."""

    endpoint: str
    owners: set[str]
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    before_commit: Callable[["Hub", str], None] = lambda hub, repository: None
    failing: int | None = None


@contextmanager
def running_hub(owners: set[str]) -> Iterator[Hub]:
    """A hub at `endpoint`, on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}", owners)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the tests look at `Hub.requests`."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} /{'/'.join(path)}")
        if self.hub.failing is not None:
            return self._answer(self.hub.failing, {"error": f"no, not with {self.headers.get('Authorization')}"})
        match self.command, path:
            case "POST", ["api", "validate-yaml"]:
                return self._answer(200, {"errors": [], "warnings": []})
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "PUT", ["lfs", digest]:
                self.hub.objects[digest] = body
                return self._answer(200 if hashlib.sha256(body).hexdigest() == digest else 400, {})
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(json.loads(body))
            case _, ["api", "models", owner, name, *rest]:
                repository = self._repository(f"{owner}/{name}")
                return self._of_repository(repository, f"{owner}/{name}", rest, body) if repository else None
            case _, [owner, name, "resolve", revision, *file]:
                repository = self._repository(f"{owner}/{name}")
                return self._resolve(repository, revision, "/".join(file)) if repository else None
        return self._answer(404, {"error": "no such address"})

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._may_write(name)):
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _may_write(self, name: str) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" and name.split("/")[0] in self.hub.owners

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(name):
            return self._answer(403, {"error": f"You have no rights to create {name}"})
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", "url": f"/{name}"})
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def _of_repository(self, repository: Repository, name: str, rest: list[str], body: bytes) -> None:
        match self.command, rest:
            case "GET", ["revision", revision]:
                pass
            case "GET", []:
                revision = "main"
            case _, [_, revision, *_]:
                pass
            case _:
                return self._answer(404, {"error": "no such address"})
        found = repository.at(revision)
        if found is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if rest[:1] in ([], ["revision"]):
            return self._answer(200, {"id": name, "sha": commit, "siblings": [], "private": repository.private})
        if rest[0] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
                for path, data in files.items()
            ]
            return self._answer(200, [{"type": "directory", "path": "somewhere", "oid": "0" * 40}, *entries])
        if not self._may_write(name):
            return self._answer(403, {"error": "Forbidden"}, {"X-Error-Message": "not yours"})
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            return self._answer(200, {"files": [_upload_mode(file["path"], files) for file in asked]})
        self.hub.before_commit(self.hub, name)
        return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        header = lines[0]["value"]
        newest = repository.name_of(len(repository.commits) - 1)
        if header.get("parentCommit", newest) != newest:
            return self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.commits[-1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        repository.commits.append(files)
        repository.messages.append(header["summary"])
        made = repository.name_of(len(repository.commits) - 1)
        return self._answer(
            200,
            {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{made}", "commitOid": made, "pullRequestUrl": None},
        )

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        found = repository.at(revision)
        if found is None or path not in found[1]:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        commit, files = found
        return self._send(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(files[path])}"'})

    def _answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _upload_mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
        "shouldIgnore": False,
        "oid": _git_hash(files[path]) if path in files else None,
    }
