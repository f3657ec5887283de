"""Ratings in the input fields of a record that contradict its order of responses."""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from dpo_dist.data.records import Fields

_RATING = re.compile(r"score|rating|reward|quality|grade|preference", re.IGNORECASE)
_LISTS = ("completions", "responses", "output")
_OVERALL = ("overall_score", "score", "fine-grained_score", "rating")

Scores = tuple[float, ...] | None


def ratings_contradict(fields: Fields, scores: Scores) -> bool:
    """Return whether a rating in the record ranks its responses in another order than the record does.

    Numbers of both sides, such as `chosen_rating` and `rejected_rating` (also in `metadata`), are compared
    with the order of the pair; inside a list of responses the overall score with the mean of the ratings by
    aspect. The scores by which the record was read are not compared with themselves.
    """
    nested = [value for value in fields.values() if isinstance(value, Mapping)]
    pairs = [pair for part in (fields, *nested) for pair in _side_ratings(part)]
    if any(chosen < rejected for chosen, rejected in pairs if (chosen, rejected) != scores):
        return True
    return any(
        (one[0] - other[0]) * (one[1] - other[1]) < 0
        for name in _LISTS
        for one, other in combinations(_response_ratings(fields.get(name)), 2)
    )


def _side_ratings(part: Fields) -> Iterator[tuple[float, float]]:
    """Yield the two numbers of each rating that both sides have."""
    for name, value in part.items():
        if isinstance(name, str) and "chosen" in name and _RATING.search(name):
            chosen, rejected = _number(value), _number(part.get(name.replace("chosen", "rejected")))
            if chosen is not None and rejected is not None:
                yield chosen, rejected


def _response_ratings(responses: Any) -> list[tuple[float, float]]:
    """Return the overall score and the mean rating by aspect of each response that has both."""
    found = []
    for response in responses if isinstance(responses, list) else []:
        annotations = response.get("annotations") if isinstance(response, Mapping) else None
        if not isinstance(annotations, Mapping):
            continue
        aspects = [_number(part.get("Rating")) for part in annotations.values() if isinstance(part, Mapping)]
        given = [rating for rating in aspects if rating is not None]
        overall = next(filter(None, (_number(response.get(name)) for name in _OVERALL)), None)
        if given and overall is not None:
            found.append((overall, sum(given) / len(given)))
    return found


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else, also for true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
