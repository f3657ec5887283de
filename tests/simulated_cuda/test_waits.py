"""In a step the host waits for the device once, where it reads the metrics, and where DeepSpeed waits.

A wait elsewhere drains the device's queue: the device then idles until the host has queued work again.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.steps import loop
from tests.simulated_cuda import device
from tests.simulated_cuda.runs import run_train
from tests.support import tiny
from tests.support.families import tiny_family
from tests.support.invented import write_pairs
from tests.support.launch import history
from tests.support.tiny_model import write_model

STEPS, COUNTED = 4, 2  # of a run; the last of them, as DeepSpeed's first steps record the order of gathers
AFTER = "after the last step"
SAVED_OR_FREED = re.compile(
    r"distributed/(checkpoint/slices|memory).py:\d+ (?!<genexpr>)"
)  # without the reads of Adam's step
ADAPTER = "model.adapter={r:4} reference.mode=adapter"
ROUTERS = "loss.router.aux_coefficient=0.1"
MASKED = "data.untrained=[formatting] model.gradient_checkpointing=full"  # tokens without loss in responses
WAYS = {
    "ddp, a live reference": (1, "experts", f"parallelism.kind=ddp reference.mode=live {ROUTERS}"),
    "zero2, an adapter, a coupled loss": (1, "dense", f"parallelism.kind=zero2 loss.kind=aot {ADAPTER}"),
    "zero3, two ranks share sequences": (2, "experts", f"parallelism.sequence_parallel=2 {ROUTERS} {MASKED}"),
    "zero3, two ranks, a hybrid": (2, "hybrid", "reference.mode=live"),
}
"""Processes, model and other keys."""
PLANNED = {
    ("step", "copy to host, pageable", "dpo_dist/training/steps/step.py reduce_step"): COUNTED,
}
OF_DEEPSPEED = (
    (PolicyEngine, "backward", "backward"),
    (PolicyEngine, "step", "optimizer"),
    (ReferenceProvider, "token_logps", "reference"),
)
"""Class, method, phase: it waits for its own streams and copies, and reads the gradient's norm to update."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waits")
    write_model(folder / "dense", seed=1)
    tiny_family("qwen3_moe", len(tiny.qwen())).save_pretrained(folder / "experts")
    tiny_family("qwen3_5_text", len(tiny.qwen())).save_pretrained(folder / "hybrid")
    for name in ("experts", "hybrid"):
        tiny.qwen().save_pretrained(folder / name)
    write_pairs(folder / "train.jsonl", 12, seed=3, goes_on=True)
    return folder


def count_by_phase() -> None:
    """Tell the device the phase of each step, and let it forget the waits before those that are counted."""
    begun = 0

    def begin_step(*given: Any, real: Callable[..., Any] = loop.train_step) -> Any:
        nonlocal begun
        begun += 1
        if begun == STEPS - COUNTED + 1:
            device.reset_waits()
        device.enter_phase("step")
        return real(*given)

    def end_step(*given: Any, real: Callable[..., Any] = loop.count_step, **options: Any) -> None:
        device.enter_phase("between steps" if begun < STEPS else AFTER)
        real(*given, **options)

    def in_phase(phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            device.enter_phase(phase)
            result = real(*given, **options)
            device.enter_phase("step")
            return result

        return call

    mock.patch.multiple(loop, train_step=begin_step, count_step=end_step).start()
    for owner, name, phase in OF_DEEPSPEED:
        mock.patch.object(owner, name, in_phase(phase, getattr(owner, name))).start()


@pytest.mark.parametrize("way", WAYS)
def test_the_host_waits_for_the_device_once_a_step(way: str, assets: Path, tmp_path: Path) -> None:
    processes, model, others = WAYS[way]
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
        "tracking=off",
        *others.split(),
    ]
    ended = run_train(overrides, processes=processes, prepare=count_by_phase, report=reports)
    assert ended.code == 0, ended.output
    assert ended.output.count("flash-linear-attention is not installed") == (model == "hybrid")
    files = [*reports.iterdir()]
    assert len(files) == processes
    phases = {phase for _, _, phase in OF_DEEPSPEED}
    for file in files:
        report = json.loads(file.read_text())
        waits = [wait for wait in report["waits"] if wait[0] != AFTER]
        after: Counter[tuple[str, str]] = Counter()
        for phase, kind, line, _, count in report["waits"]:
            if phase == AFTER and SAVED_OR_FREED.search(line):
                after[kind, re.sub(r":\d+ ", " ", line)] += count
        saved = [*run.glob(f"checkpoints/*/*/rank-{int(report['rank'] or 0):05d}-*")]
        assert after == {
            ("device", "dpo_dist/distributed/checkpoint/slices.py fill"): len(
                saved
            ),  # not one for each tensor
            ("device", "dpo_dist/distributed/memory.py wait_for_device"): 1 + ("live" in others),
        }
        found: Counter[tuple[str, str, str]] = Counter()
        for phase, kind, line, caller, count in waits:
            if not (phase in phases and caller.startswith("deepspeed/")):
                found[phase, kind, re.sub(r":\d+ ", " ", caller or line)] += count
        assert found == PLANNED, "\n".join(" | ".join(map(str, wait)) for wait in waits)
    most = max(row["memory/peak_allocated_bytes"] for row in history(run))
    assert 0 < most < 2**24, "without the matrices that measure the device"
