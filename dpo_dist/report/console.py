"""The screen of a run: progress and results on rank 0, everything that libraries say in logs/rank-N.log."""

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import DpoDistError

_FIRST_LINE_SECONDS = 5.0
_LINE_SECONDS = 30.0
_FIRST_HEARTBEAT_SECONDS = 15.0
_HEARTBEAT_SECONDS = 60.0


class Console:
    """Where a person looks; only `alarm` prints on other ranks than the first.

    Args:
        screen: None on every rank but the first.
        alarms: where errors go; by default nowhere.
    """

    def __init__(self, screen: TextIO | None, alarms: TextIO | None = None):
        self._screen = screen
        self._alarms = alarms

    def say(self, text: str) -> None:
        """Print one line, and keep it in the log."""
        logging.getLogger("dpo_dist").info(text)
        if self._screen is not None:
            tqdm.write(text, file=self._screen)

    def alarm(self, text: str) -> None:
        """Print an error, from whichever rank and thread, and keep it in the log."""
        logging.getLogger("dpo_dist").error(text)
        if self._alarms is not None:
            self._alarms.write(text + "\n")
            self._alarms.flush()

    def heartbeat(self, work: str) -> Callable[[float], None]:
        """Return a function that takes the seconds `work` has taken, and prints them about once a minute."""
        due = _FIRST_HEARTBEAT_SECONDS

        def beat(seconds: float) -> None:
            nonlocal due
            if seconds >= due:
                due = seconds + _HEARTBEAT_SECONDS
                self.say(f"{work}: {seconds:.0f} s so far")

        return beat

    def bar(self, what: str, total: int | None, done: int, unit: str) -> Any:
        """A progress bar, with the time to go where the total is known."""
        return tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=unit,
            file=self._screen,
            disable=self._screen is None,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    @contextlib.contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Yield a function to call with how many are done and how many there are.

        The bar appears with its total at the first call; none appears if there is nothing to do.
        """
        with contextlib.ExitStack() as stack:
            bars: list[Any] = []

            def show(done: int, total: int) -> None:
                if not bars and total:
                    bars.append(stack.enter_context(self.bar(what, total, done, unit)))
                for bar in bars:
                    bar.update(done - bar.n)

            yield show

    @contextlib.contextmanager
    def counter(self, what: str, unit: str) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with how many more of an unknown number are done.

        Shows a bar on a terminal, elsewhere a line now and then; nothing if it is never called.
        """
        if self._screen is None or not self._screen.isatty():
            yield _Tally(self.say, what, unit)
            return
        with contextlib.ExitStack() as stack:
            bars: list[Any] = []

            def count(more: int) -> None:
                if not bars:
                    bars.append(stack.enter_context(self.bar(what, None, 0, unit)))
                bars[0].update(more)

            yield count


class _Tally:
    """Says how many are done, at first after a few seconds and then about twice a minute."""

    def __init__(self, say: Callable[[str], None], what: str, unit: str):
        self._say, self._what, self._unit = say, what, unit
        self._done = 0
        self._started: float | None = None
        self._due = 0.0

    def __call__(self, more: int) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started, self._due = now, now + _FIRST_LINE_SECONDS
            self._say(f"{self._what} ...")
        self._done += more
        if now >= self._due:
            self._due = now + _LINE_SECONDS
            speed = self._done / (now - self._started)
            self._say(f"{self._what}: {self._done:,} {self._unit}s, {speed:,.0f} a second")


class _Once(logging.Filter):
    """Lets every distinct message pass once: some libraries repeat a warning at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


@contextlib.contextmanager
def open_console(run_dir: Path) -> Iterator[Console]:
    """Send standard output and error of this process, down to C libraries, to its log file.

    The console it yields keeps the screen. Entered before heavy imports, so that their noise goes to the log
    too. On leaving, the screen is back where it was; an exception is also written to the log.
    """
    rank = os.environ.get("RANK", "0")
    log_file = RunFolder(run_dir).rank_log(rank)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log_file.open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.INFO,
            format="%(asctime)s %(name)s %(levelname)s %(message)s",
            force=True,
        )
        logging.captureWarnings(True)
        once, warnings_logger = _Once(), logging.getLogger("py.warnings")
        warnings_logger.addFilter(once)
        alarms = os.fdopen(os.dup(saved[1]), "w", buffering=1)
        try:
            yield Console(alarms if rank == "0" else None, alarms)
        except BaseException as error:
            log.write(traceback.format_exc())
            if isinstance(error, DpoDistError):
                log.write(error.block() + "\n")
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            warnings_logger.removeFilter(once)
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)
            alarms.close()
