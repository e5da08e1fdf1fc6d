"""The endpoints of the Hugging Face Hub that `huggingface_hub` needs to upload, on this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Repository:
    """What was committed: files of the newest state, and every commit's message and own files."""

    visibility: str | None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What a test sees of the server, and how it makes it fail or wait.

    Attributes:
        url: the value of HF_ENDPOINT.
        repositories: by owner/name; a name without owner belongs to "me".
        tokens: every token that was sent.
        failing: answer everything with an error.
        gate: commits wait until it is set.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    failing: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    large: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Give a hub on a free port of this machine."""
    hub = Hub()
    hub.gate.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Log nothing: a test's output is its own."""

    def do_POST(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if self._refused():
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/\w+", path):
            self._answer({"files": [_mode(f["path"]) for f in json.loads(body)["files"]]})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._answer(self._places(json.loads(body)["objects"]))
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(\w+)", path):
            self.hub.gate.wait(30)
            self.hub.repositories[match[1]].branches.append(match[2])
            self._commit(match[1], body)
        else:
            self._answer({"error": f"POST {path}"}, status=404)

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid, "a file changed while it was uploaded"
        self.hub.large[oid] = content
        self._answer({})

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self._refused():
            return
        if match := re.fullmatch(r"/api/models/(.+)/tree/\w+", path):
            files = self.hub.repositories[match[1]].files
            self._answer(
                [{"type": "file", "path": p, "oid": "0", "size": len(c)} for p, c in files.items()]
            )
        else:
            self._answer({"error": f"GET {path}"}, status=404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refused(self) -> bool:
        token = self.headers.get("Authorization", "")
        if token:
            self.hub.tokens.add(token.removeprefix("Bearer "))
        if self.hub.failing:
            self._answer({"error": "out of order"}, status=403)
        return self.hub.failing

    def _answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Connection", "close")  # a thread that waits for more would be a leak
        self.end_headers()
        self.wfile.write(text)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.hub.repositories
        if not there:
            self.hub.repositories[name] = Repository(asked.get("visibility"))
        self._answer({"url": f"{self.hub.url}/{name}"}, status=409 if there else 200)

    def _places(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        places = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
            for o in objects
        ]
        return {"transfer": "basic", "objects": places}

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        message, touched = "", []
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                continue
            touched.append(value["path"])
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append((message, touched))
        oid = f"{len(repository.commits):040x}"
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url})


def _mode(path: str) -> dict[str, Any]:
    large = path.endswith(".safetensors")
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
