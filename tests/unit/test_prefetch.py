"""One thread computes items ahead, in order, at most `depth`, and ends with the context."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from dpo_dist.foundation.process import prefetch


class Maker:
    """Counts up, and records the threads and the number of items."""

    def __init__(self, stop: int | None = None, error_at: int | None = None):
        self.made = 0
        self.threads: set[int] = set()
        self.stop, self.error_at = stop, error_at

    def __iter__(self) -> Iterator[int]:
        for number in itertools.count():
            if number == self.stop:
                return
            self.threads.add(threading.get_ident())
            if number == self.error_at:
                raise OSError(f"item {number} cannot be made")
            self.made += 1
            yield number

    def wait_for(self, made: int) -> None:
        deadline = time.monotonic() + 10
        while self.made != made and time.monotonic() < deadline:
            time.sleep(0.001)
        assert self.made == made


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_all_items_in_order_from_one_thread(depth: int) -> None:
    maker = Maker(stop=50)
    with prefetch(maker, depth) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert len(maker.threads) == 1
    assert threading.get_ident() not in maker.threads
    with prefetch([], depth) as items:
        assert list(items) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_at_most_depth_items_are_ahead_of_a_slow_consumer(depth: int) -> None:
    maker = Maker()
    with prefetch(maker, depth) as items:
        for taken in range(1, 6):
            assert next(items) == taken - 1
            maker.wait_for(taken + depth)
        time.sleep(0.02)
        assert maker.made == taken + depth


def test_an_error_is_raised_at_the_position_of_its_item() -> None:
    with prefetch(Maker(error_at=3), 8) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="item 3 cannot be made"):
            next(items)
        assert list(items) == []
    with prefetch(Maker(error_at=1), 8) as items:
        assert next(items) == 0


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_early_ends_the_thread(taken: int) -> None:
    maker = Maker()
    with prefetch(maker, 2) as items:
        assert list(itertools.islice(items, taken)) == list(range(taken))
    assert maker.made <= taken + 2
    assert list(items) == []
    with pytest.raises(ZeroDivisionError), prefetch(Maker(), 1) as items:
        print(1 / next(items))


def test_leaving_waits_for_the_current_item_only() -> None:
    begun, finish = threading.Event(), threading.Event()
    finished = []

    def slow() -> Iterator[int]:
        for number in itertools.count():
            begun.set()
            assert finish.wait(120)
            finished.append(number)
            yield number

    with prefetch(slow(), 5):
        assert begun.wait(120)
        threading.Timer(0.05, finish.set).start()
    assert finished == [0]


def test_nested_prefetches_are_independent_and_nothing_is_computed_before_the_context() -> None:
    maker = Maker()
    prefetch(maker, 4)
    assert maker.made == 0
    with prefetch(range(5), 1) as outer:
        for number in outer:
            with prefetch(range(number), 2) as inner:
                assert list(inner) == list(range(number))
