"""Errors that a user can fix, printed as one block (message, where, got, expected, to do); exit codes."""

import contextlib
import errno
import logging
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit code of a verb; one with nothing to save ends at SIGTERM with 143, as other programs do."""

    completed = 0
    failed = 1
    """A bug of the program."""
    findings = 1
    """`doctor` has a finding above its threshold; the same number as `failed`, as linters do."""
    invalid = 2
    """The configuration, the data, a file or a device cannot be used."""
    diverged = 3
    lost = 69
    """Another process died or does not answer: the same command resumes (EX_UNAVAILABLE of sysexits.h)."""
    preempted = 75
    """Stopped by a signal or limit, after saving: the same command resumes (EX_TEMPFAIL of sysexits.h)."""
    interrupted = 130
    """Stopped by SIGINT (Ctrl-C), as shells number it."""


class RunOutcome(StrEnum):
    """State of a run, in run_state.json; `exit` in summary.json is one of the last three.

    `started`: it trains, or was killed. `exported`: all steps are done and the model is written, but not yet
    the report. `completed`: the report is written. `preempted`: stopped on request, with a checkpoint.
    `diverged`: loss or gradient was not finite.
    """

    started = "started"
    exported = "exported"
    completed = "completed"
    preempted = "preempted"
    diverged = "diverged"


_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DpoDistError(Exception):
    """An error that the user can fix: one sentence, the key or ``file:line``, values, what to do next."""

    exit_code: int = ExitCode.invalid
    title: ClassVar[str] = "error"

    def __init__(self, message: str, *, where: str = "", got: str = "", expected: str = "", remedy: str = ""):
        super().__init__(message)
        self.message, self.where, self.got, self.expected, self.remedy = message, where, got, expected, remedy
        self.is_printed_here: bool | None = None  # by this process; None: the processes have not joined yet
        self.parts: Sequence[DpoDistError] = ()  # the errors that this one joins

    def block(self) -> str:
        """Return the error as the lines that are printed, without empty parts."""
        parts = {"where": self.where, "got": self.got, "expected": self.expected, "to do": self.remedy}
        lines = [f"  {label + ':':<10}{text}" for label, text in parts.items() if text]
        return "\n".join([f"{self.title}: {self.message}", *lines])

    def as_dict(self) -> dict[str, str | int]:
        """Return the error for programs."""
        texts = {name: getattr(self, name) for name in ("title", "message", "where", "got", "expected")}
        return {**texts, "to_do": self.remedy, "exit_code": int(self.exit_code)}

    def __str__(self) -> str:
        return self.block()


class ConfigError(DpoDistError):
    """The configuration cannot be run."""

    title = "configuration error"


class DataError(DpoDistError):
    """The preference data cannot be used."""

    title = "data error"


class ReferenceModelError(DpoDistError):
    """Reference log-probs cannot be trusted or computed."""

    title = "reference error"


class CheckpointError(DpoDistError):
    """A checkpoint or result cannot be written, read or trusted."""

    title = "checkpoint error"


class DivergedError(DpoDistError):
    """Loss or gradient is not finite."""

    exit_code: int = ExitCode.diverged
    title = "diverged"


class StoppedError(DpoDistError):
    """The run was asked to stop while it had no new steps to save."""

    exit_code: int = ExitCode.preempted
    title = "stopped"


class DeviceMemoryError(DpoDistError):
    """A GPU is out of memory."""

    title = "out of memory"


class PeerLostError(DpoDistError):
    """Another process of the run died or failed."""

    exit_code: int = ExitCode.lost
    title = "process lost"


def disk_error(error: BaseException) -> ConfigError | None:
    """Return a `ConfigError` if a full disk, a path or its permissions caused `error`, else None."""
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
        what = "a path begins with ~, but the home folder is unknown"
        return ConfigError(
            what, where="a path on the command line or in a YAML file", remedy="write the whole path"
        )
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in _DISK_IS_FULL):
        return None
    return ConfigError(
        "a file cannot be written or read",
        where=str(error.filename or "run.dir, data.cache or reference.store"),
        got=dead_link(Path(str(error.filename or ""))) or str(error.strerror),
        remedy="make room, or correct the path or its permissions; then run the same command again, which "
        "keeps the work that is complete",
    )


_TOOL_PACKAGES = {"datasketch", "py3langid", "scipy", "sklearn"}
"""Packages of the extra `tools`, by the names that Python imports."""


def package_error(error: BaseException) -> ConfigError | None:
    """Return a `ConfigError` if a package of the extra `tools` is missing, else None."""
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if package not in _TOOL_PACKAGES:
        return None
    return ConfigError(
        "this verb needs packages that training does not need",
        where="the environment",
        got=f"{package} is not installed",
        remedy="pip install 'dpo-dist[tools]'",
    )


def dead_link(path: Path) -> str:
    """Return a description of a link to a missing file or folder; "" for any other path."""
    is_dead = os.path.islink(path) and not os.path.exists(path)  # noqa: PTH114, PTH110 (no error of long names)
    return f"a link to {path.readlink()}, which does not exist" if is_dead else ""


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its text, cut at 200 characters."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def in_one_line(error: BaseException) -> str:
    """Return an error's type and text on one line, cut at 600 characters: hubs write several lines."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 600, placeholder=" ...")


@contextlib.contextmanager
def warn_on_bug(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Turn a bug in the block into a warning that `what` is missing: a bug in a report must not end the run.

    Errors of files and of the user are raised: the same command continues once they are corrected.
    """
    try:
        yield
    except (OSError, DpoDistError):
        raise
    except Exception as bug:
        logging.getLogger(__name__).exception("%s is missing", what)
        say(f"warning: {what} is missing because of a bug, see logs/rank-0.log: {first_line(bug)}")
