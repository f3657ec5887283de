"""Threads beside the main one: they compute ahead, or say that it still works."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_BEAT_SECONDS = 5.0
T = TypeVar("T")
_END: Any = object()


@contextlib.contextmanager
def call_periodically(beat: Callable[[float], None]) -> Iterator[None]:
    """Call `beat` every few seconds during the block, in a thread, with the seconds since its start."""
    done, started = threading.Event(), time.monotonic()

    def run() -> None:
        while not done.wait(_BEAT_SECONDS):
            beat(time.monotonic() - started)

    thread = threading.Thread(target=run, name="periodic", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def prefetch(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Yield an iterator over `items` that one background thread computes ahead, at most `depth` of them.

    Leaving the context waits for the current item; later ones are never computed. An exception of `items` is
    raised at the position of the item that failed.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "prefetch") as pool:
        waiting = deque(pool.submit(next, source, _END) for _ in range(depth))

        def take() -> Iterator[T]:
            while waiting and (item := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(next, source, _END))
                yield item

        try:
            yield take()
        finally:
            pool.shutdown(cancel_futures=True)
            waiting.clear()
