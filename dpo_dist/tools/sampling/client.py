"""Ask an OpenAI-compatible server: several requests at a time.

The API key comes from the environment. Errors contain neither the key nor a text of a request or reply.
"""

import os
import re
from collections.abc import Callable, Collection
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.installed import install_extra
from dpo_dist.foundation.text import first_few

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.pagination import SyncPage
    from openai.types import Model

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIES = 6
"""The client's own, after pauses of 24 seconds in all; a server that is not there is an error in a minute."""
_CONNECT_SECONDS = 4.0
_LISTING_SECONDS = 45.0  # a server that computes everything else slowly answers this at once
_NO_LIST = (500, 501)  # `transformers serve` without a cache of models answers by 500
# Statuses that refuse a single request for its texts; others mean that the server cannot be used.
_REFUSES_TEXTS = (400, 413, 422)
# Hosts that a proxy would look for on its own machine; vLLM prints the last one as its address.
_ON_THIS_MACHINE = re.compile(r"(.+\.)?localhost|127(\.\d+){3}|::1|0\.0\.0\.0")
_WORD = 60  # characters of a server's code in an error
Reply = TypeVar("Reply")
R = TypeVar("R")


class RefusedError(Exception):
    """One request is refused; the message has the server's status and code, not its words."""

    def __init__(self, status: str, code: Any = None, param: Any = None):
        words = [fact[:_WORD] for fact in (status, code, param) if isinstance(fact, str) and fact]
        super().__init__(", ".join(words))
        self.code = str(code)
        self.param = str(param)


class Client:
    """The `openai` client of one server; `url_key` is the key of its `url`, and `name` the model's there."""

    def __init__(self, url: str, url_key: str, name: str, seconds: float, parallel: int):
        try:
            import openai  # noqa: PLC0415  (optional)
        except ImportError:
            raise ConfigError(
                "an endpoint needs the package openai", where=url_key, remedy=install_extra("judge")
            ) from None
        self._openai = openai
        self.url = url
        self._url_key = url_key
        self.name = name
        key = os.environ.get(KEY_VARIABLE, "").strip() or "none"
        timeout = openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        asks_proxies = _ON_THIS_MACHINE.fullmatch(urlsplit(url).hostname or "") is None
        try:
            connections = openai.DefaultHttpxClient(trust_env=asks_proxies)
        except Exception as fault:  # not an address, a scheme that needs another package, no file
            # Its words may quote a password of the proxy.
            raise ConfigError(
                "a proxy or certificate of the environment cannot be used",
                where="http_proxy, https_proxy, all_proxy, SSL_CERT_FILE or SSL_CERT_DIR",
                got=type(fault).__name__,
                expected="http://HOST:PORT of a proxy; a file or folder of certificates",
                remedy="correct or remove the variable; a SOCKS proxy needs the package socksio",
            ) from None
        self._openai_client = openai.OpenAI(
            base_url=url,
            api_key=key,
            timeout=timeout,
            max_retries=RETRIES,
            http_client=connections,
        )
        self._parallel = parallel
        self._names = ""

    def send(
        self,
        request: "Callable[[OpenAI], Reply]",
        read: Callable[[Reply], R],
        refusals: Collection[int] = _REFUSES_TEXTS,
    ) -> R:
        """Return what `read` takes from the server's reply to `request`.

        A reply has the type of `openai`, which has not checked what the fields hold. Raises RefusedError for
        a status of `refusals`, and ConfigError without a server, or if `read` finds no reply of this API.
        """
        try:
            return read(request(self._openai_client))
        except self._openai.APIStatusError as error:  # its message may quote a text
            refusal = RefusedError(f"status {error.status_code}", error.code, error.param)
            if error.status_code in refusals:
                raise refusal from None
            raise self.unusable(str(refusal)) from None
        except self._openai.OpenAIError as error:
            raise self.unusable(type(error.__cause__ or error).__name__) from None
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise self.unusable(f"no reply of this API, perhaps a page: {error}") from None

    def listed(self) -> dict[str, int | None]:
        """Return the models that the server lists and the length of each, if known; none without a list."""

        def read(page: "SyncPage[Model]") -> dict[str, int | None]:
            return {str(model.id): getattr(model, "max_model_len", None) for model in page.data}

        def request(openai: "OpenAI") -> "SyncPage[Model]":
            return openai.with_options(timeout=_LISTING_SECONDS, max_retries=2).models.list()

        try:
            lengths = self.send(request, read, _NO_LIST)
        except RefusedError:
            return {}
        self._names = f"; it lists {first_few(list(lengths)) or 'no model'}"
        return lengths

    def ask(
        self, keys: Collection[str], answer: Callable[[str], R], probe: Callable[[], object]
    ) -> dict[str, R | None]:
        """Return what `answer` returns for the key of each request; None if the server refuses that one.

        If every request is refused, `probe` tells whether the server is at fault, or these few texts.
        """

        def reply_to(key: str) -> tuple[str, R | None]:
            try:
                return key, answer(key)
            except RefusedError:
                return key, None

        # Unlike that of concurrent.futures, this pool waits for no request after an error or Ctrl-C.
        with ThreadPool(self._parallel) as pool:
            replies = dict(pool.imap_unordered(reply_to, keys))
        if replies and all(reply is None for reply in replies.values()):
            self.check(probe)
        return replies

    def check(self, probe: Callable[[], object]) -> None:
        """Raise ConfigError if the server refuses `probe`, a harmless request, too."""
        try:
            probe()
        except RefusedError as refusal:
            raise self.unusable(f"{refusal}, also for a harmless request") from None

    def unusable(self, fault: str) -> ConfigError:
        """Return the error for a server that does not reply as expected."""
        section = self._url_key.rpartition(".")[0]
        usual = "" if "/v" in self.url else f", usually {self.url.rstrip('/')}/v1"
        return ConfigError(
            "the server does not reply as expected",
            where=self._url_key,
            got=f"{self.url}, model {self.name}: {fault}{self._names}",
            remedy=f"start it, or check its address{usual}, {section}.model and the key in {KEY_VARIABLE}; "
            "the same command continues after the finished parts",
        )
