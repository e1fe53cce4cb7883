"""A Hub on loopback, and the fixture `hub` that starts one.

Speaks the part of the Hugging Face Hub's HTTP protocol that publishing and loading a model use: whoami, create
repository, validate a card, preupload, LFS batch with basic transfer, commit (newline-delimited JSON), model info,
tree, and resolve with ETag and Range.  Repositories are lists of commits over content-addressed blobs on disk, so a
commit happens whole or not at all, as on the real one.

huggingface_hub reads HF_ENDPOINT when it is imported: clients run in processes of their own, with `hub.env()`.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", "tokenizer.json")


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, str]  # path -> sha256 of its blob


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def commit(self, title: str, files: dict[str, str]) -> Commit:
        parent = self.commits[-1].oid if self.commits else ""
        oid = hashlib.sha1(json.dumps([parent, title, sorted(files.items())]).encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        return self.head


class HubServer:
    """The server: its state is open to the tests that use it.

    repos: by "org/name".  tokens: token -> role.  log: "METHOD path status" of every request.
    break_uploads_after: if set, the connection of an LFS upload is dropped after that many bytes.
    """

    write_token = "hf_write"
    read_token = "hf_read"

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)
        self.repos: dict[str, Repo] = {}
        self.tokens = {self.write_token: "write", self.read_token: "read"}
        self.log: list[str] = []
        self.break_uploads_after: int | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        """Stop listening: from now on there is no network."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def env(self, token: str | None = None) -> dict[str, str]:
        """Environment of a client process: this Hub, an empty cache, and `token` as if logged in."""
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE")
        env = {key: value for key, value in os.environ.items() if key not in dropped}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.root / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return env | ({"HF_TOKEN": token} if token is not None else {})

    def run(self, script: str, *args: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run Python source with this Hub; args are its sys.argv[1:]."""
        command = [sys.executable, "-c", script, *args]
        return subprocess.run(command, env=self.env(token), capture_output=True, text=True, timeout=300, check=False)

    def add_repo(self, repo_id: str, files: dict[str, bytes], private: bool = False, gated: bool = False) -> Repo:
        """A repository that is already there."""
        repo = self.repos[repo_id] = Repo(private, gated)
        repo.commit("initial", {path: self.store(content) for path, content in files.items()})
        return repo

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.blob(oid).write_bytes(content)
        return oid

    def blob(self, oid: str) -> Path:
        return self.root / "blobs" / oid

    def content(self, repo_id: str, path: str) -> bytes:
        """A file at the head of a repository."""
        return self.blob(self.repos[repo_id].head.files[path]).read_bytes()


class _RefusedError(Exception):
    """Ends a request with an error answer."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/[^/]+", "preupload"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/[^/]+", "commit"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+?)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if match and verb == method:
                    getattr(self, name)(**match.groupdict())
                    return
            raise _RefusedError(404, f"no such page: {path}", "EntryNotFound")
        except _RefusedError as refused:
            self.body()  # an unread body would be taken for the next request
            headers = {"X-Error-Message": refused.message}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            self.reply({"error": refused.message}, refused.status, headers)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  http.server's names

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.log.append(f"{self.command} {self.path} {args[1] if len(args) > 1 else ''}")

    # What comes in, what goes out

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            del self.headers["Content-Length"]  # read once
            return content
        del self.headers["Transfer-Encoding"]
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def reply(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send(status, {"Content-Type": "application/json", **(headers or {})}, content)

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who may do what

    def role(self) -> str | None:
        """Role of the caller's token; None without one."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        role = self.hub.tokens.get(header.removeprefix("Bearer "))
        if role is None:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return role

    def writable(self, namespace: str) -> None:
        role = self.role()
        if role is None:
            raise _RefusedError(401, "Invalid username or password.")
        if role != "write" or namespace != USER:
            raise _RefusedError(403, f"You don't have the rights to write under the namespace {namespace}")

    def readable(self, repo_id: str) -> Repo:
        role = self.role()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and role is None):
            raise _RefusedError(401 if role is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def commit_of(self, repo_id: str, revision: str | None) -> Commit:
        repo = self.readable(repo_id)
        if not repo.commits:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        if revision in (None, "main"):
            return repo.head
        for commit in repo.commits:
            if commit.oid == revision:
                return commit
        raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # The routes

    def whoami(self) -> None:
        role = self.role()
        if role is None:
            raise _RefusedError(401, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"role": role, "displayName": "test"}}
        self.reply({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": access})

    def create(self) -> None:
        asked = json.loads(self.body())
        namespace = asked.get("organization") or USER
        self.writable(namespace)
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            self.reply({"error": "You already created this model repo", "url": url}, 409)
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(private)
        self.reply({"url": url, "name": repo_id, "id": repo_id})

    def validate_card(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body())["content"], re.S)
        known = front is None or isinstance(yaml.safe_load(front[1]), dict)
        errors = [] if known else [{"message": "front matter is not a mapping"}]
        self.reply({"errors": errors, "warnings": []}, 200 if known else 400)

    def preupload(self, repo_id: str) -> None:
        self.writable(repo_id.split("/")[0])
        asked = json.loads(self.body())["files"]
        modes = [{"path": f["path"], "shouldIgnore": False, "oid": None} for f in asked]
        for mode in modes:
            mode["uploadMode"] = "lfs" if mode["path"].endswith(LFS_SUFFIXES) else "regular"
        self.reply({"files": modes})

    def lfs_batch(self, repo_id: str) -> None:
        self.writable(repo_id.split("/")[0])
        objects = []
        for asked in json.loads(self.body())["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if not self.hub.blob(asked["oid"]).exists():
                upload = {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        """The object itself; its address was given to somebody who may write, so it carries no token."""
        if self.hub.break_uploads_after is not None:
            self.rfile.read(self.hub.break_uploads_after)
            self.log_message("", "", "broken off")
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise _RefusedError(400, "content does not match its oid")
        self.hub.store(content)
        self.send(200, {}, b"")

    def lfs_verify(self) -> None:
        asked = json.loads(self.body())
        blob = self.hub.blob(asked["oid"])
        if not blob.exists() or blob.stat().st_size != asked["size"]:
            raise _RefusedError(404, f"object {asked['oid']} was not uploaded")
        self.reply({})

    def commit(self, repo_id: str) -> None:
        self.writable(repo_id.split("/")[0])
        repo = self.readable(repo_id)
        files = dict(repo.head.files) if repo.commits else {}
        title = ""
        for line in self.body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"], validate=True))
            elif entry["key"] == "lfsFile" and self.hub.blob(value["oid"]).exists():
                files[value["path"]] = value["oid"]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _RefusedError(400, f"cannot commit {entry['key']} {value.get('path')}")
        oid = repo.commit(title, files).oid
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        self.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, repo_id: str, revision: str | None) -> None:
        repo = self.readable(repo_id)
        commit = self.commit_of(repo_id, revision) if repo.commits else Commit("0" * 40, "", {})
        self.reply(
            {
                "_id": "1",
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.oid,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def tree(self, repo_id: str, revision: str, path: str | None) -> None:
        files = self.commit_of(repo_id, revision).files
        below = f"{path}/" if path else ""
        found = [name for name in sorted(files) if name.startswith(below)]
        if path and not found:
            raise _RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        sizes = {name: self.hub.blob(files[name]).stat().st_size for name in found}
        self.reply([{"type": "file", "path": name, "size": sizes[name], "oid": files[name][:40]} for name in found])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.readable(repo_id)
        commit = self.commit_of(repo_id, revision)
        if repo.gated:
            raise _RefusedError(403 if self.role() else 401, f"Access to model {repo_id} is restricted", "GatedRepo")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.reply({"error": "Entry not found"}, 404, headers)
            return
        oid = commit.files[path]
        content = self.hub.blob(oid).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers["ETag"] = f'"{oid}"'
        if not asked:
            self.send(200, headers, content)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(206, headers, content[first : last + 1])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A fresh Hub with no repositories, one user and two tokens (write_token, read_token)."""
    server = HubServer(tmp_path / "hub")
    yield server
    server.close()
