"""Read the records of CSV files with their line numbers, and recover after a quote that is never closed.

A quoted cell may span lines (RFC 4180), so without its closing quote it includes the lines up to the next
quote. Then reading continues at the line after the damaged one. The next quote in the file decides about
the lines before it: if it opens a cell, they are records; if it closes one, the rest of the damaged cell.
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
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Replaces a line that is too long to load; as a record it has too few cells.
_TOO_LONG = "\0too long\0"


def read_csv(text: TextIO, path: str, max_characters: int) -> Iterator[RawRecord]:
    """Read the header now, and the records as the iterator advances.

    Args:
        text: opened with ``newline=""``.
        path: for origins and errors.
        max_characters: limit of a record; a longer one is a bad record.

    Raises:
        DataError: the header cannot be parsed, has a column twice, or other separators; raised by this call.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    lines = _Lines(text, max_characters)
    names, fault = lines.cells()
    if names is None and fault:
        raise DataError(
            "the header of the CSV file cannot be parsed",
            where=f"{path}:1",
            got=fault,
            remedy="write the names of the columns in the first line",
        )
    header = names or []
    check_columns(header, f"{path}:1")
    _check_separator(header, f"{path}:1")
    return _records(lines, path, header)


def check_columns(names: list[str], where: str) -> None:
    """Check that the names of columns differ.

    Raises:
        DataError: two columns have the same name.
    """
    if len(set(names)) < len(names):
        raise DataError(
            "two columns have the same name",
            where=where,
            got=", ".join(map(shown_key, names)),
            expected="a different name for each column",
            remedy="rename one of them in the file",
        )


def _check_separator(header: list[str], where: str) -> None:
    """Check that a single name is not several with another separator. Raises DataError."""
    found = [name for sign, name in _OTHER_SEPARATORS.items() if len(header) == 1 and sign in header[0]]
    if found:
        raise DataError(
            "the columns of the CSV file are not separated by commas",
            where=where,
            got=f"one name with {found[0]}",
            expected="names separated by commas",
            remedy="write the file again with commas",
        )


def _records(lines: "_Lines", path: str, header: list[str]) -> Iterator[RawRecord]:
    while True:
        origin = Origin(path, lines.number)
        cells, fault = lines.cells()
        if not lines.taken:
            return
        if cells is not None and len(cells) != len(header) and len(lines.taken) > 1:
            fault = f"{len(cells)} cells for {len(header)} columns, on {len(lines.taken)} lines"
            cells = None
        if cells is None:
            yield BadRecord("unparsable", origin, fault), origin
            for number in lines.go_back():
                inside = Origin(path, number)
                yield BadRecord("unparsable", inside, f"inside the record that starts at {origin}"), inside
        elif len(cells) > len(header):
            yield BadRecord("unparsable", origin, f"{len(cells)} cells for {len(header)} columns"), origin
        elif cells:
            yield dict(zip(header, cells, strict=False)), origin


class _Lines:
    """Lines of a text; lines of the last record can be read again.

    Attributes:
        number: number of the next line, 1-based.
        taken: lines of the last record.
    """

    def __init__(self, text: TextIO, max_characters: int):
        self.number = 1
        self.taken: list[str] = []
        self._text = text
        self._max_characters = max_characters
        self._ahead: deque[str] = deque()

    def cells(self) -> tuple[list[str] | None, str]:
        """Return the cells of the next record, or None and the error; at the end `taken` is empty."""
        self.taken = []
        try:
            # Strict: a quote that is never closed is an error, not one giant cell.
            return next(csv.reader(self._feed(), strict=True), None), ""
        except csv.Error as fault:
            return None, str(fault)

    def go_back(self) -> Iterator[int]:
        """Put back all taken lines but the first; skip the rest of its damaged cell and yield those lines."""
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
            if line == _TOO_LONG or size > self._max_characters:
                raise csv.Error(f"more than {self._max_characters} characters")
            yield line

    def _take(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._read()
        self.number += bool(line)
        return line

    def _read(self) -> str:
        line = self._text.readline(self._max_characters)
        if len(line) < self._max_characters or line.endswith("\n"):
            return line
        while line and not line.endswith("\n"):
            line = self._text.readline(self._max_characters)
        return _TOO_LONG

    def _rest_of_cell(self) -> int:
        """Return how many of the next lines belong to an unclosed cell; 0 if the next quote opens a cell."""
        size = 0
        for count, line in enumerate(self._peeked(), start=1):
            if found := _QUOTE.search(line):
                return 0 if found["opening"] else count
            size += len(line)
            if size > self._max_characters:
                break
        return 0

    def _peeked(self) -> Iterator[str]:
        yield from self._ahead
        while line := self._read():
            self._ahead.append(line)
            yield line
