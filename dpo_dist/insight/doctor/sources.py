"""Facts and findings about one source, from those about its records."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data import DataConfig
from dpo_dist.data.counts import EMPTY_REMEDY, remedy_of
from dpo_dist.generation.text_facts import language_of, shares
from dpo_dist.insight.doctor.findings import KINDS, RULE_OF, RULES, Finding, Rules
from dpo_dist.insight.doctor.label_leaks import LeakTest, leak_findings, leak_tests
from dpo_dist.insight.doctor.observe import SIDES, Facts, Keys, PairFacts

PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)
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


def distribution(values: npt.NDArray[Any], edges: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the distribution of values; those beyond the edges of the histogram count in its ends."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    percentiles = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {
        "count": len(values),
        "mean": float(np.mean(values)),
        "smallest": float(np.min(values)),
        "largest": float(np.max(values)),
        "percentiles": dict(zip(PERCENTILES, percentiles.tolist(), strict=True)),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def _of_lengths(lengths: Sequence[int]) -> dict[str, Any]:
    """Return the distribution of lengths, with edges from the smallest to the largest, ever wider."""
    low, high = min(lengths), max(*lengths, min(lengths) + 1)
    edges = np.unique(np.round(np.geomspace(low + 1, high + 1, _SHOWN_BINS + 1) - 1))
    return distribution(np.array(lengths), edges)


class Source:
    """The records of one source; readable are those that have a prompt and responses."""

    def __init__(self, label: str, path: str, config: DataConfig, *, is_eval: bool, is_encoded: bool):
        self.label, self.path, self.is_eval = label, path, is_eval
        self._config, self._is_encoded = config, is_encoded
        self.read = self.kept = self.held_out = self._all_pairs = 0
        self.keys: list[Keys] = []
        self.named: dict[str, list[object]] = defaultdict(list)
        self._dropped: dict[str, list[object]] = defaultdict(list)
        self._details: dict[str, str] = {}
        self._changed: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._characters: list[Sequence[int]] = []
        self._tokens: list[Sequence[int]] = []
        self._cut: list[Sequence[int]] = []
        self._pairs: list[PairFacts] = []
        self._random = random.Random(0)  # noqa: S311

    def add(self, records: Iterable[Facts]) -> None:
        """Add the facts about the next records."""
        for one in records:
            self.read += 1
            if one.dropped is not None:
                self._dropped[one.dropped].append(one.origin)
                self._details.setdefault(one.dropped, one.detail)
            if one.keys is None:
                continue
            self.keys.append(one.keys)
            self._characters.append(one.characters)
            for name in one.names:
                self.named[name].append(one.origin)
            if one.dropped is None:
                self.kept += 1
                self.held_out += one.keys.is_held_out
                self._cut.append(one.cut)
                self._changed.update(one.changed)
                self._sums.update(one.sums)
            if one.tokens is not None:
                self._tokens.append(one.tokens)
            if one.pair is not None:
                self._sample(one.pair)

    def _sample(self, pair: PairFacts) -> None:
        """Add a pair to a uniform sample, by Algorithm R (Vitter 1985, doi:10.1145/3147.3165)."""
        self._all_pairs += 1
        if len(self._pairs) < _SAMPLED_PAIRS:
            self._pairs.append(pair)
        elif (at := self._random.randrange(self._all_pairs)) < _SAMPLED_PAIRS:
            self._pairs[at] = pair

    def of(self, name: str) -> int:
        """Return the number of records of which those with a name are a share."""
        return len(self.named.get("pair_or_ranking", ())) if name in _OF_PAIRS else len(self.keys)

    @cached_property
    def leaks(self) -> list[LeakTest]:
        """The tests for label leaks of training data, which are what the policy learns from."""
        if not self._pairs or self.is_eval:
            return []
        languages = [
            0 if None in found else (found[1] == found[0]) - (found[2] == found[0])
            for found in self._languages
        ]
        return leak_tests(
            np.stack([pair.features for pair in self._pairs]),
            [pair.words for pair in self._pairs],
            np.array([pair.prompt for pair in self._pairs], dtype=np.uint64),
            np.array(languages, dtype=np.float64),
        )

    @cached_property
    def _languages(self) -> list[tuple[str | None, ...]]:
        """Of sampled pairs, those of the prompt and of both responses."""
        return [tuple(map(language_of, pair.heads)) for pair in self._pairs[:_SAMPLED_LANGUAGES]]

    def report(self) -> dict[str, Any]:
        """Return the entry of doctor.json; docs/doctor.md describes its fields."""
        tokens, unique = self._sums["tokens"], self._sums["unique_tokens"]
        prefix: dict[str, float] | None = None
        if tokens:
            prefix = {"tokens": tokens, "unique_tokens": unique}
            prefix |= {"share": 1 - unique / tokens, "expected_gain": tokens / unique}
        dropped = sorted(self._dropped.items(), key=lambda item: -len(item[1]))
        return {
            "label": self.label,
            "path": self.path,
            "is_eval": self.is_eval,
            "read": self.read,
            "kept": self.kept,
            "pairs": self._sums["pairs"] if self._is_encoded else self.kept,
            "held_out": self.held_out if self._config.eval_share else None,
            "dropped": {
                reason: {"count": len(origins), "examples": list(map(str, origins[:20]))}
                for reason, origins in dropped
            },
            "changed": dict(sorted(self._changed.items())),
            "sides": dict(self._sides()),
            "prefix": prefix,
            "shares": self._shares(),
            "languages": shares([prompt for prompt, *_ in self._languages]),
            "scores": self._scores(),
            "margins": {},
            "leaks": list(map(asdict, self.leaks)),
            "notes": list(self._notes()),
        }

    def _sides(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for at, side in enumerate(SIDES):
            characters = [lengths[at] for lengths in self._characters if lengths[at] >= 0]
            tokens = [lengths[at] for lengths in self._tokens if lengths[at] >= 0]
            cuts = [cut[at] for cut in self._cut if cut[at] > 0]
            if characters:
                yield (
                    side,
                    {
                        "characters": _of_lengths(characters),
                        "tokens": _of_lengths(tokens) if tokens else None,
                        "cut": len(cuts),
                        "cut_tokens": sum(cuts),
                    },
                )

    def _shares(self) -> dict[str, float]:
        """Return the shares of records that are facts, not faults; and the share of trained tokens."""
        of = self._sums["response_tokens"]
        trained = {"trained_tokens": self._sums["trained_tokens"] / of} if of else {}
        return trained | {
            name: len(origins) / self.of(name)
            for name, origins in sorted(self.named.items())
            if name not in RULES and name not in RULE_OF
        }

    def _scores(self) -> dict[str, float]:
        """Return statistics of the sampled scores."""
        scores = np.array([pair.scores for pair in self._pairs]).reshape(-1, 2)
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
        if self._all_pairs > _SAMPLED_PAIRS:
            yield f"label leaks and scores: a sample of {_SAMPLED_PAIRS} of {self._all_pairs} pairs"
        if self._all_pairs > _SAMPLED_LANGUAGES:
            yield f"languages: a sample of {_SAMPLED_LANGUAGES} pairs"

    def findings(self, rules: Rules) -> Iterator[Finding]:
        """Yield the findings about the source, without those that compare records."""
        yield from self._of_reading(rules)
        for name in RULES:
            origins = self.named.get(name, [])
            kinds = {kind: len(self.named.get(kind, ())) for kind in KINDS.get(name, ())}
            detail = ", ".join(
                f"{kind.replace('_', ' ')} in {count}" for kind, count in kinds.items() if count
            )
            yield from rules[name].count(len(origins), self.of(name), self.label, origins, detail)
        yield from leak_findings(self.leaks, rules, self.label)
        known = [pair for _, *pair in self._languages if None not in pair]
        if len(known) >= _MIN_LANGUAGES:
            differing = sum(chosen != rejected for chosen, rejected in known)
            yield from rules["language_differs"].count(
                differing, len(known), self.label, records="sampled records"
            )

    def _of_reading(self, rules: Rules) -> Iterator[Finding]:
        reasons = sorted(self._dropped.items(), key=lambda item: -len(item[1]))
        dropped = sum(len(origins) for _, origins in reasons)
        if not self.kept:
            remedy = remedy_of(reasons[0][0]) if reasons else EMPTY_REMEDY
            found = rules["no_records"].value(1, self.read, self.label, f"{self.read} were read")
            yield from (replace(finding, remedy=remedy) for finding in found)
        elif dropped > self._config.max_bad_share * self.read:
            detail = f"{dropped} of {self.read} records"
            yield from rules["too_many_dropped"].value(dropped / self.read, dropped, self.label, detail)
        for reason, origins in reasons:
            detail = f"{reason} ({self._details[reason]})" if self._details[reason] else reason
            for finding in rules["dropped"].count(len(origins), self.read, self.label, origins, detail):
                yield replace(finding, remedy=remedy_of(reason))
