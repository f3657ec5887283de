"""Console of a run: progress and results on rank 0; the output of libraries is written to logs/rank-N.log."""

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import DpoDistError

_FIRST_LINE_SECONDS = 5.0
_LINE_SECONDS = 30.0
_FIRST_HEARTBEAT_SECONDS = 15.0
_HEARTBEAT_SECONDS = 60.0
_SHARE_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {postfix[0]} [{elapsed}<{remaining}]"


class Console:
    """Screen output, also written to the log; ranks other than 0 print only errors.

    Args:
        screen: stream of rank 0; None on other ranks.
        alarms: stream for errors; None prints none.
    """

    def __init__(self, screen: TextIO | None, alarms: TextIO | None = None):
        self._screen = screen
        self._alarms = alarms

    def say(self, text: str) -> None:
        """Print one line and log it."""
        logging.getLogger("dpo_dist").info(text)
        if self._screen is not None:
            tqdm.write(text, file=self._screen)

    def show(self, text: str) -> None:
        """Print one line without logging it: a log file may be readable by others."""
        if self._screen is not None:
            tqdm.write(text, file=self._screen)

    def alarm(self, text: str) -> None:
        """Print and log an error, on any rank and from any thread."""
        logging.getLogger("dpo_dist").error(text)
        if self._alarms is not None:
            self._alarms.write(text + "\n")
            self._alarms.flush()

    def heartbeat(self, work: str) -> Callable[[float], None]:
        """Return a function that takes the seconds spent on `work` so far and prints them once a minute."""
        due = _FIRST_HEARTBEAT_SECONDS

        def beat(seconds: float) -> None:
            nonlocal due
            if seconds >= due:
                due = seconds + _HEARTBEAT_SECONDS
                self.say(f"{work}: {seconds:.0f} s so far")

        return beat

    def bar(self, title: str, total: float | None, done: int, unit: str, **options: Any) -> Any:
        """Return a progress bar, with the remaining time if the total is known; `options` are tqdm's."""
        return tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=unit,
            file=self._screen,
            disable=self._screen is None,
            mininterval=0.5,
            dynamic_ncols=True,
            **options,
        )

    @contextlib.contextmanager
    def progress(self, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Yield a function that takes the number of units done and their total, and updates a bar.

        The bar appears with its total at the first call; a total of 0 shows none.
        """
        with contextlib.ExitStack() as stack:
            bars: list[Any] = []

            def show(done: int, total: int) -> None:
                if not bars and total:
                    bars.append(stack.enter_context(self.bar(title, total, done, unit)))
                for bar in bars:
                    bar.update(done - bar.n)

            yield show

    @contextlib.contextmanager
    def counter(self, title: str, unit: str) -> Iterator["Count"]:
        """Yield a function that takes the number of units just done, and the share of all work that is done.

        The share is from 0 to 1, or None if the total is unknown. Shows a bar on a terminal, elsewhere a line
        about twice a minute, both with the remaining time; nothing if it is never called.
        """
        if self._screen is None or not self._screen.isatty():
            yield _Tally(self.say, title, unit)
            return
        with contextlib.ExitStack() as stack:
            bars: list[Any] = []
            done = 0

            def count(more: int, share: float | None = None) -> None:
                nonlocal done
                done += more
                if not bars and share is None:
                    bars.append(stack.enter_context(self.bar(title, None, 0, unit)))
                elif not bars:
                    options = {"bar_format": _SHARE_FORMAT, "postfix": [f"0 {unit}s"]}
                    bars.append(stack.enter_context(self.bar(title, 1.0, 0, unit, **options)))
                [bar] = bars
                seconds = max(bar.format_dict["elapsed"], 1e-3)
                if bar.total is not None:
                    bar.postfix = [f"{done:,} {unit}s, {done / seconds:,.0f}/s"]
                bar.update(more if share is None else share - bar.n)

            yield count


Count = Callable[..., None]
"""Called with the number of units just done and, if it is known, the share of all work that is done."""


class _Tally:
    """Counts units; prints the count after a few seconds and then about twice a minute."""

    def __init__(self, say: Callable[[str], None], title: str, unit: str):
        self._say, self._title, self._unit = say, title, unit
        self._done = 0
        self._started: float | None = None
        self._due = 0.0

    def __call__(self, more: int, share: float | None = None) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started, self._due = now, now + _FIRST_LINE_SECONDS
            self._say(f"{self._title} ...")
        self._done += more
        if now >= self._due:
            self._due = now + _LINE_SECONDS
            seconds = now - self._started
            line = f"{self._done:,} {self._unit}s, {self._done / seconds:,.0f} a second"
            if share:
                line = f"{share:.0%}, {line}, {tqdm.format_interval(seconds / share - seconds)} left"
            self._say(f"{self._title}: {line}")


class _Once(logging.Filter):
    """Passes each distinct message once: some libraries repeat a warning at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


@contextlib.contextmanager
def open_console(folder: RunFolder) -> Iterator[Console]:
    """Redirect standard output and error of this process, including C libraries, to its log file.

    The yielded console prints to the screen. Enter it before heavy imports, to redirect their output too. On
    exit the streams are restored; an exception is also written to the log, if the disk is not full.
    """
    rank = os.environ.get("RANK", "0")
    log_file = folder.rank_log(rank)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log_file.open("ab", buffering=0) as log:  # a buffer would raise again when it is closed
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        root = logging.getLogger()
        callers = root.handlers[:], root.level
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)
        callers_show = warnings.showwarning
        logging.captureWarnings(True)
        is_captured_by_caller = warnings.showwarning is callers_show
        once, warnings_logger = _Once(), logging.getLogger("py.warnings")
        warnings_logger.addFilter(once)
        alarms = os.fdopen(os.dup(saved[1]), "w", buffering=1)
        try:
            yield Console(alarms if rank == "0" else None, alarms)
        except BaseException as error:
            block = error.block() + "\n" if isinstance(error, DpoDistError) else ""
            with contextlib.suppress(OSError):
                log.write((traceback.format_exc() + block).encode())
            raise
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            warnings_logger.removeFilter(once)
            if not is_captured_by_caller:
                logging.captureWarnings(False)
            root.handlers[:] = callers[0]
            root.setLevel(callers[1])
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)
            alarms.close()
