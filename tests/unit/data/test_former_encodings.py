"""The same examples, encoded by an earlier version of the program into folders with other fingerprints."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.data import build as build_dataset_module
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.store import read_manifest, was_fingerprint_of
from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import text_digest
from dpo_dist.training.state import check_identity
from tests.support.cache import opened
from tests.support.masks import add_masks
from tests.support.records import jsonl

ROWS = [{"prompt": f"question {n}", "chosen": f"right {n}", "rejected": f"wrong {n}"} for n in range(6)]
NEW_ARRAYS = ("trained", "mask_starts", "trained_tokens", "truncated", "prompts")


def sources(folder: Path, rows: list[dict[str, str]] = ROWS) -> list[SourceConfig]:
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
    return [
        SourceConfig(jsonl(folder / "a", *rows[:3])),
        SourceConfig(jsonl(folder / "b", *rows[3:]), limit=2),
    ]


def encoded_formerly(folder: Path, monkeypatch: pytest.MonkeyPatch, *rest: Any) -> PreferenceDataset:
    """Encode as a version did that stored fewer arrays."""
    with monkeypatch.context() as patched:
        patched.setattr(build_dataset_module, "_ENCODING_VERSION", 5)
        former = opened(folder, *sources(folder, *rest))
    for source in former.encoded:
        file = source.folder / "manifest.json"
        manifest = json.loads(json.loads(file.read_text())["content"])
        for name in NEW_ARRAYS:
            del manifest["digests"][name], manifest["sizes"][name]
            (source.folder / f"{name}.bin").unlink()
        content = json.dumps(manifest)
        file.write_text(json.dumps({"digest": text_digest(content), "content": content}))
        assert read_manifest(source.folder) is not None
    return former


def test_a_run_knows_its_examples_in_another_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = encoded_formerly(tmp_path, monkeypatch)
    dataset = opened(tmp_path, *sources(tmp_path))
    assert dataset.fingerprint != former.fingerprint
    assert was_fingerprint_of(former.fingerprint, dataset.encoded)
    assert not was_fingerprint_of(former.fingerprint, dataset.encoded[:1])
    identity = {"data": dataset.fingerprint, "model": "same"}
    recorded = {**identity, "data": former.fingerprint}
    check_identity(recorded, identity, tmp_path, {"train": dataset})
    for other in ({"eval": dataset}, {}):
        with pytest.raises(CheckpointError, match="training data"):
            check_identity(recorded, identity, tmp_path, other)


def test_other_examples_or_masks_are_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [{**ROWS[0], "chosen": "another"}, *ROWS[1:]]
    former = encoded_formerly(tmp_path, monkeypatch, changed)
    dataset = opened(tmp_path, *sources(tmp_path))
    assert not was_fingerprint_of(former.fingerprint, dataset.encoded)
    with pytest.raises(CheckpointError) as caught:
        check_identity(
            {"data": former.fingerprint}, {"data": dataset.fingerprint}, tmp_path, {"train": dataset}
        )
    assert "data.cache" in str(caught.value.remedy)


def test_examples_with_masks_are_not_those_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former = encoded_formerly(tmp_path, monkeypatch)
    with monkeypatch.context() as patched:
        add_masks(patched)
        dataset = opened(tmp_path, *sources(tmp_path))
    assert len(dataset.trained)
    assert not was_fingerprint_of(former.fingerprint, dataset.encoded)
