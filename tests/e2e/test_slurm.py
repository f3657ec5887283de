"""`launch/slurm/train.sbatch`, unchanged, on a SLURM of two nodes: every way in which a job ends."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import small_run
from tests.support.launch import assert_same_history, history, run_state, summary, train
from tests.support.slurm import Cluster, missing, started
from tests.support.slurm_jobs import Job, steps_of, submit, with_stand_in

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing())]

STEPS = ["optim.lr=1e-3", "trainer.epochs=20", "trainer.save_every=5"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with started(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


def test_the_end_of_the_processes_decides_the_end_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    path = with_stand_in(tmp_path)

    def job(codes: str, *options: str, **variables: str) -> Job:
        small = ["--nodes=1", "--gres=gpu:2", *options]
        return submit(cluster, tmp_path, small, [], CODES=codes, **{"PATH": path, **variables})

    jobs = {
        "a wrong configuration": job("2"),
        "divergence; the launcher has ended the others": job("3,75,75", PROCESSES_PER_NODE="3"),
        "a bug": job("1,75", PROCESSES_PER_NODE="2"),
        "the stop button": job("75person"),
        "a launcher that is not there": job("", PATH=f"{tmp_path}:/usr/sbin:/usr/bin:/bin"),
        "an array of equal jobs": job("0", "--array=0"),
        "stopped, saved": job("75saved"),
        "killed by a second signal": job("143"),
        "killed": job("none", PROCESSES_PER_NODE="2"),
        "stopped again and again": job("75 75 75 75", MAX_IDLE_STARTS="2"),
        "saved in the first start only": job("75saved none none", MAX_IDLE_STARTS="1"),
    }
    assert {name: job.ended() for name, job in jobs.items()} == {
        "a wrong configuration": ("FAILED", "2:0", "0"),
        "divergence; the launcher has ended the others": ("FAILED", "3:0", "0"),
        "a bug": ("FAILED", "1:0", "0"),
        "the stop button": ("FAILED", "75:0", "0"),
        "a launcher that is not there": ("FAILED", "127:0", "0"),
        "an array of equal jobs": ("FAILED", "2:0", "0"),
        "stopped, saved": ("COMPLETED", "0:0", "1"),
        "killed by a second signal": ("COMPLETED", "0:0", "1"),
        "killed": ("COMPLETED", "0:0", "1"),
        "stopped again and again": ("FAILED", "1:0", "1"),
        "saved in the first start only": ("FAILED", "1:0", "1"),
    }
    assert "stopped by the tracker" in jobs["the stop button"].text()
    assert "2 starts in a row saved nothing" in jobs["stopped again and again"].text()
    assert not list(tmp_path.glob("dpo_dist-*")), "files of the jobs are left"


def test_a_job_survives_its_time_limit_and_a_node(cluster: Cluster, assets: Path, tmp_path: Path) -> None:
    """Two nodes, a requested stop, two nodes, one of them dies, one node: one run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = [*small_run(assets, tmp_path), *STEPS]
    job = submit(cluster, tmp_path, ["--nodes=1-2"], command)
    job.wait_for((run / "checkpoints" / "step-000005").is_dir)
    cluster.output("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the time limit
    job.wait_for_text("is queued again")
    stopped = run_state(run)
    assert stopped["outcome"] == "preempted"
    job.wait_for_text(f"resuming from {run}/checkpoints/step-{stopped['step']:06d}")
    reached = stopped["step"] // 5 * 5 + 10
    job.wait_for(lambda: (run / "checkpoints" / "latest").read_text() >= f"step-{reached:06d}")
    cluster.kill_node("node2")
    cluster.output("scontrol", "update", "nodename=node2", "state=down", "reason=killed")
    assert job.ended() == ("COMPLETED", "0:0", "2"), job.text()
    cluster.start_node("node2")
    train([*command, f"run.dir={whole}", f"reference.store={tmp_path / 'another store'}"], processes=2)

    assert summary(run)["exit"] == "completed"
    assert summary(run)["world_size"] == 1
    assert steps_of(run) == steps_of(whole)
    assert history(run)[:reached] == history(whole)[:reached]
    assert_same_history(history(run), history(whole), 1e-4)
    assert not list(tmp_path.glob("dpo_dist-*")), "files of the job are left"
