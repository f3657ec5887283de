"""`pairs.method=scores`: pairs of scored responses, which the trainer reads without options."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.generation.pairs.run import pairs_from_scores
from tests.support.records import assistant, jsonl, user

SCORED = {
    "prompt": [user("name a colour")],
    "responses": [{"content": text, "score": score} for text, score in [("a", 3), ("b", 9), ("c", 1)]],
}
PAIR = {
    "chosen": [user("hi"), assistant("hello")],
    "rejected": [user("hi"), assistant("no")],
    "score_chosen": 1,
    "score_rejected": 4,
}
PLAIN = {"prompt": "two and two is", "responses": ["four", "five"], "scores": [1.0, 0.5]}


def make(folder: Path, *records: Any, **keys: Any) -> tuple[Path, list[str]]:
    said: list[str] = []
    file = folder / "pairs/pairs.jsonl"
    overrides = [f"pairs.{key}={value}" for key, value in keys.items()]
    config = load_run_config(
        ["model.path=m", f"data.train=[{jsonl(folder, *records)}]", f"run.dir={folder}", *overrides]
    )
    pairs_from_scores(config, said.append)
    return file, said


def test_the_trainer_reads_the_pairs_with_their_scores(tmp_path: Path) -> None:
    file, _ = make(tmp_path, SCORED, PAIR)
    first, second = (record for record in read_records(str(file)) if isinstance(record, PreferenceRecord))
    assert (first.response_texts, first.scores) == (("b", "c"), (9.0, 1.0))
    assert [turn.content for turn in first.prompt] == ["name a colour"]  # type: ignore[union-attr]
    assert (second.response_texts, second.scores) == (("no", "hello"), (4.0, 1.0))


def test_provenance_names_the_line_and_the_rule(tmp_path: Path) -> None:
    file, said = make(tmp_path, PAIR, SCORED, select="all_pairs", margin=3)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["score_chosen"], row["score_rejected"]) for row in rows] == [(9, 3), (9, 1)]
    assert rows[0]["provenance"] == {
        "source": f"{tmp_path}/records.jsonl:2",
        "method": "scores",
        "select": "all_pairs",
        "margin": 3.0,
        "seed": 0,
        "ranks": [1, 2],
        "responses": 3,
    }
    assert "1 prompts_below_margin: prompts without a pair" in " ".join(said)


def test_a_random_choice_does_not_depend_on_the_place_of_a_record(tmp_path: Path) -> None:
    """Only on its content: it may be moved, and others may be before it."""

    def lines(name: str, *before: Any) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir()
        ranked = [SCORED | {"prompt": [user(f"question {number}")]} for number in range(20)]
        same = [
            SCORED
            | {"responses": [{**one, "content": f"{one['content']}{n}"} for one in SCORED["responses"]]}
            for n in range(20)
        ]
        file, _ = make(tmp_path / name, *before, *ranked, *same, select="best_random")
        return [json.loads(line) for line in file.read_text().splitlines()][len(before) :]

    first, moved = lines("first"), lines("moved", PAIR)
    assert [line["rejected"] for line in first] == [line["rejected"] for line in moved]
    for part in (first[:20], first[20:]):
        assert len({tuple(line["provenance"]["ranks"]) for line in part}) == 2


def test_texts_stay_texts(tmp_path: Path) -> None:
    file, _ = make(tmp_path, PLAIN)
    row = json.loads(file.read_text())
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("two and two is", "four", "five")


def test_an_hh_dialogue_is_written_as_one(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    hh = {"chosen": f"{start} yes", "rejected": f"{start} no", "score_chosen": 2, "score_rejected": 1}
    file, _ = make(tmp_path, hh)
    row = json.loads(file.read_text())
    assert {key: row[key] for key in hh} == hh


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"left": {"type": "integer"}}}}
CHAT = PAIR | {"score_chosen": 9}
WITH_TOOLS = {
    "prompt": [
        {"role": "system", "content": "be brief"},
        user("rain?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes", "name": "weather"},
    ],
    "chosen": [{"role": "assistant", "content": "yes", "reasoning_content": "the tool says so"}],
    "rejected": [
        {"role": "assistant", "content": "one moment", "loss_weight": 0},
        user("well?"),
        {"role": "assistant", "content": "no", "loss_weight": 1},
    ],
    "tools": [WEATHER, ADD],
    "chat_template_kwargs": {"enable_thinking": False},
    "score_chosen": 2,
    "score_rejected": 1,
}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: yes",
    "rejected": "\n\nHuman: hi\n\nAssistant: no",
    "score_chosen": 2,
    "score_rejected": 1,
}


@pytest.mark.parametrize("records", [[CHAT, WITH_TOOLS, CHAT], [HH, PLAIN]])
def test_no_field_of_a_record_is_lost(tmp_path: Path, records: list[Any]) -> None:
    file, _ = make(tmp_path, *records)
    for before, after in zip(
        read_records(str(tmp_path / "records.jsonl")), read_records(str(file)), strict=True
    ):
        assert isinstance(before, PreferenceRecord)
        assert isinstance(after, PreferenceRecord)
        assert replace(after, origin=before.origin) == before


def test_records_without_scores_are_counted(tmp_path: Path) -> None:
    _, said = make(tmp_path, SCORED, {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "1 without_scores: records without scores" in " ".join(said)


def test_without_a_pair_no_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair can be made"):
        make(tmp_path, SCORED, margin=100)
    assert [file.name for file in tmp_path.iterdir()] == ["pairs", "records.jsonl"]


def test_a_file_of_other_settings_is_not_replaced(tmp_path: Path) -> None:
    file, _ = make(tmp_path, SCORED)
    first = file.read_bytes()
    assert make(tmp_path, SCORED)[0].read_bytes() == first
    with pytest.raises(ConfigError, match="other settings") as caught:
        make(tmp_path, SCORED, margin=1)
    assert caught.value.got == "margin: 0 before, 1 now"
    assert file.read_bytes() == first


def test_the_limit_counts_prompts(tmp_path: Path) -> None:
    file, _ = make(tmp_path, PLAIN, SCORED, SCORED, limit=2, select="all_pairs")
    assert len(file.read_text().splitlines()) == 1 + 3


def test_dropped_records_before_the_limit_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 3 records cannot be used"):
        make(tmp_path, {"unknown": 1}, PLAIN, SCORED, {"unknown": 2}, limit=2)
