"""Blocks of queries: the queries of a segment, cut at multiples of one size, with the keys within reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Some queries of a sequence and the keys that they may see, as positions.

    Attributes:
        size: of a whole block.
        queries: consecutive, in one interval between multiples of `size`.
        keys: from a multiple of `size` to the last query.
    """

    size: int
    queries: range
    keys: range

    @property
    def start(self) -> int:
        """Position of the first query of the whole block."""
        return self.queries.start - self.queries.start % self.size


def cut_in_blocks(queries: range, size: int, reach: int | None) -> list[Block]:
    """Return the blocks of these queries, the last tokens of a sequence.

    Args:
        queries: positions.
        size: of a block.
        reach: a query at position p sees no key at p - reach or before; None: it may see all keys before it.
    """
    blocks = []
    for start in range(queries.start - queries.start % size, queries.stop, size):
        own = range(max(start, queries.start), min(start + size, queries.stop))
        earliest = 0 if reach is None else max(0, own.start - reach + 1)
        blocks.append(Block(size, own, range(earliest - earliest % size, own.stop)))
    return blocks
