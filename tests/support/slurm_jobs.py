"""Jobs of `launch/slurm/train.sbatch` on a cluster of the tests."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from tests.support.slurm import Cluster

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "NODE_FAIL")
# Whether the whole suite runs beside it on two cores or not.
_SECONDS = 240.0
STAND_IN = r"""#!/bin/bash
# A launcher whose processes have just ended: $CODES are its exit codes, in turn for each start of the job.
start=${SLURM_RESTART_COUNT:-0}
read -ra of_starts <<<"$CODES"
code=${of_starts[start]:-0}
[[ $code == *saved* ]] && echo checkpoint >>"$DPO_DIST_PROGRESS"
[[ $code == *person* ]] && echo "stopped by the tracker" >>"$DPO_DIST_PROGRESS"
exit "${code//[^0-9]/}"
"""


class Job:
    """A submitted job; all jobs of an array have one screen each.

    Args:
        cluster: that has it.
        number: of the job, or of the array and the job in it: 12_0.
        screen: the file of its output.
    """

    def __init__(self, cluster: Cluster, number: str, screen: Path):
        self.cluster, self.number, self.screen = cluster, number, screen

    def shown(self, *fields: str) -> tuple[str, ...]:
        """Fields of the job, as SLURM shows them."""
        text = self.cluster.output("scontrol", "show", "job", self.number)
        return tuple(found[1] for field in fields if (found := re.search(rf"\b{field}=(\S*)", text)))

    def ended(self) -> tuple[str, ...]:
        """Wait until the job has ended for good; its state, exit code and number of restarts."""
        last: list[tuple[str, ...]] = []

        def is_over() -> bool:
            last.append(self.shown("JobState", "ExitCode", "Restarts"))
            return last[-1][0] not in RUNNING

        self.wait_for(is_over)
        return last[-1]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; the job is cancelled if it does not come."""
        try:
            self.cluster.wait_for(condition, _SECONDS)
        except TimeoutError as late:
            self.cancel()
            raise AssertionError(f"{self.text()}\n{late}") from late

    def wait_for_text(self, text: str) -> None:
        """Wait until the job has printed `text`."""
        self.wait_for(lambda: text in self.text())

    def text(self) -> str:
        """The output so far."""
        return self.screen.read_text() if self.screen.exists() else ""

    def cancel(self) -> None:
        """Cancel the job, as its owner does."""
        self.cluster.output("scancel", self.number)


def submit(cluster: Cluster, folder: Path, options: list[str], arguments: list[str], **variables: str) -> Job:
    """Submit the batch script as it is; one CPU and one process for each of its tasks.

    Args:
        cluster: to run on.
        folder: for the output and the job's files.
        options: of sbatch.
        arguments: of the script.
        variables: added to the environment.
    """
    environment = cluster.environment | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "DPO_DIST_ENV": "",
        "PROCESSES_PER_NODE": "1",
        "JOB_FILES": str(folder),
        **variables,
    }
    screen = folder / ("%A_%a.out" if any("--array" in option for option in options) else "%j.out")
    own = ["--parsable", "--cpus-per-task=1", f"--output={screen}", *options]
    number = cluster.output(
        "sbatch", *own, str(SBATCH), *arguments, environment=environment, cwd=ROOT
    ).strip()
    return Job(cluster, number, folder / f"{number}.out")


def jobs_of(array: Job, number: int) -> list[Job]:
    """The jobs of an array."""
    names = [f"{array.number}_{index}" for index in range(number)]
    return [Job(array.cluster, name, array.screen.with_name(f"{name}.out")) for name in names]


def with_stand_in(folder: Path) -> str:
    """Return a PATH on which `python` is STAND_IN."""
    launcher = folder / "bin" / "python"
    launcher.parent.mkdir()
    launcher.write_text(STAND_IN)
    launcher.chmod(0o755)
    return f"{launcher.parent}:{os.environ['PATH']}"


def steps_of(run: Path) -> list[int]:
    """The steps in the metrics of a run, in the order of the file."""
    rows = json.loads((run / "dpo_metrics" / "log_history.json").read_text())
    return [row["step"] for row in rows if "loss" in row]
