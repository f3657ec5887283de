"""Sources have short, unique labels that are safe in names of metrics."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.config.data import SourceConfig
from dpo_dist.data.sources import source_labels


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/data/math.jsonl"], ["math"]),
        (["org/ultrafeedback_binarized", "/data/hh.jsonl.gz"], ["ultrafeedback_binarized", "hh"]),
        (["/data/hh/train.jsonl", "/data/uf/train.jsonl"], ["hh-train", "uf-train"]),
        (["a/pairs.csv", "b/pairs.csv", "b/more.csv"], ["a-pairs", "b-pairs", "more"]),
        (["x/a/pairs.csv", "x/b/a/pairs.csv"], ["x-a-pairs", "b-a-pairs"]),
        (["/data/hh/*.jsonl", "/data/hh/**/part-*.parquet"], ["hh", "part"]),
        (["/data/my pairs (new).jsonl", "folder/"], ["my-pairs-new", "folder"]),
        (["データ/選択.jsonl"], ["選択"]),
        (["train.jsonl", "."], ["train", "source"]),
        (["a.jsonl", "a.jsonl", "a-2.jsonl"], ["a", "a-3", "a-2"]),
    ],
)
def test_labels_by_hand(paths: list[str], labels: list[str]) -> None:
    assert source_labels(list(map(SourceConfig, paths))) == labels


def test_subset_folder_and_split_tell_parts_of_a_dataset_apart() -> None:
    parts = [
        SourceConfig("org/hh", data_dir="helpful-base"),
        SourceConfig("org/hh", data_dir="harmless/base"),
        SourceConfig("org/uf", name="en"),
        SourceConfig("org/uf", name="zh"),
        SourceConfig("org/ds", split="train"),
        SourceConfig("org/ds", split="test"),
        SourceConfig("org/ds", split="test", weight=2.0),
    ]
    wanted = ["hh-helpful-base", "hh-harmless-base", "uf-en", "uf-zh", "ds-train", "ds-test", "ds-test-2"]
    assert source_labels(parts) == wanted


def test_an_entry_of_a_registry_has_its_own_name(tmp_path: Path) -> None:
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    entries = {
        name: {"file_name": f"{name}.json", "ranking": True, "columns": columns} for name in ("dpo_en", "zh")
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    for name in entries:
        (tmp_path / f"{name}.json").write_text("[]")
    assert source_labels([SourceConfig(str(tmp_path), name=name) for name in entries]) == list(entries)


def test_an_own_label_is_kept_and_may_be_shared() -> None:
    sources = [
        SourceConfig("a/pairs.jsonl", label="math"),
        SourceConfig("b/pairs.jsonl", label="math"),
        SourceConfig("math.jsonl"),
        SourceConfig("c/pairs.jsonl"),
    ]
    assert source_labels(sources) == ["math", "math", "math-2", "pairs"]


names = st.text(st.sampled_from("ab/.-_* é\n"), min_size=1, max_size=8).filter(str.strip)
sources = st.builds(
    SourceConfig,
    names,
    name=st.none() | names,
    data_dir=st.none() | names,
    split=st.none() | names,
    label=st.none() | st.sampled_from(["a", "b", "a-2"]),
)


@given(st.lists(sources, max_size=6))
def test_derived_labels_are_unique_and_safe(listed: list[SourceConfig]) -> None:
    labels = source_labels(listed)
    own = {source.label for source in listed if source.label is not None}
    derived = [label for source, label in zip(listed, labels, strict=True) if source.label is None]
    assert len(set(derived)) == len(derived)
    assert not own & set(derived)
    assert all(re.fullmatch(r"[\w.+-]+", label) for label in labels)
    assert [label for source, label in zip(listed, labels, strict=True) if source.label] == [
        source.label for source in listed if source.label
    ]
