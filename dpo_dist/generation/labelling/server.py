"""HTTP server of the labelling page, on this machine only.

A request must name the random token of this start in its path, come by a local host name (against DNS
rebinding) and, if it changes anything, from the page itself (against forged requests of other sites).
"""

import hmac
import json
import secrets
import unicodedata
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from dpo_dist.errors import ConfigError
from dpo_dist.generation.labelling.events import Slot
from dpo_dist.generation.labelling.session import RefusedError, Session

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
