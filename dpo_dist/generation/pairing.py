"""Pairs of a prompt's responses, chosen by their scores."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_dist.config.pairs_schema import PairSelection
from dpo_dist.digests import text_digest


@dataclass(frozen=True)
class Selection:
    """Rule that selects pairs; see `PairsConfig` for the values."""

    select: PairSelection = PairSelection.best_worst
    margin: float = 0.0
    seed: int = 0


def select_pairs(
    scores: Sequence[float], selection: Selection, key: str, counts: Counter[str]
) -> list[tuple[int, int]]:
    """Return pairs of responses of one prompt as indices: (chosen, rejected).

    A pair's scores differ by more than the margin, so equal scores are never a pair. Among equally good or
    bad responses the first one counts.

    Args:
        scores: [responses], finite.
        selection: the rule.
        key: of the content: the random choice of `best_random` follows from it and the seed alone.
        counts: gets `prompts_too_few_responses`, `prompts_all_tied` or `prompts_below_margin` for a prompt
            without a pair, and `tied_pairs`: the number of tied pairs among all pairs of responses.
    """
    every = list(itertools.combinations(range(len(scores)), 2))
    counts["tied_pairs"] += sum(scores[one] == scores[other] for one, other in every)
    ordered = [(one, other) if scores[one] > scores[other] else (other, one) for one, other in every]
    possible = [
        (better, worse)
        for better, worse in ordered
        if scores[better] > scores[worse] and scores[better] - scores[worse] > selection.margin
    ]
    if not possible:
        few = len(scores) < 2
        reason = "too_few_responses" if few else "all_tied" if len(set(scores)) == 1 else "below_margin"
        counts[f"prompts_{reason}"] += 1
        return []
    best, worst = _first(scores, max(scores)), _first(scores, min(scores))
    match selection.select:
        case PairSelection.all_pairs:
            return possible
        case PairSelection.best_worst:
            return [(best, worst)]
        case PairSelection.best_random:
            others = [worse for better, worse in possible if better == best]
            digest = text_digest(f"{selection.seed} {key}")
            return [(best, others[int(np.random.default_rng(int(digest, 16)).integers(len(others)))])]


def _first(scores: Sequence[float], score: float) -> int:
    return list(scores).index(score)
