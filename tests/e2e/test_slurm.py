"""`launch/slurm/train.sbatch`, unchanged, on a SLURM of two nodes: every way in which a job ends."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import small_run
from tests.support.launch import ROOT, history, run_state, summary, train
from tests.support.warm import reserve_port

pytestmark = pytest.mark.cluster

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("node1", "node2")
GPUS = 8
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "NODE_FAIL")
# Whether the whole suite runs beside it on two cores or not.
_SECONDS = 240.0
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """The two nodes, with files of their own in `folder`: a short path, as those of sockets are limited."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), _PATH]),
            "DPO_DIST_ENV": "",
        }

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("bin", "state", "log", *(f"spool.{node}" for node in NODES)):
            (self._folder / name).mkdir()
        (self._folder / "slurm.conf").write_text(self._configuration())
        # Without the GPUs of SLURM, which are invented.
        launcher = self._folder / "bin" / "python"
        launcher.write_text(f'#!/bin/sh\nunset CUDA_VISIBLE_DEVICES\nexec {sys.executable} "$@"\n')
        launcher.chmod(0o755)
        version = self.run("slurmd", "-V").split()[-1].split(".")
        if tuple(map(int, version[:2])) >= (23, 11):  # earlier ones need no cgroups
            (self._folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for number in range(GPUS):
            (self._folder / f"gpu{number}").touch()
        gpus = f"Name=gpu File={self._folder}/gpu[0-{GPUS - 1}]"
        (self._folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {gpus}\n")
        key = self._folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        names = {"socket": "munge", "key-file": "key", "pid-file": "munged.pid", "log-file": "munged.log"}
        files = [f"--{option}={self._folder / name}" for option, name in names.items()]
        self.run("munged", "--force", f"--seed-file={self._folder / 'seed'}", *files)
        self.run("slurmctld", "-c")
        for node in NODES:
            self.run("slurmd", "-N", node)
        self.wait_for_idle()

    def wait_for_idle(self) -> None:
        """Wait until both nodes are idle."""
        self.wait_for(lambda: int(self.run("sinfo", "-h", "-t", "idle", "-o", "%D") or 0) == len(NODES))

    def stop(self) -> None:
        """End all daemons, and the processes of jobs that are left."""
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld.pid", "munged.pid"):
            _kill(self._folder / name)

    def end_daemon(self, node: str) -> None:
        """Kill the daemon of a node, whose processes go on."""
        _kill(self._folder / f"slurmd.{node}.pid")

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and all processes of jobs there at the same moment."""
        self.end_daemon(node)
        variables = {"SLURMD_NODENAME": node, "SLURM_CONF": str(self._folder / "slurm.conf")}.items()
        lost: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if variables <= process.environ().items():
                    daemons = [one for one in process.parents() if one.name() == "slurmstepd"]
                    lost |= {process, *daemons}
        for process in lost:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """Return the output of a command of SLURM."""
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment or self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout

    def wait_for(self, condition: Callable[[], bool], interval: float = 0.5) -> None:
        """Ask each `interval` seconds until a condition holds; if it never does, that is a `TimeoutError`."""
        deadline = time.monotonic() + _SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(self.run("scontrol", "show", "nodes"))
            time.sleep(interval)

    def _configuration(self) -> str:
        host, ports = socket.gethostname().split(".")[0], [reserve_port() for _ in NODES]
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._folder / 'munge'},cred_expire=5",
            "ProctrackType": "proctrack/linuxproc",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "FirstJobId": str(1 + secrets.randbelow(9000)),  # the port of a run follows from it
            "GresTypes": "gpu",
            "ReturnToService": "2",
            "KillWait": "20",
            "SlurmdTimeout": "300",
            "SchedulerParameters": "bf_interval=1,sched_interval=1,batch_sched_delay=1",
            "SlurmctldPort": str(reserve_port()),
            "SlurmctldPidFile": f"{self._folder}/slurmctld.pid",
            "SlurmctldLogFile": f"{self._folder}/log/slurmctld.log",
            "StateSaveLocation": f"{self._folder}/state",
            "SlurmdPidFile": f"{self._folder}/slurmd.%n.pid",
            "SlurmdLogFile": f"{self._folder}/log/slurmd.%n.log",
            "SlurmdSpoolDir": f"{self._folder}/spool.%n",
            "SlurmdParameters": "config_overrides",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        machine = f"NodeAddr=127.0.0.1 NodeHostname={host} CPUs=8 RealMemory=1000 Gres=gpu:{GPUS}"
        lines += [f"NodeName={node} Port={port} {machine}" for node, port in zip(NODES, ports, strict=True)]
        lines += [f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP"]
        return "\n".join(lines) + "\n"


def _kill(pid_file: Path) -> None:
    if pid_file.is_file() and (text := pid_file.read_text().strip()):
        with contextlib.suppress(psutil.Error):
            psutil.Process(int(text)).kill()


@dataclass(frozen=True)
class Job:
    """A submitted job. `number`: of the job, or of an array and its job (12_0); `screen`: its output."""

    cluster: Cluster
    number: str
    screen: Path

    def ended(self) -> tuple[str, ...]:
        """Wait until the job has ended for good; return its state, exit code and number of restarts."""
        self.wait_for(lambda: self.shown()[0] not in RUNNING)
        return self.shown()

    def shown(self) -> tuple[str, ...]:
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        fields = [re.search(rf"\b{name}=(\S*)", shown) for name in ("JobState", "ExitCode", "Restarts")]
        return tuple(found[1] for found in fields if found)

    def wait_for(self, condition: Callable[[], bool], interval: float = 0.5) -> None:
        """Wait for a condition; the job is cancelled if it does not come."""
        try:
            self.cluster.wait_for(condition, interval)
        except TimeoutError as late:
            self.cluster.run("scancel", self.number)
            raise AssertionError(f"{self.text()}\n{late}") from late

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.text(), 0.1)

    def text(self) -> str:
        return self.screen.read_text() if self.screen.exists() else ""


def submit(cluster: Cluster, folder: Path, options: list[str], arguments: list[str], **variables: str) -> Job:
    """Submit the batch script as it is; one CPU and one process for each of its tasks.

    `folder`: of the output and the job's files. `options`: of sbatch. `arguments`: of the script.
    """
    environment = cluster.environment | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "PROCESSES_PER_NODE": "1",
        "JOB_FILES": str(folder),
        **variables,
    }
    own = [
        "--parsable",
        "--cpus-per-task=1",
        f"--output={folder}/{'%A_%a' if 'EACH' in variables else '%j'}.out",
    ]
    script = str(ROOT / "launch" / "slurm" / "train.sbatch")
    number = cluster.run("sbatch", *own, *options, script, *arguments, environment=environment).strip()
    return Job(cluster, number, folder / f"{number}.out")


STEPS = ["optim.lr=1e-3", "trainer.epochs=10", "trainer.save_every=5"]
STAND_IN = r"""#!/bin/bash
# A launcher whose processes have just ended: $CODES are its exit codes, in turn for each start of the job.
start=${SLURM_RESTART_COUNT:-0}
read -ra of_starts <<<"$CODES"
code=${of_starts[start]:-0}
echo "started with ${@: -1}"
[[ $code == wait ]] && exec /bin/sleep 600
[[ $code == until* ]] && until [[ -e $UNTIL ]]; do sleep 0.1; done
[[ $code == *saved* ]] && echo checkpoint >>"$DPO_DIST_PROGRESS"
[[ $code == *person* ]] && echo "stopped by the tracker" >>"$DPO_DIST_PROGRESS"
exit "${code//[^0-9]/}"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of SLURM's daemons, which need root."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if os.geteuid() != 0 or absent:
        pytest.skip(f"not root, or not installed: {absent} (packages slurm-wlm and munge)")
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
    job.wait_for(latest.is_file, 0.1)
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


def stand_in(folder: Path) -> str:
    """Write the launcher that only ends; return the PATH that has it."""
    launcher = folder / "bin" / "python"
    launcher.parent.mkdir()
    launcher.write_text(STAND_IN)
    launcher.chmod(0o755)
    return f"{launcher.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(("order", "code"), [("SLURM queues it", 0), ("the script queues it", 137)])
def test_a_script_on_a_lost_node_leaves_the_next_start_alone(
    cluster: Cluster, tmp_path: Path, order: str, code: int
) -> None:
    """SLURM cannot end the script of a node that it has lost; `code`: that of its launcher."""
    path, ended, slept = stand_in(tmp_path), tmp_path / "ended", tmp_path / "slept"
    sleep = tmp_path / "bin" / "sleep"
    short = "[[ $1 == 600 ]] || exec /bin/sleep $1"
    sleep.write_text(f"#!/bin/bash\n{short}\nuntil [[ -e {slept} ]]; do /bin/sleep 0.1; done\n")
    sleep.chmod(0o755)
    noted, scripts = tmp_path / "environment", tmp_path / "scripts"
    noted.write_text(f"echo $$ >>{scripts}\n")
    variables = {"CODES": f"until{code} wait", "UNTIL": str(ended), "PATH": path, "DPO_DIST_ENV": str(noted)}
    job = submit(cluster, tmp_path, ["--nodes=1", "--gres=none"], [], **variables)
    job.wait_for_text("started")
    first = int(scripts.read_text())
    node = cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={job.number}").strip()
    try:
        # Drained: an answer to the launch that is read late makes SLURM take the node back.
        cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=lost")
        cluster.end_daemon(node)
        if order == "the script queues it":
            ended.touch()
            job.wait_for_text("is queued again")

        def is_started_elsewhere() -> bool:
            # Each time, as SLURM would wait for the end of the job on a node that it has taken back.
            cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
            return job.text().count("started") == 2

        job.wait_for(is_started_elsewhere)
        ended.touch()
        slept.touch()
        job.wait_for(lambda: job.shown()[2] != "1" or not psutil.pid_exists(first))
        assert job.shown()[2] == "1", f"restarts by the script of the lost node: {job.text()}"
        time.sleep(1)
        assert job.shown() == ("RUNNING", "0:0", "1"), job.text()
        assert (tmp_path / f"dpo_dist-{job.number}" / "progress").is_file()
        assert "SLURM has queued" in job.text()
    finally:
        cluster.run("scancel", job.number)
        cluster.run("slurmd", "-N", node)
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        cluster.wait_for_idle()


def test_the_end_of_the_processes_decides_the_end_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    path = stand_in(tmp_path)

    def job(codes: str, *options: str, **variables: str) -> Job:
        small = ["--nodes=1", "--gres=gpu:2", *options]
        return submit(cluster, tmp_path, small, [], CODES=codes, **{"PATH": path, **variables})

    cancelled, preempted = job("wait"), job("wait 0")
    array = job("0", "--array=0-1", EACH="run.dir=a run.dir=b")
    ends = {
        "a wrong configuration": (job("2"), "FAILED", "2:0", "0"),
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
