"""A chat completions endpoint on this machine, whose replies are a function of the request."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.http_server import http_server

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

    def respond(_path: str, body: Any, headers: Mapping[str, str]) -> tuple[int, str]:
        if body is None:  # it lists no models
            return 501, "{}"
        with lock:
            log.bodies.append(body)
            log.headers.append(dict(headers))
        content = body["messages"][-1]["content"]
        replied = answer(json.loads(content if isinstance(content, str) else content[0]["text"]))
        if not isinstance(replied, str):
            return replied
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": replied}}]})

    with http_server(respond) as address:
        log.url = f"{address}/v1"
        yield log
