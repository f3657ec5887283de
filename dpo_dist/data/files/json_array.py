"""Split a JSON array into its elements while it is read, so that it may be larger than memory.

Only brackets, commas and the ends of strings are looked at. So an element that is no JSON, is nested too
deeply or is too long does not affect the others.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TO_SIGN = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+", re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+", re.DOTALL)
_TO_QUOTE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BLOCK_BYTES = 2**20
_MAX_DEPTH = 1_000_000


def split_array(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Yield the bytes of each element of an array; None for one that is longer than `max_bytes`.

    Args:
        stream: positioned after the opening bracket of the array.
        max_bytes: about as much is in memory at a time.

    Raises:
        ValueError: the array does not end, text follows it, or it is no data: a million brackets are open.
    """
    elements = _Elements(max_bytes)
    while block := stream.read(_BLOCK_BYTES):
        yield from elements.of(block)
    if elements.depth:
        raise ValueError("the file ends inside the array")


class _Elements:
    """Finds the elements in consecutive blocks of the text of an array.

    Attributes:
        depth: number of open brackets, the array's included; 0 after its end.
    """

    def __init__(self, max_bytes: int):
        self.depth = 1
        self._max_bytes = max_bytes
        self._in_string = False
        self._is_escaped = False
        self._found = 0
        self._parts: list[bytes] = []
        self._size = 0

    def of(self, block: bytes) -> Iterator[bytes | None]:
        """Yield the elements that end in this block."""
        start = position = 0
        while (position := self._next_sign(block, position)) < len(block):
            sign = block[position : position + 1]
            position += 1
            self.depth += (sign in b"[{") - (sign in b"]}")
            if self.depth > _MAX_DEPTH:
                raise ValueError(f"brackets are nested more than {_MAX_DEPTH:,} levels deep")
            if self.depth == 0 or (self.depth == 1 and sign == b","):
                self._keep(block[start : position - 1])
                start = position
                yield from self._element()
            if self.depth == 0:
                break
        if self.depth:
            self._keep(block[start:])
        elif block[start:].strip():
            raise ValueError("text follows the array")

    def _next_sign(self, block: bytes, position: int) -> int:
        """Return the position of the next bracket or separating comma outside strings, or the block's end."""
        if not self.depth:
            return len(block)
        if self._in_string:
            position = self._after_string(block, position)
        while position < len(block):
            found = (_TO_SIGN if self.depth == 1 else _TO_BRACKET).match(block, position)
            position = found.end() if found else position
            if block[position : position + 1] != b'"':
                return position
            # A string that does not end in this block.
            self._in_string = True
            position = self._after_string(block, position + 1)
        return position

    def _after_string(self, block: bytes, position: int) -> int:
        found = _TO_QUOTE.match(block, position + self._is_escaped)
        position = found.end() if found else len(block)
        self._is_escaped = block[position : position + 1] == b"\\"
        self._in_string = block[position : position + 1] != b'"'
        return len(block) if self._in_string else position + 1

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._max_bytes:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _element(self) -> Iterator[bytes | None]:
        content = b"".join(self._parts).strip()
        is_long = self._size > self._max_bytes
        self._parts, self._size = [], 0
        if is_long or content or self._found or self.depth:
            self._found += 1
            yield None if is_long else content
