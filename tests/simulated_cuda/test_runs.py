"""What a run computes on CUDA is what it computes on the CPU, in every way of computing it."""

import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dpo_dist.config.verbs import VERBS
from dpo_dist.distributed import zero
from tests.e2e.test_evaluate import scores
from tests.simulated_cuda import device
from tests.simulated_cuda.runs import run_module, run_train
from tests.support.cpu_adam import stand_in_for_cpu_adam
from tests.support.invented import write_pairs
from tests.support.killed_runs import assert_same_run
from tests.support.launch import Finished, history, log, row_name, run_verb
from tests.support.own_code import ship_code
from tests.support.tiny_model import write_model

PEAKS = ("memory/peak_allocated_bytes", "memory/peak_reserved_bytes")
SAMPLED = [
    *("trainer.eval_every=2", "sampling.prompts=2", "sampling.max_new_tokens=4", "sampling.temperature=0"),
    "trainer.max_steps=2",
]
BASES = {
    "full": SAMPLED,
    "lora": [*SAMPLED, "model.adapter={r: 4}", "optim.lr=5e-3"],
    "bf16": [*SAMPLED, "model.dtype=bf16"],
    "saved": ["trainer.max_steps=4", "trainer.save_every=1"],
    "rows": [*SAMPLED, "model.trust_remote_code=true", "reference.mode=live"],
}
"""The runs on the CPU, each the expectation of several on CUDA."""
ACTIVATIONS = "model.gradient_checkpointing=2 model.activation_offload=true"
WAYS = {
    "full": (
        (
            1,
            "kind=zero3 offload_parameters=cpu offload_optimizer=cpu",
            "model.gradient_checkpointing=full",
        ),
        (1, "kind=zero2 offload_optimizer=cpu", f"reference.mode=live {ACTIVATIONS}"),
        (2, "kind=zero3 sequence_parallel=2 shard_size=1", "reference.mode=live reference.offload=cpu"),
    ),
    "lora": ((2, "kind=zero2", "reference.mode=adapter model.gradient_checkpointing=full"),),
    "rows": ((1, "kind=ddp", ""),),  # the policy's are padded, the reference computes them one by one
}
"""By base: processes, keys of `parallelism`, other keys."""
CASES = [
    pytest.param(base, *way, id=f"{base} on {' '.join(map(str, way))}") for base in WAYS for way in WAYS[base]
]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    write_model(folder / "policy", seed=1)
    ship_code(write_model(folder / "padded", seed=1), "state")
    ship_code(write_model(folder / "single", seed=2), "rows")
    write_pairs(folder / "train.jsonl", 12, seed=3)
    write_pairs(folder / "eval.jsonl", 3, seed=4)
    return folder


def smooth() -> None:
    zero.ADAM_EPS = 1e-4  # smooth where a gradient is only rounding


def on_device() -> None:
    """Before a run on the device."""
    smooth()
    stand_in_for_cpu_adam()


def command(assets: Path, run: Path, base: str, *extra: str) -> list[str]:
    models = {"model": "padded", "reference": "single"} if base == "rows" else {"model": "policy"}
    return [
        *(f"{role}.path={assets}/{folder}" for role, folder in models.items()),
        "model.dtype=fp32",
        f"data.train=[{assets}/train.jsonl]",
        f"data.eval=[{assets}/eval.jsonl]",
        f"data.cache={assets}/encoded",
        f"reference.store={run}_store",
        f"run.dir={run}",
        "optim.lr=1e-3",
        "trainer.global_batch_pairs=5",
        "trainer.micro_batch_tokens=256",
        "tracking=off",
        "sampling.prompts=0",
        *BASES[base],
        *extra,
    ]


def on_cpu(assets: Path, base: str) -> Path:
    """The run folder of a base on the CPU; trained once."""
    run = assets / f"{base}_on_cpu"
    if not run.exists():
        ended = run_verb("train", command(assets, run, base), prepare=smooth)
        assert ended.code == 0, ended.output
    return run


def assert_on_cuda(run: Path, finished: Finished, code: int = 0) -> None:
    assert finished.code == code, finished.output
    assert re.search(r"^.*model: .*\bcuda\b", finished.output, re.MULTILINE), finished.output
    kernels = r"kernels: attention by (varlen|sdpa|the model itself); fused layers: none"
    assert re.search(kernels, log(run))


def rows(run: Path) -> list[dict[str, float]]:
    """The metrics of a run on CUDA, without the memory that only a device has."""
    found = history(run)
    assert all(row[peak] > 0 for row in found if "loss" in row for peak in PEAKS)
    return [{key: value for key, value in row.items() if key not in PEAKS} for row in found]


def assert_as_on_cpu(run: Path, wanted: Path) -> None:
    """In float32, where a reward is a tenth of the difference of two sums of some hundreds."""
    for got, expected in zip(rows(run), history(wanted), strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=5e-6), row_name(expected)


def samples(run: Path) -> list[str]:
    return [file.read_text() for file in sorted((run / "samples").iterdir())]


@pytest.mark.parametrize(("base", "processes", "parallelism", "others"), CASES)
def test_every_way_of_computing_is_that_of_the_cpu(
    base: str, processes: int, parallelism: str, others: str, assets: Path, tmp_path: Path
) -> None:
    wanted, run = on_cpu(assets, base), tmp_path / "run"
    keys = [*(f"parallelism.{key}" for key in parallelism.split()), *others.split()]
    overrides = command(assets, run, base, *keys)
    assert_on_cuda(run, run_train(overrides, processes=processes, prepare=on_device))
    assert_as_on_cpu(run, wanted)
    if base == "rows":  # the code of this model generates otherwise than its forward computes
        assert not (run / "samples").exists()
    else:
        assert samples(run) == samples(wanted)


def numbers(pair: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in pair.items() if isinstance(value, float)}


def test_an_evaluation_is_that_of_the_cpu(assets: Path, tmp_path: Path) -> None:
    run = on_cpu(assets, "full")
    wanted = [numbers(pair) for pair in scores(run)]
    (run / "evaluation" / "scores.jsonl").unlink()
    ended = run_module(VERBS["evaluate"].module, [f"run.dir={run}"], report=tmp_path)
    assert ended.code == 0, ended.output
    [report] = tmp_path.iterdir()
    assert json.loads(report.read_text())["peak_bytes"] > 0, "on CUDA"
    for pair, expected in zip(scores(run), wanted, strict=True):
        assert numbers(pair) == pytest.approx(expected, rel=1e-5, abs=5e-6)


def test_bf16_drifts_as_on_the_cpu(assets: Path, tmp_path: Path) -> None:
    """With the variable-length attention of GPUs, which the CPU does not have, and micro-batches that fit."""
    run = tmp_path / "run"
    ended = run_train(command(assets, run, "bf16", "trainer.micro_batch_tokens=auto"), prepare=smooth)
    assert_on_cuda(run, ended)
    assert "micro-batches: up to 32,768 tokens (about " in log(run)
    exact, rounded = (history(on_cpu(assets, base)) for base in ("full", "bf16"))
    # The few values of one quantity are taken together: a drift of one value may be small by chance.
    for keys in (("loss", "eval_loss"), ("logps/chosen", "logps/rejected"), ("grad_norm",)):
        on_cuda, on_host = (
            max(
                abs(row[key] - true[key])
                for row, true in zip(found, exact, strict=True)
                for key in keys
                if key in true
            )
            for found in (rows(run), rounded)
        )
        assert 0 < on_cuda <= 3 * on_host, (keys, on_cuda, on_host)


def kill_in_an_update(run: Path) -> None:
    """As soon as there is a checkpoint to go on from."""

    def after_update(*_: object) -> None:
        if (run / "checkpoints" / "latest").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(after_update)


def test_a_killed_run_goes_on_to_the_same_bits(assets: Path, tmp_path: Path) -> None:
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    overrides = {
        run: command(assets, run / "run", "saved", "parallelism.kind=ddp") for run in (whole, killed)
    }
    assert_on_cuda(whole / "run", run_train(overrides[whole]))
    kill = partial(kill_in_an_update, killed / "run")
    assert_on_cuda(killed / "run", run_train(overrides[killed], prepare=kill), -signal.SIGKILL)
    assert_on_cuda(killed / "run", run_train(overrides[killed]))
    assert_same_run(killed, whole)


def full_after_the_first_step() -> None:
    """After the first optimizer step the device has no room for another forward."""
    register_optimizer_step_post_hook(lambda *_: device.set_limit(torch.cuda.memory_allocated() + 2**16))


def test_memory_that_ends_in_the_second_step_is_an_error_with_a_remedy(assets: Path, tmp_path: Path) -> None:
    ended = run_train(command(assets, tmp_path / "run", "saved"), prepare=full_after_the_first_step)
    assert_on_cuda(tmp_path / "run", ended, 2)
    assert "GPU memory is exhausted" in ended.output
    assert ("step 1/4" in ended.output, "step 2/4" in ended.output) == (True, False), ended.output
    assert re.search(r"to do: .*trainer.micro_batch_tokens", ended.output), ended.output
    assert "Traceback" not in ended.output
