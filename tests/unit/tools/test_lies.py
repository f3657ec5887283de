"""What a server says is not believed: each lie is one plain error that names the server."""

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.schema import ModelConfig
from dpo_dist.data.config import DataConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.reference.model_source import find_files
from dpo_dist.tools.sampling import client as clients
from dpo_dist.tools.sampling.client import Client
from dpo_dist.tools.sampling.judges import EndpointJudge
from dpo_dist.tools.sampling.keys import EndpointConfig, ServerConfig
from dpo_dist.tools.sampling.respond import open_responder
from dpo_dist.tools.sampling.served import open_server
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

JSON = "Content-Type: application/json"
OTHER = "no reply of this API, perhaps a page: "


@contextlib.contextmanager
def raw_server(pieces: Callable[[str], Iterable[bytes]]) -> Iterator[str]:
    """Yield the address of a server that sends the `pieces` for each request's path, and closes."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            path, length = self.rfile.readline().decode().split()[1], 0
            while line := self.rfile.readline().strip().lower():
                length = int(line.split()[1]) if line.startswith(b"content-length") else length
            self.rfile.read(length)
            with contextlib.suppress(OSError):
                for piece in pieces(path):
                    self.wfile.write(piece)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()


def reply(body: bytes | str, *headers: str, status: str = "200 OK") -> list[bytes]:
    content = body if isinstance(body, bytes) else body.encode()
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(content)}",
        "Connection: close",
        *(headers or (JSON,)),
    ]
    return ["\r\n".join([*lines, "", ""]).encode(), content]  # type: ignore[list-item]


def silence(*pieces: bytes) -> Iterator[bytes]:
    yield from pieces
    time.sleep(5)


# What is wrong with a reply as a whole, whatever was asked: the pieces, and what the error says of them.
WHOLE: dict[str, tuple[Callable[[], Iterable[bytes]], str]] = {
    "nothing": (lambda: reply(""), OTHER),
    "a page": (lambda: reply("<html>Welcome</html>", "Content-Type: text/html"), OTHER),
    "a page as JSON": (lambda: reply(" <html>Welcome</html>"), OTHER),
    "another encoding": (lambda: reply(b'{"choices": "\xff", "data": "\xff"}'), OTHER),
    "deep brackets": (lambda: reply('{"x":' + "[" * 5_000), OTHER),
    "events": (lambda: reply("data: {}\n\n", "Content-Type: text/event-stream"), OTHER),
    "a list": (lambda: reply("[]"), OTHER),
    "null": (lambda: reply("null"), OTHER),
    "half of it": (lambda: reply('{"choices": ['), OTHER),
    "silence": (silence, "ReadTimeout"),
    "silence after half of it": (lambda: silence(reply("[" * 99)[0], b"["), "ReadTimeout"),
    "a loop": (lambda: reply("", "Location: /v1/x", status="307 Go"), "TooManyRedirects"),
    "no HTTP": (lambda: [b"SSH-2.0-OpenSSH\r\n"], "RemoteProtocolError"),
    "a deep error": (lambda: reply("[" * 5_000, status="404 No"), "status 404"),
    "an error of types": (
        lambda: reply('{"error": {"code": ["x"], "param": {"y": 1}}}', status="403 No"),
        "status 403",
    ),
}


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "RETRIES", 0)


def completion(openai: Any) -> Any:
    return openai.completions.create(model="m", prompt=[1])


def texts(reply: Any) -> list[str]:
    return [choice.text for choice in reply.choices]


@pytest.mark.parametrize("name", WHOLE)
def test_a_reply_that_is_no_reply_is_one_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, said = WHOLE[name]
    # A busy machine may need a second for any reply.
    seconds, started = 0.5 if said == "ReadTimeout" else 240, time.monotonic()
    monkeypatch.setattr(clients, "_LISTING_SECONDS", seconds)
    with raw_server(lambda _: pieces()) as url:
        client = Client(url, "sampling.endpoint.url", "m", seconds, 1)
        for ask in (client.listed, lambda: client.send(completion, texts)):
            with pytest.raises(ConfigError, match="the server does not reply as expected") as raised:
                ask()
            assert raised.value.got.startswith(f"{url}, model m: ")
            assert said in raised.value.got
    assert time.monotonic() - started < 200


def test_a_server_is_reached_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its proxy, which may be a bare host, but for the hosts that need none and those on this machine."""
    asked: list[str] = []

    def listed(path: str) -> Iterable[bytes]:
        asked.append(path)
        return reply('{"data": [{"id": "m"}]}')

    with raw_server(listed) as url:
        place = url.removesuffix("/v1")
        here = [url.replace("127.0.0.1", host) for host in ("127.0.0.1", "localhost", "0.0.0.0")]
        for proxy in (place, place.removeprefix("http://")):
            monkeypatch.setenv("http_proxy", proxy)
            monkeypatch.setenv("https_proxy", proxy)
            monkeypatch.setenv("no_proxy", "none.invalid")
            for address in ("http://judge.invalid/v1", *here):
                assert Client(address, "sampling.endpoint.url", "m", 20, 1).listed() == {"m": None}
            for address in ("https://judge.invalid/v1", "http://none.invalid/v1"):
                with pytest.raises(ConfigError, match="the server does not reply as expected"):
                    Client(address, "sampling.endpoint.url", "m", 20, 1).send(completion, texts)
    assert asked == ["http://judge.invalid/v1/models", *["/v1/models"] * 3, "judge.invalid:443"] * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http_proxy", "socks5://proxy.invalid:1080"),
        ("http_proxy", "ftp://proxy.invalid"),
        ("https_proxy", "http://me:canary#@proxy.invalid:80"),
        ("SSL_CERT_FILE", "/none/canary.pem"),
    ],
)
def test_a_proxy_or_certificate_that_cannot_be_used_is_one_error(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For servers elsewhere; what it quotes is no part of a password."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="a proxy or certificate of the environment") as raised:
        Client("http://judge.invalid/v1", "sampling.endpoint.url", "m", 1, 1)
    assert name in raised.value.where
    assert "canary" not in raised.value.block()
    assert Client("http://[::1]:8000/v1", "sampling.endpoint.url", "m", 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lies") / "model")


TOKEN = "a token that is none of the model's"
OK = {"text": "a", "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5]}, "token_ids": [5]}


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [OK | fields] * 2}


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({}, OTHER),
        ({"choices": None}, OTHER),
        ({"choices": [None, None]}, OTHER),
        (choice(text=5, token_ids=None), OTHER),
        (choice(text=["a"], token_ids=None), OTHER),
        (choice(logprobs=[-0.5]), OTHER),
        (choice(logprobs={"token_logprobs": ["x"]}), OTHER),
        (choice(logprobs={"token_logprobs": [float("nan")]}), "a log-prob that is not finite"),
        (choice(logprobs={"token_logprobs": [float("-inf")]}), "a log-prob that is not finite"),
        (choice(logprobs={"token_logprobs": [0.5]}), "above 0"),
        (choice(token_ids=[-1]), TOKEN),
        (choice(token_ids=["5"]), TOKEN),
        (choice(token_ids=[5.5]), TOKEN),
        (choice(token_ids=[True]), TOKEN),
        (choice(token_ids=[10**30]), TOKEN),
        (choice(token_ids=[10**6]), TOKEN),
        (choice(token_ids=5), OTHER),
        (choice() | {"usage": [3]}, OTHER),
    ],
)
def test_a_lie_in_a_completion_is_one_error(folder: Path, said: Any, place: str) -> None:
    model = ModelConfig(path=str(folder))
    responder = open_responder(find_files(str(folder), model, "model.path"), model, DataConfig())
    models = reply(json.dumps({"data": [{"id": "m"}]}))
    said_by = {"/v1/models": models, "/v1/completions": reply(json.dumps(said))}
    with raw_server(said_by.__getitem__) as url, pytest.raises(ConfigError) as raised:
        open_server(ServerConfig(url=url, model="m"), responder)
    assert place in raised.value.got
    assert "it lists m" in raised.value.got


@pytest.mark.parametrize(
    "said",
    [
        {"data": ["m"]},
        {"data": 5},
    ],
)
def test_a_lie_in_the_list_of_models_is_one_error(said: Any) -> None:
    with raw_server(lambda _: reply(json.dumps(said))) as url, pytest.raises(ConfigError) as raised:
        Client(url, "sampling.endpoint.url", "m", 1, 1).listed()
    assert OTHER in raised.value.got


@pytest.mark.parametrize(
    "said",
    [
        {"choices": {"0": 5}},
        {"choices": [{}]},
        {"choices": [{"message": "[[5]]"}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": [5]}}]},
    ],
)
def test_a_lie_of_a_judge_is_one_error(said: Any) -> None:
    with raw_server(lambda _: reply(json.dumps(said))) as url, pytest.raises(ConfigError) as raised:
        EndpointJudge(EndpointConfig(url=url, model="judge")).check()
    assert OTHER in raised.value.got
