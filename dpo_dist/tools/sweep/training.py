"""Train the points of a sweep one after another, each by a command with its own output file."""

import time
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError, ExitCode, RunOutcome
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.text import duration
from dpo_dist.kit import RunConfig, RunFolder, RunHistory, write_command
from dpo_dist.tools.launching import launcher_command, run_command
from dpo_dist.tools.sweep.extension import SweepConfig
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import Points

Words = tuple[str, ...]
ELSEWHERE = "trained by another process"
"""The outcome of a point whose run another process has locked."""


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


def point_end(run: RunFolder, code: int, printed: str) -> tuple[int, tuple[str, str]]:
    """Return the exit code, outcome and error of a point whose process ended with `code`.

    If a point failed and another process holds its run's lock, that process trains it: the code is 75.
    """
    if code in (ExitCode.invalid, ExitCode.failed) and run.lock.is_file():
        try:
            with locked(run.lock, ""):
                pass
        except ConfigError:
            return ExitCode.preempted, (ELSEWHERE, "")
    error = ""
    if code not in (ExitCode.completed, ExitCode.preempted):  # the last line, or the first one of an error
        lines = reversed(printed.splitlines())
        error = next((line[:160] for line in lines if line.strip() and line[0] != " "), "")
    return code, (_ending(code), error)


def screen_since(screen: Path, start: int) -> str:
    """Return the text in a point's output file from the byte `start` on."""
    return screen.read_bytes()[start:].decode(errors="replace")


class PointTrainer:
    """Trains points one after another, so that a crash ends one point only.

    `codes` and `ends` have the exit code, and the outcome and error, of each point that was trained.
    """

    def __init__(self, points: Points, folder: SweepFolder, console: Console) -> None:
        self.points = points
        self.codes = dict[Words, int]()
        self.ends = dict[Words, tuple[str, str]]()
        self._folder = folder
        self._console = console
        self._launcher = launcher_command()

    def run(self, waiting: Sequence[Words]) -> bool:
        """Train these points; return whether a signal stopped the sweep."""
        is_stopped = False
        for words in waiting:
            if not is_stopped:
                is_stopped = self._train(words)
        # Another process may have finished a point that it had when this one came to it.
        for words in self.ends:
            if is_finished(self.points[words]):
                self.codes[words] = ExitCode.completed
                self.ends[words] = (_ending(ExitCode.completed), "")
        return is_stopped

    def _train(self, words: Words) -> bool:
        """Train a point; return whether a signal stopped it."""
        name = " ".join(words)
        config = self.points[words].with_sections(SweepConfig())
        run = RunFolder(config.run.path)
        screen = self._folder.point_screen(run)
        number = list(self.points).index(words) + 1
        self._console.say(f"{name}: point {number} of {len(self.points)}, its screen is in {screen}")
        start = screen.stat().st_size if screen.exists() else 0
        began = time.monotonic()
        command = write_command("train", config, screen.with_suffix(""), self._launcher)
        code, received = run_command(command, screen)
        self.codes[words], self.ends[words] = point_end(run, code, screen_since(screen, start))
        outcome, _ = self.ends[words]
        self._console.say(f"{name}: {outcome} after {duration(time.monotonic() - began)}")
        return bool(received)
