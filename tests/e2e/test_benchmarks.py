"""The benchmark scripts run and say what they measured; how fast this machine is decides nothing here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.shared_data import shared_data_dir

SCRIPTS = Path(__file__).parents[2] / "scripts"


def figures(script: str, *arguments: str) -> Any:
    command = [sys.executable, str(SCRIPTS / script), "--smoke", *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout.splitlines()[-1])


def test_bench_store(tmp_path: Path) -> None:
    measured = figures("bench_store.py", "--folder", str(tmp_path))
    assert (measured["rows"], measured["shards"], measured["small_shards"]) == (20_000, 5, 50)
    assert all(value >= 0 for value in measured.values())
    assert list(tmp_path.iterdir()) == []


def test_bench_encode(tmp_path: Path) -> None:
    data = shared_data_dir()
    file = [] if data is None else ["--file", str(data / "hh_rlhf_sample.jsonl")]
    measured = figures("bench_encode.py", "--folder", str(tmp_path), "--processes", "1", "2", *file)
    assert [figure["processes"] for figure in measured["figures"]] == [1, 2]
    assert measured["records"] == 200
    assert all(figure["tokens_per_second"] > figure["records_per_second"] for figure in measured["figures"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("real", [False, True])
def test_bench_schedule(tmp_path: Path, real: bool) -> None:
    data = shared_data_dir() if real else tmp_path
    if data is None:
        pytest.skip("no slices of real data here")
    measured = figures("bench_schedule.py", "--data", str(data))
    kinds = {plan["lengths"] for plan in measured["plans"]}
    assert kinds == {"uniform", "long-tailed"} | ({"hh", "ultrafeedback"} if real else set())
    # No figure of time: how well the pairs are spread.
    for plan in measured["plans"]:
        assert plan["fill"] == pytest.approx(plan["bound"], abs=0.02)
        assert 1 <= plan["ranks"] <= plan["waiting"] + 1e-9 < 1.05
    assert measured["schedule"]["pairs"] == 100_000
