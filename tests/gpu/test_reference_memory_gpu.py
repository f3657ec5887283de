"""A freed reference releases all GPU memory, and an offloaded one uses none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.launch import ROOT, environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

MODES = ["cached, the store filled first", "live, offload cpu", "live"]


def test_only_a_live_reference_uses_memory_in_training(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    shape = ["--models", "5m", "--processes", "1", "--pairs", "4"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks", "memory", *shape, "--modes", *MODES, "--out", str(figures)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    filled, offloaded, live = (json.loads(figures.read_text())["5m, 1 rank"][mode] for mode in MODES)
    assert live["kept"] > 4 * 2**20
    assert filled["kept"] < 2**20
    assert offloaded["kept"] < live["kept"] / 4
    assert filled["peak while made ready"] > live["kept"], "it was on the GPU until the store was filled"
