"""Which fields of a row hold its prompt and its answers, best first, and their scores."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dpo_dist.config.schema import DataFormat
from dpo_dist.data.conversations import unread_keys
from dpo_dist.data.records import BadRecord, Origin, shown_key

Row: TypeAlias = Mapping[str, Any]

_SIDES = ("chosen", "rejected")
_RANKINGS = ("responses", "completions", "output")
_TEXTS = ("content", "text", "response")
_SCORES = ("score", "fine-grained_score", "overall_score", "rating")

# The keys by which each arrangement is recognised, for the message about a row that fits none.
_EXPECTED = {
    "text or messages": ("prompt", *_SIDES),
    "hh": _SIDES,
    "ranked": ("prompt", "responses", "scores"),
    "ranked (instruction)": ("instruction", "input", "output", "history", "system"),
    "completion": ("prompt", "completion"),
    "completion (messages)": ("messages",),
}
_MOST_SHOWN_KEYS = 12
_KINDS = {str: "text", list: "list", dict: "object", type(None): "null"}


@dataclass(frozen=True)
class Answers:
    """A prompt and its answers, each still as the source writes it.

    Attributes:
        prompt: None where the answers contain it.
        values: best first, by the name under which a message tells of them.
        scores: of each answer, finite; None where the source has none.
        is_instruction: whether `prompt` was made of the row's `instruction` and the fields beside it.
    """

    prompt: Any
    values: Mapping[str, Any]
    scores: tuple[float, ...] | None = None
    is_instruction: bool = False


def recognise(row: Row) -> DataFormat | None:
    """Whether a row has a `ranked` list or a `completion`; `auto` for a pair; None for anything else."""
    if any(row.get(side) is not None for side in _SIDES):
        return DataFormat.auto
    if any(isinstance(row.get(name), list) for name in _RANKINGS):
        return DataFormat.ranked
    if row.get("label") is None and any(row.get(name) is not None for name in ("completion", "messages")):
        return DataFormat.completion
    return None


def unrecognised(row: Row, origin: Origin) -> BadRecord:
    """`unknown_format`, with the fields that the row has and those of the formats nearest to it."""
    shown = [f"{shown_key(key)} ({_KINDS.get(type(value), 'value')})" for key, value in row.items()]
    if len(shown) > _MOST_SHOWN_KEYS:
        shown[_MOST_SHOWN_KEYS:] = ["..."]
    common = {name: len(row.keys() & set(keys)) for name, keys in _EXPECTED.items()}
    most = max(common.values())
    nearest = [f"{name}: {', '.join(_EXPECTED[name])}" for name, count in common.items() if count == most > 0]
    told = f"; nearest formats: {'; '.join(nearest)}" if nearest else ""
    if row.get("label") is not None:
        told = "; label: one answer with a verdict is no pair, and not one to learn"
    return BadRecord("unknown_format", origin, f"fields: {', '.join(shown) or 'none'}{told}")


def pair_answers(row: Row, origin: Origin) -> Answers | BadRecord:
    """`chosen` and `rejected`, and their scores from the row or its metadata."""
    for side in _SIDES:
        if row.get(side) is None:
            return BadRecord("missing_field", origin, side)
    try:
        scores = _pair_scores(row)
    except (TypeError, ValueError):
        return BadRecord("invalid_scores", origin, "score_chosen and score_rejected are not two numbers")
    return Answers(row.get("prompt"), {side: row[side] for side in _SIDES}, scores)


def completion_answers(row: Row, origin: Origin) -> Answers | BadRecord:
    """The one answer to learn: `completion`, the end of `messages`, or the `chosen` side of a pair."""
    if row.get("label") is not None:
        return BadRecord("unknown_format", origin, "label: an answer with a verdict is not one to learn")
    for name in ("completion", "messages", "chosen"):
        if row.get(name) is not None:
            return Answers(row.get("prompt"), {name: row[name]})
    return BadRecord("missing_field", origin, "completion or messages")


def ranked_answers(row: Row, origin: Origin) -> Answers | BadRecord:
    """A list of answers: as it stands, best first, or sorted by the score that each carries."""
    name = next((name for name in _RANKINGS if row.get(name) is not None), None)
    if name is None:
        return BadRecord("missing_field", origin, "responses")
    items = row[name]
    if not isinstance(items, list):
        return BadRecord("unknown_format", origin, f"{name} is not a list")
    if len(items) < 2:
        return BadRecord("no_ranking", origin, f"{len(items)} in {name}")
    unread = unread_keys(*(item for item in items if isinstance(item, Mapping)))
    if unread:
        return BadRecord("unread_content", origin, f"a response has {', '.join(unread)}", unread)
    try:
        values, scores = _ranking(items, row.get("scores"))
    except (TypeError, ValueError):
        return BadRecord(
            "invalid_scores", origin, "not a finite number for each response, or the best is not the first"
        )
    if any(value is None for value in values):
        return BadRecord("missing_field", origin, f"a response in {name}")
    if scores is not None and scores[0] == scores[-1]:
        return BadRecord("all_tied", origin, f"all score {scores[0]:g}")
    is_instruction = row.get("prompt") is None
    prompt = _instruction(row) if is_instruction else row["prompt"]
    by_rank = {f"rank {rank}": value for rank, value in enumerate(values, start=1)}
    return Answers(prompt, by_rank, scores, is_instruction and prompt is not None)


def _ranking(items: list[Any], scores: Any) -> tuple[list[Any], tuple[float, ...] | None]:
    """The answers best first, with their scores; ValueError or TypeError for scores that are none."""
    carried = [_carried_score(item) if isinstance(item, Mapping) else None for item in items]
    if any(score is not None for score in carried):
        numbers = _finite(carried)
        order = sorted(range(len(items)), key=lambda place: -numbers[place])
        return [_first(items[place], _TEXTS) for place in order], tuple(numbers[place] for place in order)
    if scores is None:
        return items, None
    numbers = _finite(scores)
    if len(numbers) != len(items) or any(low < high for low, high in itertools.pairwise(numbers)):
        raise ValueError("not one for each response, best first")
    return items, numbers


def _carried_score(answer: Row) -> Any:
    """The score beside an answer: the mean rating of its aspects where it has them, else a single number.

    UltraFeedback's `overall_score` is wrong for hundreds of its answers (a rating of 1 became 10); the
    ratings of the aspects are right (dataset card of argilla/ultrafeedback-binarized-preferences).
    """
    annotations = answer.get("annotations")
    aspects = annotations.values() if isinstance(annotations, Mapping) else ()
    ratings = [aspect["Rating"] for aspect in aspects if isinstance(aspect, Mapping) and "Rating" in aspect]
    if not ratings:
        return _first(answer, _SCORES)
    given = _finite(rating for rating in ratings if rating not in (None, "N/A"))
    return sum(given) / len(given) if given else math.nan


def _instruction(row: Row) -> list[Row] | None:
    """The conversation that `system`, `history`, `instruction` and `input` make, as LLaMA-Factory has it."""
    history = row.get("history") or []
    if row.get("instruction") is None or not isinstance(history, list):
        return None
    system = row.get("system") or row.get("system_prompt")
    turns = [("system", system)] if system else []
    for exchange in history:
        if not isinstance(exchange, list) or len(exchange) != 2:
            return None
        turns += zip(("user", "assistant"), exchange, strict=True)
    text = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", text)]]


def _pair_scores(row: Row) -> tuple[float, ...] | None:
    """The pair's scores, None where it has none; raises on anything else."""
    metadata = row.get("metadata")
    places: list[Row] = [row, metadata] if isinstance(metadata, Mapping) else [row]
    for fields in places:
        found = [fields.get(f"score_{side}") for side in _SIDES]
        if any(score is not None for score in found):
            return _finite(found)
    return None


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    """The values as finite numbers; TypeError or ValueError where one is none."""
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


def _first(fields: Row, names: Iterable[str]) -> Any:
    """The value under the first of `names` that has one."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)
