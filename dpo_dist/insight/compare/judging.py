"""Judge the models' responses to a prompt: scores, or verdicts on every two responses."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpo_dist.config.verb_options import PairsConfig, Verdicts
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.generation.judges.judge import Judge, Judgement, Question

WIN, TIE, LOSS = 1.0, 0.5, 0.0


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


def compare_texts(
    records: Sequence[PreferenceRecord], texts: Sequence[Sequence[str]], judge: Judge
) -> list[dict[str, Any]]:
    """Return for each prompt `credits` of the first of every two models, and `counts` of the judge.

    A credit is null without a usable verdict; the order is that of `itertools.combinations`. The judge is
    asked only about two different texts that are not empty.
    """
    pairs = [list(itertools.combinations(own, 2)) for own in texts]
    questions = [
        Question(record, pair)
        for record, own in zip(records, pairs, strict=True)
        for pair in own
        if without_judge(*pair) is None
    ]
    judgements, rows = iter(judge.judge(questions)), []
    for own, own_pairs in zip(texts, pairs, strict=True):
        counts, credited = Counter[str](), [without_judge(*pair) for pair in own_pairs]
        for at, decided in enumerate(credited):
            if decided is None:
                judgement = next(judgements)
                credited[at] = judgement.scores[0]
                counts += judgement.counts
        rows.append(_row([None] * len(own), credited, counts))
    return rows


def score_texts(
    records: Sequence[PreferenceRecord], texts: Sequence[Sequence[str]], judge: Judge
) -> list[dict[str, Any]]:
    """Return the same as `compare_texts`, with the `scores` of the models' responses, which decide credits.

    Equal responses are scored once; an empty one has no score.
    """
    different = [tuple(dict.fromkeys(filter(str.strip, own))) for own in texts]
    questions = [Question(record, own) for record, own in zip(records, different, strict=True) if own]
    judgements, rows = iter(judge.judge(questions)), []
    for own, asked in zip(texts, different, strict=True):
        judgement = next(judgements) if asked else Judgement([])
        scores = dict(zip(asked, judgement.scores, strict=True))
        scored = [(text, scores.get(text)) for text in own]
        credited = [credit(*pair) for pair in itertools.combinations(scored, 2)]
        rows.append(_row([score for _, score in scored], credited, judgement.counts))
    return rows


def _row(
    scores: Sequence[float | None], credited: Sequence[float | None], counts: Counter[str]
) -> dict[str, Any]:
    return {"scores": scores, "credits": credited, "counts": dict(sorted((+counts).items()))}


def without_judge(first: str, second: str) -> float | None:
    """Return the credit of the first response if no judge is needed: equal ones tie, an empty one loses."""
    has_first, has_second = bool(first.strip()), bool(second.strip())
    if first == second or not (has_first or has_second):
        return TIE
    if has_first and has_second:
        return None
    return WIN if has_first else LOSS


def credit(first: tuple[str, float | None], second: tuple[str, float | None]) -> float | None:
    """Return the credit of the first response, each with its score; None if one of them has none."""
    (text, one), (other_text, other) = first, second
    decided = without_judge(text, other_text)
    if decided is not None or one is None or other is None:
        return decided
    return TIE if one == other else WIN if one > other else LOSS
