"""Runs that are killed again and again, and their comparison with one that was not."""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open

from tests.support import warm
from tests.support.kill_points import KillPoint
from tests.support.launch import Finished, history, run_verb, summary

# Seconds after the fatal operation; in half of the kills none.
_LONGEST_DELAY = 0.03
# As short as a launcher's: what the ranks that are left say is not looked at.
_GRACE_SECONDS = 0.5
_OF_STARTS = frozenset({"train_seconds", "work", "window", "reference_report"})


@dataclass(frozen=True)
class KilledRuns:
    """One configuration, whose runs are killed until there were enough kills.

    Attributes:
        parent: of the folders of the runs; each has its own run directory, store and encoded data.
        overrides: makes the command line of a run in a folder.
        processes: of each start.
        seed: of the places.
        kills: of all runs together.
        reach: the part of a whole run, in file operations, in which a start is killed.
        seconds: after which a start fails.
        before: called once with the folder of each run, before its first start that may be killed.
    """

    parent: Path
    overrides: Callable[[Path], Sequence[str]]
    processes: int
    seed: int
    kills: int
    reach: float = 0.7
    seconds: float = 400
    before: Callable[[Path], None] = lambda folder: None

    def check(self, done: Callable[[int], None] = lambda kills: None) -> None:
        """Kill runs, and compare each with the uninterrupted one; `done` is called after every kill.

        Raises:
            AssertionError: a start failed in another way, or a result differs.
        """
        whole, drawn = self._folder("whole"), random.Random(self.seed)
        operations = self._count(whole)
        kills = runs = 0
        while kills < self.kills:
            runs += 1
            folder = self._folder(f"killed-{runs}")
            while True:
                point = self._point(folder, operations, drawn, kills)
                if (ended := self._start(point)).code == 0:
                    break
                assert point.is_reached, ended.output  # else it was not killed, but refused or wrong
                assert "Traceback" not in ended.output, ended.output
                kills += 1
                done(kills)
            assert_same_run(folder, whole)
            shutil.rmtree(folder)

    def _count(self, whole: Path) -> list[int]:
        point = KillPoint(whole)
        ended = self._start(point)
        assert ended.code == 0, ended.output
        return [max(1, int(point.counted(rank) * self.reach)) for rank in range(self.processes)]

    def _point(self, folder: Path, operations: list[int], drawn: random.Random, kills: int) -> KillPoint:
        rank = drawn.randrange(self.processes)
        return KillPoint(
            folder,
            operation=drawn.randint(1, operations[rank]) if kills < self.kills else 0,
            rank=rank,
            delay=drawn.choice([0.0, drawn.uniform(0, _LONGEST_DELAY)]),
            everybody=drawn.random() < 0.7,
        )

    def _start(self, point: KillPoint) -> Finished:
        command = list(self.overrides(point.folder))
        point.forget_former_start()
        with mock.patch.object(warm, "GRACE_AFTER_KILL_SECONDS", _GRACE_SECONDS):
            return run_verb(
                "train", command, processes=self.processes, prepare=point.arm, seconds=int(self.seconds)
            )

    def _folder(self, name: str) -> Path:
        folder = self.parent / name
        folder.mkdir()
        self.before(folder)
        return folder


def assert_same_run(killed: Path, whole: Path) -> None:
    """Equal rows, model, and optimizer states of the last checkpoint; no temporary file anywhere.

    Rows but for the peak of a device's memory, which is that of each start.
    """
    rows = [history(folder / "run") for folder in (killed, whole)]
    for row in itertools.chain(*rows):
        row.pop("memory/peak_allocated_bytes", None)
    assert rows[0] == rows[1]
    assert summary(killed / "run")["exit"] == "completed"
    (last,) = sorted((whole / "run" / "checkpoints").glob("step-*"))[-1:]
    for part in ("model", f"checkpoints/{last.name}/engine"):
        files = sorted(file.name for file in (whole / "run" / part).iterdir())
        assert sorted(file.name for file in (killed / "run" / part).iterdir()) == files
        for name in files:
            assert _content(killed / "run" / part / name) == _content(whole / "run" / part / name), name
    saved = whole / "run" / "checkpoints" / last.name
    for file in (saved / "state.json", *sorted(saved.glob("random_states_*.json"))):
        assert _untimed(killed / file.relative_to(whole)) == _untimed(file), file.name
    assert not [file for file in killed.rglob("*") if ".tmp-" in file.name]


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
