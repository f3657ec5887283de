"""A GPU reproduces the trajectory recorded on CPUs, with every kind of parallelism."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.setting import default_data
from tests.golden.scenario import GOLDEN, overrides, write_scenario
from tests.support.launch import ROOT, assert_same_history, history, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

WAYS = {
    "zero3": [],
    "zero3, checkpointed": ["model.gradient_checkpointing=2"],
    "zero3, compiled": ["model.fused=compile"],
    "zero2": ["parallelism.kind=zero2"],
    "ddp, checkpointed": ["parallelism.kind=ddp", "model.gradient_checkpointing=full"],
    "ddp, compiled": ["parallelism.kind=ddp", "model.fused=compile", "model.gradient_checkpointing=full"],
    "zero3, offloaded": ["parallelism.offload_parameters=cpu", "parallelism.offload_optimizer=cpu"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_recorded_trajectory_is_reached(way: str, tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path)
    # The parent of warm processes has no GPU.
    ended = train([*overrides(scenario, "sigmoid"), f"run.dir={tmp_path}/run", *WAYS[way]], cold=True)
    assert re.search(r"model: .*\bcuda\b", ended.output), ended.output
    rows = history(tmp_path / "run")
    for row in rows:
        assert "loss" not in row or 0 < row.pop("memory/peak_allocated_bytes") <= row.pop(
            "memory/peak_reserved_bytes"
        )
    assert_same_history(rows, json.loads(GOLDEN.read_text())["sigmoid"], relative=1e-3)


JOINED = """
import torch
from dpo_dist.config.schema import OptimConfig
from dpo_dist.config.schema import Dtype, ParallelismConfig
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.processes.failures import Reports
from dpo_dist.distributed.processes.join import join_world

with join_world(policy_config(ParallelismConfig(), OptimConfig(), Dtype.bf16), 60, Reports()):
    kept = torch.ones(2**22, device="cuda")
    print("segments", {segment["is_expandable"] for segment in torch.cuda.memory_snapshot()})
"""


def test_memory_is_reserved_in_expandable_segments(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    ended = subprocess.run(
        [sys.executable, "-c", JOINED],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert "segments {True}" in ended.stdout, ended.stdout + ended.stderr


def test_speed_and_memory_are_those_of_the_baselines(tmp_path: Path) -> None:
    """Those of this kind of GPU, in benchmarks/baselines.json; a GPU that is faster than them is no fault."""
    baselines = json.loads((ROOT / "benchmarks" / "baselines.json").read_text())
    of_this = baselines.get(torch.cuda.get_device_name()) or pytest.skip("there are none of this GPU")
    if default_data() == "synthetic":
        pytest.skip("they are of slices of real data, which are not here")
    out, lacks_liger = tmp_path / "figures.json", find_spec("liger_kernel") is None
    for options, variants in of_this.items():
        expected = {name: at for name, at in variants.items() if "liger" not in name or not lacks_liger}
        command = [*f"-m benchmarks mfu {options} --out {out} --variants".split(), *expected]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        found = json.loads(out.read_text())["variants"]
        for name, at in expected.items():
            assert found[name]["mfu"] >= 0.85 * at["mfu"], (options, name, found[name])
            assert found[name]["peak_bytes"] / 2**30 == pytest.approx(at["peak_gib"], rel=0.01, abs=0.5)
