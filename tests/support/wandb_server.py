"""The part of a wandb server that an online run needs: it receives rows and can stop the run."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.support.wandb_file import numbers_of

_BUCKET = {
    "id": "1",
    "name": "run",
    "displayName": "run",
    "config": "{}",
    "historyLineCount": 0,
    "project": {"id": "1", "name": "project", "entity": {"id": "1", "name": "entity"}},
}
_NO_RUN: dict[str, Any] = {"model": {"bucket": None}}
_ANSWER = {
    "upsertBucket": {"bucket": _BUCKET, "inserted": True},
    "viewer": {"id": "1", "entity": "entity", "flags": "{}"},
    "serverInfo": {"features": []},
    "project": None,
    "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
}


class _Handler(BaseHTTPRequestHandler):
    server: "WandbServer"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.server.history += [json.loads(line) for line in history.get("content", [])]
        data = {**_ANSWER, **self._known_run()}
        variables = (json.loads(body).get("variables") or {}) if self.path.endswith("/graphql") else {}
        if name := variables.get("name"):
            data["upsertBucket"] = {"bucket": {**_BUCKET, "name": name}, "inserted": True}
        self._answer({"data": data, "stopped": self.server.stops_the_run})

    def _known_run(self) -> dict[str, Any]:
        """The run as a resumed one asks for it, from the rows received."""
        history = self.server.history
        if not history:
            return _NO_RUN
        bucket = {
            **_BUCKET,
            "summaryMetrics": json.dumps({name: value for row in history for name, value in row.items()}),
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(history[-1])]),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"bucket": bucket, "entity": {"id": "1", "name": "entity"}}}

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class WandbServer(ThreadingHTTPServer):
    """A server on a free local port, for the time of a `with` block; it stops the run if that is asked.

    Attributes:
        history: the rows received.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, *, stops_the_run: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stops_the_run = stops_the_run
        self.history: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def history_rows(self) -> list[dict[str, Any]]:
        """The rows received, without wandb's own keys, tables and histograms."""
        return [numbers_of(row) for row in self.history]
