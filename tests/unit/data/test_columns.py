"""Sources whose records name their fields otherwise: `columns` and `tags`."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.load import load_run_config
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Message, PreferenceRecord
from dpo_dist.data.sources import check_source
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support.pages import ROOT
from tests.support.records import TEXT, assistant, jsonl, user

RECORD = {"task": "q", "answers": {"good": "yes", "bad": ["no", "never"]}, "id": 7}
COLUMNS = {"prompt": "task", "chosen": "answers.good", "rejected": "answers.bad.1"}


def read(folder: Path, record: Any, columns: Any, **options: Any) -> PreferenceRecord | BadRecord:
    [found] = read_records(SourceConfig(path=jsonl(folder, record), columns=columns, **options))
    return found


def good(folder: Path, record: Any, columns: Any, **options: Any) -> PreferenceRecord:
    found = read(folder, record, columns, **options)
    assert isinstance(found, PreferenceRecord), found
    return found


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (RECORD, COLUMNS),
        (RECORD | {"answers": json.dumps(RECORD["answers"])}, COLUMNS),
        (RECORD, COLUMNS | {"rejected": "answers.bad.-1"}),
        (RECORD | {"prompt": "another"}, COLUMNS),
        (RECORD | {"answers.good": "yes", "answers": {"good": "", "bad": ["", "never"]}}, COLUMNS),
        ({"prompt": "yes", "chosen": "q", "rejected": "never"}, {"prompt": "chosen", "chosen": "prompt"}),
        ({"inner": {"prompt": "q", "chosen": "yes", "rejected": "never"}, "id": 3}, {"record": "inner"}),
        (
            {"inner": {"task": 1, "chosen": "yes", "rejected": "never"}, "t": "q"},
            {"record": "inner", "prompt": "t"},
        ),
        (RECORD | {"images": ["a.png"]}, COLUMNS | {"images": None}),
        (RECORD | {"completion": "maybe"}, COLUMNS | {"completion": None}),
        (RECORD | {"images": ["a.png"], "completion": "maybe"}, COLUMNS | {"*": None}),
    ],
)
def test_fields_are_read_from_the_columns_given(tmp_path: Path, record: Any, columns: Any) -> None:
    found = good(tmp_path, record, columns)
    assert (found.prompt, found.responses) == ("q", ("yes", "never"))


def test_cells_of_a_table_may_be_json(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be kind"}, user("q")]
    row = {
        "talk": json.dumps(turns),
        "sides": json.dumps({"good": [assistant("yes")], "bad": [assistant("no")]}),
        "defs": json.dumps([{"name": "f"}]),
    }
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    columns = {"prompt": "talk", "chosen": "sides.good", "rejected": "sides.bad", "tools": "defs"}
    [found] = read_records(SourceConfig(path=str(tmp_path / "table.csv"), columns=columns))
    assert isinstance(found, PreferenceRecord)
    assert found.prompt == (Message("system", "be kind"), Message("user", "q"))
    assert (found.responses, found.tools[0]["function"]) == (("yes", "no"), {"name": "f"})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"columns": {"promt": "task"}}, ("promt", "chosen", "did you mean prompt")),
        ({"columns": {"prompt": 3}}, ("columns.prompt", "answers.good")),
        ({"columns": {"*": "task"}}, ("columns.*",)),
        ({"tags": {"role": "role"}}, ("role_tag",)),
        ({"tags": {"role_tag": None}}, ("tags.role_tag",)),
    ],
)
def test_unknown_names_are_errors_before_a_record_is_read(
    tmp_path: Path, options: Any, names: tuple[str, ...]
) -> None:
    source = SourceConfig(path=jsonl(tmp_path, RECORD), **options)
    for check in (check_source, read_records):
        with pytest.raises(ConfigError) as raised:
            check(source)
        assert all(name in str(raised.value) for name in names), raised.value


def test_a_column_that_no_record_has_is_an_error_with_the_columns_seen(tmp_path: Path) -> None:
    path = jsonl(tmp_path, RECORD, RECORD)
    for limit in (None, 1):
        columns = COLUMNS | {"system": "system_text", "chosen": "answer.good"}
        records = read_records(SourceConfig(path=path, columns=columns, limit=limit))
        with pytest.raises(DataError) as raised:
            list(records)
        assert "answer.good, system_text" in str(raised.value)
        assert "task, answers, id" in str(raised.value)
        assert "did you mean answers" in str(raised.value)


def test_a_missing_column_is_found_before_a_large_file_is_read(tmp_path: Path) -> None:
    late = RECORD | {"system_text": "be kind"}
    path = jsonl(tmp_path, *[RECORD] * 30, late)
    check_source(SourceConfig(path=path, columns=COLUMNS | {"system": "system_text"}))
    with pytest.raises(DataError, match="no record has a column"):
        check_source(SourceConfig(path=path, columns=COLUMNS | {"prompt": "tasks"}))


def test_a_record_that_is_no_object_is_bad(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"inner": TEXT}, {"inner": "text"}, {"other": 1})
    outcomes = list(read_records(SourceConfig(path=path, columns={"record": "inner"})))
    assert [getattr(found, "reason", "") for found in outcomes] == ["", "missing_field", "missing_field"]


def test_tags_name_the_fields_and_roles_of_turns(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "clerk"}
    record = {
        "conversations": [{"who": "system", "says": "be kind"}, {"who": "customer", "says": "q"}],
        "chosen": {"who": "clerk", "says": "yes"},
        "rejected": {"who": "clerk", "says": "no"},
    }
    found = good(tmp_path, record, None, tags=tags)
    assert found.prompt == (Message("system", "be kind"), Message("user", "q"))
    assert found.responses == ("yes", "no")
    wrong = read(tmp_path, record, None, tags=tags | {"user_tag": "client"})
    assert isinstance(wrong, BadRecord)
    assert wrong.reason == "roles_out_of_turn"


def test_tags_without_turns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tags have no effect"):
        read(tmp_path, TEXT, None, tags={"user_tag": "customer"})


def test_names_that_are_not_english_are_quoted_as_on_the_page(tmp_path: Path) -> None:
    [line] = re.findall(r"`(data\.train=.*问题.*)`", (ROOT / "docs" / "data.md").read_text())
    [override] = shlex.split(line)
    columns = load_run_config(["model.path=m", override]).data.train[0].columns
    assert columns == {"prompt": "问题", "chosen": "好的回答", "rejected": "answer (bad)"}
    record = dict(zip(columns.values(), ("q", "yes", "no"), strict=True))
    assert good(tmp_path, record, columns).responses == ("yes", "no")
    with pytest.raises(ConfigError, match="needs quotes"):
        load_run_config(["model.path=m", override.replace('"', "")])
