"""Run the verbs as a person does: their command line, real processes, a real run folder."""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.parent import ROOT, environment
from tests.support.warm import launcher_variables, run_warm, start_verb

TWO_PROCESSES = ROOT / "launch" / "accelerate" / "cpu_2.yaml"

TIMINGS = frozenset({"step_seconds", "pairs_per_second", "tokens_per_second", "mfu"})


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str


def command(verb: str, overrides: list[str], processes: int) -> list[str]:
    """The command line of a verb on one process (plain python) or two (accelerate)."""
    if processes == 1:
        return [sys.executable, "-m", "dpo_dist", verb, *overrides]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*launcher, "--config_file", str(TWO_PROCESSES), "-m", "dpo_dist", verb, *overrides]


def run_verb(
    verb: str,
    overrides: list[str],
    *,
    processes: int = 1,
    cwd: Path = ROOT,
    seconds: int = 900,
    cold: bool = False,
    prepare: Callable[[], None] | None = None,
) -> Finished:
    """Run a verb to its end; its screen as one text.

    The processes are forked from a warm parent. `cold` takes the real command line, for what depends on it.
    `prepare` is called in each warm process before the verb.
    """
    if not cold:
        added = launcher_variables(TWO_PROCESSES) if processes > 1 else {}
        variables = {**environment(), **added}
        return Finished(*run_warm(verb, overrides, variables, processes, cwd, seconds, prepare))
    ended = subprocess.run(
        command(verb, overrides, processes),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Finished(ended.returncode, ended.stdout)


@contextlib.contextmanager
def running(
    verb: str,
    overrides: list[str],
    screen: Path,
    cwd: Path = ROOT,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """A verb on a warm process that writes to the file `screen`; killed at the end of the block."""
    screen.touch()
    (process,) = start_verb(verb, overrides, environment(), 1, cwd, screen, prepare)
    process.screen = screen
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_until(is_done: Callable[[], Any], process: Any) -> None:
    """Wait for something that a running verb does."""
    deadline = time.monotonic() + 900
    while not is_done():
        assert process.is_alive(), process.screen.read_text()
        assert time.monotonic() < deadline, process.screen.read_text()
        time.sleep(0.02)


def train(overrides: list[str], *, processes: int = 1, cold: bool = False) -> Finished:
    """Train to completion, or fail the test with what the screen said."""
    ended = run_verb("train", overrides, processes=processes, cold=cold)
    assert ended.code == 0, ended.output
    return ended


def history(run_dir: Path) -> list[dict[str, float]]:
    """The rows of log_history.json without what a clock decides."""
    rows = json.loads((run_dir / "dpo_metrics" / "log_history.json").read_text())
    return [{k: v for k, v in row.items() if k.removeprefix("eval_") not in TIMINGS} for row in rows]


def log(run_dir: Path) -> str:
    """The log of rank 0, which also has what is not printed."""
    return (run_dir / "logs" / "rank-0.log").read_text()


def summary(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "dpo_metrics" / "summary.json").read_text())
    return content


def run_state(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "run_state.json").read_text())
    return content


def assert_same_history(got: list[dict[str, float]], wanted: list[dict[str, float]], relative: float) -> None:
    """Equal steps and keys, and values within `relative` of the larger of the wanted value and 0.1."""
    assert [row["step"] for row in got] == [row["step"] for row in wanted]
    for got_row, wanted_row in zip(got, wanted, strict=True):
        assert got_row.keys() == wanted_row.keys()
        for key, value in wanted_row.items():
            difference = abs(got_row[key] - value)
            assert difference <= relative * max(abs(value), 0.1), (
                row_name(wanted_row),
                key,
                got_row[key],
                value,
            )


def row_name(row: dict[str, float]) -> str:
    return f"{'eval' if 'eval_loss' in row else 'train'} row of step {row['step']}"


def constants(**values: object) -> Callable[[], None]:
    """Return a `prepare` that sets constants of modules, by their whole names."""
    return partial(_set, values)


def _set(values: dict[str, object]) -> None:
    for name, value in values.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
