"""Arrangements of the responses of a micro-batch in a forward; imports no torch."""

from enum import StrEnum


class Arrangement(StrEnum):
    """Arrangement of the responses of a micro-batch in a forward, from the cheapest to the costliest.

    `packed`: one sequence, each prompt computed once. `padded`: one response per row, as long as the longest.
    `single`: one forward per response.
    """

    packed = "packed"
    padded = "padded"
    single = "single"
