"""`launch/slurm/train.sbatch`, unchanged, on a SLURM of two nodes: every way in which a job ends."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import small_run
from tests.support.launch import history, run_state, summary, train
from tests.support.slurm import Cluster, Job, missing, submit

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing())]

STEPS = ["optim.lr=1e-3", "trainer.epochs=16", "trainer.save_every=5"]
STAND_IN = r"""#!/bin/bash
# A launcher whose processes have just ended: $CODES are its exit codes, in turn for each start of the job.
start=${SLURM_RESTART_COUNT:-0}
read -ra of_starts <<<"$CODES"
code=${of_starts[start]:-0}
echo "started with ${@: -1}"
[[ $code == wait ]] && exec sleep 600
[[ $code == *saved* ]] && echo checkpoint >>"$DPO_DIST_PROGRESS"
[[ $code == *person* ]] && echo "stopped by the tracker" >>"$DPO_DIST_PROGRESS"
exit "${code//[^0-9]/}"
"""


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


def test_a_job_that_stops_before_its_time_limit_is_continued(
    cluster: Cluster, assets: Path, tmp_path: Path
) -> None:
    """A requested stop on two nodes: one run."""
    run, latest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "latest"
    job = submit(cluster, tmp_path, ["--nodes=1-2"], [*small_run(assets, tmp_path), *STEPS])
    job.wait_for(latest.is_file)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the time limit
    job.wait_for_text("is queued again")
    stopped = run_state(run)
    assert stopped["outcome"] == "preempted"
    assert job.ended() == ("COMPLETED", "0:0", "1"), job.text()
    assert f"resuming from {run}/checkpoints/step-{stopped['step']:06d}" in job.text()
    assert (summary(run)["exit"], summary(run)["world_size"]) == ("completed", 2)
    whole = tmp_path / "whole" / "run"
    train([*small_run(assets, whole.parent), *STEPS], processes=2)
    assert history(run) == history(whole)
    assert not list(tmp_path.glob("dpo_dist-*")), "files of the job are left"


def test_the_end_of_the_processes_decides_the_end_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    launcher = tmp_path / "bin" / "python"
    launcher.parent.mkdir()
    launcher.write_text(STAND_IN)
    launcher.chmod(0o755)
    path = f"{launcher.parent}:{os.environ['PATH']}"

    def job(codes: str, *options: str, **variables: str) -> Job:
        small = ["--nodes=1", "--gres=gpu:2", *options]
        return submit(cluster, tmp_path, small, [], CODES=codes, **{"PATH": path, **variables})

    cancelled, preempted = job("wait"), job("wait 0")
    array = job("0", "--array=0-1", EACH="run.dir=a run.dir=b")
    ends = {
        "a wrong configuration": (job("2"), "FAILED", "2:0", "0"),
        "divergence": (job("3"), "FAILED", "3:0", "0"),
        "a bug": (job("1"), "FAILED", "1:0", "0"),
        "the stop button": (button := job("75person"), "FAILED", "75:0", "0"),
        "a launcher that is not there": (job("127"), "FAILED", "127:0", "0"),
        "an array of equal jobs": (job("0", "--array=0"), "FAILED", "2:0", "0"),
        "stopped, saved": (job("75saved"), "COMPLETED", "0:0", "1"),
        "killed by a second signal": (job("143"), "COMPLETED", "0:0", "1"),
        "killed": (job("137"), "COMPLETED", "0:0", "1"),
        "a process does not answer": (job("69"), "COMPLETED", "0:0", "1"),
        "stopped again and again": (idle := job("75 75 75 75", MAX_IDLE_STARTS="2"), "FAILED", "1:0", "1"),
        "saved in the first start only": (job("75saved 137 69", MAX_IDLE_STARTS="1"), "FAILED", "1:0", "1"),
        "preempted by SLURM": (preempted, "COMPLETED", "0:0", "1"),
    }
    for waiting, command in ((cancelled, ["scancel"]), (preempted, ["scontrol", "requeue"])):
        waiting.wait_for_text("started")
        cluster.run(*command, waiting.number)
    for name, (ending, *expected) in ends.items():
        assert [*ending.ended()] == expected, name
    state, _, restarts = cancelled.ended()
    assert (state, restarts) == ("CANCELLED", "0")
    assert "stopped by the tracker" in button.text()
    assert "2 starts in a row saved nothing" in idle.text()
    for number, own in enumerate(("run.dir=a", "run.dir=b")):
        one = Job(cluster, f"{array.number}_{number}", tmp_path / f"{array.number}_{number}.out")
        assert one.ended() == ("COMPLETED", "0:0", "0")
        assert f"started with {own}" in one.text()
    on_both_nodes = job("wait 0", "--nodes=1-2")
    on_both_nodes.wait_for(lambda: on_both_nodes.text().count("started") == 2)
    cluster.kill_node("node2")
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=killed")
    assert on_both_nodes.ended() == ("COMPLETED", "0:0", "1"), on_both_nodes.text()
    assert on_both_nodes.text().count("started") == 3, "again on the other node"
    assert not [left for left in tmp_path.glob("dpo_dist-*") if not left.name.endswith(cancelled.number)]
