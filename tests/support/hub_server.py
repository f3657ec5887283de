"""The part of the Hugging Face Hub that reading needs: commits, their trees and files."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        body, headers = self._found(path)
        self.send_response(404 if body is None else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body:
            self.wfile.write(body or b"")

    def _found(self, path: str) -> tuple[bytes | None, dict[str, str]]:
        api = path.startswith("api/")
        words = path.removeprefix("api/").removeprefix("datasets/").removeprefix("models/").split("/")
        repository, what, rest = "/".join(words[:2]), *(words[2:3] or [""]), words[3:]
        commits = self.server.repositories.get(repository)
        revisions = self.server.revisions.get(repository, {})
        commit = revisions.get(rest[0] if rest else "main", rest[0] if rest else "")
        if commits is None:
            return None, {"X-Error-Code": "RepoNotFound"}
        if commit not in commits:
            return None, {"X-Error-Code": "RevisionNotFound"}
        files = commits[commit]
        if api and what in ("", "revision"):
            return _json(
                {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            )
        if api and what == "tree":
            return _json([_entry(name, content) for name, content in files.items()])
        content = files.get("/".join(rest[1:]))
        if api or what != "resolve" or content is None:
            return None, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        return content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit}

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def _json(value: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    repositories: dict[str, dict[str, Files]]
    revisions: dict[str, dict[str, str]]
    asked: list[str]


class HubServer:
    """A hub on this machine, for as long as the context lasts.

    Attributes:
        url: for HF_ENDPOINT.
        asked: the paths asked for so far.
    """

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.repositories, self._server.revisions, self._server.asked = {}, {}, []
        self.asked = self._server.asked
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def commit(self, repository: str, files: Files, revision: str = "main") -> str:
        """Make `files` what `revision` names; the commit's name."""
        commit = _digest(repr((repository, sorted(files.items()))).encode())
        self._server.repositories.setdefault(repository, {})[commit] = files
        self._server.revisions.setdefault(repository, {})[revision] = commit
        return commit

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
