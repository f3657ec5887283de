"""A SLURM of two nodes on this machine, without accounting and cgroups, for tests of batch scripts."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("node1", "node2")
GPUS = 8
_SECONDS = 120.0
_COMMAND_SECONDS = 240.0


def missing() -> str:
    """Return why no cluster can be started here; "" if one can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(absent)} (packages slurm-wlm and munge)" if absent else ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """The two nodes; its ports and files are its own, so that several can run at once.

    Args:
        folder: for its files; a short path, as those of sockets are limited.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), _path()]),
            "DPO_DIST_ENV": "",
        }
        self._ports = _free_ports(3)

    def _write_launcher(self) -> None:
        """Write a `python` without the GPUs of SLURM, which are invented."""
        launcher = self._folder / "bin" / "python"
        launcher.parent.mkdir()
        launcher.write_text(f'#!/bin/sh\nunset CUDA_VISIBLE_DEVICES\nexec {sys.executable} "$@"\n')
        launcher.chmod(0o755)

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("state", "log", *(f"spool.{node}" for node in NODES)):
            (self._folder / name).mkdir()
        (self._folder / "slurm.conf").write_text(self._configuration())
        self._write_launcher()
        version = self.output("slurmd", "-V").split()[-1].split(".")
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
        self._run("munged", "--force", f"--seed-file={self._folder / 'seed'}", *files)
        self._run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.idle_nodes() == len(NODES))

    def stop(self) -> None:
        """End all daemons, and the processes of jobs that are left."""
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld.pid", "munged.pid"):
            _kill(self._folder / name)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and all processes of jobs there at the same moment."""
        _kill(self._folder / f"slurmd.{node}.pid")
        variables = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self._folder / 'slurm.conf'}"}
        lost = [process for process in psutil.process_iter() if variables <= _environment_of(process)]
        for process in {above for one in lost for above in (one, *_step_daemons(one))}:
            _signal(process, signal.SIGKILL)

    def idle_nodes(self) -> int:
        """Return how many nodes are idle."""
        return int(self.output("sinfo", "-h", "-t", "idle", "-o", "%D") or 0)

    def output(
        self, *command: str, environment: dict[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Return the output of a command of SLURM."""
        return self._run(*command, environment=environment, cwd=cwd).stdout

    def wait_for(self, condition: Callable[[], bool], seconds: float = _SECONDS) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: it does not come.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(self.output("scontrol", "show", "nodes"))
            time.sleep(0.1)

    def _run(
        self, *command: str, environment: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            command,
            cwd=cwd,
            env=environment or self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_SECONDS,
        )
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended

    def _configuration(self) -> str:
        host, (controller, *ports) = socket.gethostname().split(".")[0], self._ports
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
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _environment_of(process: psutil.Process) -> set[str]:
    try:
        return {f"{name}={value}" for name, value in process.environ().items()}
    except (psutil.Error, OSError):
        return set()


def _step_daemons(process: psutil.Process) -> list[psutil.Process]:
    """Return SLURM's daemons of the job step that a process belongs to."""
    try:
        return [parent for parent in process.parents() if parent.name() == "slurmstepd"]
    except psutil.Error:
        return []


def _kill(pid_file: Path) -> None:
    if pid_file.is_file() and (text := pid_file.read_text().strip()):
        try:
            _signal(psutil.Process(int(text)), signal.SIGKILL)
        except psutil.NoSuchProcess:
            return


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return
