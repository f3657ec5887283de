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


def score_texts(
    records: Sequence[PreferenceRecord], texts: Sequence[Sequence[str]], judge: Judge
) -> list[dict[str, Any]]:
    """Return `{"scores": [score or null of each model], "counts": {...}}` for each prompt.

    Equal responses are scored once; an empty one has no score.
    """
    different = [tuple(dict.fromkeys(filter(str.strip, own))) for own in texts]
    questions = [Question(record, own) for record, own in zip(records, different, strict=True) if own]
    judgements, rows = iter(judge.judge(questions)), []
    for own, asked in zip(texts, different, strict=True):
        judgement = next(judgements) if asked else Judgement([])
        scores = dict(zip(asked, judgement.scores, strict=True))
        rows.append({"scores": [scores.get(text) for text in own], "counts": _positive(judgement.counts)})
    return rows


def compare_texts(
    records: Sequence[PreferenceRecord], texts: Sequence[Sequence[str]], judge: Judge
) -> list[dict[str, Any]]:
    """Return `{"credits": [...], "counts": {...}}` for each prompt: credits of the first of every two models.

    The order is that of `itertools.combinations`. The judge is asked only about two different texts that are
    not empty.
    """
    rows: list[dict[str, Any]] = []
    questions: list[tuple[int, int, Question]] = []
    for index, (record, own) in enumerate(zip(records, texts, strict=True)):
        pairs = list(itertools.combinations(own, 2))
        own_credits = [without_judge(*pair) for pair in pairs]
        open_pairs = [at for at, decided in enumerate(own_credits) if decided is None]
        questions += [(index, at, Question(record, pairs[at])) for at in open_pairs]
        rows.append({"credits": own_credits, "counts": Counter()})
    judgements = judge.judge([question for *_, question in questions])
    for (index, at, _), judgement in zip(questions, judgements, strict=True):
        rows[index]["credits"][at] = judgement.scores[0]
        rows[index]["counts"] += judgement.counts
    return [row | {"counts": _positive(row["counts"])} for row in rows]


def without_judge(first: str, second: str) -> float | None:
    """Return the credit of the first response if no judge is needed: equal ones tie, an empty one loses."""
    has_first, has_second = bool(first.strip()), bool(second.strip())
    if first == second or not (has_first or has_second):
        return TIE
    if has_first and has_second:
        return None
    return WIN if has_first else LOSS


def credit(first: str, second: str, scores: tuple[float | None, float | None]) -> float | None:
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

    `verdicts` are those of a judge that compares, in the same order; None: scores decide.
    """
    if verdicts is not None:
        return list(verdicts)
    pairs = itertools.combinations(zip(texts, scores, strict=True), 2)
    return [credit(first, second, (one, other)) for (first, one), (second, other) in pairs]


def _positive(counts: Counter[str]) -> dict[str, int]:
    return {name: number for name, number in sorted(counts.items()) if number}
