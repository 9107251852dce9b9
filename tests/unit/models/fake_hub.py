"""A model hub on loopback: serves the folders below a root as repositories, over the paths huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """``root/org/name/`` is the repository org/name. ``status`` other than 200 is the answer to everything."""

    root: Path
    endpoint: str = ""
    status: int = 200
    fetched: list[str] = field(default_factory=list)

    def files(self, repository: str) -> list[Path]:
        folder = self.root / repository
        return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def run_fake_hub(root: Path) -> Iterator[FakeHub]:
    hub = FakeHub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if hub.status != 200:
                self._send(hub.status, b"{}")
            elif parts[:2] == ["api", "models"]:
                self._api("/".join(parts[2:4]), parts[4:])
            elif len(parts) > 4 and parts[2] == "resolve":
                self._file(hub.root / "/".join(parts[:2]) / "/".join(parts[4:]))
            else:
                self._send(404, b"{}")

        def _api(self, repository: str, rest: list[str]) -> None:
            files = hub.files(repository)
            folder = hub.root / repository
            if not files:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["tree"]:
                tree = [
                    {
                        "type": "file",
                        "path": str(path.relative_to(folder)),
                        "size": path.stat().st_size,
                        "oid": _etag(path),
                    }
                    for path in files
                ]
                self._send(200, json.dumps(tree).encode(), {"X-Repo-Commit": COMMIT})
            else:
                siblings = [
                    {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size, "blobId": _etag(path)}
                    for path in files
                ]
                self._send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())

        def _file(self, path: Path) -> None:
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if self.command == "GET":
                hub.fetched.append(path.name)
            self._send(200, path.read_bytes(), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _etag(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
