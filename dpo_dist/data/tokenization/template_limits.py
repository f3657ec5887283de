"""Limits of time and memory for a chat template, which is a program of whoever wrote the model folder.

Jinja's sandbox forbids files, imports and attributes of Python; it does not forbid `{{ 'x' * 10**10 }}`.
"""

import contextlib
import faulthandler
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20.0
"""CPU time of one text; real templates take less than a millisecond."""
TIMES_SECONDS = 3
"""So many times `SECONDS` one operation may take, in which Python cannot be interrupted."""
MEMORY = 1 << 30
"""Bytes of address space beyond that of the process."""
CHARACTERS = 1 << 26
"""Length of one text."""
_SIZES = Path("/proc/self/statm")
_SECONDS_KNOWN = 0.5
_known = (-_SECONDS_KNOWN, 0)


class _OutOfTimeError(BaseException):
    """A template has used its time; no handler inside the template takes it for its own error."""


def limited(render: Callable[[], str], template: str) -> str:
    """Return the output of `render`, a call of a chat template.

    Time is limited in the main thread only, where every verb renders.

    Args:
        render: without effects, as it may be called twice.
        template: its place, for an error.

    Raises:
        ConfigError: it takes too much memory or time, or its output is too long.
    """
    try:
        text = _guarded(render, template)
    except MemoryError:
        forget_size()  # another thread may have taken the memory
        try:
            text = _guarded(render, template)
        except MemoryError:
            raise _too_much(template, f"more than {MEMORY >> 30} GiB of memory for one text") from None
    if len(text) > CHARACTERS:
        raise _too_much(template, f"a text of {len(text):,} characters")
    return text


def place_of(tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    """Return the place of a template for an error: a file of the tokenizer, or `data.chat_template`.

    Args:
        tokenizer: of the policy.
        template: that is used.
    """
    own, folder = tokenizer.chat_template, Path(str(tokenizer.name_or_path))
    templates = own.values() if isinstance(own, dict) else [own]
    if not any(isinstance(text, str) and template.endswith(text) for text in templates):
        return "data.chat_template"
    file = folder / "chat_template.jinja"
    return str(file if file.is_file() or not folder.is_dir() else folder / "tokenizer_config.json")


def forget_size() -> None:
    """Measure the size of this process again before the next text."""
    global _known  # noqa: PLW0603  (one process has one size)
    _known = (-_SECONDS_KNOWN, 0)


def _guarded(render: Callable[[], str], template: str) -> str:
    try:
        with _memory_limit(), _time_limit():
            return render()
    except _OutOfTimeError:
        raise _too_much(template, f"more than {SECONDS:.0f} seconds for one text") from None


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    size = _size()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = size + MEMORY
    if size == 0 or 0 <= soft <= most:  # unknown, or the limit of the user is lower
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """Return the bytes of address space of this process, measured from time to time; 0 if unknown."""
    global _known  # noqa: PLW0603
    now = time.monotonic()
    if now - _known[0] >= _SECONDS_KNOWN:
        try:
            _known = (now, int(_SIZES.read_text().split()[0]) * resource.getpagesize())
        except (OSError, ValueError):
            _known = (now, 0)
    return _known[1]


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGVTALRM, _out_of_time)
    is_ended = _can_be_ended()
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        if is_ended:
            signal.setitimer(signal.ITIMER_PROF, TIMES_SECONDS * SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if is_ended:
            signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGVTALRM, former)


@cache
def _can_be_ended() -> bool:
    """Make SIGPROF print the stack and end this process; return False if a profiler uses it.

    A comparison of two nested lists (`a == b`) is one operation, which can take longer than any run.
    """
    if signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL:
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # no standard error
        faulthandler.register(signal.SIGPROF, sys.__stderr__, chain=True)  # type: ignore[arg-type]
    return True


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise _OutOfTimeError


def _too_much(template: str, got: str) -> ConfigError:
    return ConfigError(
        "the chat template takes too much time or memory",
        where=template,
        got=got,
        expected="a template that writes a conversation",
        remedy="read the template; set data.chat_template to a file with another one",
    )
