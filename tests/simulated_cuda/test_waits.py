"""In a step the host waits for the device once, where it reads the metrics, and where DeepSpeed waits.

A wait elsewhere drains the device's queue: the device then idles until the host has queued work again.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.training.step import StepClock
from tests.simulated_cuda import device
from tests.simulated_cuda.runs import run_train
from tests.support import tiny
from tests.support.families import tiny_family
from tests.support.invented import write_pairs
from tests.support.launch import history
from tests.support.tiny_model import write_model

STEPS, COUNTED = 4, 2  # of a run; the last of them, as DeepSpeed's first steps record the order of gathers
FORWARDS = 7  # of the counted steps' micro-batches
AFTER = "after the last step"
SAVED_OR_FREED = re.compile(
    r"distributed/(slices|memory).py:\d+ (?!<genexpr>)"
)  # without the reads of Adam's step
Place = tuple[str, str, str]  # phase; kind; file and function
PLANNED: dict[Place, int] = {
    ("other", "copy to host, pageable", "dpo_dist/training/step.py reduce_step"): COUNTED,
    # For an event before that copy, which the device has passed.
    ("stop", "event", "dpo_dist/training/step.py stop"): COUNTED,
}
ITEM, PAGEABLE = "aten::_local_scalar_dense", "copy to device, pageable"
PARTITIONS = "deepspeed/runtime/zero/partition_parameters.py"
NORM: Place = ("optimizer", ITEM, "deepspeed/runtime/utils.py is_invalid_grad_norm")
MASK: Place = ("optimizer", PAGEABLE, "deepspeed/runtime/utils.py mask_nan_or_inf_with_val_inplace")
STAGE3 = "deepspeed/runtime/zero/stage3.py"
ZERO2 = "deepspeed/runtime/zero/stage_1_and_2.py"
ADAPTER = "model.adapter={r:4} reference.mode=adapter"
ROUTERS = "loss.router.aux_coefficient=0.1 loss.router.z_coefficient=0.01"
MASKED = "data.untrained=[formatting]"  # tokens without loss within responses
# Processes, model, other keys, and where DeepSpeed waits: it reads the gradient's norm in the optimizer, and
# waits for its own streams after the backward.
WAYS: dict[str, tuple[int, str, str, dict[Place, int]]] = {
    "ddp, a live reference, experts": (
        1,
        "experts",
        f"parallelism.kind=ddp reference.mode=live {ROUTERS}",
        {
            ("optimizer", ITEM, "deepspeed/runtime/utils.py clip_tensors_by_global_norm"): COUNTED,
            ("reference", "stream", f"{PARTITIONS} wait"): 2 * FORWARDS,
            MASK: COUNTED,
            NORM: COUNTED,
        },
    ),
    "zero2, an adapter, a coupled loss": (
        1,
        "dense",
        f"parallelism.kind=zero2 loss.kind=aot {ADAPTER}",
        {
            ("backward", "device", f"{ZERO2} independent_gradient_partition_epilogue"): FORWARDS,
            ("optimizer", ITEM, f"{ZERO2} has_overflow"): COUNTED,
            MASK: COUNTED,
            NORM: 2 * COUNTED,
        },
    ),
    "zero3, two ranks share sequences, experts, a cached reference": (
        2,
        "experts",
        f"parallelism.sequence_parallel=2 model.gradient_checkpointing=full {ROUTERS} {MASKED}",
        {
            ("backward", "stream", f"{STAGE3} independent_gradient_partition_epilogue"): FORWARDS,
            ("optimizer", PAGEABLE, f"{STAGE3} get_grad_norm_direct"): 2 * COUNTED,  # for 2 groups of weights
            ("optimizer", "device", f"{PARTITIONS} _allgather_params_coalesced"): COUNTED,
            NORM: COUNTED,
        },
    ),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waits")
    write_model(folder / "dense", seed=1)
    tiny_family("qwen3_moe", len(tiny.qwen())).save_pretrained(folder / "experts")
    tiny.qwen().save_pretrained(folder / "experts")
    write_pairs(folder / "train.jsonl", 12, seed=3)
    return folder


def count_by_phase() -> None:
    """Tell the device the phase of each step, and let it forget the waits before those that are counted."""
    begin, enter, stop = StepClock.__init__, StepClock.enter, StepClock.stop
    begun = 0

    def begin_step(self: StepClock, *given: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == STEPS - COUNTED + 1:
            device.reset_waits()
        begin(self, *given)

    def enter_phase(self: StepClock, phase: Any) -> None:
        device.enter_phase(phase)
        enter(self, phase)

    def stop_step(self: StepClock) -> Any:
        device.enter_phase("stop")
        seconds = stop(self)
        device.enter_phase("between steps" if begun < STEPS else AFTER)
        return seconds

    mock.patch.multiple(StepClock, __init__=begin_step, enter=enter_phase, stop=stop_step).start()


@pytest.mark.parametrize("way", WAYS)
def test_the_host_waits_for_the_device_once_a_step(way: str, assets: Path, tmp_path: Path) -> None:
    processes, model, others, of_libraries = WAYS[way]
    reports, run = tmp_path / "reports", tmp_path / "run"
    reports.mkdir()
    overrides = [
        f"model.path={assets}/{model}",
        "model.dtype=bf16",
        f"data.train=[{assets}/train.jsonl]",
        f"data.cache={assets}/encoded",
        f"reference.store={run}_store",
        f"run.dir={run}",
        "trainer.global_batch_pairs=4",
        "trainer.micro_batch_tokens=256",
        f"trainer.max_steps={STEPS}",
        "tracking.wandb=off",
        *others.split(),
    ]
    ended = run_train(overrides, processes=processes, prepare=count_by_phase, report=reports)
    assert ended.code == 0, ended.output
    files = [*reports.iterdir()]
    assert len(files) == processes
    for file in files:
        report = json.loads(file.read_text())
        waits = [wait for wait in report["waits"] if wait[0] != AFTER]
        after: Counter[tuple[str, str]] = Counter()
        for phase, kind, line, _, count in report["waits"]:
            if phase == AFTER and SAVED_OR_FREED.search(line):
                after[kind, re.sub(r":\d+ ", " ", line)] += count
        saved = [*run.glob(f"checkpoints/*/*/rank-{int(report['rank'] or 0):05d}-*")]
        assert after == {
            ("device", "dpo_dist/distributed/slices.py of"): len(saved),  # not one for each tensor
            ("device", "dpo_dist/distributed/memory.py wait_for_device"): 1 + ("live" in others),
        }
        found: Counter[Place] = Counter()
        for phase, kind, line, caller, count in waits:
            found[phase, kind, re.sub(r":\d+ ", " ", caller or line)] += count
        assert found == PLANNED | of_libraries, "\n".join(" | ".join(map(str, wait)) for wait in waits)
    most = max(row["memory/peak_allocated_bytes"] for row in history(run))
    assert 0 < most < 2**24, "without the matrices that measure the device"
