"""The few endpoints of the Hugging Face hub that downloading a model uses, on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves ``repos`` (id to file name to content) and keeps what was asked for.

    Attributes:
        tokens: repository id to the only token that may read it.
        gated: repositories whose terms were not accepted.
        requests: (path, Authorization header) in order.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.rsplit("/", 1)[1] for path, _ in self.requests if "/resolve/" in path}


@contextmanager
def fake_hub(repos: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    server = FakeHub(repos)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def log_message(self, *args: Any) -> None:
        pass

    def _respond(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((path, self.headers.get("Authorization")))
        repo_id = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.server.repos.get(repo_id)
        token = self.server.tokens.get(repo_id)
        if files is None or (token and self.headers.get("Authorization") != f"Bearer {token}"):
            return self._error(401, "RepoNotFound", "Repository not found")
        if repo_id in self.server.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix(f"/api/models/{repo_id}"), repo_id, files, body)
        revision, name = path.removeprefix(f"/{repo_id}/resolve/").split("/", 1)
        if revision not in ("main", COMMIT) or name not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        return self._send(files[name], {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": COMMIT}, body)

    def _api(self, rest: str, repo_id: str, files: dict[str, bytes], body: bool) -> None:
        revision = rest.removeprefix("/revision/").removeprefix("/tree/") or "main"
        if revision not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
            for name, content in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "private": False, "siblings": siblings}
        answer = entries if rest.startswith("/tree/") else info
        return self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": message}, False, status)

    def _send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
