"""`launch/slurm/train.sbatch`, unchanged, on a SLURM of two nodes: every way in which a job ends."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_dist import store
from tests.e2e.conftest import small_run
from tests.support.launch import assert_same_history, history, run_state, summary, train
from tests.support.slurm import Cluster, missing
from tests.support.slurm_jobs import Job, jobs_of, steps_of, submit, with_stand_in

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing())]

STEPS = ["optim.lr=1e-3", "trainer.epochs=20", "trainer.save_every=5"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    try:
        try:
            cluster.start()
        except (AssertionError, OSError) as error:
            pytest.skip(f"SLURM does not start on this machine: {error}")
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train([*small_run(assets, folder), *STEPS], processes=2)
    return folder / "run"


def test_the_end_of_the_processes_decides_the_end_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    path = with_stand_in(tmp_path)

    def job(codes: str, *options: str, **variables: str) -> Job:
        small = ["--nodes=1", "--gres=gpu:2", *options]
        return submit(cluster, tmp_path, small, [], CODES=codes, **{"PATH": path, **variables})

    jobs = {
        "a wrong configuration": job("2"),
        "divergence": job("3"),
        "a bug": job("1"),
        "the stop button": job("75person"),
        "a launcher that is not there": job("127"),
        "an array of equal jobs": job("0", "--array=0"),
        "stopped, saved": job("75saved"),
        "killed by a second signal": job("143"),
        "killed": job("137"),
        "a process does not answer": job("69"),
        "stopped again and again": job("75 75 75 75", MAX_IDLE_STARTS="2"),
        "saved in the first start only": job("75saved 137 69", MAX_IDLE_STARTS="1"),
    }
    assert {name: job.ended() for name, job in jobs.items()} == {
        "a wrong configuration": ("FAILED", "2:0", "0"),
        "divergence": ("FAILED", "3:0", "0"),
        "a bug": ("FAILED", "1:0", "0"),
        "the stop button": ("FAILED", "75:0", "0"),
        "a launcher that is not there": ("FAILED", "127:0", "0"),
        "an array of equal jobs": ("FAILED", "2:0", "0"),
        "stopped, saved": ("COMPLETED", "0:0", "1"),
        "killed by a second signal": ("COMPLETED", "0:0", "1"),
        "killed": ("COMPLETED", "0:0", "1"),
        "a process does not answer": ("COMPLETED", "0:0", "1"),
        "stopped again and again": ("FAILED", "1:0", "1"),
        "saved in the first start only": ("FAILED", "1:0", "1"),
    }
    assert "stopped by the tracker" in jobs["the stop button"].text()
    assert "2 starts in a row saved nothing" in jobs["stopped again and again"].text()
    assert not list(tmp_path.glob("dpo_dist-*")), "files of the jobs are left"


def test_a_job_survives_its_time_limit_and_a_node(
    cluster: Cluster, assets: Path, tmp_path: Path, whole: Path
) -> None:
    """Two nodes, a requested stop, two nodes, one of them dies, one node: one run."""
    run, latest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "latest"
    job = submit(cluster, tmp_path, ["--nodes=1-2"], [*small_run(assets, tmp_path), *STEPS])
    job.wait_for(latest.is_file)
    cluster.output("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the time limit
    job.wait_for_text("is queued again")
    stopped = run_state(run)
    assert stopped["outcome"] == "preempted"
    job.wait_for_text(f"resuming from {run}/checkpoints/step-{stopped['step']:06d}")
    reached = stopped["step"] // 5 * 5 + 10
    job.wait_for(lambda: latest.read_text() >= f"step-{reached:06d}")
    cluster.kill_node("node2")
    cluster.output("scontrol", "update", "nodename=node2", "state=down", "reason=killed")
    assert job.ended() == ("COMPLETED", "0:0", "2"), job.text()
    cluster.start_node("node2")
    assert summary(run)["exit"] == "completed"
    assert summary(run)["world_size"] == 1
    assert steps_of(run) == steps_of(whole)
    assert history(run)[:reached] == history(whole)[:reached]
    assert_same_history(history(run), history(whole), 1e-4)
    assert not list(tmp_path.glob("dpo_dist-*")), "files of the job are left"


def test_an_array_fills_one_store(cluster: Cluster, assets: Path, tmp_path: Path, whole: Path) -> None:
    """Two jobs score at the same time; then one is preempted, and the other one cancelled."""
    command = [*small_run(assets, tmp_path), *STEPS, "reference.rows_per_shard=2"]
    base = [argument for argument in command if not argument.startswith("run.dir=")]
    runs = [tmp_path / f"run{number}" for number in range(2)]
    each = [f"run.dir={run}" for run in runs]
    array = submit(cluster, tmp_path, ["--nodes=1", "--array=0-1"], base, EACH=" ".join(each))
    preempted, cancelled = jobs_of(array, 2)
    events = {
        runs[0]: lambda: cluster.output("scontrol", "requeue", preempted.number),
        runs[1]: lambda: cluster.output("scancel", cancelled.number),
    }

    def have_happened() -> bool:
        for run in [run for run in events if (run / "checkpoints" / "latest").is_file()]:
            events.pop(run)()
        return not events

    array.wait_for(have_happened)
    state, _, restarts = cancelled.ended()
    assert (state, restarts) == ("CANCELLED", "0"), cancelled.text()
    assert preempted.ended() == ("COMPLETED", "0:0", "1"), preempted.text()
    train([*base, each[1]])
    responses = summary(whole)["reference"]["computed"]
    for run in runs:
        reference = summary(run)["reference"]
        assert reference["hits"] + reference["computed"] == responses
        assert steps_of(run) == steps_of(whole)
        assert_same_history(history(run), history(whole), 1e-4)
    assert store.main(["verify", str(tmp_path / "store")]) == 0
