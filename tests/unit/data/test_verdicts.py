"""Two answers and a field that says which is better: read if it can mean one thing only, else an error."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.counts import DataCounts
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.user_code import find_function
from tests.support.records import TEXT, assistant, bad, good, jsonl, user

AB = {"prompt": "q", "response_a": "one text", "response_b": "another text"}
ONE_TWO = {"prompt": "q", "response_1": "one text", "response_2": "another text"}
ZERO_ONE = {"prompt": "q", "response_0": "one text", "response_1": "another text"}
FIRST, SECOND = ("one text", "another text"), ("another text", "one text")


def named(first: str, second: str) -> dict[str, str]:
    return {"prompt": "q", first: "one text", second: "another text"}


NAMES = (
    "best better choice chosen decision favorite favourite judgement judgment label labels outcome picked "
    "prefer preference preferred result safer selected selection status verdict vote winner winning "
    "human_preference gold_label winner_label better_response_id preferred_answer best_completion chosen_idx "
    "winner_model preferred_option best_output better_side selectedResponse"
)
ANSWERS = (
    "answer assistant candidate chat completion continuation conversation dialogue generation message "
    "messages output ref reply response result solution story summary text"
)
# What is known from the names, and what was asked.
DECIDED = (
    "accepted/other bad/other best/other better/other correct/other dispreferred/other good/other "
    "incorrect/other loser/other negative/other non/other positive/other preferred/other right/other "
    "winner/other worse/other worst/other wrong/other context/other input/other instruction/other "
    "prompt/other query/other system/other user/other"
)
TIES = (
    "tie",
    "Tie",
    "tied",
    "a tie",
    "tie (bothbad)",
    "both_bad",
    "both are good",
    "neither",
    "draw",
    "equal",
)


@pytest.mark.parametrize("name", NAMES.split())
def test_a_verdict_has_one_of_these_names(name: str) -> None:
    assert good(AB | {name: "A"}).responses == FIRST
    assert good(AB | {name: "B"}).responses == SECOND
    assert not good(AB | {name: "B"}).unread


@pytest.mark.parametrize("name", ["dispreferred", "loser", "losing", "rejected", "worse", "worst_response"])
def test_a_name_can_say_which_answer_is_worse(name: str) -> None:
    assert good(AB | {name: "A"}).responses == SECOND
    assert good(AB | {name: "response_b"}).responses == FIRST


@pytest.mark.parametrize(
    "name",
    [
        *("less_preferred", "least_preferred_response", "not_chosen", "second_best", "rejected_choice"),
        *("worse_choice", "wrong_choice", "losing_vote", "non_preferred", "notBest", "a_is_not_better"),
    ],
)
def test_a_name_that_turns_its_last_word_is_none_of_a_better_answer(name: str) -> None:
    value = 1 if name.startswith("a_") else "A"
    assert bad(AB | {name: value}).reason == "unread_verdict"
    assert good(AB | {name: value, "winner": "B"}).responses == SECOND


@pytest.mark.parametrize(
    ("record", "second"),
    [
        *((AB, f"{word}B") for word in ("winner=", "better = ", "Answer=")),
        *((AB, word) for word in ("b", "response_b", "Response B", "model_b", "assistant b", "[[B]]", "B>A")),
        *(
            (AB, word)
            for word in ("A<B", "B >> A", "B is better", "second", "two", "right", "the chatbot B won")
        ),
        *(
            (AB, f"option B is {word} better")
            for word in ["clearly", "much", "significantly", "slightly", "strongly"]
        ),
        *((AB, word) for word in ("system_b", "side b", "b wins", "answer b is preferred", "another text")),
        *((ONE_TWO, word) for word in (2, 2.0, "2", "2.0", "response_2", "B", "second", "output 2", "right")),
        *((ZERO_ONE, word) for word in (1, 1.0, "1", "response_1", "b", "second")),
        *((named("answerA", "answerB"), word) for word in ("B", "answerB", "answer_b")),
        *((named("left_text", "right_text"), word) for word in ("right", "right_text", "B")),
        *((named("first_answer", "second_answer"), word) for word in ("second", "b", "right")),
        *((named("output_one", "output_two"), word) for word in ("two", "second")),
        *((named("answer_human", "answer_ai"), word) for word in ("ai", "AI", "answer_ai")),
        *((named("summary_gpt", "summary_llama"), word) for word in ("llama", "summary_llama")),
        (AB | {"model_a": "gpt-4", "model_b": "llama-2"}, "llama-2"),
        # The names may stand in any order.
        ({"response_b": "another text", "response_a": "one text", "prompt": "q"}, "B"),
    ],
)
def test_a_verdict_names_one_of_the_answers(record: dict[str, Any], second: Any) -> None:
    assert good(record | {"winner": second}).responses == SECOND
    assert good({"winner": second} | record).responses == SECOND


@pytest.mark.parametrize("name", ANSWERS.split())
def test_answers_have_one_of_these_words_in_their_names(name: str) -> None:
    assert good(named(f"{name}_a", f"{name}_b") | {"winner": "b"}).responses == SECOND


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, FIRST),
        ({"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, SECOND),
        ({"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}, None),
        *(({f"b_{word}": "yes"}, SECOND) for word in ("is_better", "wins", "won", "preferred", "is_best")),
        *(({f"{word}_a": True}, FIRST) for word in ("prefers", "chosen", "winner")),
        ({"winner": "a", "is_tie": False}, FIRST),
        ({"tied": "true"}, None),
        ({"draw": 1}, None),
    ],
)
def test_flags_name_an_answer_or_a_tie(flags: dict[str, Any], expected: Any) -> None:
    if expected is None:
        assert bad(AB | flags).reason == "all_tied"
    else:
        assert good(AB | flags).responses == expected


@pytest.mark.parametrize("word", [*TIES, "equally good", "same", "A=B", "neither is good"])
def test_a_tie_is_no_pair(word: str) -> None:
    assert bad(AB | {"winner": word}).reason == "all_tied"


# What can mean several things, or nothing.
@pytest.mark.parametrize(
    ("record", "value"),
    [
        *(
            (AB, value)
            for value in (0, 1, 2, "0", "1", 1.0, True, False, -1, "yes", "C", "gpt-4", "not A", ["A"])
        ),
        *((AB, value) for value in ("A or B", "A is worse", "a long sentence " * 5 + "A")),
        *((ONE_TWO, value) for value in (0, 3, -1, 1.5, "0", True)),
        *((ZERO_ONE, value) for value in (2, -1, True)),
        *((named("answer_human", "answer_ai"), value) for value in (1, "1", "A", "first")),
        (AB | {"score_a": "1", "score_b": "0"}, "1"),
        (AB | {"safety_a": "safe", "safety_b": "unsafe"}, "unsafe"),
        (AB | {"language_a": "en", "language_b": "de"}, "de"),
    ],
)
@pytest.mark.parametrize("name", ["winner", "preference", "label"])
def test_a_verdict_that_can_mean_several_things_is_not_read(
    record: dict[str, Any], value: Any, name: str
) -> None:
    assert bad(record | {name: value}).reason == "unread_verdict"


def test_an_index_is_read_where_the_answers_are_counted_from_0() -> None:
    for name in ("chosen_index", "winner_idx"):
        assert good(ZERO_ONE | {name: 0}).responses == FIRST
        assert good(ZERO_ONE | {name: 1}).responses == SECOND
        assert bad(ONE_TWO | {name: 1}).reason == "unread_verdict"


@pytest.mark.parametrize(
    ("amount", "other"),
    [("preference_strength", "preference_statement"), ("overall_preference", "individual_preference")],
)
def test_a_signed_preference_is_read_in_the_files_of_helpsteer_alone(amount: str, other: str) -> None:
    published = ONE_TWO | {other: "Response 2 is slightly better than Response 1."}
    assert good(published | {amount: -2}).responses == FIRST
    assert good(published | {amount: 1}).responses == SECOND
    assert bad(published | {amount: 0}).reason == "all_tied"
    for value in (-2, 1, 2):
        assert bad(ONE_TWO | {amount: value}).reason == "unread_verdict"


def test_verdicts_must_agree_and_one_can_be_ignored(tmp_path: Path) -> None:
    both = ZERO_ONE | {"better_response_id": 1, "safer_response_id": 1}
    assert good(both).responses == SECOND
    path = jsonl(tmp_path, both, both | {"safer_response_id": 0})
    remedy = checked(SourceConfig(path)).remedy
    assert "ignore all verdicts but one" in remedy
    assert "columns: {safer_response_id: null}" in remedy
    found = read_records(SourceConfig(path, columns={"safer_response_id": None}))
    assert [one.responses for one in found if isinstance(one, PreferenceRecord)] == [SECOND, SECOND]


def test_a_number_that_is_not_read_beside_a_verdict_is_no_agreement() -> None:
    assert bad(ONE_TWO | {"preference": 1.27, "raw_preference": 2}).reason == "unread_verdict"
    assert good(ONE_TWO | {"preference": "a text of a judge", "winner": 2}).responses == SECOND


def test_a_strict_name_is_shown_before_a_loose_one() -> None:
    exported = {"status": "completed", **ONE_TWO, "preference": "unsure"}
    assert bad(exported).fields[0] == "preference"


@pytest.mark.parametrize("is_first", [True, False])
def test_the_remedy_keeps_the_sides_that_the_user_made(tmp_path: Path, *, is_first: bool) -> None:
    verdicts = {"safer_response_id": 0, "better_response_id": 1}
    pair = {"chosen": "another text", "rejected": "one text"}
    record = verdicts | ZERO_ONE | pair if is_first else ZERO_ONE | pair | verdicts
    assert (
        "columns: {safer_response_id: null, better_response_id: null}"
        in checked(SourceConfig(jsonl(tmp_path, record))).remedy
    )


def test_a_record_that_nobody_has_judged_is_a_bad_record() -> None:
    for nothing in ("", None, [], {}):
        found = bad(AB | {"winner": nothing})
        assert (found.reason, found.detail) == ("missing_field", "winner")
    for record in (AB, AB | {"target": 1}):
        assert bad(record).reason == "unread_verdict"


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "good_answer": "one text", "bad_answer": "another text", "label": "math"},
        named("question_text", "answer_text") | {"label": "answer"},
        {"prompt": "q", "response_1": "a", "response_2": "b", "response_3": "c", "best": 2},
        {"prompt": "q", "answer_a": "a", "answer_b": "b", "text_a": "c", "text_b": "d", "winner": "a"},
    ],
)
def test_other_fields_are_no_two_answers(record: dict[str, Any]) -> None:
    assert bad(record).reason == "unknown_format"


@pytest.mark.parametrize(("one", "other"), [pair.split("/") for pair in DECIDED.split()])
def test_names_that_say_which_answer_is_better_need_no_verdict(one: str, other: str) -> None:
    record = named(f"{one}_response", f"{other}_response") | {"label": one}
    assert bad(record).reason in ("unknown_format", "missing_field")


def test_names_in_chosen_and_rejected_are_verdicts() -> None:
    assert good(AB | {"chosen": "response_b", "rejected": "response_a"}).responses == SECOND
    assert good(AB | {"chosen": "b"}).responses == SECOND
    texts = AB | {"chosen": "third text", "rejected": "fourth text"}
    assert good(texts).responses == ("third text", "fourth text")
    assert bad(texts | {"winner": "a"}).unread == ("winner",)


def test_published_tables_are_read() -> None:
    chats = {f"conversation_{side}": [user("q"), assistant(side)] for side in ("a", "b")}
    arena = chats | {"model_a": "m", "model_b": "n", "winner": "model_b", "judge": "author_2", "turn": 1}
    assert good(arena).responses == ("b", "a")
    assert [turn.content for turn in good(arena).prompt] == ["q"]  # type: ignore[union-attr]
    assert bad(arena | {"winner": "tie (bothbad)"}).reason == "all_tied"
    lists = {
        "prompt": '["q"]',
        "response_a": '["one text"]',
        "response_b": ["another text"],
        "winner": "model_b",
    }
    assert (good(lists).prompt, good(lists).responses) == ("q", SECOND)
    assert bad(lists | {"prompt": ["q", "and?"], "response_a": ["a", "b"]}).reason == "history_differs"
    farm = {
        "instruction": "q",
        "input": "",
        "output_1": "one text",
        "output_2": "another text",
        "preference": 2,
    }
    assert good(farm).responses == SECOND
    judged = {"question": "q", "response_model": "m", "response_A": "one text", "response_B": "another text"}
    assert good(judged | {"label": "B>A"}).responses == SECOND
    helpsteer = {"context": [user("q")], "response1": "one text", "response2": "another text"}
    assert good(helpsteer | {"overall_preference": 3, "individual_preference": [{}]}).responses == SECOND


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_table_that_datasets_writes_is_read(tmp_path: Path, suffix: str) -> None:
    classes = datasets.ClassLabel(names=["tie", "b", "a"])
    columns = {"winner": [1, 2, 0], **{name: [AB[name]] * 3 for name in AB}}
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"winner": classes})
    table = datasets.Dataset.from_dict(columns, features=features)
    file = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        table.to_parquet(str(file))
    else:  # as text: only Arrow knows the names of classes
        named_rows = [row | {"winner": classes.int2str(row["winner"])} for row in table]
        table = datasets.Dataset.from_list(named_rows)
        table.to_csv(str(file)) if suffix == "csv" else table.to_json(str(file))
    *pairs, tie = read_records(str(file))
    assert [one.responses for one in pairs if isinstance(one, PreferenceRecord)] == [SECOND, FIRST]
    assert isinstance(tie, BadRecord)
    assert tie.reason == "all_tied"


# Beside a pair.
@pytest.mark.parametrize(
    "fields",
    [
        *({"winner": word} for word in ("rejected", "tie", "A", "model_b", 1, 0, "bad")),
        *({name: True} for name in ("tie", "is_tie", "tied", "draw", "rejected_is_better")),
        *({name: -2} for name in ("preference_strength", "overall_preference", "strength")),
        *({name: 0} for name in ("preference_strength", "better_response_id", "vote")),
        *(
            {name: "rejected"}
            for name in ("label", "status", "better", "preferred_side", "verdict", "outcome")
        ),
        *({name: "tie"} for name in ("label", "status", "preference", "result", "judgment")),
        *({"chosen_is_better": value} for value in (False, 0, "no")),
        *({name: "chosen"} for name in ("loser", "worse")),
        {"preference": "B"},
        {"choice": "b"},
    ],
    ids=str,
)
def test_a_verdict_against_the_chosen_side_is_not_dropped(fields: dict[str, Any]) -> None:
    found = bad(TEXT | fields)
    assert (found.reason, found.unread) == ("unread_content", tuple(fields))


@pytest.mark.parametrize(
    "fields",
    [
        *({"winner": word} for word in ("chosen", "good", "", None)),
        *({name: False} for name in ("tie", "is_tie", "rejected_is_better")),
        *({name: 2} for name in ("preference_strength", "overall_preference", "strength")),
        *({name: value} for name in ("label", "status", "outcome") for value in (0, 1, "math", "chosen")),
        *({name: "rejected"} for name in ("loser", "worse", "topic")),
        {"chosen_is_better": True},
        {"chosen_model": "a", "rejected_model": "b", "winner": "a"},
        {"tied_embeddings": True, "tie_breaker": 1, "signal_strength": -60, "agreement_strength": 0},
        {"less_preferred": "rejected"},
        {"chosen_votes": 0, "rejected_rank": 1, "preference": "strong", "is_better": "much"},
        {"verdict": "The chosen response has more facts than the rejected one, which is a tie breaker."},
    ],
    ids=str,
)
def test_other_fields_beside_a_pair_are_named_only(fields: dict[str, Any]) -> None:
    record = good(TEXT | fields)
    assert record.responses == ("good", "bad")
    assert set(record.unread) == {
        name for name in fields if fields[name] not in ("", None) and fields[name] is not False
    }


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        (AB, {"winner": "b"}),
        (AB, {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}),
        (ZERO_ONE, {"better_response_id": 1, "safer_response_id": 1}),
        (ONE_TWO, {"preference_strength": 2, "preference_statement": "x"}),
        (
            {
                "conversation_a": [user("q"), assistant("one text")],
                "conversation_b": [user("q"), assistant("another text")],
            },
            {"winner": "model_b"},
        ),
    ],
    ids=str,
)
def test_two_answers_may_stay_beside_the_pair_that_was_made_of_them(
    answers: dict[str, Any], verdict: dict[str, Any]
) -> None:
    sides = {
        "chosen": [user("q"), assistant("another text")],
        "rejected": [user("q"), assistant("one text")],
    }
    assert good(answers | verdict | sides).responses == SECOND
    turned = dict(zip(sides, reversed(sides.values()), strict=True))
    assert bad(answers | verdict | turned).reason in ("unread_content", "unread_verdict")


# Sources.
TEXTS = [
    (f"question {n}", f"a good answer {n}, with words", f"a bad answer {n}, with words") for n in range(24)
]


def table(folder: Path, names: str, verdicts: tuple[Any, Any]) -> str:
    """A table of questions, two answers, the good one in turn the first and the second, and a verdict."""
    file = folder / "table.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names.split())
        for at, (question, best, worst) in enumerate(TEXTS):
            writer.writerow([question, *((worst, best) if at % 2 else (best, worst)), verdicts[at % 2]])
    return str(file)


def check(source: SourceConfig) -> None:
    counts = DataCounts()
    for record in read_records(source):
        counts.add(record)
    counts.check(source.path, DataConfig(train=[source], max_bad_share=0.99))


def checked(source: SourceConfig) -> DataError:
    with pytest.raises(DataError) as raised:
        check(source)
    return raised.value


def are_right(source: SourceConfig) -> bool:
    pairs = [one.responses for one in read_records(source) if isinstance(one, PreferenceRecord)]
    return pairs == [(best, worst) for _, best, worst in TEXTS]


READERS = [
    ("question response_a response_b preference", ("0", "1")),
    ("prompt answer_1 answer_2 overall_preference", (-2, 2)),
    ("context response1 response2 overall_preference", (-2, 2)),
    ("prompt response_a response_b target", ("x", "y")),
    ("prompt answer_human answer_ai preferred", (1, 2)),
]


@pytest.mark.parametrize(("names", "verdicts"), READERS)
def test_the_reader_that_an_error_shows_works_when_its_values_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, verdicts: tuple[Any, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = SourceConfig(table(tmp_path, names, verdicts))
    remedy = checked(source).remedy
    [code] = re.findall(r"^def read\(record\):\n(?: {4}.+\n)+", remedy, re.MULTILINE)
    [columns] = re.findall(r"reader: verdicts:read(?:, columns: \{prompt: (\w+)\})?", remedy)
    source = SourceConfig(
        source.path, reader="verdicts:read", columns={"prompt": columns} if columns else None
    )
    # Without the values it reads nothing.
    (tmp_path / "verdicts.py").write_text(code)
    assert all(isinstance(record, BadRecord) for record in read_records(source))
    code = code.replace("VALUE_1", str(verdicts[0])).replace("VALUE_2", str(verdicts[1]))
    (tmp_path / "verdicts.py").write_text(code.replace("COLUMN", names.rsplit(maxsplit=1)[-1]))
    find_function.cache_clear()
    assert are_right(source)


@pytest.mark.parametrize(
    ("names", "verdicts"),
    [
        ("input output_1 output_2 label", (1, 2)),
        ("prompt response_a response_b winner", ("model_a", "model_b")),
        ("prompt answer_human answer_ai preference", ("human", "ai")),
        ("prompt response_0 response_1 better_response_id", (0, 1)),
    ],
)
def test_a_table_with_a_verdict_is_read_without_columns(
    tmp_path: Path, names: str, verdicts: tuple[Any, Any]
) -> None:
    assert are_right(SourceConfig(table(tmp_path, names, verdicts)))


@pytest.mark.parametrize(
    ("names", "verdicts"),
    [
        ("prompt response_a response_b winner", ("A", "B")),
        ("prompt response_a response_b pick", ("response_a", "response_b")),
        ("prompt response_1 response_2 label", (0, 1)),
        ("prompt answer_human answer_ai preference", ("human", "ai")),
        ("prompt output_1 output_2 preference_strength", (-2, 2)),
    ],
)
def test_columns_take_no_verdict_for_an_answer_nor_leave_it_out(
    tmp_path: Path, names: str, verdicts: tuple[Any, Any]
) -> None:
    path = table(tmp_path, names, verdicts)
    prompt, first, second, verdict = names.split()
    for chosen, rejected in ((verdict, second), (first, verdict)):
        error = checked(SourceConfig(path, columns={"chosen": chosen, "rejected": rejected}))
        assert "a few short values that repeat" in str(error)
    answers: dict[str, str | None] = {"chosen": first, "rejected": second}
    for columns in (answers, answers | {"prompt": prompt, "*": None}):
        error = checked(SourceConfig(path, columns=columns))
        assert "unread_verdict" in str(error)
        assert not re.search(r"(chosen|rejected): ", error.remedy.partition("data.train")[2])
    # It is ignored only by its name.
    [*ignored] = read_records(SourceConfig(path, columns=answers | {verdict: None}))
    assert all(isinstance(record, PreferenceRecord) for record in ignored)


def test_short_responses_on_both_sides_are_no_verdicts(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "best": "ab"[n % 2], "worst": "ba"[n % 2]} for n in range(24)]
    columns: dict[str, str | None] = {"chosen": "best", "rejected": "worst"}
    assert good(TEXT | {"chosen": "A", "rejected": "B"}).responses == ("A", "B")
    for record in read_records(SourceConfig(jsonl(tmp_path, *rows), columns=columns)):
        assert isinstance(record, PreferenceRecord)


def test_one_verdict_that_is_not_read_is_an_error_of_the_source(tmp_path: Path) -> None:
    """Of 0, 1 and 2 beside answers 1 and 2, 1 may be the first or the second."""
    rows = [ONE_TWO | {"label": 1 + n % 2} for n in range(99)]
    assert "unread_verdict 1" in str(checked(SourceConfig(jsonl(tmp_path, *rows, ONE_TWO | {"label": 0}))))
    path = jsonl(tmp_path, *rows, ONE_TWO | {"label": "tie"})
    check(SourceConfig(path))


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        ("prompt response accepted", "{prompt: prompt, completion: response, label: accepted}"),
        *(
            (f"prompt answer is_{word}", f"{{prompt: prompt, completion: answer, label: is_{word}}}")
            for word in ("acceptable", "approved", "correct", "good", "helpful", "preferred")
        ),
        ("prompt answer_1 answer_2 answer_3 target", "{prompt: prompt, chosen: COLUMN, rejected: COLUMN}"),
        ("prompt winner other", "{prompt: prompt, chosen: COLUMN, rejected: COLUMN}"),
        (
            "prompt response_1 response_2 response_3 best",
            "{prompt: prompt, chosen: COLUMN, rejected: COLUMN}",
        ),
        ("orig_instruction orig_response_A orig_response_B orig_preference", "{prompt: orig_instruction}"),
    ],
)
def test_a_remedy_names_no_verdict_as_a_response(tmp_path: Path, names: str, columns: str) -> None:
    rows = [dict(zip(names.split(), ["q", *map(str, range(8))], strict=False)) for n in range(4)]
    rows = [row | {names.rsplit(maxsplit=1)[-1]: ["true", "false"][n % 2]} for n, row in enumerate(rows)]
    if "orig" in names:
        rows = [row | {"orig_preference": "A"} for row in rows]
    assert f"columns: {columns}" in checked(SourceConfig(jsonl(tmp_path, *rows))).remedy


def test_remedies_for_what_is_not_read_lose_no_response(tmp_path: Path) -> None:
    parts = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    in_message = {"prompt": [user("q")], "chosen": [parts], "rejected": "no"}
    for record, expected in (
        (in_message, None),
        (TEXT | {"winner": "rejected"}, "columns: {winner: null}"),
        (TEXT | {"completion": "z"}, "columns: {completion: null}"),
        ({"messages": [user("q"), assistant("other")], "chosen": "good", "rejected": "bad"}, None),
    ):
        remedy = checked(SourceConfig(jsonl(tmp_path, *[record] * 3))).remedy
        assert expected in remedy if expected else "null" not in remedy
    same = {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]}
    assert "columns" not in checked(SourceConfig(jsonl(tmp_path, *[same] * 3))).remedy


def test_a_dropped_verdict_leaves_the_prompt(tmp_path: Path) -> None:
    [found] = DataSource(SourceConfig(jsonl(tmp_path, json.loads(json.dumps(AB | {"winner": 1}))))).prompts()
    assert isinstance(found, PreferenceRecord)
    assert found.prompt == "q"
