"""A freed reference releases all GPU memory, and an offloaded one uses none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

ROOT = Path(__file__).parents[2]
MODES = ["cached, the store filled first", "live, offload cpu", "live"]


def test_only_a_live_reference_uses_memory_in_training() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        "--models",
        "5m",
        "--processes",
        "1",
        "--pairs",
        "4",
    ]
    ended = subprocess.run(
        [*command, "--modes", *MODES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout.splitlines()[-1])["5m, 1 rank"]
    freed, offloaded, live = (measured[mode]["kept"] for mode in MODES)
    assert live > 4 * 2**20
    assert freed < 2**20
    assert offloaded < live / 4
