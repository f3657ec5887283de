"""Background threads: one computes items ahead of their use, one calls a function every few seconds."""

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
    """While the block runs, call `beat` every few seconds in a thread, with the seconds since the start."""
    done = threading.Event()
    started = time.monotonic()

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
    """Yield an iterator over `items`; a background thread computes up to `depth` items ahead.

    Leaving the context waits for the item that is being computed; later items are never computed. If an item
    raises, its exception is raised where the item would have been returned.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "prefetch") as pool:
        waiting = deque(pool.submit(next, source, _END) for _ in range(depth))

        def take() -> Iterator[T]:
            while waiting:
                item = waiting.popleft().result()
                if item is _END:
                    return
                waiting.append(pool.submit(next, source, _END))
                yield item

        try:
            yield take()
        finally:
            pool.shutdown(cancel_futures=True)
            waiting.clear()
