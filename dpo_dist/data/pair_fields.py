"""Fields of pairs, rankings and single responses: their names in common datasets, and scores."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.config.data import Ranked
from dpo_dist.data.context import CONVERSATIONS, ends_with_response, is_conversation, prompt_of
from dpo_dist.data.messages import check_no_media, from_json, has_more, has_value
from dpo_dist.data.records import (
    BadRecord,
    Fields,
    Origin,
    PreferenceRecord,
    RawContent,
    UnusableRecordError,
)


@dataclass(frozen=True)
class Comparison:
    """The fields of two compared responses.

    Attributes:
        prompt: name of the prompt; empty if the responses contain it.
        responses: names of the first and the second response.
        winner: name of the field that says which is better.
        first, second: its values if the first or the second response is better.
        ties: its values if none is.
        scores: names of the responses' scores.
    """

    prompt: str
    responses: tuple[str, str]
    winner: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    ties: tuple[str, ...] = ()
    scores: tuple[str, str] | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """All names, for messages."""
        return (*filter(None, [self.prompt]), *self.responses, self.winner)

    def matches(self, record: Fields) -> bool:
        """Return whether a record has these fields."""
        return self.winner in record and all(record.get(name) is not None for name in self.responses)

    def is_first_better(self, value: Any) -> bool:
        """Return whether the first response is better. Raises UnusableRecordError."""
        if value is None or value == "":
            raise UnusableRecordError("missing_field", self.winner)
        found = format(value, "g") if isinstance(value, int | float) else str(value).strip()
        if found in self.ties:
            raise UnusableRecordError("all_tied", f"{self.winner} says that no response is better")
        if found not in (*self.first, *self.second):
            expected = ", ".join((*self.first, *self.second, *self.ties))
            raise UnusableRecordError("invalid_scores", f"{self.winner} is none of {expected}")
        return found in self.first


COMPARISONS = (
    # PKU-SafeRLHF
    Comparison("prompt", ("response_0", "response_1"), "better_response_id", ("0",), ("1",)),
    # SHP
    Comparison(
        "history",
        ("human_ref_A", "human_ref_B"),
        "labels",
        ("1",),
        ("0",),
        scores=("score_A", "score_B"),
    ),
    # HelpSteer3
    Comparison(
        "context",
        ("response1", "response2"),
        "overall_preference",
        ("-3", "-2", "-1"),
        ("1", "2", "3"),
        ("0",),
    ),
    # Chatbot Arena, MT-Bench: whole conversations
    Comparison(
        "",
        ("conversation_a", "conversation_b"),
        "winner",
        ("model_a",),
        ("model_b",),
        ("tie", "tie (bothbad)"),
    ),
)
_WINNERS = frozenset(row.winner for row in COMPARISONS)


def as_pair(record: Fields) -> Fields:
    """Return a record of two compared responses as a pair; any other record unchanged.

    Raises:
        UnusableRecordError: `missing_field`, `invalid_scores` or `all_tied` of the field that names the
            better response; `ambiguous_format` if the record also has another pair.
    """
    if _WINNERS.isdisjoint(record):
        return record
    row = next((row for row in COMPARISONS if row.matches(record)), None)
    if row is None:
        return record
    order = 1 if row.is_first_better(record[row.winner]) else -1
    fields = {name: value for name, value in record.items() if name not in row.responses}
    found = dict(zip(("chosen", "rejected"), [record[name] for name in row.responses][::order], strict=True))
    if row.scores and all(record.get(name) is not None for name in row.scores):
        scores = [record[name] for name in row.scores][::order]
        found |= dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    if any(fields.get(name) not in (None, value) for name, value in found.items()):
        raise UnusableRecordError(
            "ambiguous_format",
            f"another pair beside {', '.join(row.responses)}; to read it, ignore {row.winner}: columns: "
            f"{{{row.winner}: null}}",
        )
    if row.prompt and fields.get("prompt") is None:
        found["prompt"] = fields.pop(row.prompt, None)
    return fields | found


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
    """Return the training examples of a record, each as indices of its responses, best first, and the ties.

    `whole` is one ranking with the first of responses with equal scores, `best_worst` the first and the last
    response, `all_pairs` every two responses with different scores. One or two responses are one example.

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
_SIDE_SCORES = (
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
    known = {*SIDES, *itertools.chain(*_SIDE_SCORES), "metadata"}
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
    for fields, names in itertools.product((record, inner), _SIDE_SCORES):
        scores = [None if fields.get(name) == "" else fields.get(name) for name in names]
        has_score = [score is not None for score in scores]
        if all(has_score) or (any(has_score) and names == _SIDE_SCORES[0]):
            return finite_scores(scores)
    return None
