"""Ask an OpenAI-compatible server: several requests at a time, each reply kept as it comes.

The API key comes from the environment. Errors contain neither the key nor a text of a request or reply.
"""

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from dpo_dist.foundation.errors import ConfigError

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIES = 6
"""The client's own, after pauses of 24 seconds in all; a server that is not there is an error in a minute."""
_CONNECT_SECONDS = 4.0
_LISTING_SECONDS = 45.0  # a server that computes everything else slowly answers this at once
_LOADING = 503
# Statuses that refuse a single request for its texts; others mean that the server cannot be used.
_REFUSES_TEXTS = (400, 413, 422)
T = TypeVar("T")
R = TypeVar("R")


class RefusedError(Exception):
    """One request is refused; the message has the server's status and code, not its words."""

    def __init__(self, status: str, code: Any = None, param: Any = None):
        super().__init__(", ".join(str(fact) for fact in (status, code, param) if fact))
        self.code, self.param = str(code), param


class Client:
    """The `openai` client of one server; `url_key` is the key of its `url`, and `name` the model's there."""

    def __init__(
        self, url: str, url_key: str, name: str, seconds: float, parallel: int, retries: int = RETRIES
    ):
        try:
            import openai  # noqa: PLC0415  (optional)
        except ImportError:
            raise ConfigError(
                "an endpoint needs the package openai", where=url_key, remedy="pip install openai"
            ) from None
        self._openai, self.url, self._url_key, self.name = openai, url, url_key, name
        key = os.environ.get(KEY_VARIABLE, "").strip() or "none"
        timeout = openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        self._openai_client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
        self._parallel, self._names = parallel, ""
        self._file: Path | None = None
        self._show: Callable[[int, int], None] = lambda *_: None
        self._answered = self._asked = 0

    def send(self, request: Callable[[Any], T]) -> T:
        """Return what `request` does with the client; raise RefusedError, or ConfigError without a server."""
        try:
            return request(self._openai_client)
        except self._openai.APIStatusError as error:  # its message may quote a text
            refusal = RefusedError(f"status {error.status_code}", error.code, error.param)
            if error.status_code in _REFUSES_TEXTS:
                raise refusal from None
            raise self.unusable(str(refusal)) from None
        except (self._openai.APIError, ValueError) as error:
            raise self.unusable(type(error).__name__) from None

    def listed(self) -> dict[str, Any]:
        """Return the models that the server lists, by name; none if it has no list."""
        client = self._openai_client.with_options(timeout=_LISTING_SECONDS, max_retries=2)
        try:
            models = client.models.list()
        except self._openai.InternalServerError as error:  # of `transformers serve` without a cache of models
            if error.status_code == _LOADING:
                raise self.unusable(f"status {_LOADING}") from None
            return {}
        except (self._openai.OpenAIError, ValueError) as error:
            raise self.unusable(type(error).__name__) from None
        found = {model.id: model for model in getattr(models, "data", None) or ()}
        self._names = f"; it lists {', '.join(found) or 'no model'}"
        return found

    @contextlib.contextmanager
    def keeping(self, file: Path, show: Callable[[int, int], None]) -> Iterator[None]:
        """Inside the block keep replies in `file`, and `show` how many came so far, of how many requests."""
        self._file, self._show = file, show
        try:
            yield
        finally:
            self._file, self._show = None, lambda *_: None

    def ask(
        self, keys: Collection[str], answer: Callable[[str], R], check: Callable[[], None]
    ) -> dict[str, R | None]:
        """Return what `answer` returns for the key of each request; None if the server refuses that one.

        Replies, which JSON can hold, are read again from the file that a killed command left. If every
        request is refused, `check` is called, which raises if the server is at fault, not these few texts.
        """
        kept = {} if self._file is None else _kept(self._file)
        replies: dict[str, R | None] = {key: kept[key] for key in keys if key in kept}
        self._asked, self._answered = self._asked + len(keys), self._answered + len(replies)
        self._show(self._answered, self._asked)
        missing = [key for key in keys if key not in replies]
        with contextlib.ExitStack() as opened:
            file = None if self._file is None else opened.enter_context(self._file.open("a", buffering=1))
            for key, reply in self._answers(missing, answer):
                replies[key] = reply
                if file is not None and reply is not None:  # a killed command may have left half a line
                    file.write("\n" + json.dumps([key, reply]))
                self._answered += 1
                self._show(self._answered, self._asked)
        if replies and all(reply is None for reply in replies.values()):
            check()
        return replies

    def _answers(self, keys: Collection[str], answer: Callable[[str], R]) -> Iterator[tuple[str, R | None]]:
        """Yield each key with its answer, as they come.

        After an error or Ctrl-C nothing waits for requests under way, as a pool of threads would.
        """
        todo, done = deque(keys), SimpleQueue[tuple[str, R | None, Exception | None]]()

        def work() -> None:
            while todo:
                with contextlib.suppress(IndexError):
                    key = todo.popleft()
                    try:
                        done.put((key, answer(key), None))
                    except Exception as error:  # raised where it is read
                        done.put((key, None, error))

        for _ in range(min(self._parallel, len(keys))):
            threading.Thread(target=work, name="requests", daemon=True).start()
        try:
            for _ in keys:
                key, reply, error = done.get()
                if error is not None and not isinstance(error, RefusedError):
                    raise error
                yield key, reply
        finally:
            todo.clear()

    def unusable(self, fault: str) -> ConfigError:
        """Return the error for a server that does not reply as expected."""
        section = self._url_key.rpartition(".")[0]
        return ConfigError(
            "the server does not reply as expected",
            where=self._url_key,
            got=f"{self.url}, model {self.name}: {fault}{self._names}",
            remedy=f"start it, or check its address, {section}.model and the key in {KEY_VARIABLE}; "
            "the same command continues after the finished requests",
        )


def _kept(file: Path) -> dict[str, Any]:
    """Return the replies in a file by their keys, without a line that was cut."""
    replies = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            key, reply = json.loads(line) if line else ("", None)
            replies[key] = reply
    return replies
