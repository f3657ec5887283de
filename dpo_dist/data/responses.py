"""Where a record has its responses, and their scores: pairs, compared responses, rankings, completions."""

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
    """

    prompt: Any
    responses: Fields
    scores: tuple[float, ...] | None = None


# Pairs: the names of the chosen and the rejected side.
SIDES = ("chosen", "rejected")
_ALL_SIDES = (
    SIDES,
    ("chosen_messages", "rejected_messages"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
)
# Fields of other kinds of records too: by themselves they are no pair.
_SHARED_NAMES = ("messages", "response")
SIDE_NAMES = frozenset(itertools.chain(*_ALL_SIDES)).difference(_SHARED_NAMES)
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    # Read if both sides have one: some datasets score the chosen side only.
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


def has_pair(record: Fields) -> bool:
    """Return whether a record has a side of a pair, or the field of a rejected side beside a chosen one."""
    return any(
        record.get(rejected) is not None
        or (record.get(chosen) is not None and (chosen not in _SHARED_NAMES or rejected in record))
        for chosen, rejected in _ALL_SIDES
    )


def has_only_sides(record: Fields) -> bool:
    """Return whether the sides of a pair are all that a record has, so that they contain its prompt."""
    known = {*SIDES, *itertools.chain(*_PAIR_SCORES), "metadata"}
    return all(name in known or value is None for name, value in record.items())


def pair(record: Fields) -> Content:
    """Return the two sides of a pair, and their scores from the record or its metadata."""
    chosen, rejected = _side_names(record)
    for name in (chosen, rejected):
        if record.get(name) is None:
            raise UnusableRecordError("missing_field", name)
    scores = _pair_scores(record)
    sides = {name: record[name] for name in (chosen, rejected)}
    if chosen == "messages" and not is_conversation(record[rejected]):
        # The other response to the same question as the last message.
        turns = record[chosen]
        if not ends_with_response(turns):
            raise UnusableRecordError("not_one_answer", "messages does not end with an assistant message")
        return Content(turns[:-1], sides | {chosen: turns[-1]}, scores)
    return Content(prompt_of(record, sides.values()), sides, scores)


def _side_names(record: Fields) -> tuple[str, str]:
    """Return the names of the chosen and the rejected side. Raises UnusableRecordError: two pairs."""
    complete = [names for names in _ALL_SIDES if all(record.get(name) is not None for name in names)]
    if len(complete) > 1 and not ends_with_response(record.get("messages")):
        # Messages before other sides are their prompt.
        complete = [names for names in complete if names[0] != "messages"] or complete
    pairs = [[record[name] for name in names] for names in complete]
    if any(pair != pairs[0] for pair in pairs):
        shown = "; ".join(", ".join(names) for names in complete)
        raise UnusableRecordError("ambiguous_format", f"two pairs: {shown}; {IGNORE}")
    found = {
        names: [name for name in names if record.get(name) is not None] for names in complete or _ALL_SIDES
    }
    return max(found, key=lambda names: (len(found[names]), len(record.keys() & {*names})))


def _pair_scores(record: Fields) -> tuple[float, ...] | None:
    metadata = from_json(record.get("metadata"))
    inner = metadata if isinstance(metadata, Mapping) else {}
    for fields, names in itertools.product((record, inner), _PAIR_SCORES):
        scores = [None if fields.get(name) == "" else fields.get(name) for name in names]
        has_score = [score is not None for score in scores]
        if all(has_score) or (any(has_score) and names == _PAIR_SCORES[0]):
            return _finite(scores)
    return None


@dataclass(frozen=True)
class _Comparison:
    """The fields of two compared responses, and of the better one's name with its values.

    Without the name of a prompt the responses contain it.
    """

    prompt: str
    responses: tuple[str, str]
    winner: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    ties: tuple[str, ...] = ()
    scores: tuple[str, str] | None = None


_COMPARISONS = (
    # PKU-SafeRLHF
    _Comparison("prompt", ("response_0", "response_1"), "better_response_id", ("0",), ("1",)),
    # SHP
    _Comparison(
        "history", ("human_ref_A", "human_ref_B"), "labels", ("1",), ("0",), scores=("score_A", "score_B")
    ),
    # HelpSteer3
    _Comparison(
        "context",
        ("response1", "response2"),
        "overall_preference",
        ("-3", "-2", "-1"),
        ("1", "2", "3"),
        ("0",),
    ),
    # Chatbot Arena, MT-Bench: whole conversations
    _Comparison(
        "",
        ("conversation_a", "conversation_b"),
        "winner",
        ("model_a",),
        ("model_b",),
        ("tie", "tie (bothbad)"),
    ),
)


def as_pair(record: Fields) -> Fields:
    """Return a record of two compared responses as a pair; any other record unchanged.

    Raises:
        UnusableRecordError: the better response is not named, or the record also has another pair.
    """
    for row in _COMPARISONS:
        if row.winner in record and all(record.get(name) is not None for name in row.responses):
            break
    else:
        return record
    winner = record[row.winner]
    if winner is None or winner == "":
        raise UnusableRecordError("missing_field", row.winner)
    value = format(winner, "g") if isinstance(winner, int | float) else str(winner).strip()
    if value in row.ties:
        raise UnusableRecordError("all_tied", f"{row.winner} says that no response is better")
    if value not in (*row.first, *row.second):
        expected = ", ".join((*row.first, *row.second, *row.ties))
        raise UnusableRecordError("invalid_scores", f"{row.winner} is none of {expected}")
    order = 1 if value in row.first else -1
    found = {side: record[name] for side, name in zip(SIDES, row.responses[::order], strict=True)}
    if row.scores and all(record.get(name) is not None for name in row.scores):
        scores = zip(_PAIR_SCORES[0], row.scores[::order], strict=True)
        found |= {side: record[name] for side, name in scores}
    fields = {name: value for name, value in record.items() if name not in row.responses}
    if any(fields.get(name) not in (None, value) for name, value in found.items()):
        raise UnusableRecordError(
            "ambiguous_format",
            f"another pair beside {', '.join(row.responses)}; to read it, ignore {row.winner}: columns: "
            f"{{{row.winner}: null}}",
        )
    if row.prompt and fields.get("prompt") is None:
        found["prompt"] = fields.pop(row.prompt, None)
    return fields | found


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
    lists = {name: record[name] for name in LISTS if record.get(name) is not None}
    if not lists:
        raise UnusableRecordError("missing_field", "responses")
    name, items = next(iter(lists.items()))
    if any(isinstance(other, list) and other != items for other in lists.values()):
        raise UnusableRecordError("ambiguous_format", f"several lists: {', '.join(lists)}; {IGNORE}")
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
    return Content(prompt_of(record, by_rank.values()), by_rank, scores)


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
    """Return the score inside a response: the mean rating of its aspects if it has them, else one number.

    A rank without a score, 1 for the best, is a negative score. UltraFeedback's `overall_score` is wrong for
    hundreds of responses (a rating of 1 became 10); the ratings of the aspects are right (dataset card of
    argilla/ultrafeedback-binarized-preferences).
    """
    annotations = response.get("annotations")
    aspects = annotations.values() if isinstance(annotations, Mapping) else ()
    ratings = [aspect["Rating"] for aspect in aspects if isinstance(aspect, Mapping) and "Rating" in aspect]
    if ratings:
        given = _finite(rating for rating in ratings if rating not in (None, "N/A"))
        return sum(given) / len(given)
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
    if not any(name in record and str(record[name]).strip().lower() in _LABEL_VALUES for name in _LABELS):
        return False
    return not has_pair(record) and not has_ranking(record)


def has_completion(record: Fields) -> bool:
    """Return whether a record has a single response that is no side of its pair."""
    if is_labelled(record):
        return False
    if record.get("completion") is not None:
        return True
    is_other = has_pair(record) or has_ranking(record)
    if record.get("instruction") is not None and isinstance(record.get("output"), str):
        return not is_other or record["output"] != record.get("chosen")
    turns = [record[name] for name in CONVERSATIONS if record.get(name) is not None]
    return (
        any(map(ends_with_response, turns)) and not _repeat_a_side(record, turns) if is_other else bool(turns)
    )


def _repeat_a_side(record: Fields, turns: list[Any]) -> bool:
    """Return whether each conversation is a side of the record's pair, or is equal to one."""
    sides = [record[name] for name in SIDE_NAMES if record.get(name) is not None]
    sides += [record["messages"]] if has_pair(record) and _side_names(record)[0] == "messages" else []
    return all(turn in sides for turn in turns)


def completion(record: Fields) -> Content:
    """Return the one response to learn: `completion`, the end of a conversation, `output`, or `chosen`."""
    if is_labelled(record):
        raise UnusableRecordError("unpaired", UNPAIRED)
    turns = [name for name in CONVERSATIONS if ends_with_response(record.get(name))]
    names = [name for name in ("completion", *turns) if record.get(name) is not None]
    if len(names) > 1:
        detail = f"one response in each of {', '.join(names)}; {IGNORE}"
        raise UnusableRecordError("ambiguous_format", detail)
    if not names and isinstance(record.get("output"), str) and record.get("instruction") is not None:
        names = ["output"]
    names += ["chosen"] if record.get("chosen") is not None else []
    if names:
        return Content(prompt_of(record, [record[names[0]]]), {names[0]: record[names[0]]})
    if any(record.get(name) is not None for name in CONVERSATIONS):
        raise UnusableRecordError("not_one_answer", "the messages do not end with the assistant's")
    raise UnusableRecordError("missing_field", "completion or messages")
