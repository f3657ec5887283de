"""A uniform sample of a stream, in bounded memory."""

import random
from collections.abc import Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """The first `size` items of a stream, then each later one in place of an earlier one with fair chance.

    Algorithm R (Vitter 1985, doi:10.1145/3147.3165); it depends on the seed and the order of the items only.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.items: list[Item] = []
        self.seen = 0
        self._size = size
        self._random = random.Random(seed)  # noqa: S311

    def add(self, items: Iterable[Item]) -> None:
        """Offer items to the sample."""
        for item in items:
            self.seen += 1
            if len(self.items) < self._size:
                self.items.append(item)
            elif (at := self._random.randrange(self.seen)) < self._size:
                self.items[at] = item
