"""An order of responses that stands beside their list: it is read or refused, never ignored."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.formats import check_source, read_records
from dpo_dist.foundation.errors import DataError
from tests.support.records import assistant, bad, good, jsonl, user

FRUITS = {"prompt": "Name a fruit.", "responses": ["Car", "Apple", "Fruit"]}
NAMES = (
    "ranking rankings rank ranks winner best preferred preference better_response_id gpt_rank human_ranking "
    "response_ranks order overall_scores preference_scores reward_scores rewards rm_scores ratings votes "
    "upvotes correct is_correct chosen_index best_answer bestAnswer labels choice verdict selected"
)
# Fields that need no name to be an order.
UNNAMED: list[Any] = [
    [3, 1, 2],
    [0.1, 0.9, 0.5],
    [False, True, False],
    [None, True, None],
    ["3", "1", "2"],
    ["b", "a", "c"],
    "[3, 1, 2]",
    "Apple",
    "response_b",
    {"helpful": [1, 5, 2]},
    [{"s": 1}, {"s": 5}, {"s": 2}],
]
NAMED: list[Any] = [
    *UNNAMED,
    0,
    1,
    3,
    "1",
    "b",
    "a model",
    [1],
    [[3, 1, 2], [3, 2, 1]],
    {"Car": 3, "Apple": 1},
]


@pytest.mark.parametrize("name", NAMES.split())
@pytest.mark.parametrize("value", NAMED, ids=str)
def test_an_order_beside_a_list_is_not_ignored(name: str, value: Any) -> None:
    found = bad(FRUITS | {name: value})
    assert (found.reason, found.unread) == ("unread_content", (name,))
    assert good(FRUITS | {name: value, "scores": [3, 2, 1]}).scores == (3, 2, 1)


@pytest.mark.parametrize("value", UNNAMED, ids=str)
def test_a_list_as_long_as_the_responses_is_an_order_by_any_name(value: Any) -> None:
    assert bad(FRUITS | {"points": value}).unread == ("points",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", 1),
        ("turns", 2),
        ("response_ids", [17, 4, 9]),
        ("num_tokens", [5, 3, 8]),
        ("createdAt", [1700000002, 1700000001, 1700000003]),
        ("seeds", [2, 1, 3]),
        ("temperatures", [0.7, 0.8, 0.9]),
        ("levels", [2, 2, 2]),
        ("models", ["llama", "gpt", "qwen"]),
        ("sources", [{"url": "x.org"}, {"url": "y.org"}, {"url": "z.org"}]),
        ("metadata", {"language": "en", "level": 2}),
        ("language", "en"),
        ("reference", "Pear"),
        ("reference", "Car"),
        ("context_window", 2),
        ("agreement_score", 0.7),
        ("is_correct", True),
        ("reward_model", "a model"),
        ("judgeModel", "a model"),
        ("preference_source", "web"),
        ("grade_level", "elementary"),
        ("gold_answer", "a pear"),
        ("choices", ["Car", "Pear", "Plum"]),
        ("generation", {"best_of": 2}),
        ("uuids", ["x", "y", "z"]),
        ("logps", [-3.5, -2.5, -4.5]),
        ("ranking", None),
        ("labels", []),
    ],
)
def test_a_field_that_is_no_order_does_not_drop_the_record(name: str, value: Any) -> None:
    assert good(FRUITS | {name: value}).responses == ("Car", "Apple", "Fruit")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward_model", [3, 1, 2]),
        ("gold_answer", "Apple"),
        ("gold_answer", "b"),
        ("choices", ["b", "a", "c"]),
        ("incorrect_answer", "Car"),
        ("preferred_model", "a model"),
    ],
)
def test_an_order_in_a_field_about_something_else_is_not_ignored(name: str, value: Any) -> None:
    assert bad(FRUITS | {name: value}).unread == (name,)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("annotations", [{"helpfulness": {"Rating": "2"}}, {"helpfulness": {"Rating": "5"}}]),
        ("votes", [1, 9]),
        ("selected", [False, True]),
        ("best", [None, True]),
        ("label", ["bad", "good"]),
        ("points", ["1", "2"]),
    ],
)
@pytest.mark.parametrize("form", ["message", "content", "conversation"])
def test_an_order_in_the_responses_themselves_is_not_ignored(name: str, values: list[Any], form: str) -> None:
    turns = [assistant(text) | {name: value} for text, value in zip(["Car", "Apple"], values, strict=True)]
    bare = [{"content": turn["content"], name: turn[name]} for turn in turns]
    lists = {"message": turns, "content": bare, "conversation": [[user("q"), turn] for turn in turns]}
    found = bad({"prompt": [user("q")], "responses": lists[form]})
    assert (found.reason, found.unread) == ("unread_content", (name,))


@pytest.mark.parametrize(("name", "values"), [("id", [7, 3]), ("model", ["x1", "x2"]), ("weight", [1, 1])])
def test_other_fields_of_responses_do_not_drop_the_record(name: str, values: list[Any]) -> None:
    turns = [assistant(text) | {name: value} for text, value in zip(["Car", "Apple"], values, strict=True)]
    assert good({"prompt": [user("q")], "responses": turns}).responses == ("Car", "Apple")


def test_the_remedies_for_an_order_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceConfig(jsonl(tmp_path, *[FRUITS | {"ranking": [3, 1, 2]}] * 3))
    with pytest.raises(DataError, match="ranking") as raised:
        check_source(source, DataConfig(train=[source]))
    assert "columns: {COLUMN: null}" in raised.value.remedy
    assert "reader" in raised.value.remedy
    [ignored, *_] = read_records(SourceConfig(source.path, columns={"ranking": None}))
    assert ignored.responses == ("Car", "Apple", "Fruit")  # type: ignore[union-attr]
    code = "[text for _, text in sorted(zip(record['ranking'], record['responses']))]"
    (tmp_path / "orders.py").write_text(
        f"def read(record):\n    return {{'prompt': record['prompt'], 'responses': {code}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    [best_first, *_] = read_records(SourceConfig(source.path, reader="orders:read"))
    assert best_first.responses == ("Apple", "Fruit", "Car")  # type: ignore[union-attr]
