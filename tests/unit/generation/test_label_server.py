"""The server of the labelling page: who may ask what, and what is stored when."""

import http.client
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.records import Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.pairs.label_server import LabelServer, Session
from dpo_dist.generation.pairs.labelling import Labelling, Plan, draw_items, opened_log


@dataclass
class Served:
    server: LabelServer
    log: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def ask(
        self,
        path: str | None = None,
        body: Any = b"",
        method: str = "POST",
        headers: dict[str, str] | None = None,
        token: str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        host = f"127.0.0.1:{self.server.server_port}"
        usual = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(host, timeout=120)
        sent = {name: value for name, value in (usual | (headers or {})).items() if value}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.putrequest(method, f"/{token or self.server.token}/{path or ''}", skip_host=True)
        for name, value in ({"Content-Length": str(len(data))} | sent).items():
            connection.putheader(name, value)
        connection.endheaders(data if method == "POST" else None)
        reply = connection.getresponse()
        result = reply.status, dict(reply.headers), reply.read()
        connection.close()
        return result

    def do(self, path: str, **body: Any) -> dict[str, Any]:
        status, _, content = self.ask(path, {"annotator": "Ada", **body})
        assert status == 200, content
        return json.loads(content)


@contextmanager
def serving(log: Path, number: int = 5) -> Iterator[Served]:
    records = [
        PreferenceRecord(f"p{n}", (f"good {n}", f"bad {n}"), Origin("data.jsonl", n)) for n in range(number)
    ]
    items = {item.key: item for item in draw_items(records, None, 0, Counter())}
    with opened_log(log) as opened:
        state = Labelling(items, Plan(overlap=0.0, repeats=0.0), opened.events)
        with LabelServer(Session(items, state, opened)) as server:
            worker = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            worker.start()
            try:
                yield Served(server, log)
            finally:
                server.shutdown()
                worker.join()


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    with serving(tmp_path / "log") as server:
        yield server


def test_the_page_has_a_strict_policy_and_no_other_address(served) -> None:
    status, headers, page = served.ask(method="GET")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "unsafe" not in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert page.decode().count(f'nonce="{nonce}"') == 2
    assert headers["Cache-Control"] == "no-store"
    assert "innerHTML" not in page.decode()
    assert "http" not in page.decode()
    _, other, _ = served.ask(method="GET")
    assert other["Content-Security-Policy"] != policy


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"token": "wrong"}, 404),
        ({"token": "wr%C3%B6ng"}, 404),
        ({"headers": {"Host": "evil.example"}}, 403),
        ({"headers": {"Host": "127.0.0.1.evil.example:80"}}, 403),
        ({"headers": {"Host": ""}}, 403),
        ({"headers": {"Origin": "http://evil.example"}}, 403),
        ({"headers": {"Origin": "null"}}, 403),
        ({"headers": {"Origin": ""}}, 403),
        ({"headers": {"Content-Type": "text/plain"}}, 415),
        ({"headers": {"Content-Length": "5000000"}}, 413),
        ({"headers": {"Content-Length": "9" * 5000}}, 413),
        ({"headers": {"Content-Length": "-1"}}, 411),
        ({"body": b"{"}, 400),
        ({"body": b"[" * 4000}, 400),
        ({"body": []}, 400),
        ({"body": {"annotator": 3}}, 400),
        ({"body": {"annotator": "x" * 65}}, 400),
        ({"body": {"annotator": "a\u202eb"}}, 400),
        ({"path": "judge"}, 400),
        ({"path": "judge", "body": {"annotator": "", "slot": "x", "choice": "left", "seconds": 1}}, 404),
        ({"path": "judge", "body": {"annotator": "A", "slot": "x", "choice": "best", "seconds": 1}}, 400),
        ({"path": "judge", "body": b'{"annotator": "A", "slot": "x", "choice": "tie", "seconds": NaN}'}, 400),
        ({"path": "undo", "body": {"annotator": "A"}}, 400),
        ({"path": "../next", "body": {}}, 404),
        ({"path": "next", "method": "GET"}, 404),
        ({"path": "next", "method": "PUT"}, 501),
    ],
)
def test_other_requests_are_refused_and_store_nothing(served, given, status) -> None:
    assert served.ask(**({"path": "next", "body": {"annotator": "Ada"}} | given))[0] == status
    assert served.events == []


@pytest.mark.parametrize("host", ["localhost:9999", "127.0.0.1:1", "localhost", "[::1]:8000"])
def test_a_tunnel_may_have_another_port(served, host) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert served.ask("next", {"annotator": "Ada"}, headers=headers)[0] == 200


def test_a_verdict_is_on_disk_before_its_reply(served) -> None:
    item = served.do("next")["item"]
    reply = served.do("judge", slot=item["slot"], choice="right", seconds=1.234)
    assert reply["stored"]
    (event,) = served.events
    left = served.server.session.state.plan.left(served.server.session.state.last("Ada"), "Ada")
    assert event["verdict"] == ("second" if left == 0 else "first")
    assert (event["left"], event["seconds"], event["annotator"]) == (left, 1.23, "Ada")
    assert reply["item"]["slot"] != item["slot"]


def test_two_tabs_count_once_and_a_stale_one_cannot_undo(served) -> None:
    first = served.do("next")["item"]["slot"]
    assert served.do("next")["item"]["slot"] == first
    served.do("judge", slot=first, choice="left", seconds=1)
    again = served.do("judge", slot=first, choice="right", seconds=1)
    assert not again["stored"]
    assert again["progress"]["done"] == 1
    assert not served.do("undo", judged=0)["stored"]
    assert served.do("undo", judged=1)["item"]["slot"] == first
    assert [event["event"] for event in served.events] == ["judgement", "undo"]


def test_a_verdict_after_the_end_is_refused_on_an_open_connection(tmp_path) -> None:
    """The log is closed by then, and its descriptor may be that of the pairs."""
    with serving(tmp_path / "log") as served:
        host = f"127.0.0.1:{served.server.server_port}"
        connection = http.client.HTTPConnection(host, timeout=120)

        def ask(path: str, **body: Any) -> http.client.HTTPResponse:
            headers = {"Origin": f"http://{host}", "Content-Type": "application/json"}
            data = json.dumps({"annotator": "Ada", **body})
            connection.request("POST", f"/{served.server.token}/{path}", data, headers)
            return connection.getresponse()

        slot = json.loads(ask("next").read())["item"]["slot"]
    with (tmp_path / "pairs.jsonl").open("w"):
        reply = ask("judge", slot=slot, choice="left", seconds=1)
        assert (reply.status, reply.read()) == (503, b"the command has ended")
    assert (tmp_path / "pairs.jsonl").read_text() == ""
    assert served.events == []


def test_many_annotators_at_once_lose_nothing(tmp_path) -> None:
    with serving(tmp_path / "log", number=60) as served:

        def work(name: str) -> None:
            item = served.do("next", annotator=name)["item"]
            while item is not None:
                item = served.do("judge", annotator=name, slot=item["slot"], choice="tie", seconds=1)["item"]

        workers = [threading.Thread(target=work, args=(f"A{n % 3}",)) for n in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        slots = [(event["annotator"], event["slot"]) for event in served.events]
        assert len(slots) == len(set(slots))
        assert len({slot for _, slot in slots}) == 60


def test_a_full_disk_stores_nothing_and_the_page_does_not_go_on(served, monkeypatch) -> None:
    item = served.do("next")["item"]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_dist.generation.pairs.labelling.os.fsync", full)
    status, _, _ = served.ask(
        "judge", {"annotator": "Ada", "slot": item["slot"], "choice": "left", "seconds": 1}
    )
    monkeypatch.undo()
    assert status == 507
    assert served.events == []
    assert served.do("next")["item"]["slot"] == item["slot"]


def test_a_used_port_is_an_error_of_the_user(served) -> None:
    with pytest.raises(ConfigError, match=r"pairs\.people\.port"):
        LabelServer(served.server.session, served.server.server_port)
