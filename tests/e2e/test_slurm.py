"""`launch/slurm/train.sbatch` on a real SLURM of two nodes: signals, requeues, idle starts.

The cluster is the one of SLURM_CONF, or one started on this machine for the tests where that is possible.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launch import history, run_state, run_verb, summary, train
from tests.support.records import TEXT, jsonl
from tests.support.shared_data import shared_cluster_dir
from tests.support.tiny_model import write_model

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a cluster's commands."""
    if shutil.which("sbatch") is None:
        pytest.skip("no SLURM")
    if "SLURM_CONF" in os.environ:
        yield dict(os.environ)
        return
    scripts = shared_cluster_dir()
    if os.geteuid() != 0 or scripts is None or _is_up():
        pytest.skip("no cluster, and none can be started here")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", scripts / "slurm-up.sh", folder], check=True, capture_output=True, timeout=120)
    yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", scripts / "slurm-down.sh", folder], check=False, capture_output=True, timeout=60)


def _is_up() -> bool:
    return subprocess.run(["pgrep", "slurmctld"], check=False, capture_output=True).returncode == 0


@pytest.fixture
def submit(cluster: dict[str, str], tmp_path: Path) -> Callable[..., "Job"]:
    """Submit a run of 2 processes on 2 nodes, with whatever overrides are added."""
    pairs = jsonl(tmp_path, *(TEXT | {"prompt": f"question {number}"} for number in range(24)))
    base = [
        f"model.path={write_model(tmp_path / 'model')}",
        "model.dtype=fp32",
        f"data.train=[{pairs}]",
        "trainer.global_batch_pairs=8",
        f"run.root={tmp_path}",
        "tracking=off",
    ]

    def make(*overrides: str, **variables: str) -> Job:
        environment = cluster | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DPO_DIST_ENV": "",
            "PROCESSES_PER_NODE": "1",
            "JOB_FILES": str(tmp_path),
            **variables,
        }
        screen, arguments = tmp_path / "job.out", [*base, f"run.dir={tmp_path / 'run'}", *overrides]
        options = ["--parsable", "--nodes=2", "--cpus-per-task=1", "--time=20", f"--output={screen}"]
        command = ["sbatch", *options, str(SBATCH), *arguments]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return Job(ended.stdout.strip(), cluster, tmp_path / "run", screen, arguments)

    return make


class Job:
    """A submitted job."""

    def __init__(
        self, number: str, environment: dict[str, str], run: Path, screen: Path, arguments: list[str]
    ):
        self.number, self.environment, self.run, self.screen = number, environment, run, screen
        self.arguments = arguments

    def shown(self, field: str) -> str:
        """A field of the job, as SLURM shows it."""
        command = ["scontrol", "show", "job", self.number]
        text = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True
        ).stdout
        return re.search(rf"\b{field}=(\S*)", text)[1]

    def ended(self, seconds: float = 300) -> str:
        """Wait until the job has ended for good, and return its state."""
        self.wait_for(lambda: self.shown("JobState") not in RUNNING, seconds)
        return self.shown("JobState")

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for a condition; the job is cancelled if it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.send("--full")
                raise AssertionError(self.screen.read_text() if self.screen.exists() else "no output")
            time.sleep(0.2)

    def send(self, *options: str) -> None:
        """Call scancel for this job."""
        subprocess.run(["scancel", *options, self.number], env=self.environment, check=True)


def test_a_time_limit_saves_and_requeues_until_the_run_is_complete(submit: Callable[..., Job]) -> None:
    steps = ("trainer.epochs=12", "trainer.save_every=5", "optim.lr=1e-3")
    job = submit(*steps)
    job.wait_for((job.run / "checkpoints" / "step-000005").is_dir)
    job.send("--batch", "--signal=USR1")  # as SLURM does before the time limit
    assert job.ended() == "COMPLETED", job.screen.read_text()
    assert job.shown("Restarts") == "1"
    screen = job.screen.read_text()
    assert "stopping after step" in screen
    assert "is queued again" in screen
    assert "process lost" not in screen
    assert summary(job.run)["exit"] == "completed"
    assert summary(job.run)["world_size"] == 2
    whole = job.run.with_name("whole")
    train([*job.arguments, f"run.dir={whole}"], processes=2)
    assert history(job.run) == history(whole)
    assert not list(job.run.parent.glob("dpo_dist-*")), "files of the job are left"


def test_a_cancelled_job_leaves_a_run_that_resumes(submit: Callable[..., Job]) -> None:
    job = submit("trainer.epochs=40", "trainer.save_every=5")
    job.wait_for((job.run / "checkpoints" / "step-000005").is_dir)
    job.send()
    assert job.ended() == "CANCELLED"
    job.wait_for(lambda: run_state(job.run)["outcome"] == "preempted", 60)
    again = run_verb("train", [*job.arguments, "trainer.stop_after_steps=1"], processes=2)
    assert "resuming from" in again.output


def test_starts_without_progress_end_the_job(submit: Callable[..., Job], tmp_path: Path) -> None:
    """The run is stopped at once at every start, here by a limit of its time."""
    job = submit("trainer.max_seconds=0.001", MAX_IDLE_STARTS="2")
    assert job.ended() == "FAILED", job.screen.read_text()
    assert "2 starts in a row saved nothing" in job.screen.read_text()


def test_a_wrong_configuration_fails_without_a_requeue(submit: Callable[..., Job]) -> None:
    job = submit("loss.beta=-1")
    assert job.ended() == "FAILED", job.screen.read_text()
    assert job.shown("ExitCode") == "2:0"
    assert job.shown("Restarts") == "0"
    assert json.dumps("loss.beta")[1:-1] in job.screen.read_text()
