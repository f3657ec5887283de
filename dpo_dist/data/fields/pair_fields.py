"""Fields of pairs and of single responses: their names in common datasets, and the scores of a pair."""

import itertools
from collections.abc import Mapping
from typing import Any

from dpo_dist.data.fields.context import CONVERSATIONS, ends_with_response, is_conversation, prompt_of
from dpo_dist.data.fields.message_fields import from_json
from dpo_dist.data.fields.rankings import finite_scores, has_ranking
from dpo_dist.data.records import BadRecord, Fields, Origin, RawContent, UnusableRecordError

SIDES = ("chosen", "rejected")
PAIR = ("prompt", *SIDES)
MESSAGE_SIDES = (
    ("chosen_messages", "rejected_messages"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
)
_RESPONSE_SIDES = (
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
)
QUESTION_PAIRS = (
    ("system", "question", *SIDES),
    ("system", "history", "question", *_RESPONSE_SIDES[0]),
    ("instruction", *_RESPONSE_SIDES[1]),
    ("query", "history", *_RESPONSE_SIDES[2]),
)
_ALL_SIDES = (SIDES, *MESSAGE_SIDES, *_RESPONSE_SIDES)
# Fields of other kinds of records too: by themselves they are no pair.
_SHARED_NAMES = ("messages", "response")
_PAIR_NAMES = frozenset(name for names in _ALL_SIDES for name in names if name not in _SHARED_NAMES)
_COMPLETIONS = frozenset(("completion", "output", *CONVERSATIONS))
_SCORES = (
    ("score_chosen", "score_rejected"),
    # Read if both sides have one: some datasets score the chosen side only.
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_LABELS = ("label", "kto_tag")
_LABEL_VALUES = frozenset(
    (
        *("0", "1", "-1", "0.0", "1.0", "-1.0", "true", "false"),
        *("good", "bad", "chosen", "rejected", "desirable", "undesirable"),
    )
)
UNPAIRED = "one response with a good/bad label is neither a pair nor a completion"


def has_pair(record: Fields) -> bool:
    """Return whether a record has a side of a pair, or the field of a rejected side beside a chosen one."""
    return any(
        record[name] is not None or _chosen_beside(record, name) for name in _PAIR_NAMES.intersection(record)
    )


def has_completion(record: Fields) -> bool:
    """Return whether a record has a single response that is no side of its pair."""
    if _COMPLETIONS.isdisjoint(record) or is_labelled(record):
        return False
    if record.get("completion") is not None:
        return True
    is_other = has_pair(record) or has_ranking(record)
    if record.get("instruction") is not None and isinstance(record.get("output"), str):
        return not is_other or record["output"] != record.get("chosen")
    turns = [record[name] for name in CONVERSATIONS if record.get(name) is not None]
    if not is_other:
        return bool(turns)
    return any(map(ends_with_response, turns)) and not _repeats_a_side(record, turns)


def is_labelled(record: Fields) -> bool:
    """Return whether a record is a single response with a good/bad label, as for KTO."""
    if not any(name in record and str(record[name]).strip().lower() in _LABEL_VALUES for name in _LABELS):
        return False
    return not has_pair(record) and not has_ranking(record)


def has_only_sides(record: Fields) -> bool:
    """Return whether the sides of a pair are all that a record has, so that they contain its prompt."""
    known = {*SIDES, *itertools.chain(*_SCORES), "metadata"}
    return all(name in known or value is None for name, value in record.items())


def pair_content(record: Fields, origin: Origin) -> RawContent | BadRecord:
    """Return the two sides of a pair, and their scores from the record or its metadata."""
    chosen, rejected = _side_names(record)
    for name in (chosen, rejected):
        if record.get(name) is None:
            return BadRecord("missing_field", origin, name)
    try:
        scores = _pair_scores(record)
    except (TypeError, ValueError):
        return BadRecord("invalid_scores", origin, "the scores of a pair must be two finite numbers")
    if chosen == "messages" and not is_conversation(record[rejected]):
        # The other response to the same question as the last message.
        turns = from_json(record[chosen])
        if not ends_with_response(turns):
            return BadRecord("not_one_answer", origin, "messages does not end with an assistant message")
        return RawContent(turns[:-1], {chosen: turns[-1], rejected: record[rejected]}, scores)
    sides = {name: record[name] for name in (chosen, rejected)}
    prompt, has_context = prompt_of(record, sides.values())
    return RawContent(prompt, sides, scores, has_context)


def completion_content(record: Fields, origin: Origin) -> RawContent | BadRecord:
    """Return the one response to learn: `completion`, the end of a conversation, `output`, or `chosen`."""
    if is_labelled(record):
        return BadRecord("unpaired", origin, UNPAIRED)
    turns = [name for name in CONVERSATIONS if ends_with_response(record.get(name))]
    names = [name for name in ("completion", *turns) if record.get(name) is not None]
    if len(names) > 1:
        raise UnusableRecordError(
            "ambiguous_format",
            f"one response in each of {', '.join(names)}; ignore one: columns: {{COLUMN: null}}",
        )
    if not names and isinstance(record.get("output"), str) and record.get("instruction") is not None:
        names = ["output"]
    names += ["chosen"] if record.get("chosen") is not None else []
    if names:
        prompt, has_context = prompt_of(record, [record[names[0]]])
        return RawContent(prompt, {names[0]: record[names[0]]}, has_context=has_context)
    if any(record.get(name) is not None for name in CONVERSATIONS):
        return BadRecord("not_one_answer", origin, "the messages do not end with the assistant's")
    return BadRecord("missing_field", origin, "completion or messages")


def _side_names(record: Fields) -> tuple[str, str]:
    """Return the names of the chosen and the rejected side.

    Raises:
        UnusableRecordError: the record has two different pairs.
    """
    if _PAIR_NAMES.intersection(record) <= frozenset(SIDES):
        return SIDES
    complete = [names for names in _ALL_SIDES if all(record.get(name) is not None for name in names)]
    if len(complete) > 1 and not ends_with_response(record.get("messages")):
        # Messages before other sides are their prompt.
        complete = [names for names in complete if names[0] != "messages"] or complete
    pairs = [[record[name] for name in names] for names in complete]
    if any(pair != pairs[0] for pair in pairs):
        shown = "; ".join(", ".join(names) for names in complete)
        raise UnusableRecordError(
            "ambiguous_format", f"two pairs: {shown}; ignore a column: columns: {{COLUMN: null}}"
        )
    if complete:
        return complete[0]
    partial = [names for names in _ALL_SIDES if any(record.get(name) is not None for name in names)]
    named = [names for names in partial if record.keys() >= set(names)]
    return (named or partial or [SIDES])[0]


def _chosen_beside(record: Fields, rejected: str) -> bool:
    return any(names[1] == rejected and record.get(names[0]) is not None for names in _ALL_SIDES)


def _repeats_a_side(record: Fields, turns: list[Any]) -> bool:
    """Return whether each conversation is a side of the record's pair, or is equal to one."""
    sides = [record[name] for name in _PAIR_NAMES if record.get(name) is not None]
    is_side = _side_names(record)[0] == "messages"
    return all((is_side and turn is record.get("messages")) or turn in sides for turn in turns)


def _pair_scores(record: Fields) -> tuple[float, ...] | None:
    metadata = from_json(record.get("metadata"))
    inner = metadata if isinstance(metadata, Mapping) else {}
    for fields, names in itertools.product((record, inner), _SCORES):
        scores = [None if fields.get(name) == "" else fields.get(name) for name in names]
        has_score = [score is not None for score in scores]
        if all(has_score) or (any(has_score) and names == _SCORES[0]):
            return finite_scores(scores)
    return None
