"""Work done in processes of its own, so that each starts from nothing and its peak memory is its own."""

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.assets import ROOT

Result = dict[str, Any]

LAUNCHER = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


def in_fork(work: Callable[[], None]) -> None:
    """Do `work` elsewhere: a child's peak memory starts at what its parent holds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("what the benchmark runs on could not be made")


def run_variant(folder: Path, variant: str, store: Path, processes: int, threads: int) -> Result:
    """One run of `benchmarks/variant.py`; CPU seconds are of all its processes, memory of the largest."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    program = ["-m", "benchmarks.variant", str(folder), variant, str(store), str(out)]
    launch = [sys.executable]
    if processes > 1:
        launch = [*LAUNCHER, "--config_file", str(ROOT / "launch" / "accelerate" / "cpu_2.yaml")]
    ended = subprocess.run(
        [*launch, *program],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(max(1, threads // processes)),
            "TOKENIZERS_PARALLELISM": "false",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    ranks = [json.loads(file.read_text()) for file in sorted(out.glob("rank-*.json"))]
    if ended.returncode or len(ranks) != processes:
        raise SystemExit(f"{variant} failed:\n{ended.stdout[-4000:]}")
    for phase in ("training", "reference", "whole"):
        ranks[0][phase]["cpu_seconds"] = sum(rank[phase]["cpu_seconds"] for rank in ranks)
    ranks[0]["peak_bytes"] = max(rank["peak_bytes"] for rank in ranks)
    result: Result = ranks[0]
    return result
