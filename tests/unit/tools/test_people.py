"""A labelling session: items, order, several annotators, restarts from the log, agreement, the server."""

import contextlib
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from dpo_dist.data.records import Origin, PreferenceRecord, Prompt, Response
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import locked
from dpo_dist.tools.pairs.people import (
    HOST,
    Annotation,
    Labelling,
    LabelServer,
    agreement,
    draw_items,
    outcome,
)


def record(*responses: Response, prompt: Prompt = "Why?") -> PreferenceRecord:
    return PreferenceRecord(prompt, responses, Origin("data.jsonl", 1))


ITEMS = draw_items((record(f"a{n}", f"b{n}", prompt=f"q{n}") for n in range(30)), 99, 0, Counter())


@contextmanager
def opened(log: Path, items: Any = ITEMS, foreign: int = 0) -> Iterator[Labelling]:
    with locked(log, "labels", "") as descriptor:
        labelling = Labelling(items, descriptor, 0)
        assert labelling.read(log) == foreign
        yield labelling


def judge_all(labelling: Labelling, annotator: str = "Ada", choice: str = "left") -> list[str]:
    seen = []
    while remaining := labelling.remaining(annotator):
        labelling.judge(annotator, remaining[0], choice)
        seen.append(remaining[0])
    return seen


def test_items_are_shared_or_judged_by_one_annotator_and_skipped_ones_left_to_others(tmp_path: Path) -> None:
    with opened(tmp_path / "log") as labelling:
        for name in ("Ada", "Ben") * 10:
            labelling.judge(name, labelling.remaining(name)[0], "tie")
        judge_all(labelling, "Ada")
        judge_all(labelling, "Ben")
        judges = Counter(item for _, item in labelling.judgements)
        assert set(judges) == set(ITEMS)
        assert 0 < list(judges.values()).count(2) < 15
    with opened(tmp_path / "skips") as labelling:
        assert len(judge_all(labelling, "Ada", "skip")) == len(judge_all(labelling, "Ben")) == 30


def test_a_restart_reads_the_whole_lines_of_the_items_of_now_and_the_last_verdict_counts(
    tmp_path: Path,
) -> None:
    log, first = tmp_path / "log", next(iter(ITEMS))
    with opened(log) as labelling:
        assert sorted(judge_all(labelling)) == sorted(ITEMS)
        assert 5 < sum(one.left for one in labelling.judgements.values()) < 25
        assert all(one.verdict == ("first", "second")[one.left] for one in labelling.judgements.values())
        labelling.judge("Ada", first, "tie")
        given = labelling.judgements
        assert given["Ada", first].verdict == "tie"
    with opened(log) as labelling:
        assert labelling.judgements == given
    with opened(log, dict([*ITEMS.items()][1:3]), foreign=29) as labelling:
        assert len(labelling.judgements) == 2
    log.write_bytes(log.read_bytes()[:-20])
    with opened(log) as labelling:
        assert labelling.judgements["Ada", first].verdict != "tie"
    assert len(log.read_bytes().splitlines()) == 30


def test_a_verdict_that_a_full_disk_cannot_take_is_refused_and_leaves_no_part(tmp_path: Path) -> None:
    """At each byte at which the disk may be full; the next one is whole again."""
    log, (first, second, *_) = tmp_path / "log", ITEMS
    with opened(log) as labelling:
        labelling.judge("Ada", first, "left")
        whole, (soft, hard) = log.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        for room in (0, 1, len(whole) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, hard))
            try:
                with pytest.raises(OSError, match="too large"):
                    labelling.judge("Ada", second, "left")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert log.read_bytes() == whole
        assert ("Ada", second) not in labelling.judgements
        labelling.judge("Ada", second, "left")
    with opened(log) as again:
        assert again.judgements == labelling.judgements


@pytest.mark.parametrize("damage", [b'{"item": "a", "annot{"item": "b"}', b"[]", b'{"item": "a"}', b"\xff"])
def test_a_line_that_is_no_judgement_is_named(damage: bytes, tmp_path: Path) -> None:
    with opened(log := tmp_path / "log") as labelling:
        judge_all(labelling)
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([*lines[:3], damage, *lines[3:], b""]))
    with pytest.raises(DataError) as caught, opened(log):
        pass
    assert caught.value.where == f"{log}:4"


def given(annotator: str, item: str, verdict: str, left: int = 0) -> Annotation:
    return Annotation(item, annotator, verdict, left, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        ("", (None, "comparisons_not_judged")),
        ("skip", (None, "comparisons_not_judged")),
        ("first second", (None, "comparisons_without_majority")),
        ("first second second", (1, "comparisons_decided")),
        ("first tie skip", (0, "comparisons_decided")),
    ],
)
def test_the_majority_decides(verdicts: str, wanted: tuple[int | None, str]) -> None:
    assert outcome([given(str(n), "a", verdict) for n, verdict in enumerate(verdicts.split())]) == wanted


def test_agreement_is_the_share_of_equal_verdicts_of_every_two() -> None:
    verdicts = [("first", "first"), ("first", "second"), ("tie", "tie"), ("skip", "first")]
    found = agreement(
        given(name, str(n), verdict)
        for n, pair in enumerate(verdicts)
        for name, verdict in zip(("Ada", "Ben"), pair, strict=True)
    )
    assert found["between"] == [{"annotators": ["Ada", "Ben"], "items": 3, "agreed": 2 / 3}]


def test_items_do_not_depend_on_the_order_of_records_and_responses_and_others_are_counted() -> None:
    records = [record(f"a{n}", f"b{n}", prompt=f"p{n}") for n in range(1000)]
    turned = [record(f"b{n}", f"a{n}", prompt=f"p{n}") for n in reversed(range(1000))]
    drawn = draw_items(records, 20, 0, Counter())
    assert len(drawn) == 20
    assert drawn == draw_items(turned, 20, 0, Counter())
    assert drawn.keys() != draw_items(records, 20, 1, Counter()).keys()
    counts: Counter[str] = Counter()
    given = [record("a", "b"), record("b", "a"), record("a"), record("a", "b", "c", "d", prompt="Who?")]
    assert [len(one.responses) for one in draw_items(given, 1, 0, counts).values()] == [2]
    assert counts == {"duplicate": 1, "one_response": 1, "not_drawn": 1}


# The server.


@contextmanager
def served(labelling: Labelling) -> Iterator[LabelServer]:
    with LabelServer(labelling) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def post(server: LabelServer, body: bytes, path: str | None = None) -> int:
    """Send a form; return the status of the reply."""
    with contextlib.closing(HTTPConnection(HOST, server.server_port, timeout=20)) as connection:
        connection.request("POST", path or server.path, body)
        return connection.getresponse().status


ITEM = next(iter(ITEMS))
GOOD = {"annotator": "Ada", "item": ITEM, "choice": "left"}
WRONG: list[dict[str, str]] = [
    *(GOOD | {"choice": choice} for choice in ("anything", "", "first", "LEFT")),
    *(GOOD | {"annotator": name} for name in ("", "  ")),
    *(GOOD | {"item": item} for item in ("", "unknown")),
    *({name: value for name, value in GOOD.items() if name != left_out} for left_out in GOOD),
]


def test_what_is_no_judgement_is_refused_and_not_recorded(tmp_path: Path) -> None:
    with opened(tmp_path / "log") as labelling, served(labelling) as server:
        assert [post(server, urlencode(fields).encode()) for fields in WRONG] == [400] * len(WRONG)
        long = urlencode({**GOOD, "annotator": "a" * 10**6}).encode()
        assert [post(server, body) for body in (b"\xff", long)] == [400, 400]
        assert post(server, urlencode(GOOD).encode(), "/") == 404
        assert (tmp_path / "log").read_bytes() == b""
        assert post(server, urlencode(GOOD).encode()) == 303
    assert [(one.annotator, one.item) for one in labelling.judgements.values()] == [("Ada", ITEM)]


def test_a_client_that_sends_a_byte_now_and_then_does_not_hold_the_end(tmp_path: Path) -> None:
    """Nor is the part that it has sent a judgement."""
    is_over, body = threading.Event(), urlencode(GOOD).encode() + b"&more=" + b"x" * 1000
    with opened(tmp_path / "log") as labelling, served(labelling) as server:
        client = socket.create_connection((HOST, server.server_port))
        head = f"POST {server.path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()

        def trickle() -> None:
            client.sendall(head + body[:-1000])
            for _ in range(1000):
                if is_over.wait(0.2):
                    return
                with contextlib.suppress(OSError):
                    client.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        time.sleep(0.5)
        started = time.monotonic()
    assert time.monotonic() - started < 100
    is_over.set()
    thread.join()
    client.close()
    assert not labelling.judgements
