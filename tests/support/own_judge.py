"""A judge of the user's own: `pairs.function=tests.support.own_judge:letter_shares`."""

from collections.abc import Mapping, Sequence


def letter_shares(_: Sequence[Mapping[str, str]], responses: Sequence[str]) -> list[float]:
    """The share of nine frequent letters in each response."""
    return [sum(map(response.lower().count, "etaoinsrh")) / max(len(response), 1) for response in responses]
