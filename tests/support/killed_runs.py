"""Runs compared to the last bit."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.support.launch import history, summary

_OF_STARTS = frozenset({"train_seconds", "window", "reference_report"})


def assert_same_run(killed: Path, whole: Path) -> None:
    """Equal rows, model, and optimizer states of the last checkpoint; no temporary file anywhere.

    Rows but for the peak of a device's memory, which is that of each start.
    """
    rows = [history(folder / "run") for folder in (killed, whole)]
    for row in itertools.chain(*rows):
        row.pop("memory/peak_allocated_bytes", None)
        row.pop("memory/peak_reserved_bytes", None)
    assert rows[0] == rows[1]
    assert summary(killed / "run")["exit"] == "completed"
    saved = sorted((whole / "run" / "checkpoints").glob("step-*"))[-1]
    for part in (whole / "run" / "model", saved / "engine"):
        other = killed / part.relative_to(whole)
        names = sorted(file.name for file in part.iterdir())
        assert sorted(file.name for file in other.iterdir()) == names
        for name in names:
            assert _content(other / name) == _content(part / name), name
    state = saved / "state.json"
    assert _untimed(killed / state.relative_to(whole)) == _untimed(state)
    left = [file for file in killed.rglob("*") if ".tmp-" in file.name]
    assert not left, left


def die_in_shard(number: int) -> None:
    """Kill this process when half of its shard of this number, from 1, is written."""
    replace = Path.replace
    shards = 0

    def watched(temporary: Path, file: Path) -> Path:
        nonlocal shards
        shards += file.suffix == ".safetensors"
        if shards == number:
            os.truncate(temporary, temporary.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(temporary, file)

    Path.replace = watched  # type: ignore[method-assign, assignment]


def _untimed(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint without times, and what starts found in the store."""
    content = json.loads(file.read_text())
    return {name: value for name, value in content.items() if name not in _OF_STARTS}


def _content(file: Path) -> object:
    """Bytes, or of safetensors the values, because its header has no fixed order; of a model card nothing."""
    if file.name == "README.md":
        return None
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return content.metadata(), {
            name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
            for name, tensor in tensors.items()
        }
