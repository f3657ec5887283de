"""A chat completions endpoint on this machine, whose replies are a function of the request."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], "str | tuple[int, str]"]


@dataclass
class JudgeServer:
    """Requests that came in, in order."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def judge_server(answer: Answer) -> Iterator[JudgeServer]:
    """Serve until the end of the block.

    `answer` gets the object in the user's message; it returns the assistant's text, or status and body.
    """
    log, lock = JudgeServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                log.bodies.append(body)
                log.headers.append(dict(self.headers))
            content = body["messages"][-1]["content"]
            replied = answer(json.loads(content if isinstance(content, str) else content[0]["text"]))
            if isinstance(replied, str):
                choices = [{"message": {"role": "assistant", "content": replied}}]
                status, text = 200, json.dumps({"choices": choices})
            else:
                status, text = replied
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # It looks so often whether it is to end.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    log.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
