"""One thread computes items ahead, in order, at most `depth`, and ends with the context."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from dpo_dist.foundation.background import prefetch


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 100])
def test_all_items_in_order_from_one_thread(depth: int) -> None:
    threads = set()

    def numbers() -> Iterator[int]:
        for number in range(50):
            threads.add(threading.get_ident())
            yield number

    with prefetch(numbers(), depth) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_at_most_depth_items_are_ahead_of_a_slow_consumer() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    with prefetch(numbers(), 3) as items:
        for taken in range(1, 6):
            assert next(items) == taken - 1
            deadline = time.monotonic() + 240
            while len(made) < taken + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == taken + 3


def test_an_error_is_raised_at_the_position_of_its_item() -> None:
    def failing() -> Iterator[int]:
        yield from range(3)
        raise OSError("item 3 cannot be made")

    with prefetch(failing(), 8) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="item 3 cannot be made"):
            next(items)
        assert list(items) == []
