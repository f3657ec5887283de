"""The benchmark against TRL runs to its end, and both trainers compute the same first step."""

import json
import subprocess
import sys

import pytest

from tests.support.launch import environment


@pytest.mark.timeout(300)
def test_the_benchmark_ends_with_its_ratios_and_finds_both_trainers_equal() -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.vs_trl",
            "--smoke",
            "--processes",
            "2",
            "--trl-best-micro-pairs",
            "1",
            "2",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    last = json.loads(ended.stdout.splitlines()[-1])
    assert max(last["first_step_difference"].values()) <= 1e-4
    for ours in ("cold", "warm", "cold_2", "warm_2"):
        for trl in ("trl_default", "trl_best_1", "trl_best_2"):
            for what in ("seconds", "cpu_seconds", "peak_memory"):
                median, least, most = last["ratios"][f"{ours}/{trl}/{what}"]
                assert 0 < least <= median <= most
