"""Choose the samples that a run's page shows, with the reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.generation.languages import language_of
from dpo_dist.generation.refusals import is_refusal
from dpo_dist.generation.text_facts import text_facts
from dpo_dist.generation.words import WORD
from dpo_dist.report.word_diff import difference

LONGER, SHORTER, REPEATED, DISTINCT = 2.0, 0.5, 0.5, 0.5

# A part is enough for these facts, and a long response costs no more.
_MEASURED_CHARACTERS = 2000

FAULTS: Mapping[str, tuple[str, str]] = {
    "empty": ("is empty", "are empty"),
    "unfinished": ("does not end", "do not end"),
    "repeats": ("repeats itself", "repeat themselves"),
    "refuses": ("refuses where the reference does not", "refuse where the reference does not"),
    "language": (
        "is in another language than the chosen response",
        "are in another language than the chosen response",
    ),
    "longer": (
        "is at least twice as long as the reference's",
        "are at least twice as long as the reference's",
    ),
    "shorter": ("is at most half as long as the reference's", "are at most half as long as the reference's"),
}
"""Faults of a response, for one and for several; the worst first."""


@dataclass(frozen=True)
class Judged:
    """Facts of a policy's response to a prompt that decide whether it is shown.

    Attributes:
        prompt_id: of the prompt.
        faults: keys of `FAULTS` with their extent: the larger, the worse.
        change: share of its first words, and of those of the reference's response, that they do not share;
            None: the reference's response is not known.
        is_same: whether all words of both responses are the same.
    """

    prompt_id: str
    faults: Mapping[str, float]
    change: float | None
    is_same: bool


def judged(row: Mapping[str, Any]) -> Judged:
    """Return the facts of a row of a file of samples; fields of another type are not known."""
    policy, reference = _text(row.get("policy")) or "", _text(row.get("reference"))
    tokens, reference_tokens = _count(row.get("policy_tokens")), _count(row.get("reference_tokens"))
    faults: dict[str, float] = {}
    if not policy.strip():
        faults["empty"] = 1
    if row.get("policy_finished") is False:
        faults["unfinished"] = tokens or 1
    facts = text_facts(policy, 0, is_finished=True)
    if facts.longest_repeat > REPEATED or (facts.distinct_3 is not None and facts.distinct_3 < DISTINCT):
        faults["repeats"] = facts.longest_repeat + 1 - (facts.distinct_3 or 0)
    if facts.is_refusal and (reference is None or not is_refusal(reference)):
        faults["refuses"] = 1
    expected = language_of(_text(row.get("chosen")) or "")
    if None not in (facts.language, expected) and facts.language != expected:
        faults["language"] = 1
    if tokens and reference_tokens and policy.strip():
        ratio = tokens / reference_tokens
        if ratio >= LONGER:
            faults["longer"] = ratio
        elif ratio <= SHORTER:
            faults["shorter"] = 1 / ratio
    change = None if reference is None else 1 - difference(policy, reference).similarity
    responses = (row.get(name) for name in ("policy", "reference"))
    words = [WORD.findall(text) if isinstance(text, str) else None for text in responses]
    return Judged(str(row.get("prompt_id")), faults, change, None not in words and words[0] == words[1])


def choose(rows: Sequence[Judged], most: int) -> dict[str, list[str]]:
    """Return the ids of at most `most` prompts with the reasons why each is shown, in the order to show them.

    The worst response of each fault, those that changed most and least, and one of the median change; then
    the second worst of each fault, and so on. Equal ones are ordered by id.
    """
    ranked = [_worst_first(rows, fault) for fault in FAULTS]
    extremes = _extremes(rows)
    worst = [row for column in ranked for row in column[:1]]
    others = [row for at in range(1, most) for column in ranked for row in column[at : at + 1]]
    by_id = {row.prompt_id: row for row in [*worst, *(row for row, _ in extremes), *others]}
    return {
        name: [
            *(each for fault, (each, _) in FAULTS.items() if fault in row.faults),
            *(reason for each, reason in extremes if each is row),
        ]
        for name, row in list(by_id.items())[:most]
    }


def _worst_first(rows: Sequence[Judged], fault: str) -> list[Judged]:
    found = (row for row in rows if fault in row.faults)
    return sorted(found, key=lambda row: (-row.faults[fault], row.prompt_id))


def _extremes(rows: Sequence[Judged]) -> list[tuple[Judged, str]]:
    """Return the rows that changed most, by the median, and least, with their reasons."""
    ranked = sorted(
        (row for row in rows if row.change is not None), key=lambda row: (-(row.change or 0), row.prompt_id)
    )
    if not ranked:
        return []
    found = [(ranked[0], "differs most from the reference's")]
    if len(ranked) > 2:
        found.append((ranked[len(ranked) // 2], "differs from the reference's by the median"))
    if len(ranked) > 1:
        found.append((ranked[-1], "differs least from the reference's"))
    return found


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < 10**9 else None


def _text(value: object) -> str | None:
    return value[:_MEASURED_CHARACTERS] if isinstance(value, str) else None
