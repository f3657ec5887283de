"""Findings from stored reference log-probs: likely mislabelled pairs, solved pairs, nearly equal sides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.diagnostics.findings import Finding
from dpo_dist.diagnostics.judge import Judge

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# A margin is far from 0 if it is at least half a nat per token, and not by chance: log-probs of tokens vary
# by 1 to 2 nats, so means of n and m tokens differ by about 1.5 sqrt(1/n + 1/m) without a reason.
FAR_NATS = 0.5
FAR_DEVIATIONS = 3.0
_TOKEN_DEVIATION = 1.5
NEARLY_EQUAL = 0.1
_SHOWN = 20
_PERCENTILES = (5, 50, 95)


@dataclass(frozen=True, eq=False)
class ReferencePairs:
    """Stored reference log-probs of the pairs of one source.

    Attributes:
        chosen_logps: float64 [pairs], log-prob of the whole chosen response, in nats.
        rejected_logps: the same for the rejected response.
        chosen_tokens: int64 [pairs], tokens of the chosen response, at least 1.
        rejected_tokens: the same for the rejected response.
        distances: float64 [pairs], `bag_distance` of the two responses; None: not known.
    """

    chosen_logps: Floats
    rejected_logps: Floats
    chosen_tokens: Counts
    rejected_tokens: Counts
    distances: Floats | None = None

    @property
    def margins(self) -> Floats:
        """Length-normalised margin of each pair, nats per token."""
        return self.chosen_logps / self.chosen_tokens - self.rejected_logps / self.rejected_tokens


def bag_distance(
    chosen_ids: npt.NDArray[np.integer[Any]], rejected_ids: npt.NDArray[np.integer[Any]]
) -> float:
    """Return the share of tokens that only one of two responses has, 0 (the same tokens) to 1.

    The order of the tokens is ignored: the value is at most the normalised edit distance.
    """
    ids, numbers = np.unique(np.concatenate([chosen_ids, rejected_ids]), return_inverse=True)
    chosen = np.bincount(numbers[: len(chosen_ids)], minlength=len(ids))
    rejected = np.bincount(numbers[len(chosen_ids) :], minlength=len(ids))
    return float(np.abs(chosen - rejected).sum() / max(len(numbers), 1))


def margin_findings(
    pairs: ReferencePairs, origin: Callable[[int], str], source: str, judge: Judge
) -> tuple[Mapping[str, float], list[Finding]]:
    """Return statistics of the reference's margins of a source, and findings.

    A pair is likely mislabelled (solved) if the reference's length-normalised margin is far below (above) 0.
    Responses with nearly the same tokens risk likelihood displacement: both probabilities fall in training
    (arXiv:2410.08847; its CHES score needs hidden states, which the store does not have).

    Args:
        pairs: of the source.
        origin: from the index of a pair to its ``file:line``.
        source: label of the source.
        judge: applies rules.

    Returns:
        Named statistics, empty without pairs; findings, whose examples are the most extreme first.
    """
    margins = pairs.margins
    if not len(margins):
        return {}, []
    noise = _TOKEN_DEVIATION * np.sqrt(1 / pairs.chosen_tokens + 1 / pairs.rejected_tokens)
    is_far = (np.abs(margins) >= FAR_NATS) & (np.abs(margins) >= FAR_DEVIATIONS * noise)
    low, median, high = np.percentile(margins, _PERCENTILES)
    facts = {
        "pairs": len(margins),
        "prefers_chosen": float((margins > 0).mean()),
        "margin_5": float(low),
        "margin_median": float(median),
        "margin_95": float(high),
    }
    rules = {"reference_disagrees": (is_far & (margins < 0), margins / noise)}
    rules["reference_solved"] = (is_far & (margins > 0), -margins / noise)
    if pairs.distances is not None:
        rules["nearly_equal_sides"] = (pairs.distances < NEARLY_EQUAL, pairs.distances)
    findings = []
    for rule, (is_found, order) in rules.items():
        found = np.flatnonzero(is_found)
        extreme = found[np.argsort(order[found], kind="stable")][:_SHOWN]
        examples = [origin(int(index)) for index in extreme]
        findings += judge.count(rule, len(found), len(margins), source, examples, records="pairs")
        facts[rule] = len(found) / len(margins)
    return facts, findings
