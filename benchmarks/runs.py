"""Run a trainer in separate processes, so that each run has its own start-up and peak memory."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.setting import ROOT

Result = dict[str, Any]

_TWO_PROCESSES = ROOT / "launch" / "accelerate" / "cpu_2.yaml"


class RunFailedError(SystemExit):
    """A process of a benchmark failed; the message is the end of its output."""


@dataclass(frozen=True)
class Run:
    """One run of a trainer.

    Attributes:
        folder: folder that `setting.prepare` has written.
        variant: `dpo_dist`, `trl_default`, `trl_best_N` (N pairs per micro-batch), `guest` (TRL's defaults by
            our import) or `guest_beta` (the same with another beta).
        store: the reference store of dpo_dist and of the guest.
        overrides: further keys of dpo_dist.
        saves: whether dpo_dist writes checkpoint and model.
        weighs_reference: whether the memory of dpo_dist's reference is measured.
    """

    folder: str
    variant: str
    store: str
    overrides: tuple[str, ...] = ()
    saves: bool = True
    weighs_reference: bool = False


def start(run: Run, processes: int = 1, threads: int | None = None) -> Result:
    """Run a trainer; return rank 0's measurements, with CPU seconds of all ranks and the largest memory.

    Raises:
        RunFailedError: a process ended with an error.
    """
    ranks = _start(run, processes, threads)
    for phase in ("training", "reference", "whole"):
        ranks[0][phase]["cpu_seconds"] = sum(rank[phase]["cpu_seconds"] for rank in ranks)
    ranks[0]["peak_bytes"] = max(rank["peak_bytes"] for rank in ranks)
    ranks[0]["memory"] = {name: max(rank["memory"][name] for rank in ranks) for name in ranks[0]["memory"]}
    return ranks[0]


def _start(run: Run, processes: int, threads: int | None) -> list[Result]:
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(max(1, threads // processes))}
    with tempfile.TemporaryDirectory(dir=run.folder) as out:
        arguments = ["-m", "benchmarks.trainers", out, json.dumps(dataclasses.asdict(run))]
        python(launched(arguments, processes), environment)
        ranks: list[Result] = [json.loads(file.read_text()) for file in sorted(Path(out).glob("rank-*.json"))]
    if len(ranks) != processes:
        raise RunFailedError(f"{run.variant}: {len(ranks)} of {processes} processes wrote a result")
    return ranks


def launched(arguments: list[str], processes: int) -> list[str]:
    """Return the arguments of Python that start a module on a number of processes."""
    if processes == 1:
        return arguments
    accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*accelerate, "--config_file", str(_TWO_PROCESSES), "--num_processes", str(processes), *arguments]


def python(arguments: list[str], environment: dict[str, str]) -> None:
    """Run Python in a separate process.

    Raises:
        RunFailedError: it ended with an error.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ended = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RunFailedError(f"{' '.join(arguments)[:200]} failed:\n{ended.stdout[-4000:]}")


def in_fork(work: Callable[[], None]) -> None:
    """Call `work` in a forked process: in this one, its memory would add to the peak of later children."""
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
        raise SystemExit("the benchmark's inputs could not be prepared: see the traceback above")
