"""Everything that is read back is data: who can write it runs no code, leaves no folder, allocates no memory.

Every reader gets pickles, forged headers and wrong types in place of its file, with digests that fit.
"""

import contextlib
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
from safetensors.torch import save_file

from dpo_dist.config.run_folder import BEST, RunFolder, best_checkpoints
from dpo_dist.distributed import manifest as checkpoint_manifest
from dpo_dist.distributed.checkpoint_files import (
    load_random_states,
    random_states,
    random_states_name,
    read_state,
)
from dpo_dist.distributed.failures import StackFile
from dpo_dist.distributed.manifest import find_faults, has_all_files, write_manifest
from dpo_dist.distributed.slices import SavedSlices
from dpo_dist.foundation.errors import CheckpointError, DpoDistError
from dpo_dist.foundation.files import content_digest, read_small, recall, text_digest
from dpo_dist.insight.console import open_console
from dpo_dist.insight.metrics.log import MetricsLog, read_latest_rows
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


@pytest.mark.parametrize("name", ["../outside.json", "{}/outside.json", "a/../../outside.json", "", "."])
def test_a_manifest_names_files_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.json", tmp_path / "step-000001"
    outside.write_text("{}")
    folder.mkdir()
    entry = {"bytes": 2, "digest": content_digest([outside])}
    write_manifest(folder, {name.format(tmp_path): entry})
    assert find_faults(folder, 0, 1)
    assert not has_all_files(folder)
    with pytest.raises(CheckpointError):
        SavedSlices.find(folder, "engine")


def test_a_link_out_of_a_checkpoint_is_damage(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.json").write_text("{}")
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "engine").symlink_to(tmp_path / "outside")
    (folder / "b.json").symlink_to(tmp_path / "outside" / "a.json")
    entry = {"bytes": 2, "digest": content_digest([tmp_path / "outside" / "a.json"])}
    write_manifest(folder, {"engine/a.json": entry, "b.json": entry})
    assert len(find_faults(folder, 0, 1)) == 2


@pytest.mark.parametrize(
    "ranges",
    [
        {"a": [0, 10**12]},
        {"a": [0, 10**30]},
        {"a": [0, -4, -1]},
        {"a": [-1, 4]},
        {"a": ["x"]},
        {"a": []},
        {"b": [0, 4]},
        [],
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("step", ["1", "-1", "9" * 30, "x"])
def test_forged_ranges_of_a_slice_allocate_nothing(ranges: Any, step: str, tmp_path: Path) -> None:
    file = tmp_path / "engine" / "rank-00000-00000.safetensors"
    file.parent.mkdir()
    metadata = None if ranges is None else {"ranges": json.dumps(ranges), "step": step}
    save_file({"weight/a": torch.zeros(4)}, file, metadata)
    write_manifest(tmp_path, checkpoint_manifest.describe_files([file], tmp_path))
    with pytest.raises(CheckpointError):
        SavedSlices.find(tmp_path, "engine")


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


@pytest.mark.parametrize("position", [-1, 625, 2**31 - 1])
def test_a_forged_position_of_numpy_is_not_read(position: int, tmp_path: Path) -> None:
    states = json.loads(random_states(CPU))
    file = tmp_path / random_states_name(0)
    file.write_text(json.dumps(states))
    load_random_states(tmp_path, 0, 1, CPU)
    states["numpy"][2] = position
    file.write_text(json.dumps(states))
    with pytest.raises(CheckpointError, match="outside of the key"):
        load_random_states(tmp_path, 0, 1, CPU)


@pytest.mark.parametrize("ends", [[10**12], [-5], [2**62], [2**40]], ids=str)
def test_forged_ends_of_a_shard_count_as_damage(ends: list[int], tmp_path: Path) -> None:
    keys, of_entries = np.zeros((1, 2), np.uint64), np.array(ends, np.int64)
    checks = np.zeros(1, np.int64)
    name = shard_name(tmp_path.name, keys, of_entries, checks)
    tensors = {"keys": keys, "ends": of_entries, "checks": checks, "values": np.zeros(2, np.float32)}
    save_arrays(tensors, tmp_path / name)
    assert open_shard(tmp_path / name) is None


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
    StackFile(run.rank_stacks(0)).write("a reason")
    assert victim.read_text() == "mine\n"
