"""Descriptions that come with data name no file outside the folder of the data."""

import json
from pathlib import Path

import datasets
import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.data import folders
from dpo_dist.data.formats import read_records
from dpo_dist.data.sources import check_source
from dpo_dist.foundation.errors import DataError, DpoDistError
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
    with pytest.raises(DataError, match=OUTSIDE) as raised:
        list(folders.hub_records(SourceConfig(path="org/set")))
    assert card in raised.value.where


def test_a_dataset_with_a_script_runs_nothing(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = outside / "snapshot"
    folder.mkdir()
    (folder / "snapshot.py").write_text(f"from pathlib import Path\nPath({str(outside / 'trace')!r}).touch()")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **_options: str(folder))
    with pytest.raises(DataError):
        list(folders.hub_records(SourceConfig(path="org/set")))
    assert not (outside / "trace").exists()


@pytest.mark.parametrize("escape", [f"../other/{SHARD}", f"{{}}/other/{SHARD}"])
def test_a_saved_dataset_names_files_of_its_folder(escape: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "mine")
    saved(tmp_path / "other")
    state = json.loads((folder / "state.json").read_bytes())
    state["_data_files"] = [{"filename": escape.format(tmp_path)}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=OUTSIDE):
        list(read_records(SourceConfig(path=str(folder))))


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


@pytest.mark.parametrize("key", ["file_name", "hf_hub_url", "folder"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_an_entry_of_a_registry_names_files_of_its_folder(key: str, escape: str, outside: Path) -> None:
    folder = outside / "data"
    folder.mkdir()
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    place = {"hf_hub_url": "org/set", key: escape.format(outside)}
    entry = {"ranking": True, "columns": columns, **(place if key == "folder" else {key: place[key]})}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(DpoDistError, match=f"{OUTSIDE}|no name of a Hub dataset"):
        check_source(SourceConfig(path=str(folder), name="mine"))
