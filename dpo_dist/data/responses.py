"""Where a record has its responses, and their scores: pairs, rankings, completions."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.data.context import CONVERSATIONS, ends_with_response, is_conversation, prompt_of
from dpo_dist.data.messages import check_no_media, from_json, has_more, has_value, spelled_messages
from dpo_dist.data.records import Fields, UnusableRecordError

IGNORE = "ignore one: columns: {COLUMN: null}"
UNPAIRED = "one response with a good/bad label is neither a pair nor a completion"


@dataclass(frozen=True)
class Content:
    """The prompt and the responses of a record, with values as in the source.

    Attributes:
        prompt: text or messages; None if the responses contain it.
        responses: text or messages each, best first, by the names that error messages use.
        scores: of each response, finite; None if the source has none.
        field: the field that has the responses, if they are a list.
    """

    prompt: Any
    responses: Fields
    scores: tuple[float, ...] | None = None
    field: str | None = None


# Pairs: the names of the chosen and the rejected side.
_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
)
# Fields of other kinds of records too: by themselves they are no pair.
_SHARED_NAMES = ("messages", "response")
SIDE_NAMES = tuple(dict.fromkeys(name for names in _PAIRS for name in names if name not in _SHARED_NAMES))
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    # Read if both sides have one: some datasets score the chosen side only.
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


def _sides(record: Fields) -> tuple[str, str] | None:
    """Return the names of the first complete pair of a record, else of the first with a side."""
    given = [
        (chosen, rejected)
        for chosen, rejected in _PAIRS
        if record.get(rejected) is not None
        or (record.get(chosen) is not None and (chosen not in _SHARED_NAMES or rejected in record))
    ]
    complete = [names for names in given if None not in map(record.get, names)]
    return next(iter([*complete, *given]), None)


def has_pair(record: Fields) -> bool:
    """Return whether a record has a side of a pair, or the field of a rejected side beside a chosen one."""
    return _sides(record) is not None


def pair(record: Fields) -> Content:
    """Return the two sides of a pair, and their scores from the record or its metadata."""
    chosen, rejected = names = _sides(record) or _PAIRS[0]
    for name in names:
        if record.get(name) is None:
            raise UnusableRecordError("missing_field", name)
    scores = _pair_scores(record)
    sides = {name: record[name] for name in names}
    if chosen == "messages" and not is_conversation(record[rejected]):
        # The other response to the same question as the last message.
        turns = record[chosen]
        if not ends_with_response(turns):
            raise UnusableRecordError("not_one_answer", "messages does not end with an assistant message")
        return Content(turns[:-1], sides | {chosen: turns[-1]}, scores)
    return Content(prompt_of(record, sides.values()), sides, scores)


def _pair_scores(record: Fields) -> tuple[float, ...] | None:
    metadata = from_json(record.get("metadata"))
    inner = metadata if isinstance(metadata, Mapping) else {}
    for fields, names in itertools.product((record, inner), _PAIR_SCORES):
        scores = [None if fields.get(name) == "" else fields.get(name) for name in names]
        has_score = [score is not None for score in scores]
        if all(has_score) or (any(has_score) and names == _PAIR_SCORES[0]):
            return _finite(scores)
    return None


# Rankings.
LISTS = ("responses", "completions", "output")
_TEXTS = ("content", "text", "response", "answer")
_SCORES = ("score", "fine-grained_score", "overall_score", "rating", "reward")
# An order beside the list that no format reads.
_ORDERS = ("rank", "ranks", "reward", "rewards", "rating", "ratings", "label", "labels", "choice")


def has_ranking(record: Fields) -> bool:
    """Return whether a record has a list of responses."""
    return any(isinstance(record.get(name), list) for name in LISTS)


def ranking(record: Fields) -> Content:
    """Return a list of responses: best first as given, or sorted by the score inside each of them."""
    lists = [name for name in LISTS if record.get(name) is not None]
    if not lists:
        raise UnusableRecordError("missing_field", "responses")
    name = next((one for one in lists if isinstance(record[one], list)), lists[0])
    items = record[name]
    if not isinstance(items, list):
        raise UnusableRecordError("unknown_format", f"{name} is not a list")
    if len(items) < 2:
        raise UnusableRecordError("no_ranking", f"{name} has {len(items)}, not at least 2")
    check_no_media([item for item in items if isinstance(item, Mapping)])
    responses, scores = _sorted(items, from_json(record.get("scores")))
    if any(response is None for response in responses):
        raise UnusableRecordError("missing_field", f"a response in {name}")
    if scores is not None and scores[0] == scores[-1]:
        raise UnusableRecordError("all_tied", f"all scores are {scores[0]:g}")
    unread = [field for field in _ORDERS if has_value(record.get(field))]
    if scores is None and unread:
        detail = f"an order of the responses in {', '.join(unread)}; write `scores`: higher is better"
        raise UnusableRecordError("unread_content", detail, tuple(unread))
    by_rank = {f"rank {rank}": spelled_messages(one) for rank, one in enumerate(responses, start=1)}
    return Content(prompt_of(record, by_rank.values()), by_rank, scores, name)


def _sorted(items: list[Any], scores: Any) -> tuple[list[Any], tuple[float, ...] | None]:
    """Return the responses, best first, and their scores: those inside of them, or `scores`."""
    own = [_own_score(item) if isinstance(item, Mapping) else None for item in items]
    if any(score is not None for score in own):
        numbers = _finite(own)
        if scores is not None and _finite(scores) != numbers:
            raise UnusableRecordError("invalid_scores", "two different scores of a response")
        order = sorted(range(len(items)), key=lambda index: -numbers[index])
        return [_scored_response(items[index]) for index in order], tuple(numbers[index] for index in order)
    if scores is None:
        return items, None
    numbers = _finite(scores)
    if len(numbers) != len(items) or any(low < high for low, high in itertools.pairwise(numbers)):
        raise UnusableRecordError("invalid_scores", "not one score for each response, best first")
    return items, numbers


def _scored_response(item: Fields) -> Any:
    """Return the text of a response; the whole message if it has tool calls or thoughts."""
    text = _first(item, _TEXTS)
    return {"role": "assistant"} | dict(item) | {"content": text} if has_more(item) else text


def _own_score(response: Fields) -> Any:
    """Return the score inside a response; a rank without a score, 1 for the best, is a negative score."""
    score, rank = _first(response, _SCORES), response.get("rank")
    return -_finite([rank])[0] if score is None and rank is not None else score


def _first(fields: Fields, names: Iterable[str]) -> Any:
    """Return the value of the first of `names` that has one."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    """Return the values as finite numbers. Raises UnusableRecordError if one is not."""
    try:
        given = [] if isinstance(values, str | Mapping) else list(values)
        numbers = tuple(map(float, given))
        if numbers and all(map(math.isfinite, numbers)) and bool not in map(type, given):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    raise UnusableRecordError("invalid_scores", "a score is missing or is no finite number")


_LABELS = ("label", "kto_tag")
_LABEL_VALUES = frozenset(
    (
        *("0", "1", "-1", "0.0", "1.0", "-1.0", "true", "false"),
        *("good", "bad", "chosen", "rejected", "desirable", "undesirable"),
    )
)


def is_labelled(record: Fields) -> bool:
    """Return whether a record is a single response with a good/bad label, as for KTO."""
    has_label = any(str(record.get(name)).strip().lower() in _LABEL_VALUES for name in _LABELS)
    return has_label and not has_pair(record) and not has_ranking(record)


def is_response(record: Fields, name: str) -> bool:
    """Return whether a field has a response or several."""
    value = record.get(name)
    if name in CONVERSATIONS:
        return ends_with_response(value)
    if name == "output" and isinstance(value, str):
        return record.get("instruction") is not None
    return isinstance(value, list) if name in LISTS else value is not None


def has_completion(record: Fields) -> bool:
    """Return whether a record has a single response."""
    has_one = any(record.get(name) is not None for name in ("completion", *CONVERSATIONS))
    return (has_one or is_response(record, "output")) and not is_labelled(record)


def completion(record: Fields) -> Content:
    """Return the one response to learn: `completion`, the end of a conversation, `output`, or `chosen`."""
    if is_labelled(record):
        raise UnusableRecordError("unpaired", UNPAIRED)
    for name in ("completion", *CONVERSATIONS, "output", "chosen"):
        value = record.get(name)
        if is_response(record, name) and not (name == "output" and isinstance(value, list)):
            return Content(prompt_of(record, [value]), {name: value})
    if any(record.get(name) is not None for name in CONVERSATIONS):
        raise UnusableRecordError("not_one_answer", "the messages do not end with the assistant's")
    raise UnusableRecordError("missing_field", "completion or messages")
