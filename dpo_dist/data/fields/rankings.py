"""Rankings: read a record's list of responses, and split it into training examples."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_dist.config.data_schema import Ranked
from dpo_dist.data.fields.context import prompt_of
from dpo_dist.data.fields.message_fields import check_no_media, from_json, has_more, has_value
from dpo_dist.data.records import (
    BadRecord,
    Fields,
    Origin,
    PreferenceRecord,
    RawContent,
    UnusableRecordError,
)

Ranks = tuple[int, ...]

_LIST_FIELDS = ("responses", "completions", "output")
_NAMES = frozenset(_LIST_FIELDS)
_TEXTS = ("content", "text", "response", "answer")
# An order beside the list that no format reads.
_ORDERS = ("rank", "ranks", "reward", "rewards", "rating", "ratings", "label", "labels", "choice")
_SCORES = ("score", "fine-grained_score", "overall_score", "rating", "reward")


def has_ranking(record: Fields) -> bool:
    """Return whether a record has a list of responses."""
    if _NAMES.isdisjoint(record):
        return False
    return any(isinstance(from_json(record.get(name)), list) for name in _LIST_FIELDS)


def ranked_content(record: Fields, origin: Origin) -> RawContent | BadRecord:
    """Return a list of responses: best first as given, or sorted by the score inside each of them."""
    lists = {name: from_json(record[name]) for name in _LIST_FIELDS if record.get(name) is not None}
    if not lists:
        return BadRecord("missing_field", origin, "responses")
    name, items = next(iter(lists.items()))
    if any(isinstance(other, list) and other != items for other in lists.values()):
        raise UnusableRecordError(
            "ambiguous_format", f"several lists: {', '.join(lists)}; ignore one: columns: {{COLUMN: null}}"
        )
    if not isinstance(items, list):
        return BadRecord("unknown_format", origin, f"{name} is not a list")
    if len(items) < 2:
        return BadRecord("no_ranking", origin, f"{name} has {len(items)}, not at least 2")
    objects = [item for item in items if isinstance(item, Mapping)]
    check_no_media(objects)
    try:
        responses, scores = _sorted_responses(items, from_json(record.get("scores")))
    except (TypeError, ValueError):
        return BadRecord(
            "invalid_scores", origin, "each response needs a finite score, and `scores` must not rise"
        )
    if any(response is None for response in responses):
        return BadRecord("missing_field", origin, f"a response in {name}")
    if scores is not None and scores[0] == scores[-1]:
        return BadRecord("all_tied", origin, f"all scores are {scores[0]:g}")
    if scores is None:
        _check_no_order(record)
    prompt, has_context = prompt_of(record, responses)
    by_rank = {f"rank {rank}": response for rank, response in enumerate(responses, start=1)}
    return RawContent(prompt, by_rank, scores, has_context)


def _sorted_responses(items: list[Any], scores: Any) -> tuple[list[Any], tuple[float, ...] | None]:
    """Return the responses, best first, and their scores. Raises ValueError or TypeError for bad scores."""
    own = [_own_score(item) if isinstance(item, Mapping) else None for item in items]
    if any(score is not None for score in own):
        numbers = finite_scores(own)
        if scores is not None and finite_scores(scores) != numbers:
            raise ValueError("two different scores of a response")
        order = sorted(range(len(items)), key=lambda index: -numbers[index])
        return [_scored_response(items[index]) for index in order], tuple(numbers[index] for index in order)
    if scores is None:
        return items, None
    numbers = finite_scores(scores)
    if len(numbers) != len(items) or any(low < high for low, high in itertools.pairwise(numbers)):
        raise ValueError("not one score for each response, best first")
    return items, numbers


def _check_no_order(record: Fields) -> None:
    """Check that no rank or reward may contradict the order of a list. Raises UnusableRecordError."""
    unread = tuple(name for name in _ORDERS if has_value(record.get(name)))
    if unread:
        raise UnusableRecordError(
            "unread_content",
            f"an order of the responses in {', '.join(unread)}; write `scores`: higher is better",
            unread,
        )


def _scored_response(item: Fields) -> Any:
    """Return the text of a response; the whole message if it has tool calls or thoughts."""
    text = _first(item, _TEXTS)
    return {"role": "assistant"} | dict(item) | {"content": text} if has_more(item) else text


def _own_score(response: Fields) -> Any:
    """Return the score inside a response: the mean rating of its aspects if it has them, else one number.

    A rank without a score, 1 for the best, is a negative score.

    UltraFeedback's `overall_score` is wrong for hundreds of responses (a rating of 1 became 10); the ratings
    of the aspects are right (dataset card of argilla/ultrafeedback-binarized-preferences).
    """
    annotations = response.get("annotations")
    aspects = annotations.values() if isinstance(annotations, Mapping) else ()
    ratings = [aspect["Rating"] for aspect in aspects if isinstance(aspect, Mapping) and "Rating" in aspect]
    if not ratings:
        score, rank = _first(response, _SCORES), response.get("rank")
        return -_number(rank) if score is None and rank is not None else score
    given = finite_scores(rating for rating in ratings if rating not in (None, "N/A"))
    return sum(given) / len(given) if given else math.nan


def finite_scores(values: Iterable[Any]) -> tuple[float, ...]:
    """Return the values as finite numbers. Raises TypeError or ValueError if one is not."""
    if isinstance(values, str | Mapping):
        raise TypeError("not a list")
    numbers = tuple(map(_number, values))
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a score is not finite")
    return numbers


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError("a score is true or false")
    try:
        return float(value)
    except OverflowError as fault:
        raise ValueError("a score is too large") from fault


def _first(fields: Fields, names: Iterable[str]) -> Any:
    """Return the value of the first of `names` that has one."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def training_examples(record: PreferenceRecord, ranked: Ranked) -> tuple[list[Ranks], int]:
    """Return the training examples of a record, each as indices of its responses, best first.

    A record of one or two responses is one example.

    Args:
        record: if it has more than two responses, its scores do not rise and are not all equal.
        ranked: `whole`: one ranking, with the first of responses with equal scores; `best_worst`: the first
            and the last response; `all_pairs`: every two responses with different scores.

    Returns:
        (examples, ties): at least one example, and the number of responses (`whole`) or pairs (`all_pairs`)
        omitted because of equal scores.
    """
    indices = range(len(record.responses))
    if len(indices) <= 2:
        return [tuple(indices)], 0
    # Without scores the order itself is the ranking.
    scores = record.scores or tuple(-float(index) for index in indices)
    match ranked:
        case Ranked.whole:
            distinct = tuple(index for index in indices if index == 0 or scores[index] != scores[index - 1])
            return [distinct], len(indices) - len(distinct)
        case Ranked.best_worst:
            return [(0, indices[-1])], 0
        case Ranked.all_pairs:
            pairs = list(itertools.combinations(indices, 2))
            untied: list[Ranks] = [
                (better, worse) for better, worse in pairs if scores[better] != scores[worse]
            ]
            return untied, len(pairs) - len(untied)
