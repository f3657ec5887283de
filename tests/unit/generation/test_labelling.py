"""A labelling session: order, repeats, corrections, several annotators, restarts from the log."""

import json
import random
from collections import Counter

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.generation.pairs.labelling import (
    REPEAT_GAP,
    Judgement,
    Labelling,
    Plan,
    Slot,
    Undo,
    Verdict,
    as_line,
    draw_items,
    from_line,
    opened_log,
    shown_prompt,
    shown_response,
)
from dpo_dist.generation.pairs.people import (
    Undecided,
    agreement,
    agreement_table,
    compared,
    label_pairs,
    outcome,
)

ITEMS = [f"item{number}" for number in range(30)]
ALONE = Plan(overlap=0.0, repeats=0.0)


def judgement(
    slot: Slot, annotator: str = "Ada", verdict: Verdict = Verdict.first, left: int = 0
) -> Judgement:
    return Judgement(slot, annotator, verdict, left, 2.0, "2026-01-01T00:00:00+00:00")


def undo(slot: Slot, annotator: str = "Ada") -> Undo:
    return Undo(slot, annotator, "2026-01-01T00:00:01+00:00")


def judge_all(state: Labelling, annotator: str = "Ada", verdict: Verdict = Verdict.first) -> list[Slot]:
    seen = []
    while (slot := state.next_slot(annotator)) is not None:
        state.apply(judgement(slot, annotator, verdict))
        seen.append(slot)
    return seen


def test_every_item_comes_once_in_an_order_of_the_seed() -> None:
    seen = judge_all(Labelling(ITEMS, ALONE))
    assert sorted(slot.item for slot in seen) == sorted(ITEMS)
    assert seen == judge_all(Labelling(reversed(ITEMS), ALONE))
    assert seen != judge_all(Labelling(ITEMS, Plan(seed=1, overlap=0.0, repeats=0.0)))


def test_the_next_comparison_stays_until_it_is_judged() -> None:
    state = Labelling(ITEMS, ALONE)
    first = state.next_slot("Ada")
    assert state.next_slot("Ada") == first


def test_a_second_verdict_on_a_comparison_is_not_counted() -> None:
    state = Labelling(ITEMS, ALONE)
    slot = Slot(ITEMS[0])
    state.apply(judgement(slot, verdict=Verdict.first))
    second = judgement(slot, verdict=Verdict.second)
    assert not state.accepts(second)
    state.apply(second)
    assert [one.verdict for one in state.judgements] == [Verdict.first]


def test_repeats_come_later_with_the_sides_exchanged() -> None:
    plan = Plan(overlap=0.0, repeats=1.0)
    seen = judge_all(Labelling(ITEMS, plan))
    repeats = [slot for slot in seen if slot.is_repeat]
    assert len(repeats) >= len(ITEMS) - REPEAT_GAP
    for slot in repeats:
        first = Slot(slot.item)
        assert seen.index(slot) - seen.index(first) > REPEAT_GAP
        assert plan.left(slot, "Ada") == 1 - plan.left(first, "Ada")


def test_sides_are_random_and_differ_between_annotators() -> None:
    plan = Plan()
    lefts = {name: [plan.left(Slot(f"i{n}"), name) for n in range(400)] for name in ("Ada", "Ben")}
    assert 160 < sum(lefts["Ada"]) < 240
    assert lefts["Ada"] != lefts["Ben"]


def test_items_are_shared_or_judged_by_one_annotator() -> None:
    plan = Plan(overlap=0.5, repeats=0.0)
    state = Labelling(ITEMS, plan)
    names = ["Ada", "Ben"]
    while any(state.next_slot(name) for name in names):
        for name in names:
            slot = state.next_slot(name)
            if slot is not None:
                state.apply(judgement(slot, name))
    judges = Counter(one.slot.item for one in state.judgements)
    assert {item for item, number in judges.items() if number == 2} == {i for i in ITEMS if plan.is_shared(i)}
    assert set(judges) == set(ITEMS)


def test_an_item_on_the_screen_of_another_comes_last() -> None:
    state = Labelling(ITEMS[:3], ALONE)
    shown = state.next_slot("Ada")
    seen = judge_all(state, "Ben")
    assert len(seen) == 3
    assert seen[-1] == shown


def test_a_skipped_item_is_left_to_others() -> None:
    state = Labelling(ITEMS[:3], ALONE)
    assert len(judge_all(state, "Ada", Verdict.skip)) == 3
    assert state.next_slot("Ada") is None
    assert len(judge_all(state, "Ben")) == 3


def test_undo_returns_to_the_last_comparison_several_times() -> None:
    state = Labelling(ITEMS, ALONE)
    slots = []
    for _ in range(3):
        slots.append(state.next_slot("Ada"))
        state.apply(judgement(slots[-1]))
    assert not state.accepts(undo(slots[0]))
    state.apply(undo(slots[2]))
    state.apply(undo(slots[1]))
    assert state.next_slot("Ada") == slots[1]
    state.apply(judgement(slots[1], verdict=Verdict.second))
    assert state.next_slot("Ada") == slots[2]
    assert {one.slot: one.verdict for one in state.judgements} == {
        slots[0]: Verdict.first,
        slots[1]: Verdict.second,
    }


def due(state: Labelling, annotator: str) -> list[Slot]:
    """The open comparisons by their definition: repeats whose gap is over, then new items in order."""
    given = [one for one in state.judgements if one.annotator == annotator]
    slots = {one.slot for one in given}
    judged = {one.slot.item for one in state.judgements if one.verdict != "skip" and not one.slot.is_repeat}
    repeats = [
        Slot(one.slot.item, is_repeat=True)
        for one in given[: max(len(given) - REPEAT_GAP, 0)]
        if one.verdict != "skip" and state.plan.is_repeated(one.slot.item, annotator)
    ]
    new = [item for item in state.items if state.plan.is_shared(item) or item not in judged]
    return [slot for slot in [*repeats, *map(Slot, new)] if slot not in slots]


@pytest.mark.parametrize("seed", range(12))
def test_the_next_comparisons_are_those_that_are_due(seed) -> None:
    """Random judgements, also of comparisons that are not shown, and corrections of two annotators."""
    chance = random.Random(seed)
    state = Labelling(ITEMS, Plan(seed, chance.choice([0.0, 0.4]), repeats=0.6))
    for _ in range(150):
        name = chance.choice(["Ada", "Ben"])
        slot = state.next_slot(name)
        last = state.last(name)
        if last is not None and chance.random() < 0.3:
            state.apply(undo(last, name))
            assert state.next_slot(name) == last
        elif slot is not None:
            other = Slot(chance.choice(ITEMS), chance.random() < 0.5)
            chosen = other if chance.random() < 0.2 else slot
            state.apply(judgement(chosen, name, chance.choice(list(Verdict))))
        for one in ("Ada", "Ben"):
            assert state.progress(one).remaining == len(due(state, one))
            assert state.number == len(state.judgements)
    alone = Labelling(ITEMS, state.plan, state.judgements)
    assert alone.next_slot("Ada") == next(iter(due(alone, "Ada")), None)
    for one in ("Ada", "Ben"):
        judge_all(state, one)
    assert not due(state, "Ada") + due(state, "Ben"), "a comparison that was taken back is judged again"
    assert state.next_slot("Ada") is state.next_slot("Ben") is None


def test_progress_counts_what_is_in_force() -> None:
    state = Labelling(ITEMS, ALONE)
    state.apply(judgement(Slot(ITEMS[0])))
    state.apply(judgement(Slot(ITEMS[1]), verdict=Verdict.skip))
    progress = state.progress("Ada")
    assert (progress.done, progress.skipped, progress.remaining, progress.pace) == (1, 1, 28, 2.0)


def test_a_restart_from_the_log_is_the_same_state(tmp_path) -> None:
    state, plan = None, Plan(overlap=0.3, repeats=0.5)
    with opened_log(tmp_path / "log") as log:
        state = Labelling(ITEMS, plan)
        for number in range(25):
            name = ("Ada", "Ben")[number % 2]
            event = judgement(state.next_slot(name), name, list(Verdict)[number % 4])
            log.append(event)
            state.apply(event)
            if number % 5 == 0:
                back = undo(event.slot, name)
                log.append(back)
                state.apply(back)
    with opened_log(tmp_path / "log") as log:
        again = Labelling(ITEMS, plan, log.events)
    assert again.judgements == state.judgements
    assert [again.next_slot(name) for name in ("Ada", "Ben")] == [state.next_slot(n) for n in ("Ada", "Ben")]


def test_judgements_of_unknown_items_are_counted_and_not_used() -> None:
    state = Labelling(ITEMS, ALONE, [judgement(Slot("gone"))])
    assert (state.foreign, state.judgements) == (1, [])


def test_a_torn_last_line_is_removed_and_a_damaged_one_is_an_error(tmp_path) -> None:
    path = tmp_path / "log"
    with opened_log(path) as log:
        log.append(judgement(Slot("a")))
        log.append(judgement(Slot("b")))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with opened_log(path) as log:
        assert [event.slot.item for event in log.events] == ["a"]
        log.append(judgement(Slot("b")))
    assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match="log:1"), opened_log(path):
        pass


def test_a_second_server_on_the_same_log_is_refused(tmp_path) -> None:
    with (
        opened_log(tmp_path / "log"),
        pytest.raises(ConfigError, match="another process"),
        opened_log(tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize("event", [judgement(Slot("a", is_repeat=True), "Zoë"), undo(Slot("b"))])
def test_events_are_read_as_they_were_written(event) -> None:
    assert from_line(json.loads(json.dumps(as_line(event)))) == event


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        ([], Undecided.not_judged),
        ([("Ada", "skip")], Undecided.skipped),
        ([("Ada", "tie")], Undecided.tie),
        ([("Ada", "first")], 0),
        ([("Ada", "first"), ("Ben", "second")], Undecided.disagreement),
        ([("Ada", "first"), ("Ben", "second"), ("Cem", "second")], 1),
        ([("Ada", "first"), ("Ada", "second"), ("Ben", "second")], 1),
        ([("Ada", "first"), ("Ada", "first"), ("Ben", "second")], Undecided.disagreement),
        ([("Ada", "first"), ("Ben", "tie"), ("Cem", "skip")], 0),
    ],
)
def test_every_annotator_has_one_vote(verdicts, wanted) -> None:
    given = [
        judgement(Slot("a", is_repeat=bool(number)), name, Verdict(verdict))
        for number, (name, verdict) in enumerate(verdicts)
    ]
    result = outcome(given)
    assert (result, type(result)) == (wanted, type(wanted))


def test_kappa_is_agreement_beyond_chance() -> None:
    first = [Verdict.first] * 20 + [Verdict.second] * 30
    second = [Verdict.first] * 15 + [Verdict.second] * 5 + [Verdict.first] * 10 + [Verdict.second] * 20
    found = compared(first, second)
    assert found["agreed"] == 0.7
    # By hand: expected agreement 0.5 * 0.4 + 0.5 * 0.6 = 0.5, so (0.7 - 0.5) / (1 - 0.5).
    assert found["kappa"] == pytest.approx(0.4)
    assert compared([Verdict.tie], [Verdict.tie])["kappa"] is None
    assert compared([], []) == {"items": 0, "agreed": None, "kappa": None}


def test_agreement_compares_repeats_and_annotators() -> None:
    given = [
        judgement(Slot("a"), "Ada", Verdict.first, left=0),
        judgement(Slot("a", is_repeat=True), "Ada", Verdict.second, left=1),
        judgement(Slot("b"), "Ada", Verdict.second, left=0),
        judgement(Slot("c"), "Ada", Verdict.skip),
        judgement(Slot("a"), "Ben", Verdict.first, left=1),
        judgement(Slot("b"), "Ben", Verdict.tie),
        judgement(Slot("c"), "Ben", Verdict.tie),
    ]
    found = agreement(given)
    ada = found["annotators"]["Ada"]
    assert (ada["judged"], ada["skipped"], ada["left_share"]) == (3, 1, pytest.approx(2 / 3))
    assert (ada["self"]["items"], ada["self"]["agreed"]) == (1, 0.0)
    (between,) = found["between"]
    assert (between["annotators"], between["items"], between["agreed"]) == (["Ada", "Ben"], 2, 0.5)
    table = agreement_table(found)
    assert "Ada and Ben" in table
    assert max(map(len, table.splitlines())) <= 100


def record(*responses, prompt="Why?", line=1) -> PreferenceRecord:
    return PreferenceRecord(prompt, responses, Origin("data.jsonl", line))


def test_items_do_not_depend_on_the_order_of_records_and_responses() -> None:
    records = [record(f"a{n}", f"b{n}", prompt=f"p{n}", line=n) for n in range(50)]
    turned = [record(f"b{n}", f"a{n}", prompt=f"p{n}", line=n) for n in reversed(range(50))]
    drawn = [{i.key: i.record for i in draw_items(rows, 20, 0, Counter())} for rows in (records, turned)]
    assert len(drawn[0]) == 20
    assert {key: one.responses for key, one in drawn[0].items()} == {
        key: one.responses for key, one in drawn[1].items()
    }
    assert drawn[0].keys() != {item.key for item in draw_items(records, 20, 1, Counter())}


def test_records_without_an_item_are_counted_by_reason() -> None:
    counts: Counter[str] = Counter()
    records = [
        record("a", "b"),
        record("b", "a"),
        record("a"),
        record("a", "b", "c", "d", prompt="Who?"),
    ]
    items = draw_items(records, None, 0, counts)
    assert len(items) == 2
    assert counts == {"read": 4, "duplicate": 1, "one_response": 1}
    assert all(len(item.record.responses) == 2 for item in items)


def test_a_file_of_other_pairs_is_refused_before_anyone_labels(tmp_path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    config = load_run_config(
        [
            *("pairs.method=people", f"data.train=[{tmp_path}/data.jsonl]", f"run.dir={tmp_path}/run"),
            *("model.path=unused", f"pairs.output={tmp_path}/other.jsonl"),
        ]
    )
    with pytest.raises(ConfigError, match="exists and was made with other settings"):
        label_pairs(config, print, print)
    assert not (tmp_path / "run/pairs/judgements.jsonl").exists()


def test_turns_are_shown_with_tools_thoughts_and_calls() -> None:
    called = Message("assistant", "", {"thinking": "hm", "tool_calls": [{"function": {"name": "f"}}]})
    one = PreferenceRecord(
        (Message("system", "Be kind."), Message("user", "Hi")),
        ("plain", (called, Message("tool", "3"), Message("assistant", "Three."))),
        Origin("x", 1),
        tools=({"function": {"name": "count"}},),
    )
    assert [turn["role"] for turn in shown_prompt(one)] == ["tools", "system", "user"]
    assert shown_prompt(one)[0]["texts"][0]["text"] == "count"
    assert shown_response(one.responses[0]) == [{"role": "", "texts": [{"kind": "text", "text": "plain"}]}]
    turns = shown_response(one.responses[1])
    assert [part["kind"] for part in turns[0]["texts"]] == ["thoughts", "field"]
    assert [turn["role"] for turn in turns] == ["assistant", "tool", "assistant"]
    assert [
        t["role"] for t in shown_prompt(record("a", "b", prompt=Dialogue("\n\nHuman: Hi\n\nAssistant:")))
    ] == ["user"]


def test_the_seconds_of_an_annotator_are_their_median() -> None:
    given = [Judgement(Slot(str(n)), "Ada", Verdict.first, 0, float(n), "t") for n in (1, 2, 3, 10)]
    assert agreement(given)["annotators"]["Ada"]["median_seconds"] == 2.5


def test_an_item_for_everyone_is_not_put_off() -> None:
    state = Labelling(ITEMS, Plan(overlap=1.0, repeats=0.0))
    assert state.next_slot("Ada") == state.next_slot("Ben")


def test_the_pace_is_that_of_the_last_judgements() -> None:
    given = [
        Judgement(Slot(item), "Ada", Verdict.first, 0, float(n >= 17), "t") for n, item in enumerate(ITEMS)
    ]
    assert Labelling(ITEMS, ALONE, given).progress("Ada").pace == 1.0
    assert Labelling(ITEMS, ALONE, given[:9]).progress("Ada").pace == 0.0


def test_ties_have_no_side_and_annotators_without_common_items_no_row() -> None:
    given = [
        judgement(Slot("a"), "Ada", Verdict.tie, left=0),
        judgement(Slot("b"), "Ada", Verdict.second, left=1),
        judgement(Slot("c"), "Ben"),
    ]
    found = agreement(given)
    assert found["annotators"]["Ada"]["left_share"] == 1.0
    assert "Ada and Ben" not in agreement_table(found)


@pytest.mark.parametrize(("written", "read"), [(-3.0, 0.0), (1e8, 86400.0), (2.5, 2.5)])
def test_impossible_seconds_are_limited(written, read) -> None:
    event = from_line(as_line(judgement(Slot("a"))) | {"seconds": written})
    assert isinstance(event, Judgement)
    assert event.seconds == read


def test_the_last_words_count_comparisons(tmp_path, monkeypatch) -> None:
    """They also count the judgements of earlier starts."""
    rows = ({"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(3))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_run_config(
        [
            *("pairs.method=people", f"data.train=[{tmp_path}/data.jsonl]", f"run.dir={tmp_path}/run"),
            *("model.path=unused", "pairs.limit=2"),
        ]
    )
    monkeypatch.setattr("dpo_dist.generation.pairs.people._serve", lambda *_: None)
    said: list[str] = []
    label_pairs(config, said.append, print)
    assert said[-1] == "no pair is decided yet: 2 comparisons not judged"
    assert "2 comparisons of 3 records (1 not drawn)" in said
    first, _ = draw_items(read_records(f"{tmp_path}/data.jsonl"), 2, 0, Counter())
    with opened_log(tmp_path / "run/pairs/judgements.jsonl") as log:
        log.append(judgement(Slot(first.key)))
    label_pairs(config, said.append, print)
    assert "1 comparison decided, 1 comparison not judged" in said
    assert said[-1].startswith("1 pair: ")
