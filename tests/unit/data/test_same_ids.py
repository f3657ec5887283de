"""The same conversation has the same token ids in every format."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_dist.config.data import DataFormat, SourceConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from tests.support import tiny
from tests.support.pairs import WIDE
from tests.support.records import assistant, jsonl, user

KIND, FIRST, REPLY, QUESTION, GOOD, BAD = (
    "Be kind. ",
    "hello",
    "hello there",
    "What is\nit? ",
    "Paris 你好",
    "no",
)
SYSTEM = {"role": "system", "content": KIND}
BEFORE = [SYSTEM, user(FIRST), assistant(REPLY), user(QUESTION)]
TURNS = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": TURNS[turn["role"]], "value": turn["content"]} for turn in BEFORE]
BESIDE = {"system": KIND, "history": [[FIRST, REPLY]]}
SIDES = {"chosen": GOOD, "rejected": BAD}


def parts(turns: list[dict[str, str]], weight: int) -> list[dict[str, Any]]:
    return [
        turn | {"content": [{"type": "text", "value": turn["content"]}], "loss_weight": weight}
        for turn in turns
    ]


FORMS: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": BEFORE, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "TRL, implicit": {"chosen": [*BEFORE, assistant(GOOD)], "rejected": [*BEFORE, assistant(BAD)]},
    "OpenRLHF": {
        "prompt": BEFORE,
        "chosen": [*BEFORE, assistant(GOOD)],
        "rejected": [*BEFORE, assistant(BAD)],
    },
    "alpaca": {"instruction": QUESTION, "input": "", **BESIDE, **SIDES},
    "alpaca of two parts": {"instruction": "What is", "input": "it? ", **BESIDE, **SIDES},
    "alpaca, older": {"instruction": QUESTION, **BESIDE, "output": [GOOD, BAD]},
    "sharegpt": {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "sharegpt, system beside": {"system": KIND, "conversations": SHAREGPT[1:], **SIDES},
    "weights": {
        "chosen_messages": [*parts(BEFORE, 0), *parts([assistant(GOOD)], 1)],
        "rejected_messages": [*parts(BEFORE, 0), *parts([assistant(BAD)], 1)],
    },
    "ms-swift": {"messages": [*BEFORE, assistant(GOOD)], "rejected_response": BAD},
    "ms-swift, query": {"query": QUESTION, "response": GOOD, "rejected_response": BAD, **BESIDE},
    "axolotl": {"messages": BEFORE, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
    "question": {"question": QUESTION, "response_chosen": GOOD, "response_rejected": BAD, **BESIDE},
    "ranked": {"prompt": BEFORE, "responses": [{"text": BAD, "score": 1}, {"text": GOOD, "score": 2}]},
}


def ids(path: str, make: Any, format_: DataFormat = DataFormat.auto) -> list[Any]:
    [record] = read_records(SourceConfig(path=path, format=format_))
    assert isinstance(record, PreferenceRecord), record
    pair = encode_pair(record, make(), WIDE)
    assert isinstance(pair, EncodedExample), pair
    trained = [mask.tolist() for mask in pair.trained] or [[True] * len(ids) for ids in pair.responses]
    return [pair.prompt_ids.tolist(), *[ids.tolist() for ids in pair.responses], trained]


@pytest.mark.parametrize("make", [tiny.qwen, tiny.llama3, tiny.zephyr])
def test_the_format_does_not_change_the_ids(tmp_path: Path, make: Any) -> None:
    found = {name: ids(jsonl(tmp_path, fields), make) for name, fields in FORMS.items()}
    assert all(one == found["TRL"] for one in found.values()), [n for n in found if found[n] != found["TRL"]]
    assert found["TRL"][1] != found["TRL"][2]


@pytest.mark.parametrize("name", FORMS)
def test_the_kind_of_file_does_not_change_the_ids(tmp_path: Path, name: str) -> None:
    fields = FORMS[name]
    expected = ids(jsonl(tmp_path, FORMS["TRL"]), tiny.qwen)
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    with (tmp_path / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(cells))
        table.writeheader()
        table.writerow(cells)
    (tmp_path / "array.json").write_text(json.dumps([fields]))
    pa.parquet.write_table(pa.Table.from_pylist([fields]), tmp_path / "table.parquet")
    # In a cell the list could also be one text.
    format_ = DataFormat.ranked if "output" in fields else DataFormat.auto
    for file_name in ("cells.csv", "array.json", "table.parquet"):
        assert ids(str(tmp_path / file_name), tiny.qwen, format_) == expected, file_name
