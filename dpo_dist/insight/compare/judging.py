"""Judge the models' responses to a prompt: scores, or verdicts on every two responses."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpo_dist.config.verb_options import PairsConfig, Verdicts
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.generation.judges.judge import Judge, Judgement, Question

WIN, TIE, LOSS = 1.0, 0.5, 0.0
Texts = Sequence[str | None]
"""The responses of all models to one prompt; None: the prompt was dropped."""


def compares(pairs: PairsConfig) -> bool:
    """Return whether the judge compares two responses, and gives none of them a score."""
    return pairs.endpoint.url is not None and pairs.endpoint.verdicts is Verdicts.compare


def has_judge(pairs: PairsConfig) -> bool:
    """Return whether there is a judge."""
    return any(judge is not None for judge in (pairs.reward_model, pairs.function, pairs.endpoint.url))


def describe(judge: dict[str, Any]) -> str:
    """Return the judge of `describe_judge` as one line."""
    match judge["kind"]:
        case "reward_model":
            return f"reward model {judge['name']}"
        case "function":
            return f"function {judge['function']}"
    verdicts = "each two responses in both positions" if judge["position_swaps"] else "grades from 1 to 10"
    return f"{judge['model']} at {judge['url']}: {verdicts}"


def score_texts(
    records: Sequence[PreferenceRecord], texts: Sequence[Texts], judge: Judge
) -> list[dict[str, Any]]:
    """Return `{"scores": [score or null of each model], "counts": {...}}` for each prompt.

    Equal responses are scored once; an empty one has no score.
    """
    different = [
        list(dict.fromkeys(text for text in own if text is not None and text.strip())) for own in texts
    ]
    asked = [index for index, own in enumerate(different) if own]
    judgements = judge.judge([_question(records[index], different[index]) for index in asked])
    scores: dict[int, dict[str, float | None]] = {
        index: dict(zip(different[index], found.scores, strict=True))
        for index, found in zip(asked, judgements, strict=True)
    }
    counts = {index: found.counts for index, found in zip(asked, judgements, strict=True)}
    return [
        {
            "scores": [scores.get(index, {}).get(text) if text is not None else None for text in own],
            "counts": _positive(counts.get(index, Counter())),
        }
        for index, own in enumerate(texts)
    ]


def compare_texts(
    records: Sequence[PreferenceRecord], texts: Sequence[Texts], judge: Judge
) -> list[dict[str, Any]]:
    """Return `{"credits": [...], "counts": {...}}` for each prompt: credits of the first of every two models.

    The order is that of `itertools.combinations`. The judge is asked only about two different texts that are
    not empty.
    """
    rows: list[dict[str, Any]] = []
    questions: list[tuple[int, int, Question]] = []
    for index, own in enumerate(texts):
        own_credits: list[float | None] = []
        for first, second in itertools.combinations(own, 2):
            if _has_text(first) and _has_text(second) and first != second:
                questions.append((index, len(own_credits), _question(records[index], [first, second])))
            own_credits.append(without_judge(first, second))
        rows.append({"credits": own_credits, "counts": Counter()})
    found: list[Judgement] = judge.judge([question for *_, question in questions])
    for (index, at, _), judgement in zip(questions, found, strict=True):
        rows[index]["credits"][at] = judgement.scores[0]
        rows[index]["counts"] += judgement.counts
    return [row | {"counts": _positive(row["counts"])} for row in rows]


def without_judge(first: str | None, second: str | None) -> float | None:
    """Return the credit of the first response if no judge is needed: equal ones tie, an empty one loses."""
    if first is None or second is None:
        return None
    if first == second or not (_has_text(first) or _has_text(second)):
        return TIE
    if _has_text(first) and _has_text(second):
        return None
    return WIN if _has_text(first) else LOSS


def credit(first: str | None, second: str | None, scores: tuple[float | None, float | None]) -> float | None:
    """Return the credit of the first response by its score; None if one of them has none."""
    decided = without_judge(first, second)
    one, other = scores
    if decided is not None or one is None or other is None:
        return decided
    return TIE if one == other else WIN if one > other else LOSS


def all_credits(
    texts: Sequence[str], scores: Sequence[float | None], verdicts: Sequence[float | None] | None
) -> list[float | None]:
    """Return the credit of the first of every two models, in the order of `itertools.combinations`.

    Args:
        texts: the models' responses to one prompt.
        scores: of each.
        verdicts: of a judge that compares, in the same order; None: scores decide.
    """
    if verdicts is not None:
        return list(verdicts)
    pairs = itertools.combinations(zip(texts, scores, strict=True), 2)
    return [credit(first, second, (one, other)) for (first, one), (second, other) in pairs]


def _has_text(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def _question(record: PreferenceRecord, texts: Sequence[str | None]) -> Question:
    return Question(record, tuple(map(str, texts)))


def _positive(counts: Counter[str]) -> dict[str, int]:
    return {name: number for name, number in sorted(counts.items()) if number}
