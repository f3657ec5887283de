"""The prompts of a comparison are different held-out ones, chosen by content, in the order of the data."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.records import Dialogue, Message
from dpo_dist.foundation.errors import DataError
from dpo_dist.generation.pairs.prompts import open_prompts
from dpo_dist.insight.compare.responses import shown_prompt, write_held_out
from tests.support.records import assistant, jsonl, user

RECORDS = [
    {
        "prompt": [user(f"question {n % 30}")],
        "chosen": [assistant(f"good {n}")],
        "rejected": [assistant("bad")],
    }
    for n in range(40)
]


def chosen(tmp_path: Path, records: list[Any], *overrides: str) -> tuple[list[str], list[str]]:
    source = jsonl(tmp_path, *records)
    base = ["model.path=x", "data.train=[x.jsonl]"]
    if not any(override.startswith("data.") for override in overrides):
        overrides = (*overrides, f"data.eval=[{{path: {source}, label: held}}]")
    said: list[str] = []
    config = load_run_config([*base, *overrides])
    file = write_held_out(tmp_path / "parts", config, said.append)
    records_found = [record for part in range(3) for record in _part(file, part)]
    assert all(not record.responses for record in records_found)
    lines = file.read_bytes().splitlines()
    assert {json.loads(line)["source"] for line in lines} <= {"held", "records"}
    return [json.loads(line)["prompt"][0][1] for line in lines], [*said, *map(str, _chosen(lines))]


def _part(file: Path, part: int) -> list[Any]:
    prompts = open_prompts(file, 100)
    return prompts.part(part) if part < prompts.parts else []


def _chosen(lines: list[bytes]) -> list[str | None]:
    return [json.loads(line)["chosen"] for line in lines]


def test_some_prompts_are_chosen_by_hash_and_kept_in_order(tmp_path: Path) -> None:
    few, said = chosen(tmp_path, RECORDS, "compare.prompts=7")
    assert len(few) == 7 == len(set(few))
    assert few == sorted(few, key=lambda text: int(text.split()[1]))
    assert "prompts: 7 of 30 different ones" in said
    assert said[-7:] == [f"good {text.split()[1]}" for text in few]
    backwards, _ = chosen(tmp_path, RECORDS[::-1], "compare.prompts=7")
    assert set(backwards) == set(few)
    more, _ = chosen(tmp_path, RECORDS, "compare.prompts=8")
    assert set(few) < set(more)


def test_fewer_prompts_than_wanted_are_said_and_bad_records_counted(tmp_path: Path) -> None:
    records = [*RECORDS, {"no": "prompt"}]
    found, said = chosen(tmp_path, records)
    assert len(found) == 30
    assert said[0].endswith("40 of 41 records kept")
    assert said[1].startswith("  1 dropped (unknown_format): ")
    assert said[2] == "prompts: 30 of 30 different ones, fewer than compare.prompts=128"


def test_prompts_without_responses_are_enough(tmp_path: Path) -> None:
    found, said = chosen(tmp_path, [{"prompt": [user("a")]}, {"messages": [user("b")]}])
    assert found == ["a", "b"]
    assert said[-2:] == ["None", "None"]


def test_a_reserved_share_of_the_training_data_is_held_out(tmp_path: Path) -> None:
    source = jsonl(tmp_path, *RECORDS)
    found, _ = chosen(tmp_path, RECORDS, f"data.train=[{source}]", "data.eval_share=0.3")
    assert 0 < len(found) < 20


def test_no_held_out_prompt_is_an_error(tmp_path: Path) -> None:
    source = jsonl(tmp_path, *RECORDS)
    with pytest.raises(DataError, match="no usable prompt"):
        chosen(tmp_path, RECORDS, f"data.train=[{source}]", "data.eval_share=1e-9")


def test_prompts_as_one_text() -> None:
    assert shown_prompt("plain") == "plain"
    assert shown_prompt((Message("user", "hello"),)) == "hello"
    assert shown_prompt((Message("system", "be kind"), Message("user", "hello"))) == (
        "system: be kind\n\nuser: hello"
    )
    assert shown_prompt(Dialogue("\n\nHuman: a\n\nAssistant:")) == "\n\nHuman: a\n\nAssistant:"
