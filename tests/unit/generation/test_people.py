"""A labelling session: items, order, several annotators, restarts from the log, agreement, the server."""

import http.client
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.records import Dialogue, Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import locked
from dpo_dist.generation.pairs.people import (
    Judgement,
    Labelling,
    LabelServer,
    agreement,
    agreement_lines,
    draw_items,
    label_pairs,
    outcome,
)


def record(*responses, prompt="Why?", line=1) -> PreferenceRecord:
    return PreferenceRecord(prompt, responses, Origin("data.jsonl", line))


ITEMS = draw_items((record(f"a{n}", f"b{n}", prompt=f"p{n}") for n in range(30)), 99, 0, Counter())


@contextmanager
def opened(log: Path, items=ITEMS) -> Iterator[Labelling]:
    with locked(log, "labels", "") as descriptor:
        labelling = Labelling(items, descriptor, 0)
        labelling.foreign = labelling.read(log)  # type: ignore[attr-defined]
        yield labelling


def judge_all(labelling: Labelling, annotator: str = "Ada", choice: str = "left") -> list[str]:
    seen = []
    while remaining := labelling.remaining(annotator):
        labelling.judge(annotator, remaining[0], choice, 1.0)
        seen.append(remaining[0])
    return seen


def test_every_item_comes_once_and_the_next_one_stays(tmp_path) -> None:
    with opened(tmp_path / "log") as labelling:
        assert labelling.remaining("Ada") == labelling.remaining("Ada")
        assert sorted(judge_all(labelling)) == sorted(ITEMS)


def test_items_are_shared_or_judged_by_one_annotator(tmp_path) -> None:
    with opened(tmp_path / "log") as labelling:
        for _ in range(10):
            for name in ("Ada", "Ben"):
                labelling.judge(name, labelling.remaining(name)[0], "tie", 1.0)
        judge_all(labelling, "Ada")
        judge_all(labelling, "Ben")
        judges = Counter(item for _, item in labelling.given)
        assert set(judges) == set(ITEMS)
        assert 0 < list(judges.values()).count(2) < 15


def test_a_skipped_item_is_left_to_others(tmp_path) -> None:
    with opened(tmp_path / "log") as labelling:
        assert len(judge_all(labelling, "Ada", "skip")) == len(judge_all(labelling, "Ben")) == 30


def test_sides_are_random_and_the_verdict_is_in_the_items_own_order(tmp_path) -> None:
    with opened(tmp_path / "log") as labelling:
        judge_all(labelling)
        lefts = Counter(one.left for one in labelling.given.values())
        assert 5 < lefts[0] < 25
        assert all(one.verdict == ("first", "second")[one.left] for one in labelling.given.values())


def test_a_restart_from_the_log_is_the_same_state_and_the_last_verdict_counts(tmp_path) -> None:
    first = next(iter(ITEMS))
    with opened(tmp_path / "log") as labelling:
        judge_all(labelling)
        labelling.judge("Ada", first, "tie", 2.0)
        given = labelling.given
        assert given["Ada", first].verdict == "tie"
    with opened(tmp_path / "log") as labelling:
        assert labelling.given == given
    with opened(tmp_path / "log", items=dict(list(ITEMS.items())[:2])) as labelling:
        assert labelling.foreign in (28, 29)
        assert len(labelling.given) == 2


def test_a_torn_last_line_is_removed_and_a_damaged_one_is_an_error(tmp_path) -> None:
    log = tmp_path / "log"
    with opened(log) as labelling:
        for item in list(ITEMS)[:2]:
            labelling.judge("Ada", item, "tie", 1.0)
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    with opened(log) as labelling:
        assert len(labelling.given) == 1
    assert len(log.read_bytes().splitlines()) == 1
    log.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match="damaged"), opened(log):
        pass


def given(annotator: str, item: str, verdict: str, left: int = 0, seconds: float = 2.0) -> Judgement:
    return Judgement(item, annotator, verdict, left, seconds, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        ("", (None, "comparisons_not_judged")),
        ("skip", (None, "comparisons_skipped")),
        ("tie", (None, "comparisons_tied")),
        ("first", (0, "comparisons_decided")),
        ("first second", (None, "comparisons_without_majority")),
        ("first second second", (1, "comparisons_decided")),
        ("first tie skip", (0, "comparisons_decided")),
    ],
)
def test_the_majority_decides(verdicts, wanted) -> None:
    assert outcome([given(str(n), "a", verdict) for n, verdict in enumerate(verdicts.split())]) == wanted


def test_kappa_is_agreement_beyond_chance() -> None:
    pairs = [("first", "first")] * 15 + [("first", "second")] * 5
    pairs += [("second", "first")] * 10 + [("second", "second")] * 20
    found = agreement(
        given(name, str(n), verdict)
        for n, pair in enumerate(pairs)
        for name, verdict in zip(("Ada", "Ben"), pair, strict=True)
    )
    # By hand: expected agreement 0.5 * 0.4 + 0.5 * 0.6 = 0.5, so (0.7 - 0.5) / (1 - 0.5).
    assert found["between"] == [
        {"annotators": ["Ada", "Ben"], "items": 50, "agreed": 0.7, "kappa": pytest.approx(0.4)}
    ]
    assert agreement_lines(found)[-1] == "Ada and Ben: 50 compared, 70 % agreed, kappa 0.40"


def test_agreement_counts_ties_skips_sides_and_seconds() -> None:
    found = agreement(
        [
            given("Ada", "a", "first", left=0, seconds=1.0),
            given("Ada", "b", "second", left=0, seconds=2.0),
            given("Ada", "c", "tie", left=0, seconds=9.0),
            given("Ada", "d", "skip"),
            given("Ben", "c", "tie"),
            given("Ben", "d", "tie"),
        ]
    )
    assert found["annotators"]["Ada"] == {
        **{"judged": 3, "ties": 1, "skipped": 1, "median_seconds": 2.0, "left_share": 0.5}
    }
    (between,) = found["between"]
    assert (between["items"], between["agreed"], between["kappa"]) == (1, 1.0, None)


def test_items_do_not_depend_on_the_order_of_records_and_responses() -> None:
    records = [record(f"a{n}", f"b{n}", prompt=f"p{n}", line=n) for n in range(50)]
    turned = [record(f"b{n}", f"a{n}", prompt=f"p{n}", line=n) for n in reversed(range(50))]
    one, other = (
        {k: v.responses for k, v in draw_items(r, 20, 0, Counter()).items()} for r in (records, turned)
    )
    assert len(one) == 20
    assert one == other
    assert one.keys() != draw_items(records, 20, 1, Counter()).keys()


def test_records_without_an_item_are_counted_by_reason() -> None:
    counts: Counter[str] = Counter()
    records = [record("a", "b"), record("b", "a"), record("a"), record("a", "b", "c", "d", prompt="Who?")]
    items = draw_items(records, 1, 0, counts)
    assert [len(one.responses) for one in items.values()] == [2]
    assert counts == {"read": 4, "duplicate": 1, "one_response": 1, "not_drawn": 1}


HOSTILE = "<script>alert(1)</script><b>bold</b>"


@contextmanager
def serving(log: Path) -> Iterator[LabelServer]:
    turns = (Message("system", "Be kind."), Message("user", HOSTILE))
    called = Message("assistant", "", {"thinking": "hm", "tool_calls": [{"name": "f"}]})
    records = [record((called,), (Message("assistant", "plain"),), prompt=turns)]
    records += [record("x", "y", prompt=Dialogue("\n\nHuman: Hi\n\nAssistant:"))]
    items = draw_items(records, 9, 0, Counter())
    with opened(log, items=items) as labelling, LabelServer(labelling, lambda: None) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield server
        finally:
            server.shutdown()


def ask(server: LabelServer, method: str, path: str, **fields: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, urlencode(fields) if method == "POST" else None)
    return connection.getresponse()


def test_the_page_shows_texts_as_texts_and_stores_verdicts(tmp_path) -> None:
    with serving(tmp_path / "log") as server:
        pages = []
        place = f"{server.path}?annotator=Ada"
        for _ in range(2):
            address = ask(server, "GET", place).headers["Location"]
            pages.append(ask(server, "GET", address).read().decode())
            item = parse_qs(urlsplit(address).query)["item"][0]
            fields = {"annotator": "Ada", "item": item, "choice": "right", "now": "0"}
            assert ask(server, "POST", server.path, **fields).status == 303
        page = "".join(pages)
        assert "&lt;b&gt;bold" in page
        assert "<b>" not in page
        assert all(word in page for word in ("Be kind.", "thinking", "tool_calls", "plain", "Hi", "1 to go"))
        end = ask(server, "GET", ask(server, "GET", place).headers["Location"]).read().decode()
        assert "2 judged, 0 to go" in end
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["verdict"] == ("first", "second")[1 - line["left"]] for line in lines] == [True, True]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_address_is_refused(method, tmp_path) -> None:
    with serving(tmp_path / "log") as server:
        assert ask(server, method, "/wrong/?annotator=Ada&item=").status == 404


def test_a_file_of_other_pairs_is_refused_before_anyone_labels(tmp_path) -> None:
    data = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
    for file in (tmp_path / "data.jsonl", tmp_path / "run/pairs/pairs.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(data)
    config = load_run_config(
        [
            *("pairs.method=people", f"data.train=[{tmp_path}/data.jsonl]", f"run.dir={tmp_path}/run"),
            *("model.path=unused",),
        ]
    )
    with pytest.raises(ConfigError, match="exists and was made with other settings"):
        label_pairs(config, print, print)
    assert not (tmp_path / "run/pairs/judgements.jsonl").exists()
