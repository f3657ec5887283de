"""End of a program: print the user's error as one block, and exit with its code."""

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
from dpo_dist.foundation.streams import json_stream, open_closed_streams, print_line
from dpo_dist.foundation.text import without_secrets

_RANK_0_SECONDS = 60
_BY_SIGNAL = 128


class Arguments(argparse.ArgumentParser):
    """An argument parser whose errors are printed like all errors of the user."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the usage of the command."""
        usage = " ".join(self.format_usage().removeprefix("usage:").split())
        raise ConfigError(
            message, where="command line", expected=usage, remedy="--help explains the arguments"
        )


@dataclass
class Errors:
    """Prints errors without secrets: as text to standard error, or as JSON objects to standard output.

    `rank`: the rank of this process.
    """

    is_json: bool = False
    rank: int = 0

    def print(self, text: str, content: Mapping[str, Any]) -> None:
        """Print one error; `content` is for programs. A stream that fails is ignored."""
        if self.is_json:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            text = json.dumps({"kind": "error", "time": now, **without_secrets(content)})
        print_line(text, json_stream() if self.is_json else sys.stderr)

    def print_end(self, exit_code: int, words: str) -> int:
        """Print `words`, how the process ended, on rank 0 unless they are empty; return the exit code."""
        if words and self.rank == 0:
            self.print(words, {"message": words, "exit_code": int(exit_code)})
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


def exit_after(work: Callable[[], int], errors: Errors | None = None) -> NoReturn:
    """Call `work`, and exit with the exit code that it returns.

    A `DpoDistError` is printed as one block by one rank, Ctrl-C as one line, any other exception with its
    traceback.
    """
    errors = errors or Errors()
    open_closed_streams()
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
        if (user_error := disk_error(bug) or package_error(bug)) is not None:
            exit_code = errors.print_once(user_error)
        else:
            exit_code = ExitCode.failed
            message = {"title": "bug", "message": first_line(bug), "exit_code": int(exit_code)}
            errors.print(traceback.format_exc().rstrip(), message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # At interpreter exit, threads of communication libraries could still abort the process.
    os._exit(exit_code)
