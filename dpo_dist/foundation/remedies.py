"""Where an error is, and sentences that say what to write, with quotes for a shell where words need them."""

import shlex
from typing import Self

COMMAND_LINE = "command line"


class Typed(str):
    """The place of words of the command: `command line: loss.betta=1`."""

    def __new__(cls, *words: str) -> Self:
        """Return the place of these words."""
        return super().__new__(cls, f"{COMMAND_LINE}: {' '.join(words)}")


class AtRecords(str):
    """The places of records: `pairs.jsonl:3; pairs.jsonl:7`."""

    records: tuple[str, ...]

    def __new__(cls, *records: str) -> Self:
        """Return the place of records, each as `FILE:LINE`, which its reason may follow."""
        place = super().__new__(cls, "; ".join(records))
        place.records = records
        return place


def to_write(*words: str, verb: str = "write") -> str:
    """Return the remedy `write KEY=VALUE`."""
    return f"{verb} {shlex.join(words)}"
