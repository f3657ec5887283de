"""Fields that a source declares, its reader, and LLaMA-Factory's dataset_info.json."""

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.counts import DataCounts
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.dataset_info import resolve_source
from dpo_dist.data.read.sources import DataSource, source_labels
from dpo_dist.data.records import NOT_KEPT, BadRecord, Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.user_code import find_function
from tests.support.cache import prepare
from tests.support.pages import ROOT
from tests.support.records import TEXT, assistant, jsonl, user

NESTED = {"task": "q", "answers": {"good": "yes", "bad": ["no", "never"]}, "id": 7}
FIELDS = {"prompt": "task", "chosen": "answers.good", "rejected": "answers.bad[1]"}
OF_LIST = {"prompt": "task", "responses": "answers.bad"}
DUEL = {"q": "q", "a": "yes", "b": "never"}
VERDICT = {"prompt": "q", "pair": "{'A': [a, b], 'B': [b, a]}[w]", "keep": "w != 'tie'"}
PAGE = (ROOT / "docs" / "data.md").read_text()


def read(path: str | Path, **options: Any) -> list[PreferenceRecord | BadRecord]:
    return list(read_records(SourceConfig(path=str(path), **options)))


def good(path: str | Path, **options: Any) -> PreferenceRecord:
    found = read(path, **options)[0]
    assert isinstance(found, PreferenceRecord), found
    return found


def refusal(path: str | Path, **options: Any) -> DataError:
    """Return the error of a source none of whose first records can be read."""
    with pytest.raises(DataError) as raised:
        read(path, **options)
    return raised.value


VERDICT_TO_COMPLETE = r'"{\"VALUE_1\": [FIRST, SECOND], \"VALUE_2\": [SECOND, FIRST]}[VERDICT]"'


def lines_of(error: DataError) -> list[SourceConfig]:
    """Return the sources that an error writes, as a shell and the configuration read them."""
    completed = error.remedy.replace(VERDICT_TO_COMPLETE, '"[chosen, rejected]"')
    completed = completed.replace(r'"VERDICT != \"TIE\""', '"true"').replace(
        "COLUMN|selectattr", "messages|selectattr"
    )
    completed = completed.replace("KEY", "chosen").replace("GOOD)", "true)").replace("BAD)", "false)")
    words = [shlex.split(f"data.train={rest}")[0] for rest in completed.split("data.train=")[1:]]
    return [load_run_config(["model.path=m", word.removesuffix(";")]).data.train[0] for word in words]


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (NESTED, FIELDS),
        (
            NESTED | {"answers": json.dumps(NESTED["answers"])},
            FIELDS | {"chosen": "(answers|fromjson).good", "rejected": "(answers|fromjson).bad[-1]"},
        ),
        (NESTED | {"prompt": ""}, FIELDS),
        (
            {"a b": "q", "chosen": "yes", "rejected": "never"},
            {"prompt": "row['a b']", "chosen": "chosen", "rejected": "rejected"},
        ),
        (DUEL | {"w": "A"}, VERDICT),
        (DUEL | {"w": 1}, VERDICT | {"pair": "{1: [a, b], 2: [b, a]}[w]", "keep": "w in [1, 2]"}),
        (
            {"q": "q", "list": ["never", "yes"], "n": ["1", "2"]},
            {"prompt": "q", "responses": "list", "scores": "n|map('number')"},
        ),
        (
            {"q": "q", "list": ["never", "yes"], "n": [2, 1]},
            {"prompt": "q", "responses": "list", "ranks": "n"},
        ),
        ({"q": "q", "list": ["yes", "never"]}, {"prompt": "q", "responses": "list", "best_first": True}),
    ],
)
def test_fields_are_expressions_over_the_columns(tmp_path: Path, record: Any, fields: Any) -> None:
    found = good(jsonl(tmp_path, record), fields=fields)
    assert (found.prompt, found.responses) == ("q", ("yes", "never"))


def test_a_verdict_that_is_not_in_the_look_up_is_an_error_of_its_record(tmp_path: Path) -> None:
    words = ["A", "B", "tie", "both", None]
    path = jsonl(tmp_path, *(DUEL | {"w": word} for word in words))
    first, second, *others = read(path, fields=VERDICT)
    assert isinstance(first, PreferenceRecord)
    assert isinstance(second, PreferenceRecord)
    assert (first.responses, second.responses) == (("yes", "never"), ("never", "yes"))
    assert [one.reason for one in others if isinstance(one, BadRecord)] == [
        NOT_KEPT,
        "expression_failed",
        "expression_failed",
    ]
    assert "nothing for the text both" in str(others[1])


def test_a_record_that_is_not_kept_is_no_bad_one(tmp_path: Path) -> None:
    source = SourceConfig(
        jsonl(tmp_path, *(DUEL | {"w": "tie" if n % 3 else "A"} for n in range(30))), fields=VERDICT
    )
    counts = DataCounts()
    for record in read_records(source):
        counts.add(record)
    counts.check(source.path, DataConfig(max_bad_share=0))
    assert (counts.kept, counts.dropped, counts.examples) == (10, {NOT_KEPT: 20}, [])
    counts.add(BadRecord("missing_field", Origin("a", 1)))
    with pytest.raises(DataError, match="1 of 31 records cannot be used") as raised:
        counts.check(source.path, DataConfig(max_bad_share=0.05))
    assert "left out" not in raised.value.remedy
    assert "neither true nor false" in refusal(source.path, fields=VERDICT | {"keep": "w"}).message
    # Sorted data may begin with ties: whether any is kept is known at the end.
    none = SourceConfig(source.path, fields=VERDICT | {"keep": "w == 'C'"})
    with pytest.raises(DataError, match="30 of 30 records cannot be used"):
        DataSource(none).check(DataConfig())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"promt": "task", "chosen": "task", "rejected": "task"}, "fields do not say"),
        ({"prompt": "task", "chosen": "task"}, "chosen and rejected"),
        (FIELDS | {"completion": "task"}, "pair | chosen and rejected"),
        (FIELDS | {"label": "id"}, "label with completion"),
        (FIELDS | {"ranks": "id"}, "ranks or best_first"),
        (FIELDS | {"best_first": True}, "with responses"),
        ({"prompt": "task", "completion": "task", "scores": "id"}, "scores with a pair"),
        (OF_LIST | {"scores": "id", "ranks": "id"}, "scores, ranks or"),
        (OF_LIST | {"scores": "id", "best_first": True}, "scores, ranks or"),
        (OF_LIST | {"best_first": False}, "best_first: true"),
        (OF_LIST | {"best_first": "'false'"}, "best_first: true"),
        (OF_LIST | {"best_first": "id"}, "best_first: true"),
        (FIELDS | {"form": "texts"}, "text | dialogue | implicit"),
        (FIELDS | {"keys": "a"}, "keys: [KEY]"),
        (FIELDS | {"chosen": "answers.good if"}, "chosen: answers.good if"),
        (FIELDS | {"chosen": "answers.good()"}, "there is no Call in an expression"),
        (FIELDS | {"chosen": "answers.good|upper"}, "there are only"),
        ("pairs", "fields names no known shape"),
    ],
)
def test_wrong_fields_are_an_error_at_the_start(tmp_path: Path, fields: Any, words: str) -> None:
    source = SourceConfig(path=jsonl(tmp_path, NESTED), fields=fields)
    for check in (lambda: DataSource(source).check(), lambda: list(read_records(source))):
        with pytest.raises(ConfigError) as raised:
            check()
        assert words in str(raised.value), raised.value


def test_a_column_that_no_record_has_is_an_error_with_the_columns_seen(tmp_path: Path) -> None:
    path = jsonl(tmp_path, NESTED, NESTED)
    for fields in (FIELDS | {"system": "style"}, "hh"):
        error = refusal(path, fields=fields)
        assert "task, answers, id" in error.expected
    assert len(read(path, fields=FIELDS | {"system": "style|default(none)"})) == 2
    # Empty records say nothing of the columns.
    late = read(jsonl(tmp_path, *[{}] * 5, *[NESTED] * 20), fields=FIELDS)
    assert isinstance(late[-1], PreferenceRecord)


def test_a_csv_with_strange_names_is_read_from_its_error_alone(tmp_path: Path) -> None:
    rows = "".join(f"frage {n},gut {n},schlecht {n},{'AB'[n % 2]}\n" for n in range(8))
    (file := tmp_path / "werte.csv").write_text(
        f"Frage,die gute,die-schlechte,Wahl\n{rows}", encoding="utf-8"
    )
    error = refusal(file)
    assert error.message == "the columns are none of the known shapes: say what they mean"
    assert error.got.splitlines()[1:] == [
        "    Frage: text",
        '    "row[\\"die gute\\"]": text',
        '    "row[\\"die-schlechte\\"]": text',
        "    Wahl: text (A, B)",
    ]
    line = error.remedy.split("data.train=")[1].splitlines()[0]
    for column in error.got.splitlines()[1:4]:
        line = line.replace("COLUMN", column.strip().removesuffix(": text"), 1)
    [source] = load_run_config(["model.path=m", shlex.split(f"data.train={line}")[0]]).data.train
    first = good(file, fields=source.fields)
    assert (first.prompt, first.responses, first.unread) == (
        "frage 0",
        ("gut 0", "schlecht 0"),
        ("Wahl (A, B)",),
    )


TURNS = [user("q"), assistant("yes")]
ADMIN = {"role": "admin", "content": "x"}
WHOLE = {"chosen": TURNS, "rejected": [user("q"), assistant("no")]}
CALLED = user("q") | {"functions": "f", "function_calls": "f()"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": json.dumps([user("q")]), "chosen": "yes", "rejected": "no"}, "spelled_messages"),
    ({"prompt": str([user("q")]), "chosen": "yes", "rejected": "no"}, "spelled_messages"),
    # A role and a content, which are no turn of this conversation: a text.
    ({"prompt": "q", "chosen": json.dumps([ADMIN]), "rejected": "no"}, "spelled_messages"),
    ({"prompt": "q", "completion": "yes", "label": "GOOD"}, "unknown_label"),
    (TEXT | {"winner": "a"}, "unread_column"),
    (TEXT | {"label": "x", "better": 1}, "unread_column"),
    ({"messages": [user("q") | {"mood": 1}, assistant("yes") | {"time": 2}]}, "unknown_key"),
    (
        {"messages": [user("q"), assistant("no") | {"chosen": False}, assistant("yes") | {"chosen": True}]},
        "unknown_key",
    ),
    # Beside columns that the shape ignores, and with keys that it gives to the template.
    (WHOLE | {"prompt": "q", "prompt_id": "1", "messages": TURNS, "winner": "x"}, "unread_column"),
    (
        {"chosen": [CALLED, assistant("yes")], "rejected": [CALLED, assistant("no")], "winner": "x"},
        "unread_column",
    ),
    # The same names and texts in other forms.
    (TEXT | {"Winner": "a"}, "unread_column"),
    (TEXT | {"labels": 1, "isTie": False, "Chosen-Response": "x"}, "unread_column"),
    ({"question": json.dumps([user("q")]), "chosen": "yes", "rejected": "no"}, "spelled_messages"),
    ({"prompt": json.dumps([user("q" * 999)], indent=2), "chosen": "a", "rejected": "b"}, "spelled_messages"),
    ({"prompt": str([{"content": "q" * 999, "role": "user"}]), "completion": "yes"}, "spelled_messages"),
    # A verdict in place of an answer.
    (DUEL | {"prompt": "q", "chosen": "A", "rejected": "B"}, "unread_column"),
    ({"prompt": "q", "answer_a": "yes", "answerB": "no", "chosen": "A", "rejected": "B"}, "unread_column"),
    ({"prompt": "q", "answer1": "yes", "answer2": "no", "chosen": "2", "rejected": "1"}, "unread_column"),
    ({"prompt": "q", "model_a": "x", "model_b": "y", "chosen": "model_b", "rejected": "-"}, "unread_column"),
    ({"prompt": "q", "answer_a": "x", "answer_b": "y", "completion": "1"}, "unread_column"),
    # A key of listed responses.
    (
        {"prompt": "q", "responses": [{"content": n, "score": int(n), "Rank": 1} for n in "12"]},
        "unread_column",
    ),
]


def is_read(source: SourceConfig) -> bool:
    with contextlib.suppress(DataError):
        return all(isinstance(one, PreferenceRecord) for one in read_records(source))
    return False


@pytest.mark.parametrize(("record", "reason"), REFUSED)
def test_the_lines_of_an_error_read_the_source(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    error = refusal(jsonl(tmp_path, *[record] * 3), limit=2)
    assert reason in error.message
    assert "yes" not in str(error)
    sources = lines_of(error)
    if reason != "spelled_messages":  # which are messages or texts
        sources = sources[:1]
    assert all(source.limit == 2 for source in sources)
    assert any(map(is_read, sources))


@pytest.mark.parametrize(
    "name", ["label", "ranks", "best_first", "responses", "pair", "completion", "scores"]
)
def test_an_error_does_not_propose_to_read_another_order(tmp_path: Path, name: str) -> None:
    error = refusal(jsonl(tmp_path, *[TEXT | {name: ["bad", "good"], "margin": 1}] * 3), fields="pair")
    assert lines_of(error)[-1].fields == "pair"
    assert name not in str([source.fields for source in lines_of(error)][:-1]).replace("pair", "")
    other = refusal(jsonl(tmp_path, *[TEXT | {"images": [], name: [1]}] * 3), fields="text")
    assert lines_of(other)[-1].fields == "text"


def test_the_first_line_of_an_error_declares_and_the_last_one_ignores(tmp_path: Path) -> None:
    rows = [TEXT | {"winner": ["chosen", "rejected"][n % 2]} for n in range(6)]
    verdict, ignored = lines_of(refusal(jsonl(tmp_path, *rows)))
    assert verdict.fields == {
        "prompt": "prompt",
        "pair": "[chosen, rejected]",
        "keep": "true",
    }
    assert ignored.ignore == ["winner"]
    candidates = [user("q"), assistant("no") | {"chosen": False}, assistant("yes") | {"chosen": True}]
    first, *_ = lines_of(refusal(jsonl(tmp_path, {"messages": candidates})))
    assert good(first.path, fields=first.fields, ignore=first.ignore).responses == ("yes", "no")


def test_a_tie_among_the_first_records_hides_no_fault_of_the_source(tmp_path: Path) -> None:
    rows = [{"q": "q", "a": ["yes", "no"], "s": scores, "label": 1} for scores in ([1, 2], [2, 2])]
    fields = {"prompt": "q", "responses": "a", "scores": "s"}
    assert "unread_column (label)" in refusal(jsonl(tmp_path, *rows), fields=fields).message
    kept = refusal(jsonl(tmp_path, *rows), fields=fields | {"keep": "s[0] == 1"})
    assert "unread_column (label)" in kept.message


def test_a_side_of_nulls_makes_no_single_responses(tmp_path: Path) -> None:
    row = {"messages": [user("q"), assistant("yes")], "rejected_response": None}
    error = refusal(jsonl(tmp_path, row, row))
    assert "rejected_response has no value" in error.message
    [line] = lines_of(error)
    assert line.ignore == ["rejected_response"]
    assert good(line.path, ignore=line.ignore).responses == ("yes",)
    assert len([*DataSource(line.path).prompts()]) == 2
    one_pair = jsonl(tmp_path, row, row | {"rejected_response": "no"})
    assert [type(record).__name__ for record in read(one_pair)] == ["BadRecord", "PreferenceRecord"]


def test_a_line_of_an_error_keeps_the_form_of_the_shape(tmp_path: Path) -> None:
    dialogue = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " yes", "rejected": " no"}
    other, _ = lines_of(refusal(jsonl(tmp_path, *[dialogue | {"system": "Be kind."}] * 3)))
    assert isinstance(other.fields, dict)
    assert (other.fields["system"], other.fields["form"]) == ("system", "dialogue")
    assert [turn.content for turn in good(other.path, fields=other.fields).prompt] == ["Be kind.", "q"]  # type: ignore[union-attr]


def test_columns_that_nothing_reads_are_named_with_their_few_values(tmp_path: Path) -> None:
    rows = [TEXT | {"prompt": f"q {n}", "id": n, "outcome": ["chosen", "rejected"][n % 2]} for n in range(9)]
    path = jsonl(tmp_path, *rows)
    assert {one.unread for one in read(path) if isinstance(one, PreferenceRecord)} == {
        ("id", "outcome (chosen, rejected)")
    }
    assert good(path, ignore=["id", "outcome"]).unread == ()
    assert good(path, ignore=["*"]).unread == ()
    late = read(jsonl(tmp_path, *[TEXT] * 20, TEXT | {"tie": True}, TEXT | {"more": 1}))
    assert [one.unread for one in late[-2:]] == [("tie",), ("more",)]
    assert isinstance(late[-2], BadRecord)


def test_a_short_answer_beside_a_column_without_neighbours_is_no_verdict(tmp_path: Path) -> None:
    """The column is the index that pandas writes."""
    record = TEXT | {"chosen": "4", "rejected": "0", "Unnamed: 0": 7}
    assert good(jsonl(tmp_path, record)).responses == ("4", "0")
    judged = {"q": "q", "a": "4", "b": "5", "w": "A", "model_a": "x", "model_b": "y"}
    assert good(jsonl(tmp_path, judged), fields=VERDICT).responses == ("4", "5")


def test_keys_of_listed_responses_that_nothing_reads_are_named(tmp_path: Path) -> None:
    listed = [{"content": "yes", "score": 2, "critique": "Fine.", "id": None}, {"content": "no", "score": 1}]
    path = jsonl(tmp_path, *[{"prompt": "q", "responses": listed}] * 5)
    assert good(path).unread == ("responses[].critique",)
    assert good(path, ignore=["responses[].critique"]).unread == ()


def test_messages_in_json_beside_a_text_have_no_line_that_would_be_refused(tmp_path: Path) -> None:
    spelled = {"prompt": "q", "chosen": json.dumps([assistant("yes")]), "rejected": "no"}
    remedy = refusal(jsonl(tmp_path, *[spelled] * 3)).remedy
    assert "train the texts as they are" in remedy
    assert "read the messages" not in remedy
    both = spelled | {"rejected": json.dumps([assistant("no")])}
    assert "read the messages" in refusal(jsonl(tmp_path, *[spelled, both, spelled])).remedy


def test_records_of_several_shapes_are_refused_with_the_key_of_the_source(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[TEXT] * 5, {"prompt": "q", "completion": "yes"}, *[TEXT] * 5)
    with pytest.raises(DataError, match="the columns have 2 known meanings") as raised:
        DataSource(SourceConfig(path), "data.eval").check()
    assert "one of these\n    data.eval='[{path:" in raised.value.remedy
    path = jsonl(tmp_path, *[TEXT] * 5, {"question": "q", "yes": "no"}, *[TEXT] * 5, TEXT | {"chosen": [1]})
    assert len(read(path)) == 12
    open_ended = {"messages": [user("q")]}
    path = jsonl(tmp_path, *[{"messages": [user("q"), assistant("yes")]}] * 5, open_ended)
    assert "none of the known shapes" in refusal(path).message


def test_a_column_that_is_ignored_must_be_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[TEXT | {"id": 1}] * 3)
    error = refusal(path, ignore=["ids", "id", "[].time"])
    assert (error.got, error.expected) == ("ids", "prompt, chosen, rejected, id")
    # An error about a later record may ask for this one.
    assert good(path, ignore=["id", "winner"]).unread == ()


def test_keys_of_messages_are_ignored_or_given_to_the_template_if_a_source_says_so(tmp_path: Path) -> None:
    turns = [user("q"), assistant("yes") | {"mood": "calm", "time": "noon", "tie": False}]
    path = jsonl(tmp_path, {"messages": turns})
    found = good(path, fields={"completion": "messages", "keys": ["mood"]}, ignore=["[].time", "[].tie"])
    assert found.responses == ((Message("assistant", "yes", {"mood": "calm"}),),)


def test_old_keys_of_a_source_are_one_error_with_the_line_to_write() -> None:
    old = "{path: a, columns: {prompt: q, chosen: a.0.text, rejected: a.-1, id: null}}"
    with pytest.raises(ConfigError) as raised:
        load_run_config(["model.path=m", f"data.train=[{old}]"])
    assert "fields: {prompt: question" in raised.value.remedy


def test_a_prompt_is_a_turn_or_what_an_expression_takes_in_its_place(tmp_path: Path) -> None:
    fields = {"prompt": "m if m is list else q|turn", "chosen": "a", "rejected": "b"}
    for messages in (None, [user("q")], [{"role": "user"}]):
        found = read(jsonl(tmp_path, DUEL | {"m": messages}, DUEL | {"m": [user("q")]}), fields=fields)
        assert [type(one) for one in found][1:] == [PreferenceRecord]


def test_a_reader_may_return_keys_that_are_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbering.py").write_text("def keys(record): return record | {3: 'x', 'chosen': 'A'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert good(jsonl(tmp_path, TEXT), reader="numbering:keys").unread == ("3",)


def test_a_reader_that_returns_no_record_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "returning.py").write_text("def texts(record): return [*record.values()]\n")
    monkeypatch.syspath_prepend(tmp_path)
    [found] = read(jsonl(tmp_path, TEXT), reader="returning:texts")
    assert isinstance(found, BadRecord)
    assert (found.reason, found.detail) == ("reader_failed", "reader returned a list")


def test_the_reader_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "readers.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "q", "response_0": "no", "response_1": "yes", "better_response_id": 1},
        {"prompt": "q"},
    ]
    source = SourceConfig(jsonl(tmp_path, *rows, 3), reader="readers:safer")
    first, *others = read(source.path, reader="readers:safer")
    assert isinstance(first, PreferenceRecord)
    assert (first.prompt, first.responses) == ("q", ("yes", "no"))
    assert [(one.reason, one.detail) for one in others if isinstance(one, BadRecord)] == [
        ("reader_failed", "reader raised KeyError"),
        ("unparsable", "a int instead of an object"),
    ]
    with pytest.raises(ConfigError, match="no attribute"):
        DataSource(SourceConfig(source.path, reader="readers:other")).check()


def test_another_reader_encodes_the_data_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = SourceConfig(jsonl(tmp_path, TEXT), reader="readers:one")
    folders = []
    for number in (1, 1, 2):
        find_function.cache_clear()
        (tmp_path / "readers.py").write_text(f"def one(record): return record | {{'prompt': '{number}'}}")
        folders.append(prepare(tmp_path, source))
    assert folders[0] == folders[1] != folders[2]


# Entries of LLaMA-Factory's dataset_info.json.
ENTRY = {"columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad"}, "ranking": True}
FILE = ENTRY | {"file_name": "records.jsonl"}
RECORD = {"q": "do", "more": "this", "good": "yes", "bad": "no", "images": ["no column"], "system": "unread"}


def registry(folder: Path, **entries: Any) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


def test_an_entry_names_file_and_columns(tmp_path: Path) -> None:
    jsonl(tmp_path, RECORD)
    folder = registry(tmp_path, mine=FILE)
    for path in (folder, folder / "dataset_info.json"):
        record = good(path, name="mine")
        assert (record.prompt, record.responses) == ((Message("user", "do\nthis"),), ("yes", "no"))
        assert record.unread == ()
        assert record.origin.source == str(tmp_path / "records.jsonl")
        trained = DataSource(SourceConfig(str(path), name="mine", limit=3)).pinned()
        assert (trained.path, trained.config.limit) == (record.origin.source, 3)
    assert source_labels([SourceConfig(str(folder), name="mine")]) == ["mine"]


@pytest.mark.parametrize(
    ("limit", "samples", "records"), [(2, 3, 2), (3, 2, 2), (None, 3, 3), (2, None, 2), (None, None, 4)]
)
def test_the_smaller_of_an_entrys_samples_and_the_limit_counts(
    tmp_path: Path, limit: int | None, samples: int | None, records: int
) -> None:
    jsonl(tmp_path, *[RECORD] * 4)
    folder = registry(tmp_path, mine=FILE | ({} if samples is None else {"num_samples": samples}))
    assert len(read(folder, name="mine", limit=limit)) == records


def test_an_entry_of_labelled_responses_of_one_response_or_of_the_split_train(tmp_path: Path) -> None:
    sides = {"chosen": "a", "rejected": "b"}
    jsonl(tmp_path, {"q": "do", "good": "yes", "ok": False, "instruction": "do", "output": "no"} | sides)
    labelled = {"columns": {"prompt": "q", "response": "good", "kto_tag": "ok"}, "split": "train"}
    of_one = {"ranking": False, "columns": None}
    for entry, responses, scores in ((labelled, ("yes",), (0.0,)), (of_one, ("no",), None)):
        registry(tmp_path, mine={"file_name": "records.jsonl"} | entry)
        record = good(tmp_path, name="mine")
        assert (record.prompt, record.responses) == ((Message("user", "do"),), responses)
        assert record.scores == scores


def test_turns_of_an_entry_have_its_tags(tmp_path: Path) -> None:
    sides = {"good": assistant("yes"), "bad": assistant("no")}
    jsonl(tmp_path, {"talk": [user("q")], **sides, "defs": '[{"name": "f"}]'})
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags |= {"system_tag": None}
    columns = {"messages": "talk", "chosen": "good", "rejected": "bad", "tools": "defs"}
    entry = {"file_name": "records.jsonl", "ranking": True, "columns": columns, "formatting": "sharegpt"}
    registry(tmp_path, mine=entry | {"tags": tags}, other=entry | {"formatting": "openai"})
    for name in ("mine", "other"):
        record = good(tmp_path, name=name)
        assert (record.prompt, record.responses) == ((Message("user", "q"),), ("yes", "no"))
        assert record.tools[0]["function"]["name"] == "f"


def test_an_entry_may_name_a_hub_dataset(tmp_path: Path) -> None:
    hub = {"hf_hub_url": "org/pairs", "ms_hub_url": "org/copy", "subset": "en", "folder": "data"}
    registry(tmp_path, mine=ENTRY | hub | {"split": "test", "revision": "v1"})
    part: dict[str, Any] = {"name": "en", "data_dir": "data", "split": "test", "revision": "v1"}
    resolved = resolve_source(SourceConfig(path=str(tmp_path), name="mine", weight=0.5))
    expected = SourceConfig("org/pairs", fields=resolved.fields, ignore=["*"], weight=0.5, **part)
    assert resolved == expected


def test_a_response_that_is_a_list_is_a_ranking_best_first(tmp_path: Path) -> None:
    jsonl(tmp_path, {"q": "do", "out": ["yes", "no"], "past": [["a", "b"]]})
    columns = {"prompt": "q", "response": "out", "history": "past"}
    registry(tmp_path, mine={"file_name": "records.jsonl", "ranking": True, "columns": columns})
    record = good(tmp_path, name="mine")
    assert ([turn.content for turn in record.prompt], record.responses) == (["a", "b", "do"], ("yes", "no"))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("entry", "options", "words"),
    [
        ({}, {"name": "mime"}, ("mime", "mine, other", "name: ENTRY")),
        ({}, {"fields": "text", "split": "test"}, ("fields of the source, split of the source",)),
        ({"formatting": "vicuna"}, {}, ("formatting vicuna",)),
        ({"columns": {"promt": "q"}}, {}, ("column promt",)),
        ({"columns": ["q"]}, {}, ("cannot be read",)),
        ({"num_samples": "many"}, {}, ("cannot be read", "many")),
        ({"tags": {"user_tag": "gpt", "assistant_tag": "gpt"}}, {}, ("got:      user_tag gpt\n", "reader")),
        ({"ranking": False}, {}, ('chosen without "ranking": true',)),
        ({"file_name": None, "script_url": "load.py"}, {}, ("script_url", "no file_name or hf_hub_url")),
    ],
)
def test_a_wrong_entry_is_an_error_at_the_start(
    tmp_path: Path, entry: Any, options: Any, words: tuple[str, ...]
) -> None:
    jsonl(tmp_path, RECORD)
    registry(tmp_path, mine=FILE | entry, other=FILE)
    with pytest.raises(ConfigError) as raised:
        DataSource(SourceConfig(**{"path": str(tmp_path), "name": "mine", **options})).check()
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_description_of_another_program_is_no_registry(tmp_path: Path) -> None:
    jsonl(tmp_path, TEXT)
    entries = [{"dataset_path": "a.jsonl", "columns": {"a": "query"}}]
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    # Without a name the folder is one of data files.
    assert len(read(tmp_path)) == 1
    for path, name in ((tmp_path, "a"), (tmp_path / "dataset_info.json", None)):
        with pytest.raises(ConfigError, match="dataset_info"):
            resolve_source(SourceConfig(path=str(path), name=name))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "response": "a", "score": 4},
        {"prompt": "q", "chosen": "a", "score_chosen": 4},
        {"prompt": "q", "responses": ["a"], "scores": [4]},
    ],
)
def test_one_response_with_a_score_becomes_a_label_by_the_line_to_complete(
    tmp_path: Path, record: Any
) -> None:
    path = jsonl(tmp_path, *[record] * 3)
    with pytest.raises(DataError) as raised:
        DataSource(SourceConfig(path)).check(DataConfig(train=[SourceConfig(path)]))
    assert "loss=kto" in raised.value.remedy
    fields = {"prompt": "prompt", "completion": "response", "label": "score >= 3"}
    rows = [{"prompt": "q", "response": "a", "score": score} for score in (4, 1)]
    found = read(jsonl(tmp_path, *rows), fields=fields)
    assert [one.scores for one in found if isinstance(one, PreferenceRecord)] == [(1,), (0,)]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("table.xlsx", "the file does not exist"),
        ("notes.tsv.zip", "the file does not exist"),
        ("all.json", "did you mean .*all.jsonl"),
        ("below/all.xlsx", "the file does not exist"),
        ("missing/all.jsonl", "no folder missing"),
    ],
)
def test_a_name_of_a_file_is_not_asked_of_the_hub(
    path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.jsonl").touch()
    (tmp_path / "below").mkdir()
    with pytest.raises(DataError, match=said):
        DataSource(SourceConfig(path)).files()
    for name in ("org/name-v1.5", "org/data.en-de", "org/cleaned.v2", "imdb"):
        assert DataSource(SourceConfig(name)).files() is None
