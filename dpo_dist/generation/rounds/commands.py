"""Run a verb as a command of its own: configuration file, launcher, signals, exit code."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from dpo_dist.atomic import write_text
from dpo_dist.config.load import to_yaml
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError

_EXPERIMENT = "round"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def command_of(verb: str, config: RunConfig, folder: Path, start: Sequence[str]) -> list[str]:
    """Write `config` as an experiment below `folder`; return the command that runs the verb with it.

    The command is complete: it does the same when it is typed by hand.

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
    """Return the start of a command: as written, by default `accelerate launch` if there are several GPUs.

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
    return [sys.executable, *(("-m", "accelerate.commands.launch") if several else ())]


def run_command(command: list[str]) -> int:
    """Run a command to its end and return its exit code; SIGINT and SIGTERM are passed on to it.

    The command ends with this process, even if that is killed.

    Raises:
        ConfigError: the launcher does not exist.
        KeyboardInterrupt, SystemExit: the command has ended after SIGINT, or SIGTERM.
    """
    try:
        process = subprocess.Popen(  # noqa: S603  (the user's own launcher)
            command,
            # Ctrl-C reaches this process alone, which passes it on once.
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  (this process has no other thread at work)
        )
    except OSError as fault:
        raise ConfigError(
            "the launcher cannot be started",
            where="pairs.launcher",
            got=f"{command[0]}: {fault.strerror}",
            remedy="correct it: the words before -m dpo_dist.train, such as 'accelerate launch'",
        ) from None
    with _passed_on(process) as received:
        code = process.wait()
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if signal.SIGTERM in received and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        raise SystemExit(128 + signal.SIGTERM)
    return code


def _end_with_parent() -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to the process; yield a list of those received."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
