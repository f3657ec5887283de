"""Prefetch items of an iterable in a background thread."""

import contextlib
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """End of the items, with the exception that caused it, if any."""

    error: BaseException | None


@contextlib.contextmanager
def prefetch(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Yield an iterator over `items` that one background thread computes ahead.

    Leaving the context ends the thread as soon as it has finished the current item; later items are never
    computed.

    Args:
        items: iterated in the thread only, and not before the context is entered.
        depth: maximum number of items computed and not yet taken; at least one.

    Yields:
        The items in order. An exception of `items` is raised at the position of the item that failed.
    """
    assert depth >= 1
    free = threading.Semaphore(depth)
    stopped = threading.Event()
    queue: SimpleQueue[T | _End] = SimpleQueue()
    worker = threading.Thread(target=_fill, args=(items, free, stopped, queue), name="prefetch", daemon=True)
    worker.start()
    taken = _take(free, queue)
    try:
        yield taken
    finally:
        stopped.set()
        free.release()
        worker.join()
        taken.close()


def _fill(
    items: Iterable[T], free: threading.Semaphore, stopped: threading.Event, queue: "SimpleQueue[T | _End]"
) -> None:
    error = None
    try:
        source = iter(items)
        while free.acquire() and not stopped.is_set():
            queue.put(next(source))
    except StopIteration:
        pass
    except BaseException as raised:
        error = raised
    queue.put(_End(error))


def _take(free: threading.Semaphore, queue: "SimpleQueue[T | _End]") -> Generator[T, None, None]:
    while not isinstance(item := queue.get(), _End):
        free.release()
        yield item
    if item.error is not None:
        raise item.error
