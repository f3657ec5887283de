"""Train the points of a sweep one after another, each by a command with its own output file."""

import time
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ExitCode, RunOutcome
from dpo_dist.foundation.text import duration
from dpo_dist.kit import RunConfig, RunFolder, RunHistory, write_command
from dpo_dist.tools.launching import launcher_command, run_command
from dpo_dist.tools.sweep.extension import SweepConfig
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import Points

Words = tuple[str, ...]


def is_finished(config: RunConfig) -> bool:
    """Return whether a point's run is completed with these settings."""
    state = RunHistory(RunFolder(config.run.path)).state()
    if state is None or state.outcome is not RunOutcome.completed:
        return False
    return state.identity.get("run_digest") == config.identity.digest


def _ending(code: int) -> str:
    """Return an exit code in a word or two: completed, diverged, invalid, signal 9, exit code 127."""
    if code in set(ExitCode):
        return ExitCode(code).name
    if 0 < code < 128:
        return f"exit code {code}"
    return f"signal {-code if code < 0 else code - 128}"


def point_end(code: int, printed: str) -> tuple[str, str]:
    """Return outcome and error of a point whose process ended with `code` and printed this."""
    error = ""
    if code not in (ExitCode.completed, ExitCode.preempted):  # the last line, or the first one of an error
        lines = reversed(printed.splitlines())
        error = next((line[:160] for line in lines if line.strip() and line[0] != " "), "")
    return _ending(code), error


def screen_since(screen: Path, start: int) -> str:
    """Return the text in a point's output file from the byte `start` on."""
    return screen.read_bytes()[start:].decode(errors="replace")


def train_points(
    points: Points, unfinished: Sequence[Words], folder: SweepFolder, console: Console
) -> tuple[dict[Words, int], dict[Words, tuple[str, str]], bool]:
    """Train points one after another, so that a crash ends one point only.

    Returns by point the exit code, and the outcome and error; and whether a signal stopped the sweep.
    """
    codes = dict[Words, int]()
    ends = dict[Words, tuple[str, str]]()
    launcher = launcher_command()
    for words in unfinished:
        name = " ".join(words)
        config = points[words].with_sections(SweepConfig())
        screen = folder.point_screen(RunFolder(config.run.path))
        number = list(points).index(words) + 1
        console.say(f"{name}: point {number} of {len(points)}, its screen is in {screen}")
        start = screen.stat().st_size if screen.exists() else 0
        began = time.monotonic()
        command = write_command("train", config, screen.with_suffix(""), launcher)
        code, received = run_command(command, screen)
        codes[words] = code
        ends[words] = point_end(code, screen_since(screen, start))
        console.say(f"{name}: {ends[words][0]} after {duration(time.monotonic() - began)}")
        if received:
            return codes, ends, True
    return codes, ends, False
