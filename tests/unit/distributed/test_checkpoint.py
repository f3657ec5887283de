"""Checkpoints of one process: damage, resuming, and deletion."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_dist.config.run_folder import best_checkpoints
from dpo_dist.distributed.checkpoint import (
    MANIFEST,
    drop_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
)
from dpo_dist.foundation.errors import CheckpointError
from tests.support.alone import ALONE
from tests.support.one_weight import WEIGHTS, Run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda folder: flip(folder / WEIGHTS),
    "a missing file": lambda folder: (folder / WEIGHTS).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an emptied manifest": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "a manifest of nothing": lambda folder: (folder / MANIFEST).write_text('{"files": {}}'),
    "a manifest that is a list": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "a manifest that lost a file": lambda folder: lose_entry(folder / MANIFEST),
}


def lose_entry(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    del content["files"][str(WEIGHTS)]
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_neither_resumed_nor_ignored(damage: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start()
    run.save(50, 100)
    DAMAGE[damage](tmp_path / "step-000100")
    run.keep_last = 1
    assert run.start() == 50
    assert run.left() == ["step-000050", "step-000100"]
    run.save(75)
    assert run.left() == ["step-000075"]
    DAMAGE[damage](tmp_path / "step-000075")
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        run.start()


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start()
    run.save(50, 100)
    flip(tmp_path / "step-000100" / WEIGHTS)
    assert run.start() == 50
    run.save(150)
    assert run.left() == ["step-000050", "step-000150"]


def test_folders_with_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start()
    run.save(1, 2)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000002-best")
    run.save(3, 4)
    assert run.left() == ["step-000002-best", "step-000003", "step-000004"]
    (tmp_path / "step-000005.tmp-0123456789ab").mkdir()
    drop_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002-best"]


def test_the_best_checkpoints_are_kept_beside_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1)
    run.start()
    for step, best in ((1, [1]), (2, [1]), (3, [3, 1]), (4, [3, 4]), (5, [3, 4])):
        run.weights.weight.fill_(step)
        run.saver.save(step, {"step": step, "best": [{"step": one} for one in best]})
    run.saver.commit()
    assert run.left() == ["step-000003", "step-000004", "step-000005"]
    assert best_checkpoints(tmp_path) == ["step-000003", "step-000004"]
    drop_checkpoints(tmp_path)
    assert run.left() == ["step-000003", "step-000004"]
    assert (tmp_path / "latest").read_text() == "step-000004"
    assert run.start() == 4
    run.save(6)  # without keep_best
    assert run.left() == ["step-000006"]
    assert not (tmp_path / "best").exists()


def test_the_last_checkpoint_always_exists_and_is_that_of_the_highest_step(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=0)
    run.start()
    run.save(999_999, 1_000_000)
    assert run.left() == ["step-1000000"]
    assert run.start() == 1_000_000


def test_the_manifest_lists_every_written_file(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start()
    run.save(3)
    folder = tmp_path / "step-000003"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {*read_manifest(folder), MANIFEST}


def test_random_states_are_restored(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start()
    run.save(1)

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), *torch.rand(3).tolist()]

    wanted = draw()
    run.start()
    assert draw() == wanted


def test_a_checkpoint_of_a_cpu_is_resumed_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no state of the GPU's random numbers, of which training takes none."""
    run = Run(tmp_path)
    run.start()
    run.save(1)
    found = latest_checkpoint(tmp_path, ALONE)
    assert found is not None
    taken: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", taken.append)
    load_checkpoint(found, [run.weights], replace(ALONE, device=torch.device("cuda")))
    assert not taken
