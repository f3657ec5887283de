"""Facts and findings about one source, summed over its chunks."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from dpo_dist.data.counts import EMPTY_REMEDY, remedy_of
from dpo_dist.generation.text_facts import language_of, shares
from dpo_dist.insight.doctor.findings import (
    PERCENTILES,
    SIDES,
    Distribution,
    Finding,
    LeakTest,
    Occurrences,
    PrefixSharing,
    SideReport,
    SourceReport,
)
from dpo_dist.insight.doctor.label_leaks import SideSample, leak_findings, leak_tests
from dpo_dist.insight.doctor.observe import Lengths, Named, Observed, PairFacts, TokenFacts
from dpo_dist.insight.doctor.rules import KINDS, RULE_OF, RULES, Judge

SEED = 0
"""Of the samples of records."""
_SAMPLED_PAIRS, _SAMPLED_LANGUAGES = 20_000, 2_000
_MIN_LANGUAGES = 20
_SHOWN_BINS = 32
_OF_PAIRS = {
    "chosen_longer",
    "model_name_chosen",
    "model_name_rejected",
    "refusal_chosen",
    "refusal_rejected",
    "one_response_starts_the_other",
    "nearly_equal_sides",
    "score_ties",
    "score_inversions",
}
"""Names of records with at least two responses; others are shares of all readable records."""
Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """The first `size` items of a stream, then each later one in place of an earlier one with fair chance.

    Algorithm R (Vitter 1985, doi:10.1145/3147.3165); it depends on the order of the items only.
    """

    def __init__(self, size: int) -> None:
        self.items: list[Item] = []
        self.seen = 0
        self._size = size
        self._random = random.Random(SEED)  # noqa: S311

    def add(self, items: Iterable[Item]) -> None:
        """Offer items to the sample."""
        for item in items:
            self.seen += 1
            if len(self.items) < self._size:
                self.items.append(item)
            elif (at := self._random.randrange(self.seen)) < self._size:
                self.items[at] = item


def distribution(values: npt.NDArray[np.int64 | np.float64], edges: npt.NDArray[np.float64]) -> Distribution:
    """Return the distribution of values; those beyond the edges of the histogram count in its ends."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    percentiles = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return Distribution(
        count=len(values),
        mean=float(np.mean(values)),
        smallest=float(np.min(values)),
        largest=float(np.max(values)),
        percentiles=dict(zip(PERCENTILES, map(float, percentiles), strict=True)),
        edges=tuple(map(float, edges)),
        counts=tuple(map(int, counts)),
    )


def _of_lengths(values: npt.NDArray[np.int64]) -> Distribution:
    """Return the distribution of lengths, with edges from the smallest to the largest, ever wider."""
    low, high = int(values.min()), max(int(values.max()), int(values.min()) + 1)
    edges = np.unique(np.round(np.geomspace(low + 1, high + 1, _SHOWN_BINS + 1) - 1))
    return distribution(values, edges)


class SourceTally:
    """Sums of `Observed` over one source; `readable` are the records that have a prompt and responses."""

    def __init__(self, label: str, path: str, is_eval: bool, is_split: bool):
        self.label, self.path, self.is_eval = label, path, is_eval
        self.names, self.dropped = Named(), Named()
        self.details: dict[str, str] = {}
        self.read = self.readable = 0
        self.sample: Reservoir[PairFacts] = Reservoir(_SAMPLED_PAIRS)
        self._held_out: int | None = 0 if is_split else None
        self._tokens: TokenFacts | None = None
        self._characters: list[Lengths] = []

    def of(self, name: str) -> int:
        """Return the number of records of which those with a name are a share."""
        return self.names.counts["pair_or_ranking"] if name in _OF_PAIRS else self.readable

    def add(self, observed: Observed) -> None:
        """Add the facts about the next records."""
        self.read += observed.read
        self.readable += len(observed.records)
        if self._held_out is not None:
            drawn = sum(record.is_held_out for record in observed.records)
            self._held_out += drawn if observed.tokens is None else observed.tokens.sums["held_out"]
        self.names.update(observed.names)
        self.dropped.update(observed.dropped)
        self.details = observed.details | self.details
        self.sample.add(observed.pairs)
        self._characters += observed.characters
        if observed.tokens is not None:
            self._tokens = self._tokens or TokenFacts()
            self._tokens.add(observed.tokens)

    def report(self) -> SourceReport:
        """Return the report of the source; its tests for label leaks run here."""
        tokens = self._tokens
        return SourceReport(
            label=self.label,
            path=self.path,
            is_eval=self.is_eval,
            read=self.read,
            kept=tokens.sums["kept"] if tokens else self.readable,
            pairs=tokens.sums["pairs"] if tokens else self.readable,
            held_out=self._held_out,
            dropped={
                name: Occurrences(count, tuple(self.dropped.examples[name]))
                for name, count in self.dropped.counts.most_common()
            },
            changed=dict(sorted(tokens.changed.items())) if tokens else {},
            sides=dict(self._sides()),
            prefix=PrefixSharing(tokens.sums["tokens"], tokens.sums["unique_tokens"]) if tokens else None,
            shares=self._shares(),
            languages=shares([prompt for prompt, *_ in self._languages]),
            scores=self._scores(),
            leaks=self._leaks(),
            notes=tuple(self._notes()),
        )

    def language_differences(self) -> tuple[int, int]:
        """Return the number of sampled pairs in two languages, and of those whose languages are known."""
        known = [pair[1:] for pair in self._languages if None not in pair[1:]]
        return sum(chosen != rejected for chosen, rejected in known), len(known)

    def _sides(self) -> Iterator[tuple[str, SideReport]]:
        characters = np.array(self._characters, dtype=np.int64).reshape(-1, len(SIDES))
        lengths = np.array(self._tokens.lengths if self._tokens else (), dtype=np.int64)
        for side, of_side, tokens in zip(SIDES, characters.T, lengths.reshape(-1, len(SIDES)).T, strict=True):
            if not (of_side >= 0).any():
                continue
            report = SideReport(_of_lengths(of_side[of_side >= 0]))
            if self._tokens and (tokens >= 0).any():
                cut, cut_tokens = (self._tokens.sums[f"{side} {name}"] for name in ("cut", "cut_tokens"))
                report = SideReport(report.characters, _of_lengths(tokens[tokens >= 0]), cut, cut_tokens)
            yield side, report

    def _shares(self) -> dict[str, float]:
        """Return the shares of records that are facts, not faults; and the share of trained tokens."""
        sums = self._tokens.sums if self._tokens else {}
        of = sums.get("response_tokens")
        trained = {"trained_tokens": sums["trained_tokens"] / of} if of else {}
        return trained | {
            name: count / self.of(name)
            for name, count in sorted(self.names.counts.items())
            if name not in RULES and name not in RULE_OF
        }

    @cached_property
    def _languages(self) -> list[tuple[str | None, ...]]:
        heads = (pair.heads for pair in self.sample.items[:_SAMPLED_LANGUAGES])
        return [tuple(map(language_of, texts)) for texts in heads]

    def _leaks(self) -> tuple[LeakTest, ...]:
        pairs = self.sample.items
        if not pairs or self.is_eval:  # what the policy learns is in the training data
            return ()
        languages = [
            0 if None in found else (found[1] == found[0]) - (found[2] == found[0])
            for found in self._languages
        ]
        return leak_tests(
            SideSample(
                np.stack([pair.features for pair in pairs]),
                [pair.words for pair in pairs],
                np.array([pair.prompt for pair in pairs], dtype=np.uint64),
                np.array(languages, dtype=np.float64),
            )
        )

    def _scores(self) -> Mapping[str, float]:
        """Return statistics of the sampled scores."""
        scores = np.array([pair.scores for pair in self.sample.items]).reshape(-1, 2)
        scores = scores[~np.isnan(scores).any(axis=1)]
        if not len(scores):
            return {}
        return {
            "sampled": len(scores),
            "mean_chosen": float(scores[:, 0].mean()),
            "mean_rejected": float(scores[:, 1].mean()),
            "median_gap": float(np.median(scores[:, 0] - scores[:, 1])),
        }

    def _notes(self) -> Iterator[str]:
        if self.sample.seen > _SAMPLED_PAIRS:
            yield f"label leaks and scores: a sample of {_SAMPLED_PAIRS} of {self.sample.seen} pairs"
        if self.sample.seen > _SAMPLED_LANGUAGES:
            yield f"languages: a sample of {_SAMPLED_LANGUAGES} pairs"


def source_findings(
    tally: SourceTally, report: SourceReport, judge: Judge, max_bad_share: float
) -> Iterator[Finding]:
    """Yield the findings about a source, without those that compare records."""
    yield from _reading_findings(tally, report, judge, max_bad_share)
    for name in RULES:
        examples = tally.names.examples.get(name, ())
        yield from judge.count(
            name, tally.names.counts[name], tally.of(name), tally.label, examples, detail=_kinds(tally, name)
        )
    yield from leak_findings(report.leaks, judge, tally.label)
    differing, known = tally.language_differences()
    if known >= _MIN_LANGUAGES:
        yield from judge.count("language_differs", differing, known, tally.label, records="sampled records")


def _kinds(tally: SourceTally, rule: str) -> str:
    """Return how many records have each kind of a rule, as text."""
    found = {kind: tally.names.counts[kind] for kind in KINDS.get(rule, ()) if tally.names.counts[kind]}
    return ", ".join(f"{kind.replace('_', ' ')} in {count}" for kind, count in found.items())


def _reading_findings(
    tally: SourceTally, report: SourceReport, judge: Judge, max_bad_share: float
) -> Iterator[Finding]:
    reasons: Sequence[tuple[str, int]] = tally.dropped.counts.most_common()
    dropped = sum(count for _, count in reasons)
    if not report.kept:
        found = judge.value("no_records", 1, tally.read, tally.label, f"{tally.read} were read")
        remedy = remedy_of(reasons[0][0]) if reasons else EMPTY_REMEDY
        yield from (replace(finding, remedy=remedy) for finding in found)
    elif dropped > max_bad_share * tally.read:
        detail = f"{dropped} of {tally.read} records"
        yield from judge.value("too_many_dropped", dropped / tally.read, dropped, tally.label, detail)
    for reason, count in reasons:
        detail = tally.details.get(reason, "")
        found = judge.count(
            "dropped",
            count,
            tally.read,
            tally.label,
            tally.dropped.examples[reason],
            detail=f"{reason} ({detail})" if detail else reason,
        )
        yield from (replace(finding, remedy=remedy_of(reason)) for finding in found)
