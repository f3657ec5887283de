"""Starts and checkpoints of a run that has one weight, on one process."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dpo_dist.distributed.checkpoint.saver import CheckpointSaver, SavedSlices, latest_checkpoint
from dpo_dist.distributed.checkpoint.slices import WEIGHT, ModelSlices, Slice
from tests.support.alone import ALONE

WEIGHTS = Path("engine/rank-00000-00000.safetensors")


@dataclass
class Weights:
    """One weight of one file, which is the step of the save."""

    weight: Tensor = field(default_factory=lambda: torch.zeros(2))

    def shards(self) -> ModelSlices:
        return ModelSlices("engine", [Slice("w", (2,), 0, {WEIGHT: self.weight})])

    def load_shards(self, folder: Path) -> None:
        SavedSlices.find(folder, "engine").load_into(self.shards().slices)

    @property
    def value(self) -> int:
        return int(self.weight[0])


@dataclass
class Run:
    """Starts and saves as a run does."""

    root: Path
    keep_last: int = 2

    def start(self) -> int:
        """Resume; returns the step, 0 for a fresh start."""
        found = latest_checkpoint(self.root, ALONE)
        weights = Weights()
        self.saver = CheckpointSaver(self.root, self.keep_last, [weights], ALONE)
        self.weights = weights
        if found is None:
            return 0
        weights.load_shards(found.folder)
        self.saver.resume(found.folder, found.state.get("best"))
        self.saver.close()  # waits until others are deleted
        assert weights.value == found.state["step"]
        return weights.value

    def save(self, *steps: int) -> None:
        for step in steps:
            self.weights.weight.fill_(step)
            self.saver.save(step, {"step": step})
            self.commit()

    def commit(self) -> None:
        self.saver.commit()
        self.saver.close()  # waits until others are deleted

    def left(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("step-*"))
