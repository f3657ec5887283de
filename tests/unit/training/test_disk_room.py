"""Room on the disk: the checkpoints that are there at a time and the model, before models are loaded."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.schema import AdapterConfig, FolderConfig, ModelConfig, RunConfig, TrainerConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.start import check_disk_room
from tests.support.one_weight import Run

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def check(
    run_dir: Path, steps_done: int = 0, steps: int = 100, adapter: AdapterConfig | None = None, **trainer: Any
) -> None:
    """Check the room for checkpoints of 12 GiB and a model of 2 GiB: 2^30 weights in bf16."""
    run, model = FolderConfig(dir=str(run_dir)), ModelConfig(path="m", adapter=adapter)
    config = RunConfig(run=run, model=model, trainer=TrainerConfig(**trainer))
    check_disk_room(config, GIB, steps_done, steps)


@pytest.mark.parametrize(
    ("trainer", "gib"),
    [
        ({"save_every": 10}, 36),  # two kept, and the one that is written beside them
        ({"save_every": 10, "keep_last": 1}, 24),
        ({"save_every": 10, "keep_last": 0}, 24),
        ({"save_every": 50}, 26),  # two in all, and the model beside them
        ({"save_every": 0}, 14),
        ({"save_every": 10, "steps_done": 95}, 14),
        ({"save_every": 10, "steps": 11, "steps_done": 9}, 26),
        ({"save_every": 10, "steps": 100, "steps_done": 100}, 2),  # the model alone is missing
        ({"save_every": 0, "keep_best": "eval_loss", "eval_every": 10}, 48),
    ],
)
def test_the_room_is_that_of_the_checkpoints_at_a_time(
    trainer: dict[str, Any], gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, gib * GIB))
    check(tmp_path, **trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, (gib - 1) * GIB))
    with pytest.raises(ConfigError) as raised:
        check(tmp_path, **trainer)
    assert raised.value.got == f"{gib - 1}.0 GiB free on the file system of {tmp_path}"
    check(tmp_path, adapter=AdapterConfig(), **trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    check(tmp_path, **trainer)


@pytest.mark.parametrize(("keep_last", "gib"), [(1, 12), (2, 12), (3, 24)])
def test_checkpoints_that_are_there_need_no_room(
    keep_last: int, gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    run = Run(tmp_path / "checkpoints", keep_last=3)
    run.start()
    run.save(10, 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, gib * GIB))
    check(tmp_path, steps_done=20, save_every=10, keep_last=keep_last)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, gib * GIB - 1))
    with pytest.raises(ConfigError, match="no room"):
        check(tmp_path, steps_done=20, save_every=10, keep_last=keep_last)
