"""Arrangements of the responses of a micro-batch in a forward; imports no torch."""

from collections.abc import Sequence
from enum import StrEnum


class Arrangement(StrEnum):
    """Arrangement of the responses of a micro-batch in a forward, from the cheapest to the costliest.

    `packed`: one sequence, each prompt computed once. `padded`: one response per row, as long as the longest.
    `single`: one forward per response.
    """

    packed = "packed"
    padded = "padded"
    single = "single"


def computed_tokens(layout: Sequence[Sequence[int]], arrangement: Arrangement) -> int:
    """Return the tokens that the forwards of a micro-batch compute, with their padding.

    Args:
        layout: as `PackedBatch.layout`: of each example, tokens of the prompt and then of each response.
        arrangement: of the responses.
    """
    if arrangement is Arrangement.packed:
        return sum(map(sum, layout))
    rows = [prompt + tokens for prompt, *responses in layout for tokens in responses]
    return len(rows) * max(rows) if arrangement is Arrangement.padded else sum(rows)


def size_in_words(layout: Sequence[Sequence[int]], arrangement: Arrangement) -> str:
    """Return the tokens and pairs of a micro-batch as text; arguments as of `computed_tokens`."""
    longest = max(map(sum, layout))
    padding = " with padding" if arrangement is Arrangement.padded else ""
    tokens = computed_tokens(layout, arrangement)
    return f"{tokens} tokens{padding} in {len(layout)} pairs, the longest of {longest}"


def consecutive_batches(
    layout: Sequence[Sequence[int]], budget: int, arrangement: Arrangement
) -> list[range]:
    """Return micro-batches of consecutive examples, indices in `layout`.

    Args:
        layout: as in `computed_tokens`.
        budget: most computed tokens of a micro-batch; a longer example is a micro-batch of its own.
        arrangement: of the responses.
    """
    batches: list[range] = []
    for stop in range(1, len(layout) + 1):
        start = batches[-1].start if batches else 0
        fits = bool(batches) and computed_tokens(layout[start:stop], arrangement) <= budget
        if fits:
            batches[-1] = range(start, stop)
        else:
            batches.append(range(stop - 1, stop))
    return batches
