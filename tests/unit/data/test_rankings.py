"""Lists of responses: which of them is the best is said by scores, or by the format of the source."""

import re
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.config import DataConfig, DataFormat, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import PreferenceRecord, turns_of
from dpo_dist.foundation.errors import DataError
from tests.support.records import assistant, bad, good, jsonl, user

FRUITS = {"prompt": "Name a fruit.", "responses": ["Apple", "Fruit", "Car"]}
TURNS = list(map(assistant, FRUITS["responses"]))
LISTS: list[dict[str, Any]] = [
    FRUITS,
    FRUITS | {"ranking": [3, 1, 2], "winner": "b", "scores": None},
    {"instruction": "Name a fruit.", "output": FRUITS["responses"]},
    {"prompt": [user("Name a fruit.")], "completions": TURNS},
    {"responses": [[user("Name a fruit."), turn | {"votes": 3}] for turn in TURNS]},
    *(
        FRUITS | {"responses": [{key: text, "quality": 1} for text in FRUITS["responses"]]}
        for key in ("content", "text")
    ),
]


@pytest.mark.parametrize("record", LISTS, ids=str)
def test_a_list_without_scores_is_best_first_only_if_the_format_says_so(record: dict[str, Any]) -> None:
    found = bad(record)
    assert found.reason == "no_scores"
    assert found.detail in record
    ranked = good(record, DataFormat.ranked)
    assert [turns_of(response)[0].content for response in ranked.responses] == ["Apple", "Fruit", "Car"]
    assert ranked.scores is None


def test_an_order_that_is_not_read_is_named() -> None:
    assert good(LISTS[1], DataFormat.ranked).unread == ("ranking", "winner")


@pytest.mark.parametrize("format_", [DataFormat.auto, DataFormat.ranked])
def test_scores_say_which_response_is_better(format_: DataFormat) -> None:
    beside = good(FRUITS | {"scores": [3, 2, 1]}, format_)
    scored = [{"content": text, "score": score} for text, score in zip(["Car", "Apple"], [1, 3], strict=True)]
    inside = good(FRUITS | {"responses": scored}, format_)
    assert (beside.responses, beside.scores) == (("Apple", "Fruit", "Car"), (3, 2, 1))
    assert (inside.responses, inside.scores) == (("Apple", "Car"), (3, 1))


def test_the_remedies_for_a_list_without_scores_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path, *[FRUITS | {"ranking": [3, 2, 1]}] * 3)
    with pytest.raises(DataError, match="records cannot be used") as raised:
        DataSource(SourceConfig(path)).check(DataConfig(train=[SourceConfig(path)]))
    remedy = raised.value.remedy
    [columns] = re.findall(r"columns: \{(\w+): COLUMN\}", remedy)
    code = "[{'content': text, 'score': n} for text, n in zip(record['responses'], record['ranking'])]"
    (tmp_path / "orders.py").write_text(
        f"def read(record):\n    return {{'prompt': record['prompt'], 'responses': {code}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert all(
        words in remedy for words in ("{path: PATH, format: ranked}", "{content: TEXT, score: NUMBER}")
    )
    for source in (
        SourceConfig(path, format=DataFormat.ranked),
        SourceConfig(path, columns={columns: "ranking"}),
        SourceConfig(path, reader="orders:read"),
    ):
        for record in read_records(source):
            assert isinstance(record, PreferenceRecord), record
            assert record.responses == ("Apple", "Fruit", "Car")
