"""Make items in a background thread, a few ahead of the one who takes them."""

import contextlib
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """No item follows: there are no more, or making the next one failed."""

    failure: BaseException | None


@contextlib.contextmanager
def prefetch(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Within it, the `items`, made by one background thread.

    Leaving it, at whatever point, ends the thread as soon as the item in the making is done; the rest is
    never made.

    Args:
        items: walked in the thread only, and not before the context is entered.
        depth: how many items may be made and not yet taken; at least one.

    Yields:
        The items in order. What making an item raises is raised where that item would have been taken.
    """
    assert depth >= 1
    rooms = threading.Semaphore(depth)
    left = threading.Event()
    made: SimpleQueue[T | _End] = SimpleQueue()
    maker = threading.Thread(target=_make, args=(items, rooms, left, made), name="prefetch", daemon=True)
    maker.start()
    taken = _take(rooms, made)
    try:
        yield taken
    finally:
        left.set()
        rooms.release()
        maker.join()
        taken.close()


def _make(
    items: Iterable[T], rooms: threading.Semaphore, left: threading.Event, made: "SimpleQueue[T | _End]"
) -> None:
    failure = None
    try:
        source = iter(items)
        while rooms.acquire() and not left.is_set():
            made.put(next(source))
    except StopIteration:
        pass
    except BaseException as raised:
        failure = raised
    made.put(_End(failure))


def _take(rooms: threading.Semaphore, made: "SimpleQueue[T | _End]") -> Generator[T, None, None]:
    while not isinstance(item := made.get(), _End):
        rooms.release()
        yield item
    if item.failure is not None:
        raise item.failure
