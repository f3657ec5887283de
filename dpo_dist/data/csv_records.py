"""Records of CSV files with true line numbers; a quote that is never closed costs the lines it damages only.

A quoted cell may span lines (RFC 4180). So a missing closing quote swallows the lines up to the next quote.
Reading goes back to the line after the damaged one. Whether the lines that follow are records or the rest of
the damaged cell is decided by the next quote: one that opens a cell, or one that closes it.
"""

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from dpo_dist.data.records import BadRecord, Origin, RawRecord, shown_key
from dpo_dist.errors import DataError

_QUOTE = re.compile(r'(?P<opening>(?:^|,)")|"(?=,|\s*$)')
_MAX_CELL_CHARACTERS = 2**31 - 1
# Stands for a line that is too long to be kept; as a record it has too few cells.
_TOO_LONG = "\0too long\0"


def read_csv(text: TextIO, path: str, most_characters: int) -> Iterator[RawRecord]:
    """Read the header at once and the records as the iterator is advanced.

    Args:
        text: opened with ``newline=""``.
        path: named in origins and errors.
        most_characters: of a record; longer ones are bad.

    Raises:
        DataError: the header is no CSV record, or names a column twice; raised by this call.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    lines = _Lines(text, most_characters)
    names, fault = lines.cells()
    if names is None and fault:
        raise DataError("the first line is no CSV header", where=f"{path}:1", got=fault)
    header = names or []
    if len(set(header)) < len(header):
        raise DataError(
            "two columns have the same name",
            where=f"{path}:1",
            got=", ".join(map(shown_key, header)),
            expected="a name of its own for each column",
        )
    return _records(lines, path, header)


def _records(lines: "_Lines", path: str, header: list[str]) -> Iterator[RawRecord]:
    while True:
        origin = Origin(path, lines.number)
        cells, fault = lines.cells()
        if not lines.taken:
            return
        if cells is not None and len(cells) != len(header) and len(lines.taken) > 1:
            fault = f"{len(cells)} cells under {len(header)} names, on {len(lines.taken)} lines"
            cells = None
        if cells is None:
            yield BadRecord("unparsable", origin, fault), origin
            for swallowed in lines.go_back():
                place = Origin(path, swallowed)
                yield BadRecord("unparsable", place, f"inside the record that starts at {origin}"), place
        elif len(cells) > len(header):
            yield BadRecord("unparsable", origin, f"{len(cells)} cells under {len(header)} names"), origin
        elif cells:
            yield dict(zip(header, cells, strict=False)), origin


class _Lines:
    """The lines of a text, which can be read again.

    Attributes:
        number: of the next line, 1-based.
        taken: the lines of the last record.
    """

    def __init__(self, text: TextIO, most_characters: int):
        self.number = 1
        self.taken: list[str] = []
        self._text = text
        self._most = most_characters
        self._ahead: deque[str] = deque()

    def cells(self) -> tuple[list[str] | None, str]:
        """The cells of the next record, or None and why it is none; at the end nothing is `taken`."""
        self.taken = []
        try:
            # Strict, so that a quote that never closes is a fault and not one giant cell.
            return next(csv.reader(self._feed(), strict=True), None), ""
        except csv.Error as fault:
            return None, str(fault)

    def go_back(self) -> Iterator[int]:
        """Put back all but the first line taken; pass over the rest of its damaged cell, by line number."""
        others = self.taken[1:]
        self._ahead.extendleft(reversed(others))
        self.number -= len(others)
        for _ in range(self._rest_of_cell()):
            yield self.number
            self._take()

    def _feed(self) -> Iterator[str]:
        size = 0
        while line := self._take():
            self.taken.append(line)
            size += len(line)
            if line == _TOO_LONG or size > self._most:
                raise csv.Error(f"more than {self._most} characters")
            yield line

    def _take(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._read()
        self.number += bool(line)
        return line

    def _read(self) -> str:
        line = self._text.readline(self._most)
        if len(line) < self._most or line.endswith("\n"):
            return line
        while line and not line.endswith("\n"):
            line = self._text.readline(self._most)
        return _TOO_LONG

    def _rest_of_cell(self) -> int:
        """How many of the next lines a cell left open goes on for; none if a cell is opened first."""
        size = 0
        for count, line in enumerate(self._peeked(), start=1):
            if found := _QUOTE.search(line):
                return 0 if found["opening"] else count
            size += len(line)
            if size > self._most:
                break
        return 0

    def _peeked(self) -> Iterator[str]:
        yield from tuple(self._ahead)
        while line := self._read():
            self._ahead.append(line)
            yield line
