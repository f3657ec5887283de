"""Errors that a user can fix, printed as one block (message, where, got, expected, to do), and exit codes.

`exit_after` ends every program.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import re
import resource
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from dpo_dist.foundation.installed import with_pages
from dpo_dist.foundation.remedies import COMMAND_LINE
from dpo_dist.foundation.streams import (
    json_stream,
    keep_document,
    kept_document,
    open_closed_streams,
    print_line,
    reserve_output,
)
from dpo_dist.foundation.text import without_secrets

_RANK_0_SECONDS = 60
_BY_SIGNAL = 128


class ExitCode(IntEnum):
    """Exit code of a verb; a verb with nothing to save ends at SIGTERM with 143, as other programs do."""

    completed = 0
    failed = 1
    """A bug of the program."""
    findings = 1
    """`doctor` has a finding of level `doctor.fail_on` or above; the number of `failed`, as in linters."""
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

    `started`: the run trains, or was killed. `exported`: all steps are done and the model is written, but not
    yet the report. `completed`: the report is written. `preempted`: stopped on request, with a checkpoint.
    `diverged`: loss or gradient was not finite.
    """

    started = "started"
    exported = "exported"
    completed = "completed"
    preempted = "preempted"
    diverged = "diverged"


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DpoDistError(Exception):
    """An error that the user can fix: one sentence, the key or ``file:line``, values, what to do next."""

    exit_code: int = ExitCode.invalid
    title: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        got: str = "",
        expected: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.got = got
        self.expected = with_pages(expected)
        self.remedy = with_pages(remedy)
        self.is_printed_here: bool | None = None  # by this process; None: the processes have not joined yet
        self.parts: Sequence[DpoDistError] = ()  # the errors that this one joins

    def block(self) -> str:
        """Return the error as the lines that are printed, without empty parts."""
        parts = {
            "where": self.where,
            "got": self.got,
            "expected": self.expected,
            "to do": self.remedy,
        }
        lines = [f"  {label + ':':<10}{text}" for label, text in parts.items() if text]
        return "\n".join([f"{self.title}: {self.message}", *lines])

    def as_dict(self) -> dict[str, Any]:
        """Return the error for programs."""
        names = ("title", "message", "where", "got", "expected", "remedy")
        content = {"code": int(self.exit_code)} | {name: getattr(self, name) for name in names}
        if self.parts:
            content["mistakes"] = [part.as_dict() for part in self.parts]
        return content

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


def raise_all(mistakes: Sequence[DpoDistError]) -> None:
    """Raise the mistake, or one error with a line for each; do nothing if there are none."""
    every: list[DpoDistError] = []
    for mistake in mistakes:
        every += mistake.parts or (mistake,)
    different = {mistake.block(): mistake for mistake in every}
    if len(different) == 1:
        raise every[0]
    lines = []
    for mistake in different.values():
        where = mistake.where.removeprefix(COMMAND_LINE).removeprefix(": ")
        got = f" ({mistake.got})" if where and mistake.got and "=" not in where else ""
        remedy = mistake.remedy
        expected = "" if mistake.expected in remedy else f", expected {mistake.expected}"
        lines.append(f"{where or mistake.got}{got}: {mistake.message}{expected}; {remedy}")
    lines = list(dict.fromkeys(lines))
    if lines:
        error = ConfigError(f"this command has {len(lines)} mistakes", remedy=f"\n{' ' * 12}".join(lines))
        error.parts = list(different.values())
        raise error


_NO_FILES = "Too many open files"  # also in errors of torch


def _too_few_files() -> ConfigError:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ConfigError(
        "this process may not open so many files and connections",
        where="ulimit -n",
        got=str(most),
        remedy="ulimit -n 4096 in the shell or batch script, or by the administrator, and start again",
    )


def disk_error(error: BaseException) -> ConfigError | None:
    """Return a `ConfigError` if a full disk, a path, its permissions or a limit caused `error`, else None."""
    if _NO_FILES in str(error):
        return _too_few_files()
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # raised by Path.expanduser
        what = "a path begins with ~, but the home folder is unknown"
        return ConfigError(
            what, where="a path on the command line or in a YAML file", remedy="write the whole path"
        )
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in DISK_IS_FULL):
        return None
    return ConfigError(
        "a file cannot be written or read",
        where=str(error.filename or "run.dir, data.cache or reference.store"),
        got=dead_link(Path(str(error.filename or ""))) or str(error.strerror),
        remedy="make room, or correct the path or its permissions; then run the same command again, which "
        "keeps the work that is complete",
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
def warn_on_bug(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Turn a bug in the block into a warning that `what` is missing: a bug in a report must not end the run.

    Errors of files and of the user are raised: the same command continues once they are corrected.
    """
    try:
        yield
    except (OSError, DpoDistError):
        raise
    except Exception as bug:
        logging.getLogger(__name__).exception("%s is missing", what)
        warn(f"{what} is missing because of a bug, see logs/rank-0.log: {first_line(bug)}")


_SIMILAR_OPTION = 0.7
"""Least similarity of an option that was meant."""
_EXPLAINED = "--help explains the arguments"


class Arguments(argparse.ArgumentParser):
    """An argument parser whose errors are printed like all errors of the user; all programs take `--json`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        text = "print the result or the error as one JSON document, and progress to standard error"
        self.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Return the options; raise ConfigError for words that are none, with the option that was meant."""
        parsed: tuple[argparse.Namespace, list[str]] = self.parse_known_args(args, namespace)
        options, unknown = parsed
        if not unknown:
            return options
        option = unknown[0].partition("=")[0]
        near = get_close_matches(option, re.findall(r"--[\w-]+", self.format_help()), 1, _SIMILAR_OPTION)
        remedy = f"did you mean {near[0]}?" if near else _EXPLAINED
        raise self._refused(f"unrecognized arguments: {' '.join(unknown)}", remedy)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the usage of the command."""
        raise self._refused(message, _EXPLAINED)

    def _refused(self, message: str, remedy: str) -> ConfigError:
        usage = " ".join(self.format_usage().removeprefix("usage:").split())
        return ConfigError(message, where=COMMAND_LINE, expected=usage, remedy=remedy)


@dataclass
class ErrorPrinter:
    """Prints errors without secrets: as text to standard error, or as JSON objects to standard output.

    `is_document`: the error is also the one JSON document that `exit_after` prints.
    """

    is_json: bool = False
    rank: int = 0
    is_document: bool = field(default_factory=lambda: "--json" in sys.argv[1:])

    def print(self, text: str, content: Mapping[str, Any]) -> None:
        """Print one error; `content` is for programs. A stream that fails is ignored."""
        stream = sys.stderr
        if self.is_document:
            if kept_document() is not None:
                keep_document(json.dumps({"error": without_secrets(content)}))
        elif self.is_json:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            stream = json_stream()
            text = json.dumps({"kind": "error", "time": now, **without_secrets(content)})
        print_line(text, stream)

    def print_end(self, exit_code: int, words: str) -> int:
        """Print `words`, how the process ended, on rank 0 unless they are empty; return the exit code."""
        if words and self.rank == 0:
            self.print(words, {"message": words, "code": int(exit_code)})
        return exit_code

    def print_once(self, error: DpoDistError) -> int:
        """Print `error` if this process is the one that reports it; return its exit code.

        Before the processes have joined, most errors occur on every rank, and rank 0 alone prints them: the
        other ranks wait, and the launcher ends them when rank 0 exits. A rank that outlives the wait prints
        its error, which rank 0 does not have. A stop by a signal reaches rank 0 too, which alone prints it.
        """
        is_early = error.is_printed_here is None and self.rank > 0
        if is_early and isinstance(error, StoppedError):
            return error.exit_code
        if is_early:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(error.exit_code))
            time.sleep(_RANK_0_SECONDS)
        if error.is_printed_here is not False:
            self.print(error.block(), error.as_dict())
        return error.exit_code


def exit_after(work: Callable[[], int], errors: ErrorPrinter | None = None) -> NoReturn:
    """Call `work`, and exit with the exit code that it returns.

    A `DpoDistError` is printed as one block by one rank, Ctrl-C as one line, any other exception with its
    traceback. With `--json` standard output gets one JSON document in place of all: the result or the error.
    """
    errors = errors or ErrorPrinter()
    open_closed_streams()
    keep_document("" if errors.is_document else None)
    if errors.is_document:
        reserve_output()
    try:
        exit_code = work()
    except DpoDistError as error:
        exit_code = errors.print_once(error)
    except KeyboardInterrupt:
        exit_code = errors.print_end(ExitCode.interrupted, "interrupted")
    except SystemExit as ended:
        is_text = isinstance(ended.code, str)
        code, words = (ExitCode.failed, str(ended.code)) if is_text else (int(ended.code or 0), "")
        if code - _BY_SIGNAL in {*signal.Signals}:
            words = f"ended by {signal.Signals(code - _BY_SIGNAL).name}"
        exit_code = errors.print_end(code, words)
    except Exception as bug:  # any exception: the process must not hang at exit
        user_error = disk_error(bug)
        if user_error is not None:
            exit_code = errors.print_once(user_error)
        else:
            exit_code = ExitCode.failed
            message = {"code": int(exit_code), "title": "bug", "message": first_line(bug)}
            errors.print(traceback.format_exc().rstrip(), message)
    is_done = errors.is_document and errors.rank == 0 and exit_code == ExitCode.completed
    document = kept_document() or ('{"kind": "done"}' if is_done else "")
    if document:
        print_line(document, json_stream())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # At interpreter exit, threads of communication libraries could still abort the process.
    os._exit(exit_code)
