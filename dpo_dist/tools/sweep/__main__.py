"""Train each point of a grid: `dpo-dist sweep +experiment=qwen7b loss.beta=0.05,0.1`.

Takes the command of `train`, with several values for some keys: 0.1,0.2 or range(1,4) or choice(a,b), as
Hydra. The same command again resumes what was interrupted and leaves what is finished. In a SLURM array each
job takes a part of the points. launch/README.md explains the table at the end.
"""

from dpo_dist.foundation.signals import SWEEP_VARIABLE, end_at_signals, stop_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds

import contextlib
import gc
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from dpo_dist import train
from dpo_dist.config.command_line import command_of, run_verb
from dpo_dist.config.load import Points
from dpo_dist.config.mistakes import raise_all
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ConsoleStyle, RunConfig, SweepConfig
from dpo_dist.foundation.console import Console, open_console
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode, RunOutcome
from dpo_dist.foundation.exit import Errors, exit_after
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.streams import output_descriptor
from dpo_dist.foundation.text import counted, duration
from dpo_dist.training.start.preflight import check_start
from dpo_dist.training.start.resume import read_state

Words = tuple[str, ...]
_PROGRESS_SECONDS = 60


def main(points: Points) -> int:
    """Train the points that are not finished; return the exit code."""
    check_points(points)
    first = next(iter(points.values()))
    folder = RunFolder(Path(first.run.root) / f"sweep-{first.run.name}")
    with open_console(folder.rank_log, first.console.style) as console:
        _warm_up()
        from dpo_dist.tools.sweep.results import sweep_lines, sweep_results  # noqa: PLC0415  (slow, prints)

        job, jobs = _place_in_array()
        mine = list(points)[job::jobs]
        left = [words for words in mine if not _is_finished(points[words])]
        share = "" if jobs == 1 else f", {len(mine):,} of them for this job of the array"
        console.say(f"sweep: {counted(len(points), 'point')}{share}, {len(mine) - len(left):,} finished")
        trainer = _Trainer({words: points[words] for words in mine}, folder, console, first.sweep)
        is_stopped = trainer.run(left)
        results = sweep_results(points, trainer.ends, folder)
        lines = [*sweep_lines(results, points, folder.report), f"sweep   {folder.sweep}"]
        if is_stopped:
            lines.append("stopped: the same command goes on with the points that are not finished")
        console.result("sweep", results, lines)
    failed = [code for code in trainer.codes.values() if code not in (ExitCode.completed, ExitCode.preempted)]
    if failed and not is_stopped:
        return failed[0] if failed[0] in set(ExitCode) else ExitCode.failed
    return ExitCode.preempted if is_stopped or any(trainer.codes.values()) else ExitCode.completed


def check_points(points: Points) -> None:
    """Check all that needs no torch of every point; one error with all mistakes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "a sweep starts the processes of its points by itself",
            where="accelerate launch",
            got=f"{os.environ['WORLD_SIZE']} processes",
            remedy="start one: dpo-dist sweep; with sweep.parallel=1 each point has all GPUs",
        )
    mistakes = list[DpoDistError]()
    for config in points.values():
        try:
            check_start(config, trains=True)
        except DpoDistError as error:
            mistakes.append(error)
    raise_all(mistakes)


def _place_in_array() -> tuple[int, int]:
    """Return the number of this job in its SLURM array, from 0, and that of all jobs; (0, 1) without one."""
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    job, first, last, step, jobs = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", "1")) for name in names)
    if (last - first) // step + 1 != jobs:
        raise ConfigError(
            "the jobs of a sweep's array have no regular numbers, by which points could be divided",
            where="sbatch --array",
            got=f"{jobs} jobs from {first} to {last} in steps of {step}",
            remedy=f"submit it again with --array=0-{jobs - 1}",
        )
    return (job - first) // step, jobs


def check(points: Points) -> Iterator[str]:
    """Check everything that the points need before they use a GPU: a line for each, then all about the first.

    Points that load the same are loaded once. A point that loads something else has lines about that.
    """
    check_points(points)
    from dpo_dist.verbs.check import expected_start  # noqa: PLC0415  (slow)

    loaded = dict[str, list[str]]()
    for words, config in points.items():
        loads = config.model, config.data, config.reference, config.loss, config.metrics, config.parallelism
        key = repr(loads)
        if key not in loaded:
            loaded[key] = "".join(train.check(config)).splitlines()
        run, common = RunFolder.of(config), next(iter(loaded.values()))
        own = [line for line in loaded[key] if line not in common and "run.dir:" not in line]
        yield "\n".join(
            [f"{' '.join(words)}: {run} ({expected_start(config.identity, config.run.resume, run)})", *own]
        )
    yield "\n".join(next(iter(loaded.values())))


def _is_finished(config: RunConfig) -> bool:
    state = read_state(RunFolder.of(config))
    if state is None or state.outcome is not RunOutcome.completed:
        return False
    return state.identity.get("run_digest") == config.identity.digest


def _ending(code: int) -> str:
    """Return an exit code in a word or two: completed, diverged, invalid, signal 9."""
    return ExitCode(code).name if code in set(ExitCode) else f"signal {-code if code < 0 else code - 128}"


def end_of(run: RunFolder, code: int, said: str) -> tuple[int, tuple[str, str]]:
    """Return the exit code that counts, and the outcome and error of a point that ended with `code`.

    A point that failed while another process has its run locked is trained by that process.
    """
    if code in (ExitCode.invalid, ExitCode.failed) and run.lock.is_file():
        try:
            with locked(run.lock, ""):
                pass
        except ConfigError:
            return ExitCode.preempted, ("trained by another process", "")
    return code, (_ending(code), "" if code in (ExitCode.completed, ExitCode.preempted) else _last_line(said))


def screen_since(screen: Path, start: int) -> str:
    """Return what a point has printed since its start, at this byte of its screen."""
    return screen.read_bytes()[start:].decode(errors="replace")


def _last_line(said: str) -> str:
    """Return the last line on the screen of a point; of an error its first."""
    lines = reversed(said.splitlines())
    return next((line[:160] for line in lines if line.strip() and line[0] != " "), "")


def _warm_up() -> None:
    """Do once what else each point would do at its start: slow imports, and slow first calls of libraries."""
    # A GPU that this process has opened to count it could not be used by its forks.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import pyarrow  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: PLC0415

    import dpo_dist.tools.report.recorder  # noqa: PLC0415
    import dpo_dist.training.run  # noqa: F401, PLC0415
    from dpo_dist.tools.pages.render import TEMPLATES  # noqa: PLC0415

    pyarrow.array([0])  # imports pandas
    get_checkpoint_conversion_mapping("")
    for name in ("base.jinja", "macros.jinja", "run.jinja", "svg.jinja"):
        TEMPLATES.get_template(name)
    Figure().savefig(BytesIO())
    gc.freeze()  # else garbage collection in each fork would copy the pages of all modules


class _Trainer:
    """Trains points, some at a time, each in a process of its own: a crash of one does not reach the next.

    The process is a fork of this one, which has imported everything, or becomes a launcher.
    """

    def __init__(self, points: Points, folder: RunFolder, console: Console, settings: SweepConfig):
        import torch  # noqa: PLC0415  (imported by now)

        self._points, self._folder, self._console = points, folder, console
        self.codes, self.ends = dict[Words, int](), dict[Words, tuple[str, str]]()
        self._running: dict[Any, tuple[Words, Any, list[str], float, Callable[[], str]]] = {}
        self._received: list[int] = []
        visible, count = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count()
        gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
        parallel = settings.parallel or count or 1
        if count % parallel:
            raise ConfigError(
                "the GPUs cannot be divided among the points",
                where="sweep.parallel",
                got=f"{parallel}, with {counted(count, 'GPU')}",
                remedy=f"set it to a divisor of {count}",
            )
        self._free = [gpus[place::parallel] for place in range(parallel)]
        self._launcher, python = settings.launcher, shlex.quote(sys.executable)
        if self._launcher is None and count > parallel:
            self._launcher = f"{python} -m dpo_dist launch"
        elif self._launcher is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._launcher = python  # CUDA does not work in a fork of a process that has used it

    def run(self, waiting: list[Words]) -> bool:
        """Train these points, which fills `codes` and `ends`; return whether a signal stopped the sweep."""
        before = {number: signal.signal(number, self._pass_on) for number in stop_signals()}
        while (waiting and not self._received) or self._running:
            while waiting and self._free and not self._received:
                self._start(waiting.pop(0))
            if not (ended := wait(list(self._running), _PROGRESS_SECONDS)):
                for words, *_, said in self._running.values():
                    self._console.say(f"{' '.join(words)}: {_last_line(said())}")
            for sentinel in ended:
                words, process, gpus, began, said = self._running.pop(sentinel)
                process.join()
                self._free.append(gpus)
                run = RunFolder.of(self._points[words])
                self.codes[words], self.ends[words] = end_of(run, process.exitcode, said())
                spent = duration(time.monotonic() - began)
                self._console.say(f"{' '.join(words)}: {self.ends[words][0]} after {spent}")
        for number, handler in before.items():
            signal.signal(number, handler)
        for words in filter(lambda words: _is_finished(self._points[words]), list(self.ends)):
            self.codes[words], self.ends[words] = ExitCode.completed, (_ending(ExitCode.completed), "")
        return bool(self._received)

    def _start(self, words: Words) -> None:
        config, gpus, command = replace(self._points[words], sweep=SweepConfig()), self._free.pop(0), None
        screen = self._folder.point_screen(RunFolder.of(config))
        if self._launcher is not None:
            command = command_of("train", config, screen.with_suffix(""), self._launcher)
        place = f"point {list(self._points).index(words) + 1} of {len(self._points)}"
        self._console.say(f"{' '.join(words)}: {place}, its screen is in {screen}")
        fork = multiprocessing.get_context("fork")
        process: Any = fork.Process(target=_be_point, args=(config, command, screen, gpus))
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        said = partial(screen_since, screen, screen.stat().st_size if screen.exists() else 0)
        process.start()
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(process.pid, process.pid)
        self._running[process.sentinel] = words, process, gpus, time.monotonic(), said
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        for _, process, *_ in self._running.values():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)


def _be_point(config: RunConfig, command: str | None, screen: Path, gpus: Sequence[str]) -> None:
    """Train a point in this process, or become its launcher, with what it prints in the file `screen`."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # Ctrl-C reaches the sweep alone, which passes it on once
    written = os.open(screen, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for descriptor in {1, 2, output_descriptor()}:
        os.dup2(written, descriptor)
    os.environ[SWEEP_VARIABLE] = "1"
    end_at_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

    def work() -> int:
        if command is not None:
            os.execvp((words := shlex.split(command))[0], words)  # noqa: S606  (the user's own launcher)
        return train.main(config)

    exit_after(work, Errors(is_json=config.console.style is ConsoleStyle.json))


if __name__ == "__main__":
    run_verb(main, check, verb="sweep")
