"""Descriptions that come with data: a Hub dataset names no file outside its folder and runs nothing."""

import json
from pathlib import Path

import datasets
import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.data import folders
from dpo_dist.data.formats import read_records
from dpo_dist.foundation.errors import DataError
from tests.support.records import TEXT

SHARD = "data-00000-of-00001.arrow"
OUTSIDE = "names a file outside its folder"
ESCAPES = ["../outside.jsonl", "{}/outside.jsonl", "a/../../outside.jsonl", "file://{}/outside.jsonl"]


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list([TEXT]).save_to_disk(str(folder))
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside.jsonl").write_text(json.dumps(TEXT) + "\n")
    return tmp_path


@pytest.mark.parametrize("escape", [*ESCAPES, "zip://x::../a.zip", "~/outside.jsonl"])
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_dataset_card_names_files_of_its_dataset(
    card: str, escape: str, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = outside / "snapshot"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **_options: str(folder))
    names = json.dumps([{"split": "train", "path": escape.format(outside)}])
    text = f"configs:\n- config_name: default\n  data_files: {names}\n"
    (folder / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    is_found = escape in ESCAPES and not escape.startswith("a/")
    with pytest.raises(DataError, match=OUTSIDE if is_found else None):
        list(folders.hub_records(SourceConfig(path="org/set")))


def test_a_dataset_with_a_script_runs_nothing(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = outside / "snapshot"
    folder.mkdir()
    (folder / "snapshot.py").write_text(f"from pathlib import Path\nPath({str(outside / 'trace')!r}).touch()")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **_options: str(folder))
    with pytest.raises(DataError):
        list(folders.hub_records(SourceConfig(path="org/set")))
    assert not (outside / "trace").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dataset_dict.json", '{"splits": ["../other"]}'),
        ("dataset_dict.json", "[]"),
        ("state.json", "[]"),
        ("state.json", '{"_data_files": [1]}'),
        ("state.json", "{"),
    ],
)
def test_a_forged_description_of_a_saved_dataset_is_an_error(file: str, content: str, tmp_path: Path) -> None:
    saved(tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text(content)
    with pytest.raises(DataError):
        list(read_records(SourceConfig(path=str(tmp_path / "mine"), split=None)))
