"""Everything that is read back is data: who can write it runs no code, leaves no folder, allocates no memory.

Every reader gets pickles, forged headers and wrong types in place of its file, with digests that fit.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays

from dpo_dist.config.data import DataConfig
from dpo_dist.config.run_folder import BEST, RunFolder, best_checkpoints
from dpo_dist.data.dataset import open_dataset
from dpo_dist.data.folders import check_card
from dpo_dist.data.store import ARRAYS, EncodedSource, find_damage, read_manifest, view
from dpo_dist.distributed import manifest as checkpoint_manifest
from dpo_dist.distributed.checkpoint_files import (
    load_random_states,
    read_state,
)
from dpo_dist.distributed.manifest import find_faults, has_all_files
from dpo_dist.distributed.processes import write_stacks
from dpo_dist.foundation.errors import CheckpointError, DataError, DpoDistError
from dpo_dist.foundation.files import read_small, recall, text_digest
from dpo_dist.insight.console import open_console
from dpo_dist.insight.metrics.log import MetricsLog, read_latest_rows
from dpo_dist.insight.pages.facts import read_facts
from dpo_dist.insight.pages.render import json_rows
from dpo_dist.model.folder import check_weights, read_model_json
from dpo_dist.reference.fingerprint import FINGERPRINT_FILE, read_fingerprint
from dpo_dist.reference.shard import open_shard, shard_name
from dpo_dist.training import state as run_state
from dpo_dist.training.start import _lock
from dpo_dist.training.state import Position
from tests.support.poison import pickled

KEYS = ("world_size", "step", "outcome", "files", "digest", "content", "python", "numpy", "torch")
CPU = torch.device("cpu")
POISONS: dict[str, Callable[[Path], bytes]] = {
    "pickle": pickled,
    "list": lambda _: b"[]",
    "object": lambda _: b"{}",
    "null": lambda _: b"null",
    "text": lambda _: b'"x"',
    "number": lambda _: b"1e999",
    "deep": lambda _: b"[" * 200_000,
    "deep object": lambda _: b'{"a":' * 200_000,
    "nothing": lambda _: b"",
    "not UTF-8": lambda _: b'{"\xff": 1}',
    "wrong types": lambda _: json.dumps({key: [{}] for key in KEYS}).encode(),
}


def read_memo(folder: Path) -> object:
    return recall(folder, "a.jsonl")


def read_rows_of(folder: Path) -> object:
    run = RunFolder(folder.parent)
    run.metrics.mkdir(exist_ok=True)
    (folder / "log_history.json").replace(run.log_history)
    return MetricsLog.open(run, 1).rows


def placed(name: str, read: Callable[[Path], object]) -> tuple[str, Callable[[Path], object]]:
    return name, read


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "checkpoint manifest": placed("manifest.json", checkpoint_manifest.read_manifest),
    "checkpoint faults": placed("manifest.json", lambda folder: find_faults(folder, 0, 1)),
    "checkpoint sizes": placed("manifest.json", has_all_files),
    "checkpoint state": placed("state.json", read_state),
    "random states": placed("random_states_0.json", lambda folder: load_random_states(folder, 0, 1, CPU)),
    "run state": placed("run_state.json", lambda folder: run_state.read_state(RunFolder(folder))),
    "metrics": placed("dpo_metrics/log_history.json", lambda folder: read_latest_rows(RunFolder(folder))),
    "rows": placed("rows.jsonl", lambda folder: list(json_rows(folder / "rows.jsonl"))),
    "fingerprint": placed(FINGERPRINT_FILE, read_fingerprint),
    "rows to resume from": placed("a/log_history.json", lambda folder: read_rows_of(folder / "a")),
    "model description": placed("config.json", lambda folder: read_model_json(folder / "config.json")),
    "weights": placed("a.safetensors", lambda folder: check_weights([folder / "a.safetensors"], "k")),
    "digests": placed(f"{text_digest('a.jsonl')}.json", read_memo),
    "encoded manifest": placed("manifest.json", read_manifest),
    "best checkpoints": placed(BEST, best_checkpoints),
    "shard": placed("0" * 32 + ".safetensors", lambda folder: open_shard(folder / f"{'0' * 32}.safetensors")),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("reader", READERS)
def test_no_file_that_is_read_back_runs_code_or_ends_in_a_traceback(
    reader: str, poison: str, tmp_path: Path
) -> None:
    name, read = READERS[reader]
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(POISONS[poison](tmp_path / "trace"))
    with contextlib.suppress(DpoDistError, ValueError, OSError):  # the errors that each reader declares
        read(tmp_path / "folder")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"rows"}))  # these are read in parts
def test_a_huge_file_takes_no_memory(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.touch()
    os.truncate(file, 2**40)
    with contextlib.suppress(DpoDistError, ValueError, OSError):
        read(tmp_path / "folder")


@pytest.mark.parametrize(
    "state",
    [{}, {"step": -1}, {"step": "1"}, {"step": 1, "pairs_seen": 1, "train_seconds": 0, "running": {"x": 1}}],
    ids=str,
)
def test_a_forged_position_is_an_error(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="state of the checkpoint"):
        Position.of(state)


STATE = {
    "step": 2,
    "pairs_seen": 12,
    "train_seconds": 1.0,
    "running": {"margin": None, "reward": 0.5, "pairs": 12},
    "window": {"steps": 1, "sums": {"loss": math.nan}},
    "work": {"seconds": {"training": 1.0}, "device_seconds": 2.0, "since_step": 0},
    "best": [{"metric": "eval_loss", "step": 2, "value": 0.5}],
    "reference_report": {"mode": "cached", "hits": 1, "computed": 0, "seconds": 0.5, "damaged": []},
    "length": '{"epochs": 1.0, "max_steps": null}',
    "steps": 4,
}


@pytest.mark.parametrize("name", [*STATE, "bad_steps", "bad_in_a_row", "collapsed_in_a_row"])
@pytest.mark.parametrize("value", ["x", ["x"], {"x": "x"}, {"seconds": ["x"]}, [{"step": "../x"}]], ids=str)
def test_a_position_of_wrong_types_is_an_error(name: str, value: Any) -> None:
    assert Position.of(STATE).step == 2
    if (name, value) == ("length", "x"):  # no length: `former_length` ignores it
        return
    with pytest.raises(CheckpointError, match="state of the checkpoint"):
        Position.of(STATE | {name: value})


@pytest.mark.parametrize("ends", [[10**12], [-5], [2**62], [2**40]], ids=str)
def test_forged_ends_of_a_shard_count_as_damage(ends: list[int], tmp_path: Path) -> None:
    keys, of_entries = np.zeros((1, 2), np.uint64), np.array(ends, np.int64)
    checks = np.zeros(1, np.int64)
    name = shard_name(tmp_path.name, keys, of_entries, checks)
    tensors = {"keys": keys, "ends": of_entries, "checks": checks, "values": np.zeros(2, np.float32)}
    save_arrays(tensors, tmp_path / name)
    assert open_shard(tmp_path / name) is None


def encoded(folder: Path, **changed: list[int]) -> Path:
    """An encoded source of one pair, with arrays changed and digests that fit."""
    arrays: dict[str, Any] = {name: [] for name in ARRAYS} | {
        "ids": [1, 2, 3],
        "piece_starts": [0, 1, 2],
        "piece_tokens": [1, 1, 1],
        "pair_pieces": [3],
        "keys": [0] * 4,
        "scores": [0, 0],
        "mask_starts": [0, 0],
        "trained_tokens": [1, 1],
        "truncated": [0, 0],
        "prompts": [0],
        "origins": [0, 1],
        "outcomes": [0],
    }
    folder.mkdir()
    digests, sizes = {}, {}
    for name, values in (arrays | changed).items():
        content = np.asarray(values, dtype=ARRAYS[name]).tobytes()
        (folder / f"{name}.bin").write_bytes(content)
        digests[name], sizes[name] = hashlib.blake2b(content, digest_size=16).hexdigest(), len(values)
    manifest = {
        "fingerprint": "f",
        "whole": True,
        "records": 1,
        "largest_id": 3,
        "sizes": sizes,
        "digests": digests,
        "outcomes": [[None, 1, [], "text"]],
        "files": ["."],
        "examples": [],
    }
    sign(folder, manifest)
    return folder


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(json.dumps({"digest": text_digest(text), "content": text}))


def look(folder: Path) -> int | None:
    """The pairs of an encoded source, as a run finds them; None if it is damaged."""
    manifest = read_manifest(folder)
    if manifest is None or find_damage(folder, manifest):
        return None
    return view(EncodedSource("a.jsonl", folder), manifest).pairs


@pytest.mark.parametrize(
    "changed",
    [
        {"piece_starts": [0, 1, 10**12]},
        {"piece_starts": [0, -1, 2]},
        {"piece_tokens": [1, 1, 2**31 - 1]},
        {"piece_starts": [0, 1, 2**63 - 1]},
        {"pair_pieces": [10**12]},
        {"pair_pieces": [-1]},
        {"pair_pieces": [1]},
        {"pair_pieces": [2**62, -(2**62)], "prompts": [0, 0], "origins": [0, 1, 0, 1]},
        {"outcomes": [2**31 - 1]},
        {"outcomes": [-1]},
        {"keys": [0] * 2},
        {"scores": []},
        {"prompts": []},
        {"origins": [5, 1]},
        {"origins": [-5, 1]},
        {"trained_tokens": [5, 1]},
        {"trained_tokens": [-1, 1]},
        {"trained_tokens": [1, 0], "mask_starts": [0, 10**12]},
        {"trained_tokens": [1, 0], "trained": [1], "mask_starts": [0, -7]},
    ],
    ids=str,
)
def test_forged_offsets_of_encoded_data_are_an_error(changed: dict[str, list[int]], tmp_path: Path) -> None:
    assert look(encoded(tmp_path / "whole")) == 1
    with pytest.raises(DataError, match="digests do not show"):
        look(encoded(tmp_path / "forged", **changed))


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": {"ids": 10**12}},
        {"sizes": {"ids": "3"}},
        {"sizes": []},
        {"outcomes": [[None, "1", []]]},
        {"outcomes": [[None, 10**30, []]]},
        {"outcomes": [[["x"], 1, []]]},
        {"outcomes": [[None, 1, [], 5]]},
        {"fingerprint": 5},
        {"outcomes": 1},
        {"files": [1]},
        {"examples": [[0, 7, 1, "a", "b"]]},
        {"examples": [["a", 0, 1, "a", {}]]},
        {"examples": [[0, 0, 1]]},
        {"records": "1"},
    ],
    ids=str,
)
def test_a_forged_manifest_of_encoded_data_is_damage(change: dict[str, Any], tmp_path: Path) -> None:
    folder = encoded(tmp_path / "folder")
    stored = json.loads((folder / "manifest.json").read_bytes())
    sign(folder, json.loads(stored["content"]) | change)
    assert look(folder) is None


def test_outcomes_of_more_examples_than_there_are_are_an_error(tmp_path: Path) -> None:
    folder = encoded(tmp_path / "folder")
    stored = json.loads((folder / "manifest.json").read_bytes())
    sign(folder, json.loads(stored["content"]) | {"outcomes": [[None, 5, []]]})
    with pytest.raises(DataError, match="digests do not show"):
        look(folder)


@pytest.mark.parametrize("ids", [[1, 2, 4], [1, 2, 2**31 - 1], [-1, 2, 3]], ids=str)
def test_ids_above_the_largest_one_are_an_error_before_a_model_gets_them(
    ids: list[int], tmp_path: Path
) -> None:
    for name, changed in (("whole", {}), ("forged", {"ids": ids})):
        source = EncodedSource("a.jsonl", encoded(tmp_path / name, **changed))
        dataset = open_dataset([source], DataConfig())
        if name == "whole":
            dataset.sequences(0)
    with pytest.raises(DataError, match="digests do not show") as caught:
        dataset.sequences(0)
    assert caught.value.where == "a.jsonl:1"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, link_to_zeros])
def test_a_file_without_an_end_is_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "file.json")
    with pytest.raises(OSError, match="a device or a pipe"):
        read_small(tmp_path / "file.json")


def test_nothing_is_written_through_a_link_of_a_run_directory(tmp_path: Path) -> None:
    victim, run = tmp_path / "profile", RunFolder(tmp_path / "run")
    victim.write_text("mine\n")
    run.logs.mkdir(parents=True)
    for link in (run.rank_log(0), run.lock, run.rank_stacks(0)):
        link.symlink_to(victim)
    with pytest.raises(OSError, match="it is a link"), open_console(run):
        print("; a command")
    with pytest.raises(CheckpointError, match="cannot be written"):
        _lock(run, [])
    write_stacks(run.rank_stacks(0), "a reason")
    assert victim.read_text() == "mine\n"


def test_references_of_references_in_yaml_are_followed_once(tmp_path: Path) -> None:
    levels = [f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}, *l{n - 1}, *l{n - 1}]" for n in range(1, 40)]
    text = "\n".join(["data_files: &l0 [a.jsonl, ../b.jsonl]", *levels, "configs: [{data_files: *l39}]"])
    (tmp_path / ".huggingface.yaml").write_text(text)
    with pytest.raises(DataError, match="outside its folder"):
        check_card(tmp_path)
    (tmp_path / ".huggingface.yaml").write_text(text.replace("../", ""))
    check_card(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    assert read_facts(RunFolder(tmp_path), None).config == {}
