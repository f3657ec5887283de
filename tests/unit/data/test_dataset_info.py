"""Entries of LLaMA-Factory's dataset_info.json as sources."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataFormat, SourceConfig
from dpo_dist.data.columns import resolved
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Message, PreferenceRecord
from dpo_dist.data.sources import check_source
from dpo_dist.foundation.errors import ConfigError, DataError, DpoDistError
from tests.support.records import TEXT, assistant, jsonl, user

PAIR = {"columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad"}, "ranking": True}
RECORD = {
    "q": "do",
    "more": "this",
    "good": "yes",
    "bad": "no",
    "images": ["not a column"],
    "system": "not read",
}


def registry(folder: Path, **entries: Any) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


def read(path: Path, name: str = "mine", **options: Any) -> PreferenceRecord:
    found = list(read_records(SourceConfig(path=str(path), name=name, **options)))
    assert isinstance(found[0], PreferenceRecord), found[0]
    return found[0]


def test_an_entry_names_file_and_columns(tmp_path: Path) -> None:
    jsonl(tmp_path, RECORD)
    folder = registry(tmp_path, mine=PAIR | {"file_name": "records.jsonl"})
    for path in (folder, folder / "dataset_info.json"):
        record = read(path)
        assert (record.prompt, record.responses) == ((Message("user", "do\nthis"),), ("yes", "no"))
        assert record.origin.source == str(tmp_path / "records.jsonl")


def test_an_entry_may_name_a_folder_and_a_number_of_samples(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    jsonl(tmp_path / "shards", *[RECORD] * 5)
    entry = PAIR | {"file_name": "shards", "num_samples": 3, "split": "train"}
    source = SourceConfig(path=str(registry(tmp_path, mine=entry)), name="mine")
    assert len(list(read_records(source))) == 3
    fewer = SourceConfig(path=str(tmp_path), name="mine", limit=2)
    assert len(list(read_records(fewer))) == 2


def test_turns_of_an_entry_have_its_tags(tmp_path: Path) -> None:
    turns = {"talk": [user("q")], "good": assistant("yes"), "bad": assistant("no"), "defs": '[{"name": "f"}]'}
    jsonl(tmp_path, turns)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "talk", "chosen": "good", "rejected": "bad", "tools": "defs"}
    entry = {"file_name": "records.jsonl", "ranking": True, "columns": columns}
    registry(
        tmp_path,
        mine=entry | {"formatting": "sharegpt", "tags": tags},
        other=entry | {"formatting": "openai"},
    )
    for name in ("mine", "other"):
        record = read(tmp_path, name)
        assert (record.prompt, record.responses) == ((Message("user", "q"),), ("yes", "no"))
        assert record.tools[0]["function"]["name"] == "f"


def test_an_entry_that_is_no_ranking_reads_no_pairs(tmp_path: Path) -> None:
    jsonl(tmp_path, {"instruction": "q", "output": "yes", "chosen": "good", "rejected": "bad"})
    for ranking, responses in ((False, ("yes",)), (True, ("good", "bad"))):
        registry(tmp_path, mine={"file_name": "records.jsonl", "ranking": ranking})
        assert read(tmp_path).responses == responses


def test_an_entry_may_name_a_hub_dataset(tmp_path: Path) -> None:
    entry = PAIR | {
        "hf_hub_url": "org/pairs",
        "ms_hub_url": "org/copy",
        "subset": "en",
        "folder": "data",
        "split": "test",
    }
    registry(tmp_path, mine=entry | {"revision": "v1"})
    source = resolved(SourceConfig(path=str(tmp_path), name="mine", weight=0.5))
    assert (source.path, source.name, source.data_dir) == ("org/pairs", "en", "data")
    assert (source.split, source.revision, source.weight) == ("test", "v1", 0.5)
    assert source.format is DataFormat.alpaca
    assert source.columns == {
        "instruction": "q",
        "input": "more",
        "chosen": "good",
        "rejected": "bad",
        "*": None,
    }


@pytest.mark.parametrize(
    ("entry", "options", "kind", "words"),
    [
        ({}, {"name": "mime"}, ConfigError, ("mime", "mine", "other", "did you mean mine")),
        ({}, {"name": None}, ConfigError, ("mine, other", "name: ENTRY")),
        ({}, {"format": DataFormat.text}, ConfigError, ("the entry decides",)),
        ({}, {"columns": {"prompt": "q"}}, ConfigError, ("the entry decides",)),
        ({}, {"split": "test"}, ConfigError, ("split of the source", "test")),
        ({"format": "x"}, {}, ConfigError, ("format", "formatting")),
        ({"formatting": "vicuna"}, {}, ConfigError, ("vicuna", "sharegpt")),
        ({"columns": {"promt": "q"}}, {}, ConfigError, ("promt", "prompt, query")),
        ({"columns": ["q"]}, {}, ConfigError, ("columns", "dictionary")),
        ({"tags": {"user": "q"}}, {}, ConfigError, ("user", "user_tag")),
        ({"ranking": False}, {}, ConfigError, ("chosen, rejected", '"ranking": true')),
        ({"columns": {"prompt": "q", "kto_tag": "label"}}, {}, DataError, ("KTO", "pair good and bad")),
        ({"file_name": None, "script_url": "load.py"}, {}, DataError, ("script_url", "file_name")),
        ({"file_name": "absent.jsonl"}, {}, DataError, ("absent.jsonl",)),
    ],
)
def test_a_wrong_entry_is_an_error_at_the_start(
    tmp_path: Path, entry: Any, options: Any, kind: type[DpoDistError], words: tuple[str, ...]
) -> None:
    jsonl(tmp_path, RECORD)
    usual = PAIR | {"file_name": "records.jsonl"}
    registry(tmp_path, mine=usual | entry, other=usual)
    with pytest.raises(kind) as raised:
        check_source(SourceConfig(**{"path": str(tmp_path), "name": "mine", **options}))
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_description_of_another_program_is_no_registry(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path, TEXT))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {"train": {}}}))
    assert len(list(read_records(str(tmp_path)))) == 1
    with pytest.raises(DataError, match="no dataset_info"):
        resolved(SourceConfig(path=str(tmp_path), name="mine"))
    path.unlink()
    (tmp_path / "dataset_info.json").write_text("[1")
    with pytest.raises(DataError, match="no dataset_info"):
        resolved(SourceConfig(path=str(tmp_path / "dataset_info.json")))


def test_the_list_of_another_trainer_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('[{"dataset_path": "a.jsonl", "columns": {"a": "query"}}]')
    with pytest.raises(DataError) as raised:
        resolved(SourceConfig(path=str(tmp_path), name="a"))
    assert raised.value.got == "a list, as of ms-swift"
    assert "dataset_path" in raised.value.remedy
    # Without a name the folder is one of data files.
    jsonl(tmp_path, TEXT)
    assert len(list(read_records(str(tmp_path)))) == 1
