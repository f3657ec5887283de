"""Other names of the fields of records: `columns`, `reader`, LLaMA-Factory's dataset_info.json."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.config import DataConfig, DataFormat, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.columns import resolve_source
from dpo_dist.data.read.sources import DataSource, source_labels
from dpo_dist.data.records import BadRecord, Message, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.user_code import find_function
from tests.support.cache import prepare
from tests.support.pages import ROOT
from tests.support.records import TEXT, assistant, jsonl, user

NESTED = {"task": "q", "answers": {"good": "yes", "bad": ["no", "never"]}, "id": 7}
COLUMNS = {"prompt": "task", "chosen": "answers.good", "rejected": "answers.bad.1"}
WHOLE = {"record": "inner"}
PAGE = (ROOT / "docs" / "data.md").read_text()


def read(path: str | Path, **options: Any) -> list[PreferenceRecord | BadRecord]:
    return list(read_records(SourceConfig(path=str(path), **options)))


def good(path: str | Path, **options: Any) -> PreferenceRecord:
    found = read(path, **options)[0]
    assert isinstance(found, PreferenceRecord), found
    return found


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (NESTED, COLUMNS),
        (NESTED | {"answers": json.dumps(NESTED["answers"])}, COLUMNS),
        (NESTED, COLUMNS | {"rejected": "answers.bad.-1"}),
        (NESTED | {"prompt": "another"}, COLUMNS),
        (NESTED | {"answers.good": "yes", "answers": {"good": "", "bad": ["", "never"]}}, COLUMNS),
        ({"prompt": "yes", "chosen": "q", "rejected": "never"}, {"prompt": "chosen", "chosen": "prompt"}),
        ({"inner": {"prompt": "q", "chosen": "yes", "rejected": "never"}, "id": 3}, WHOLE),
        ({"inner": {"prompt": 1, "chosen": "yes", "rejected": "never"}, "t": "q"}, WHOLE | {"prompt": "t"}),
        (NESTED | {"images": ["a.png"], "completion": "maybe"}, COLUMNS | {"*": None}),
    ],
)
def test_fields_are_read_from_the_columns_given(tmp_path: Path, record: Any, columns: Any) -> None:
    found = good(jsonl(tmp_path, record), columns=columns)
    assert (found.prompt, found.responses) == ("q", ("yes", "never"))


def test_preferences_of_openai_are_read_with_and_without_columns(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    record = {
        "input": {
            "messages": [{"role": "user", "content": "q"}],
            "tools": tools,
            "parallel_tool_calls": True,
        },
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "never"}],
    }
    columns = {"prompt": "input.messages", "tools": "input.tools"}
    columns |= {"chosen": "preferred_output", "rejected": "non_preferred_output"}
    found, named = good(file := jsonl(tmp_path, record)), good(file, columns=columns)
    assert found == replace(named, unread=("parallel_tool_calls",))
    assert (found.tools, found.responses) == (tuple(tools), ("yes", "never"))


@pytest.mark.parametrize(
    ("columns", "names"),
    [({"promt": "task"}, ("promt", "chosen")), ({"*": "task"}, ("columns.*",))],
)
def test_unknown_names_are_errors(tmp_path: Path, columns: Any, names: tuple[str, ...]) -> None:
    source = SourceConfig(path=jsonl(tmp_path, NESTED), columns=columns)
    for check in (lambda source: DataSource(source).check(), read_records):
        with pytest.raises(ConfigError) as raised:
            check(source)
        assert all(name in str(raised.value) for name in names), raised.value


def test_columns_that_others_replace_or_leave_out_are_named(tmp_path: Path) -> None:
    given = NESTED | {"prompt": "another", "images": ["a.png"], "history": []}
    path, columns = jsonl(tmp_path, given), COLUMNS
    assert good(path, columns=columns | {"images": None}).unread == ("id", "prompt")
    assert good(path, columns=columns | {"images": None, "*": None}).unread == ("id", "prompt")
    assert good(path, columns=columns | {"*": None}).unread == ("id", "prompt", "images")


def test_a_column_that_no_record_has_is_an_error_with_the_columns_seen(tmp_path: Path) -> None:
    path = jsonl(tmp_path, NESTED, NESTED)
    for limit in (None, 1):
        columns = COLUMNS | {"system": "system_text", "chosen": "answer.good"}
        with pytest.raises(DataError) as raised:
            read(path, columns=columns, limit=limit)
        for words in ("answer.good, system_text", "task, answers, id"):
            assert words in str(raised.value)


RARE, OTHER = NESTED | {"style": "be kind"}, {"prompt": "q", "good": "yes", "bad": "no"}


def test_a_column_of_rare_records_may_come_late_but_not_one_that_every_record_needs(tmp_path: Path) -> None:
    late = read(jsonl(tmp_path, *[NESTED] * 21, RARE), columns=COLUMNS | {"system": "style"})
    assert [one.prompt == "q" for one in late if isinstance(one, PreferenceRecord)] == [True] * 21 + [False]
    with pytest.raises(DataError, match="none of the first 20 records has a column"):
        read(jsonl(tmp_path, *[OTHER] * 21, NESTED), columns=COLUMNS)
    # Empty ones say nothing of the columns.
    assert isinstance(read(jsonl(tmp_path, *[{}] * 21, NESTED), columns=COLUMNS)[-1], PreferenceRecord)


@pytest.mark.parametrize(("path", "record"), [("2", [1, 2]), ("-3", [1, 2]), ("a", [1]), ("0", "text")])
def test_a_record_without_the_value_at_a_path_is_bad(tmp_path: Path, path: str, record: Any) -> None:
    rows = [NESTED | {"answers": {"good": "yes", "bad": bad}} for bad in (record, ["no"] * 3, {"a": "no"})]
    first, *others = read(jsonl(tmp_path, *rows), columns=COLUMNS | {"rejected": f"answers.bad.{path}"})
    assert isinstance(first, BadRecord)
    assert (first.reason, first.detail) == ("missing_field", "rejected")
    assert any(isinstance(one, PreferenceRecord) for one in others)


def test_a_column_with_the_whole_record_must_be_an_object(tmp_path: Path) -> None:
    whole = {"inner": {"prompt": "q", "chosen": "yes", "rejected": "never"}}
    first, second = read(jsonl(tmp_path, {"inner": "text"}, whole), columns=WHOLE)
    assert isinstance(first, BadRecord)
    assert (first.reason, first.detail) == ("missing_field", "inner is not an object")
    assert isinstance(second, PreferenceRecord)


def test_a_field_outside_of_the_whole_record_is_not_silently_another_one(tmp_path: Path) -> None:
    inner = {"prompt": "q", "chosen": "yes", "rejected": "never", "id": 1}
    rows = [
        {"inner": inner, **outer}
        for outer in ({"system": "be kind"}, {"prompt": "q", "id": 2}, {"prompt": "x"})
    ]
    *read_ones, twice = read(jsonl(tmp_path, *rows), columns=WHOLE)
    assert all(isinstance(one, PreferenceRecord) for one in read_ones)
    assert isinstance(twice, BadRecord)
    assert (twice.reason, twice.detail) == ("ambiguous_format", "beside inner and inside it: prompt")


def test_scores_beside_a_column_inside_of_the_metadata_are_read(tmp_path: Path) -> None:
    metadata = {"task": "q", "score_chosen": 4, "score_rejected": 1}
    path = jsonl(tmp_path, {"metadata": metadata, "chosen": "yes", "rejected": "no"})
    assert good(path, columns={"prompt": "metadata.task"}).scores == (4.0, 1.0)


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
    source = SourceConfig(jsonl(tmp_path, *rows, 3), reader="readers:safer", columns={"system": "style"})
    with pytest.raises(DataError, match="no record has a column"):
        list(read_records(source))
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
        assert record.unread == ("images", "system")
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
    columns = {"instruction": "q", "input": "more", "chosen": "good", "rejected": "bad", "*": None}
    part: dict[str, Any] = {"name": "en", "data_dir": "data", "split": "test", "revision": "v1"}
    expected = SourceConfig("org/pairs", columns=columns, weight=0.5, **part)
    assert resolve_source(SourceConfig(path=str(tmp_path), name="mine", weight=0.5)) == expected


@pytest.mark.parametrize(
    ("entry", "options", "words"),
    [
        ({}, {"name": "mime"}, ("mime", "mine, other", "name: ENTRY")),
        ({}, {"format": DataFormat.text, "split": "test"}, ("format of the source, split of the source",)),
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
    ("names", "columns"),
    [
        ("question good bad", "{prompt: question, chosen: good, rejected: bad}"),
        ("Id user_query best_answer worst_answer", None),
        (
            "non_preferred question preferred",
            "{prompt: question, chosen: preferred, rejected: non_preferred}",
        ),
        ("instruction_text reply thumb", "{prompt: instruction_text, completion: reply, label: thumb}"),
        ("a b c", "{prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}"),
        (
            "image_id question img_path good bad",
            "{prompt: question, chosen: good, rejected: bad, images: img_path}",
        ),
        ("image ask good bad", "{prompt: COLUMN, chosen: good, rejected: bad, images: image}"),
    ],
)
@pytest.mark.parametrize("key", ["train", "eval"])
def test_the_remedy_is_the_source_with_its_columns(
    tmp_path: Path, names: str, columns: str | None, key: str
) -> None:
    file, header = tmp_path / "other.csv", names.split()
    file.write_text("\n".join([",".join(header), *[",".join(["1"] * (len(header) - 1) + ["0"])] * 3]))
    source = SourceConfig(str(file))
    with pytest.raises(DataError) as raised:
        DataSource(source).check(DataConfig(**{key: [source]}))
    word = shlex.split(raised.value.remedy.removeprefix("write ").partition(";")[0])[0]
    assert columns is None or columns in word
    if "COLUMN" not in word:
        [named] = getattr(load_run_config(["model.path=m", "data.train=[x]", word]).data, key)
        assert all(isinstance(record, PreferenceRecord) for record in read_records(named))
    with pytest.raises(DataError, match=f"write the source as .*path: {file}, columns"):
        DataSource(source).check(DataConfig(train=[source, SourceConfig("another.jsonl")]))


def test_the_remedy_for_conversations_inside_of_objects_reads_them(tmp_path: Path) -> None:
    sides = {
        side: {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": side}]}
        for side in ("chosen", "rejected")
    }
    (file := tmp_path / "nested.jsonl").write_text(f"{json.dumps(sides)}\n")
    with pytest.raises(DataError) as raised:
        DataSource(SourceConfig(str(file))).check(DataConfig(train=[SourceConfig(str(file))]))
    word = shlex.split(raised.value.remedy.removeprefix("write ").partition(";")[0])[0]
    [named] = load_run_config(["model.path=m", word]).data.train
    assert all(isinstance(record, PreferenceRecord) for record in read_records(named))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "response": "a", "score": 4},
        {"question": "q", "answer": "a", "overall_rating": 0.5},
        {"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 3},
        {"prompt": "q", "answer": "a", "chosen_score": 4, "rejected_score": 1},
        {"prompt": "q", "chosen": "a", "score_chosen": 4},
        {"prompt": "q", "responses": ["a"], "scores": [4]},
        {"prompt": "q", "responses": [{"content": "a", "score": 4}]},
    ],
)
def test_one_response_with_a_score_needs_the_others_or_a_label(tmp_path: Path, record: Any) -> None:
    source = SourceConfig(jsonl(tmp_path, *[record] * 3))
    with pytest.raises(DataError) as raised:
        DataSource(source).check(DataConfig(train=[source]))
    remedy = raised.value.remedy
    assert "responses: [{content: TEXT, score: NUMBER}, ...]" in remedy
    assert "reader" in remedy
    assert "loss=kto" in remedy
    assert not re.search(r"(chosen|rejected|completion): (?!COLUMN)", remedy), remedy


def test_the_ways_for_one_response_with_a_score_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [returned] = re.findall(r'`(return \{"prompt"[^`]*)`', PAGE)
    (tmp_path / "thresholds.py").write_text(f"def label(record):\n    {' '.join(returned.split())}\n")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "q", "response": "a", "score": score} for score in (4, 1)]
    read_rows = read(jsonl(tmp_path, *rows), reader="thresholds:label")
    assert [one.scores for one in read_rows if isinstance(one, PreferenceRecord)] == [(1,), (0,)]
    responses = [{"content": "bad", "score": 1}, {"content": "good", "score": 4}]
    assert good(jsonl(tmp_path, {"prompt": "q", "responses": responses})).responses == ("good", "bad")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("table.xlsx", "the file does not exist"),
        ("notes.tsv.zip", "the file does not exist"),
        ("all.json", "did you mean .*all.jsonl"),
        ("all.jsonl all.jsonl", r"did you mean all.jsonl,all.jsonl\?"),
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
