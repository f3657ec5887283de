"""The benchmarks run and print their figures; no test depends on the speed of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.shared_data import shared_data_dir
from tests.support.warm_benchmarks import run_benchmark

ROOT = Path(__file__).parents[2]
SECONDS = 580


def run(name: str, *arguments: str, **variables: str) -> str:
    """Run a benchmark as a person does."""
    outcome = subprocess.run(
        [sys.executable, "-m", "benchmarks", name, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def run_forked(name: str, *arguments: str, with_trl: bool = False) -> str:
    """Run a benchmark that starts trainers, all forked from the warm parent."""
    code, output, errors = run_benchmark(name, *arguments, seconds=SECONDS, with_trl=with_trl)
    assert code == 0, errors
    return output


def figures(name: str, *arguments: str, **variables: str) -> Any:
    return json.loads(run(name, "--smoke", *arguments, **variables).splitlines()[-1])


def test_both_trainers_take_the_same_first_step() -> None:
    options = ("--processes", "2", "--trl-best-micro-pairs", "1", "2")
    output = run_forked("vs_trl", "--smoke", *options, with_trl=True)
    measured = json.loads(output.splitlines()[-1])
    assert measured["trainers_agree"]
    assert max(measured["first_step_difference"].values()) <= 1e-4
    for ours in ("cold", "warm", "cold_2", "warm_2"):
        for trl in ("trl_default", "trl_best_1", "trl_best_2"):
            for quantity in ("seconds", "cpu_seconds", "peak_memory"):
                median, least, most = measured["ratios"][f"{ours}/{trl}/{quantity}"]
                assert 0 < least <= median <= most


def test_checkpointing_changes_no_loss() -> None:
    measured = json.loads(run_forked("mfu", "--smoke").splitlines()[-1])
    assert measured["layers"] == 2
    losses = {tuple(variant["loss"]) for variant in measured["variants"].values()}
    assert set(measured["variants"]) == {"plain", "full", "every2"}
    assert len(losses) == 1
    assert all(variant["mfu"] > 0 for variant in measured["variants"].values())


def test_only_a_live_reference_takes_memory_while_the_policy_trains() -> None:
    [measured] = json.loads(run_forked("memory", "--smoke").splitlines()[-1]).values()
    cold, warm, live = (of_mode["kept"] for of_mode in measured.values())
    # The model that filled the store is freed before training starts.
    assert cold < 0.1 * live
    assert warm < 0.1 * live


def test_encoding_writes_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    data = shared_data_dir()
    file = [] if data is None else ["--file", str(data / "hh_rlhf_sample.jsonl")]
    measured = figures("encode", "--work", str(tmp_path), "--processes", "1", "2", *file)
    assert [figure["processes"] for figure in measured["figures"]] == [1, 2]
    assert measured["records"] == 200
    assert all(figure["tokens_per_second"] > figure["records_per_second"] for figure in measured["figures"])
    assert list(tmp_path.iterdir()) == []
