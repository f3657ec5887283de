"""Room on the disk: the checkpoints that are there at a time and the model, before the first step."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpo_dist.config.schema import Dtype, FolderConfig, ModelConfig, RunConfig, TrainerConfig
from dpo_dist.distributed.manifest import write_manifest
from dpo_dist.distributed.slices import ModelSlices, Slice
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.checkpoints import Sizes, check_disk_room
from tests.support.alone import ALONE
from tests.support.one_weight import Run

SIZES = Sizes(checkpoint=12 * 2**30, model=2 * 2**30)
GIB = 2**30
Usage = namedtuple("Usage", "total used free")


class Said(list[str]):
    """Takes messages as a console does."""

    say = list.append


def check(run_dir: Path, steps_done: int = 0, steps: int = 100, **trainer: object) -> Said:
    config = RunConfig(run=FolderConfig(dir=str(run_dir)), trainer=TrainerConfig(**trainer))  # type: ignore[arg-type]
    said = Said()
    check_disk_room(config, SIZES, steps_done, steps, ALONE, said)  # type: ignore[arg-type]
    return said


@pytest.mark.parametrize(
    ("trainer", "gib"),
    [
        ({"save_every": 10}, 36),  # two kept, and the one that is written beside them
        ({"save_every": 10, "keep_last": 1}, 24),
        ({"save_every": 10, "keep_last": 0}, 24),
        ({"save_every": 50}, 26),  # two in all, and the model beside them
        ({"save_every": 51}, 26),
        ({"save_every": 0}, 14),
        ({"save_every": 100}, 14),
        ({"save_every": 10, "steps_done": 95}, 14),
        ({"save_every": 10, "steps": 11, "steps_done": 9}, 26),
        ({"save_every": 10, "steps": 100, "steps_done": 100}, 2),  # the model alone is missing
        ({"save_every": 0, "keep_best": "eval_loss", "eval_every": 10}, 48),
        ({"save_every": 0, "keep_best": "eval_loss", "eval_every": 60}, 26),
    ],
)
def test_the_room_is_that_of_the_checkpoints_at_a_time(
    trainer: dict[str, Any], gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, gib * GIB))
    assert not check(tmp_path, **trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, (gib - 1) * GIB))
    with pytest.raises(ConfigError) as raised:
        check(tmp_path, **trainer)
    assert f"{gib - 1}.0 GiB free on the file system of {tmp_path}, 1.0 GiB too few" in raised.value.got


@pytest.mark.parametrize(("keep_last", "gib"), [(1, 12), (2, 12), (3, 24)])
def test_checkpoints_that_are_there_need_no_room(
    keep_last: int, gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    run = Run(tmp_path / "checkpoints", keep_last=3)
    run.start()
    run.save(10, 20)
    for free, fits in ((gib * GIB, True), (gib * GIB - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(100 * GIB, 0, free))
        if fits:
            check(tmp_path, steps_done=20, save_every=10, keep_last=keep_last)
        else:
            with pytest.raises(ConfigError):
                check(tmp_path, steps_done=20, save_every=10, keep_last=keep_last)


def test_a_file_system_without_a_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    assert check(tmp_path) == [
        f"the file system of {tmp_path} reports no size: its room for checkpoints is not known"
    ]


@pytest.mark.parametrize("dtype", Dtype)
def test_sizes_are_known_before_loading_and_before_the_optimizers_states(
    dtype: Dtype, tmp_path: Path
) -> None:
    config = RunConfig(model=replace(ModelConfig(path=str(tmp_path)), dtype=dtype))
    weights = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    save_file(weights, tmp_path / "consolidated.safetensors")  # the same once more, which is not loaded
    (tmp_path / "config.json").write_text("{}")
    slices = [
        Slice(name, tuple(weight.shape), 0, {"weight": weight.flatten().float()})
        for name, weight in weights.items()
    ]
    itemsize = 4 if dtype is Dtype.fp32 else 2
    assert Sizes.of_files(tmp_path, config) == Sizes(22 * 12, 22 * itemsize)
    averaged = replace(config, trainer=TrainerConfig(ema_decay=0.9))
    assert Sizes.of_files(tmp_path, averaged) == Sizes(22 * 16, 22 * itemsize)
    policy = ModelSlices("engine", slices, states=2)
    assert Sizes.of_slices([policy], config, ALONE) == Sizes(22 * 12, 22 * itemsize)
    frozen = [Slice("a", (15,), 0, {"weight": torch.zeros(15, dtype=torch.bfloat16)})]
    both = Sizes.of_slices([policy, ModelSlices("reference", frozen)], config, ALONE)
    assert both == Sizes(22 * 12 + 15 * 2, 22 * itemsize)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert Sizes.of_files(tmp_path, config) == Sizes(0, 0)


@pytest.mark.parametrize("dtype", Dtype)
def test_the_sizes_of_a_run_that_continues_are_those_of_its_checkpoint(dtype: Dtype, tmp_path: Path) -> None:
    """Also of an adapter, whose size is known after it is made only: a refused start changes nothing."""
    sizes = {"engine/rank-00000-00000.safetensors": 22 * 12, "reference/rank-00000-00000.safetensors": 30}
    write_manifest(tmp_path, {name: {"bytes": size} for name, size in sizes.items()})
    config = RunConfig(model=ModelConfig("somewhere", dtype=dtype))
    itemsize = 4 if dtype is Dtype.fp32 else 2
    assert Sizes.of_checkpoint(tmp_path, config) == Sizes(22 * 12 + 30, 22 * itemsize)
