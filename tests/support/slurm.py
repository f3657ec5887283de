"""A SLURM of two nodes on this machine, without accounting and cgroups, and jobs of the batch script."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("node1", "node2")
GPUS = 8
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "NODE_FAIL")
# Whether the whole suite runs beside it on two cores or not.
_SECONDS = 240.0
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> str:
    """Return why no cluster can be started here; "" if one can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"not installed: {', '.join(absent)} (packages slurm-wlm and munge)" if absent else ""


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
        self.wait_for(lambda: int(self.run("sinfo", "-h", "-t", "idle", "-o", "%D") or 0) == len(NODES))

    def stop(self) -> None:
        """End all daemons, and the processes of jobs that are left."""
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld.pid", "munged.pid"):
            _kill(self._folder / name)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and all processes of jobs there at the same moment."""
        _kill(self._folder / f"slurmd.{node}.pid")
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

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; if it does not come, that is a `TimeoutError`."""
        deadline = time.monotonic() + _SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(self.run("scontrol", "show", "nodes"))
            time.sleep(0.1)

    def _configuration(self) -> str:
        host, (controller, *ports) = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
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
            "SlurmctldPort": str(controller),
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


def _free_ports(number: int) -> list[int]:
    """Return ports that nobody uses at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


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
        last: list[tuple[str, ...]] = []

        def is_over() -> bool:
            shown = self.cluster.run("scontrol", "show", "job", self.number)
            fields = [re.search(rf"\b{name}=(\S*)", shown) for name in ("JobState", "ExitCode", "Restarts")]
            last.append(tuple(found[1] for found in fields if found))
            return last[-1][0] not in RUNNING

        self.wait_for(is_over)
        return last[-1]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; the job is cancelled if it does not come."""
        try:
            self.cluster.wait_for(condition)
        except TimeoutError as late:
            self.cluster.run("scancel", self.number)
            raise AssertionError(f"{self.text()}\n{late}") from late

    def wait_for_text(self, text: str) -> None:
        """Wait until the job has printed `text`."""
        self.wait_for(lambda: text in self.text())

    def text(self) -> str:
        """Return the output so far."""
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
