"""Ranks of a verb, forked from the warm parent, that get a signal."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import TWO_PROCESSES, environment
from tests.support.warm import ROOT, launcher_variables, start_verb

_SECONDS = 240


@dataclass(frozen=True)
class Signalled:
    """Exit codes of the ranks, and the screen."""

    codes: list[int]
    output: str


def signalled(
    verb: str,
    overrides: list[str],
    number: signal.Signals,
    ranks: Sequence[int],
    when: Callable[[], bool],
    prepare: Callable[[], None] | None = None,
) -> Signalled:
    """Run `verb` on two ranks without a launcher, and send a signal to `ranks` once `when()` is true.

    `prepare` is called in each rank before the verb.
    """
    variables = environment() | launcher_variables(TWO_PROCESSES)
    with tempfile.TemporaryDirectory() as temporary:
        screen = Path(temporary) / "screen"
        screen.touch()
        processes = start_verb(verb, overrides, variables, 2, ROOT, screen, prepare)
        deadline = time.monotonic() + _SECONDS
        try:
            while not when():
                assert time.monotonic() < deadline, screen.read_text()
                assert all(process.is_alive() for process in processes), screen.read_text()
                time.sleep(0.01)
            for rank in ranks:
                os.kill(processes[rank].pid, number)
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            return Signalled([process.exitcode for process in processes], screen.read_text())
        finally:
            for process in processes:
                process.kill()
