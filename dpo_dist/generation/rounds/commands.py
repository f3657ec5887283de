"""Run a verb as a command of its own: configuration file, launcher, signals, exit code."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from dpo_dist.atomic import write_text
from dpo_dist.config.load import to_yaml
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError, ExitCode
from dpo_dist.progress_file import EXIT_CODES, exit_codes
from dpo_dist.safe_stream import output_descriptor
from dpo_dist.signals import stop_signals

_EXPERIMENT = "round"
_BY_SIGNAL = 128
_REASONS = (ExitCode.invalid, ExitCode.diverged, ExitCode.preempted)


def command_of(verb: str, config: RunConfig, folder: Path, start: Sequence[str]) -> list[str]:
    """Write `config` as an experiment below `folder`; return the command that runs the verb with it.

    The command is complete: it does the same when it is typed by hand. The file has no secrets.

    Args:
        verb: `pairs` or `train`.
        config: of the verb.
        folder: for `experiment/round.yaml`.
        start: from `launcher`.
    """
    write_text(folder / "experiment" / f"{_EXPERIMENT}.yaml", to_yaml(config))
    options = ["--config-dir", str(folder), f"+experiment={_EXPERIMENT}"]
    return [*start, "-m", f"dpo_dist.{verb}", *options]


def launcher(written: str | None) -> list[str]:
    """Return the start of a command: as written, by default `dpo_dist.launch` if there are several GPUs.

    Raises:
        ConfigError: it is not one command.
    """
    if written is not None:
        try:
            return shlex.split(written)
        except ValueError as fault:
            raise ConfigError(
                "the launcher is not a command",
                where="pairs.launcher",
                got=f"{written}: {fault}",
                remedy="correct its quotes",
            ) from None
    import torch  # noqa: PLC0415  (slow, and only needed here)

    several = torch.cuda.device_count() > 1
    return [sys.executable, *(("-m", "dpo_dist.launch") if several else ())]


def run_command(command: list[str], codes: Path) -> int:
    """Run a command to its end and return its exit code; signals to stop are passed on to its processes.

    They end with this process, even if that is killed.

    Args:
        command: from `command_of`.
        codes: path for the exit codes of its processes: a launcher replaces them by its own, usually 1.

    Raises:
        ConfigError: the launcher does not exist.
        KeyboardInterrupt: the command has ended after SIGINT.
        SystemExit: it has ended after another signal, without a reason of its own.
    """
    exit_codes(codes)  # of a former start
    with _PassedOn() as signals:
        process = _started(command, codes)
        with _ended_together(process.pid):
            signals.pass_to(process.pid)
            code = process.wait()
    code = _own_code(codes, code)
    if signal.SIGINT in signals.received:
        raise KeyboardInterrupt
    if signals.received and code not in _REASONS:
        raise SystemExit(128 + signals.received[0])
    return code


def _started(command: list[str], codes: Path) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603  (the user's own launcher)
            command,
            env={**os.environ, EXIT_CODES: str(codes.resolve())},
            stdout=output_descriptor(),
            # Ctrl-C reaches this process alone, which passes it on once.
            start_new_session=True,
        )
    except OSError as fault:
        raise ConfigError(
            "the launcher cannot be started",
            where="pairs.launcher",
            got=f"{command[0]}: {fault.strerror}",
            remedy="correct it: the words before -m dpo_dist.train, such as 'accelerate launch'",
        ) from None


def _own_code(codes: Path, code: int) -> int:
    """Return the exit code of the processes that has a reason, or `code` of their launcher.

    A launcher ends the others by SIGTERM when one has ended: 143 is no reason.
    """
    written = exit_codes(codes)
    reasons = [one for one in written if one in _REASONS] or [one for one in written if one < _BY_SIGNAL]
    return max(reasons or written, default=0) or code


@contextlib.contextmanager
def _ended_together(group: int) -> Iterator[None]:
    """Send SIGTERM to what is left of a process group when the block ends, or this process is killed."""
    # The shell's read ends when the pipe closes, which no other process has open.
    reader, writer = os.pipe()
    words = ["/bin/sh", "-c", 'read -r _; kill -s TERM -- "-$0" 2> /dev/null', str(group)]
    watcher = subprocess.Popen(words, stdin=reader, start_new_session=True)  # noqa: S603
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        watcher.wait()


class _PassedOn:
    """Signals to stop that are received within the block, each passed on once to a process group.

    The block begins before the group is started: a signal that comes earlier waits for `pass_to`.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._waiting: list[int] = []
        self._group: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in stop_signals()}
        return self

    def __exit__(self, *_fault: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_to(self, group: int) -> None:
        self._group = group
        self._send()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        self._waiting.append(number)
        self._send()

    def _send(self) -> None:
        while self._group is not None and self._waiting:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, self._waiting.pop(0))
