"""One start of a run in this process: `python -m benchmarks.measured_start OUT OVERRIDE ...`.

`measure` starts it. Writes measurements to OUT/rank-N.json.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import launched, python

_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Start:
    """Measurements of one start, with as many steps as `trainer.stop_after_steps` allows.

    Attributes:
        seconds: from the start of the command to the row of the first step.
        cpu_seconds: of all ranks, to their ends.
        private: the most anonymous memory of each rank, sampled, in MB.
        resident: the most resident memory of each rank, with mapped files, in MB.
    """

    seconds: float
    cpu_seconds: float
    private: list[float]
    resident: list[float]


def measure(overrides: list[str], ranks: int) -> Start:
    """Start a run with these overrides on a number of ranks, each with one thread."""
    with tempfile.TemporaryDirectory() as out:
        command = launched(["-m", "benchmarks.measured_start", out, *overrides], ranks)
        began = time.monotonic()
        with _sampled(Path(out)) as private:
            python(command, {"OMP_NUM_THREADS": "1"})
        results = [json.loads(Path(out, f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return Start(
        results[0]["first_step"] - began,
        sum(result["cpu_seconds"] for result in results),
        [private[rank] for rank in range(ranks)],
        [result["resident"] for result in results],
    )


@contextlib.contextmanager
def _sampled(out: Path) -> Iterator[dict[int, float]]:
    """Yield the most anonymous memory in MB, by rank, of the processes whose ids are in OUT/rank-N.pid.

    They do not sample themselves: a library may keep Python's lock while it computes.
    """
    most: dict[int, float] = {}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            for file in out.glob("rank-*.pid"):
                rank = int(file.stem.removeprefix("rank-"))
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    most[rank] = max(most.get(rank, 0.0), _status(file.read_text(), "RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def _status(process: str, name: str) -> float:
    """Return a size in /proc/PROCESS/status in MB; 0 if the process has ended."""
    for line in Path("/proc", process, "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def main() -> None:
    out, overrides, rank = Path(sys.argv[1]), sys.argv[2:], os.environ.get("RANK", "0")
    pid = out / f"rank-{rank}.tmp"
    pid.write_text(str(os.getpid()))
    pid.rename(pid.with_suffix(".pid"))

    from dpo_dist import train
    from dpo_dist.config.load import load_run_config

    steps: list[float] = []

    def note(row: dict[str, float]) -> None:
        if "loss" in row:  # an evaluation's row has other names
            steps.append(time.monotonic())

    train.main(load_run_config(overrides), on_row=note)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {
        "first_step": min(steps, default=None),
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "resident": _status("self", "VmHWM"),
    }
    (out / f"rank-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
