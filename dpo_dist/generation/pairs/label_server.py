"""HTTP server of the labelling page, on this machine only."""

import hmac
import json
import secrets
import threading
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.pairs.labelling import (
    Event,
    Item,
    Judgement,
    Labelling,
    LabelLog,
    Slot,
    Undo,
    Verdict,
    shown_prompt,
    shown_response,
)


class RefusedError(Exception):
    """A request that is refused, with its HTTP status."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Session:
    """The state behind the page; every method is safe from any thread.

    Args:
        items: by key.
        state: judgements so far.
        log: receives every event before it changes the state.
        is_blurred: whether texts are hidden until the annotator points at them.
        judged: called after each event.
    """

    def __init__(
        self,
        items: Mapping[str, Item],
        state: Labelling,
        log: LabelLog,
        is_blurred: bool = False,
        judged: Callable[[Labelling], None] = lambda _: None,
    ):
        self._items, self._log, self._judged = items, log, judged
        self._blurred = is_blurred
        self.state = state
        self._lock = threading.Lock()
        self._is_closed = False

    def close(self) -> None:
        """Refuse further events: a browser's open connection outlives the server, and then the log."""
        with self._lock:
            self._is_closed = True

    def comparison(self, annotator: str) -> dict[str, Any]:
        """Return the annotator's next comparison and progress as JSON."""
        with self._lock:
            return self._comparison(annotator)

    def judge(self, annotator: str, slot: Slot, choice: str, seconds: float) -> dict[str, Any]:
        """Store a verdict, unless this comparison has one, and return the next comparison.

        Args:
            annotator: their name.
            slot: the comparison.
            choice: `left`, `right`, `tie` or `skip`.
            seconds: from the display to the verdict.
        """
        with self._lock:
            left = self.state.plan.left(slot, annotator)
            verdict = {
                "left": (Verdict.first, Verdict.second)[left],
                "right": (Verdict.second, Verdict.first)[left],
                "tie": Verdict.tie,
                "skip": Verdict.skip,
            }[choice]
            is_new = self._store(Judgement(slot, annotator, verdict, left, round(seconds, 2), _now()))
            return self._comparison(annotator) | {"stored": is_new}

    def undo(self, annotator: str, judged: int) -> dict[str, Any]:
        """Take the annotator's last judgement back, and return its comparison.

        Args:
            annotator: their name.
            judged: number of their judgements and skips that the page knows; another number means that it is
                behind, and nothing is undone.
        """
        with self._lock:
            last, progress = self.state.last(annotator), self.state.progress(annotator)
            is_done = last is not None and judged == progress.done + progress.skipped
            if last is not None and is_done:
                self._store(Undo(last, annotator, _now()))
            return self._comparison(annotator) | {"stored": is_done}

    def _store(self, event: Event) -> bool:
        if self._is_closed:
            raise RefusedError(503, "the command has ended")
        if not self.state.accepts(event):
            return False
        try:
            self._log.append(event)
        except OSError as fault:
            raise RefusedError(507, f"the judgement cannot be written: {fault.strerror}") from fault
        self.state.apply(event)
        self._judged(self.state)
        return True

    def _comparison(self, annotator: str) -> dict[str, Any]:
        reply: dict[str, Any] = {
            "annotators": self.state.annotators,
            "blurred": self._blurred,
            "item": None,
        }
        if annotator:
            slot = self.state.next_slot(annotator)
            reply["progress"] = asdict(self.state.progress(annotator))
            if slot is not None:
                record = self._items[slot.item].record
                left = self.state.plan.left(slot, annotator)
                reply["item"] = {
                    "slot": str(slot),
                    "prompt": shown_prompt(record),
                    "left": shown_response(record.responses[left]),
                    "right": shown_response(record.responses[1 - left]),
                }
        return reply


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


HOST = "127.0.0.1"
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_MOST_BODY_BYTES = 4096
_LONGEST_NAME = 64
_SOCKET_SECONDS = 30.0
_NONCE = "{nonce}"
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class LabelServer(ThreadingHTTPServer):
    """The server of one session; it listens on 127.0.0.1 when it is created.

    Args:
        session: the state.
        port: 0 takes a free one.

    Raises:
        ConfigError: the port is in use.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, session: Session, port: int = 0):
        self.session = session
        self.token = secrets.token_urlsafe(24)
        self.page = resources.files("dpo_dist.generation").joinpath("label.html").read_text("utf-8")
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as fault:
            raise ConfigError(
                "the labelling page cannot be served on this port",
                where="pairs.people.port",
                got=f"{port}: {fault.strerror}",
                remedy="set another port, or 0 for a free one",
            ) from None

    @property
    def url(self) -> str:
        """The address of the page, with the token."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def server_close(self) -> None:
        """Close the session too: the threads of open connections still run."""
        self.session.close()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a browser may close a connection at any time."""


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version = "labels"
    sys_version = ""
    timeout = _SOCKET_SECONDS

    def do_GET(self) -> None:
        """Send the page."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Run a request of the page."""
        self._answer(self._post)

    def _answer(self, work: Callable[[str], None]) -> None:
        try:
            work(self._checked_path())
        except RefusedError as refusal:
            self.close_connection = True  # an unread body would be read as the next request
            self._send(refusal.status, "text/plain; charset=utf-8", refusal.reason.encode())

    def _checked_path(self) -> str:
        """Return the path below the token, of a request with a local host name."""
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() not in _LOCAL_NAMES:
            raise RefusedError(403, "not a local host name")
        token, _, rest = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise RefusedError(404, "unknown address")
        return rest

    def _get(self, path: str) -> None:
        if path:
            raise RefusedError(404, "unknown address")
        nonce = secrets.token_urlsafe(16)
        page = self.server.page.replace(_NONCE, nonce)
        policy = _POLICY.replace(_NONCE, nonce)
        self._send(200, "text/html; charset=utf-8", page.encode(), {"Content-Security-Policy": policy})

    def _post(self, path: str) -> None:
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            raise RefusedError(403, "not a request of the page")
        session, body = self.server.session, self._body()
        annotator = _name(body.get("annotator", ""))
        match path:
            case "next":
                reply = session.comparison(annotator)
            case "judge" if annotator:
                choice, slot = body.get("choice"), body.get("slot")
                if choice not in ("left", "right", "tie", "skip") or not isinstance(slot, str):
                    raise RefusedError(400, "not a judgement")
                reply = session.judge(annotator, Slot.parse(slot), choice, _seconds(body.get("seconds")))
            case "undo" if annotator:
                reply = session.undo(annotator, int(_seconds(body.get("judged"))))
            case _:
                raise RefusedError(404, "unknown address")
        self._send(200, "application/json", json.dumps(reply).encode())

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "not JSON")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RefusedError(411, "no length")
        if len(length) > len(str(_MOST_BODY_BYTES)) or int(length) > _MOST_BODY_BYTES:
            raise RefusedError(413, "too long")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise RefusedError(400, "not JSON") from None
        if not isinstance(body, dict):
            raise RefusedError(400, "not an object")
        return body

    def _send(self, status: int, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            **(more or {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing: the address has the token."""


def _name(value: Any) -> str:
    """Return an annotator's name without surplus spaces; "" before it is given."""
    if not isinstance(value, str):
        raise RefusedError(400, "not a name")
    name = " ".join(unicodedata.normalize("NFC", value).split())
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise RefusedError(400, f"a name has at most {_LONGEST_NAME} printable characters")
    return name


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise RefusedError(400, "not a number")
    return float(value)
