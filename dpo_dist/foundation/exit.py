"""The end of a program: one printed block for an error of the user, and the exit code."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from dpo_dist.foundation.errors import (
    ConfigError,
    DpoDistError,
    ExitCode,
    StoppedError,
    disk_error,
    first_line,
    package_error,
)
from dpo_dist.foundation.streams import open_closed_streams, output_of_objects, print_line
from dpo_dist.foundation.text import without_secrets

_RANK_0_SECONDS = 60
_BY_SIGNAL = 128


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are printed as those of every verb."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the form of the command."""
        form = " ".join(self.format_usage().removeprefix("usage:").split())
        raise ConfigError(
            message, where="command line", expected=form, remedy="--help explains what it takes"
        )


@dataclass
class Errors:
    """Prints errors without secrets: as text to standard error, or as JSON objects to standard output.

    `rank`: of this process among those that run the program.
    """

    is_json: bool = False
    rank: int = 0

    def print(self, text: str, content: Mapping[str, Any]) -> None:
        """Print one error; `content` is for programs. A stream that fails is ignored."""
        if self.is_json:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            text = json.dumps({"kind": "error", "time": now, **without_secrets(content)})
        print_line(text, output_of_objects() if self.is_json else sys.stderr)

    def print_end(self, exit_code: int, words: str) -> int:
        """Print on rank 0 how the process was ended, if there is something to say; return the exit code."""
        if words and self.rank == 0:
            self.print(words, {"message": words, "exit_code": int(exit_code)})
        return exit_code

    def print_of_this_rank(self, error: DpoDistError) -> int:
        """Print `error` if this process is the one that reports it; return its exit code.

        Before the processes have joined, most errors occur in all of them. The launcher ends the others when
        rank 0 has printed its error and exited; a rank that is not ended has an error that rank 0 does not
        have. Rank 0 alone prints a stop by a signal: the launcher sends the signal to it, too.
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


def exit_after(work: Callable[[], int], errors: Errors | None = None) -> NoReturn:
    """Exit with the exit code that `work` returns.

    A `DpoDistError` is printed as one block, by one rank only; an interrupt by the user in one line. Other
    exceptions keep their traceback.
    """
    errors = errors or Errors()
    open_closed_streams()
    try:
        exit_code = work()
    except DpoDistError as error:
        exit_code = errors.print_of_this_rank(error)
    except KeyboardInterrupt:
        exit_code = errors.print_end(ExitCode.interrupted, "interrupted")
    except SystemExit as ended:
        is_text = isinstance(ended.code, str)
        code, words = (ExitCode.failed, str(ended.code)) if is_text else (int(ended.code or 0), "")
        if code - _BY_SIGNAL in {*signal.Signals}:
            words = f"ended by {signal.Signals(code - _BY_SIGNAL).name}"
        exit_code = errors.print_end(code, words)
    except Exception as bug:  # any exception: the process must not hang at exit
        if (of_user := disk_error(bug) or package_error(bug)) is not None:
            exit_code = errors.print_of_this_rank(of_user)
        else:
            exit_code = ExitCode.failed
            message = {"title": "bug", "message": first_line(bug), "exit_code": int(exit_code)}
            errors.print(traceback.format_exc().rstrip(), message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # At interpreter exit, threads of communication libraries could still abort the process.
    os._exit(exit_code)
