"""Sum up the facts about the records of one source, and find its faults."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.counts import EMPTY_REMEDY, named_in_one_line, reason_remedy
from dpo_dist.tools.doctor.measures.label_leaks import LeakTest, leak_findings, leak_tests
from dpo_dist.tools.doctor.measures.observe import SIDES, ImageFacts, PairFacts, RecordFacts
from dpo_dist.tools.doctor.measures.texts import subtract_features
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, KINDS_BY_RULE, RULE_BY_KIND
from dpo_dist.tools.shared.findings import Finding
from dpo_dist.tools.shared.text_facts import detect_language

PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)
_SAMPLED_PAIRS, _SAMPLED_LANGUAGES = 20_000, 2_000
_MIN_LANGUAGES = 20
_MOST_FIELDS = 1000
_SHOWN_BINS = 32


def distribution(values: npt.NDArray[Any], edges: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the distribution of values; a value outside the edges counts in the first or last bin."""
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


def _spread(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Return the distribution of lengths, in bins that become wider with the length."""
    if not lengths:
        return None
    edges = np.unique(np.round(np.geomspace(min(lengths) + 1, max(lengths) + 2, _SHOWN_BINS + 1) - 1))
    return distribution(np.array(lengths), edges)


class ExaminedSource:
    """The records of one source; a readable one has a prompt and responses."""

    def __init__(self, label: str, path: str, config: DataConfig, *, is_eval: bool, is_encoded: bool):
        self.label, self.path, self.is_eval = label, path, is_eval
        self._config, self._is_encoded = config, is_encoded
        self.records: list[RecordFacts] = []
        self._sample: list[tuple[int, int, PairFacts]] = []  # a heap: the next one to drop comes first
        self._unread = Counter[str]()
        self._images: dict[int, ImageFacts] = {}  # the different ones, by key
        self._images_of_records: list[int] = []

    def add(self, records: Sequence[RecordFacts]) -> None:
        """Add the facts about the next records; facts about pairs are kept for a sample only."""
        for number, record in enumerate(records, start=len(self.records)):
            if record.pair is not None:
                push = heapq.heappush if len(self._sample) < _SAMPLED_PAIRS else heapq.heappushpop
                push(self._sample, (-record.pair.record, -number, record.pair))
        self.records += records
        for record in records:
            if len(self._unread) < _MOST_FIELDS:
                self._unread.update(record.unread)
            for image in record.images:
                if image.tokens is not None or image.key not in self._images:
                    self._images[image.key] = image
            self._images_of_records += [len(record.images)] * bool(record.images)
            record.pair, record.unread, record.images = None, (), ()

    @cached_property
    def _pairs(self) -> list[PairFacts]:
        """The sampled pairs: those with the smallest keys, sorted by key."""
        return [pair for *_, pair in sorted(self._sample, reverse=True)]

    @cached_property
    def readable(self) -> list[RecordFacts]:
        """The readable records."""
        return [record for record in self.records if record.is_readable]

    @cached_property
    def origins_by_name(self) -> dict[str, list[object]]:
        """The origins of the records that have each name."""
        origins = defaultdict[str, list[object]](list)
        for record in self.readable:
            for name in record.names:
                origins[name].append(record.origin)
        return origins

    @cached_property
    def _kept(self) -> list[RecordFacts]:
        return [record for record in self.readable if record.dropped is None]

    @cached_property
    def labels(self) -> dict[str, int]:
        """The numbers of kept records whose single response is labelled good, and bad."""
        return {
            label: sum(f"labelled_{label}" in record.names for record in self._kept)
            for label in ("good", "bad")
        }

    @cached_property
    def _dropped(self) -> list[tuple[str, list[RecordFacts]]]:
        """The reasons with their records, the most frequent first."""
        by_reason = defaultdict[str, list[RecordFacts]](list)
        for record in self.records:
            if record.dropped is not None:
                by_reason[record.dropped].append(record)
        return sorted(by_reason.items(), key=lambda item: -len(item[1]))

    @cached_property
    def leaks(self) -> list[LeakTest]:
        """The tests for label leaks; none for evaluation data, from which the policy does not learn."""
        pairs = [pair for pair in self._pairs if pair.side is None]
        by_prompt = sorted(self._pairs, key=lambda pair: pair.prompt)
        good, bad = ([pair for pair in by_prompt if pair.side == side] for side in SIDES[1:])
        for first, second in zip(good, bad, strict=False):  # each labelled response once
            pairs.append(replace(first, differences=subtract_features(first.differences, second.differences)))
        if not pairs or self.is_eval:
            return []
        prompts = np.array([pair.prompt for pair in pairs], dtype=np.uint64)
        return leak_tests([pair.differences for pair in pairs], prompts)

    @cached_property
    def _languages(self) -> list[tuple[str | None, ...]]:
        """Languages of the prompt and of both responses, for sampled pairs."""
        return [tuple(map(detect_language, pair.heads)) for pair in self._pairs[:_SAMPLED_LANGUAGES]]

    def _image_report(self) -> dict[str, Any] | None:
        """Return the numbers and sizes of images; None without any."""
        if not self._images:
            return None
        different = self._images.values()
        tokens = [image.tokens for image in different if image.tokens is not None]
        return {
            "records": len(self._images_of_records),
            "images": sum(self._images_of_records),
            "different": len(different),
            "in_a_record": _spread(self._images_of_records),
            "pixels": _spread([image.pixels for image in different]),
            "tokens": _spread(tokens),
        }

    def report(self) -> dict[str, Any]:
        """Return the entry of doctor.json; docs/doctor.md describes its fields."""
        sums, changed, readable = Counter[str](), Counter[str](), self.readable
        for record in self._kept:
            sums.update(record.sums)
            changed.update(record.changed)
        sides: dict[str, dict[str, Any]] = {}
        for at, side in enumerate(SIDES):
            lengths = [record.tokens[at] for record in readable if record.tokens and record.tokens[at] >= 0]
            cuts = [record.cut[at] for record in self._kept if record.cut[at] > 0]
            if characters := [record.characters[at] for record in readable if record.characters[at] >= 0]:
                sides[side] = {
                    "characters": _spread(characters),
                    "tokens": _spread(lengths),
                }
                sides[side] |= {"cut": len(cuts), "cut_tokens": sum(cuts)}
        prefix: dict[str, float] | None = None
        if tokens := sums["tokens"]:
            unique = sums["unique_tokens"]
            prefix = {"tokens": tokens, "unique_tokens": unique}
            prefix |= {"share": 1 - unique / tokens, "expected_gain": tokens / unique}
        languages = Counter(prompt for prompt, *_ in self._languages if prompt is not None)
        shown = {
            name for name in self.origins_by_name if name not in DOCTOR_RULES and name not in RULE_BY_KIND
        }
        return {
            "label": self.label,
            "path": self.path,
            "is_eval": self.is_eval,
            "read": len(self.records),
            "kept": len(self._kept),
            "pairs": sums["pairs"] if self._is_encoded else len(self._kept),
            "held_out": sum(record.is_held_out for record in self._kept) if self._config.eval_share else None,
            "labels": self.labels,
            "dropped": {
                reason: {"count": len(records), "examples": [str(record.origin) for record in records[:20]]}
                for reason, records in self._dropped
            },
            "changed": dict(sorted(changed.items())),
            "sides": sides,
            "prefix": prefix,
            "images": self._image_report(),
            "shares": {
                **({"trained_tokens": sums["trained_tokens"] / sums["response_tokens"]} if tokens else {}),
                **{name: len(self.origins_by_name[name]) / len(readable) for name in sorted(shown)},
            },
            "languages": {name: count / languages.total() for name, count in languages.most_common()},
            "margins": {},
            "leaks": list(map(asdict, self.leaks)),
        }

    def findings(self) -> Iterator[Finding]:
        """Yield the findings about this source; those that compare records are in `duplicates`."""
        yield from self._reading_findings()
        for name in DOCTOR_RULES:
            origins = self.origins_by_name.get(name, [])
            kinds = {kind: len(self.origins_by_name.get(kind, ())) for kind in KINDS_BY_RULE.get(name, ())}
            detail = ", ".join(
                f"{kind.replace('_', ' ')} in {count}" for kind, count in kinds.items() if count
            )
            detail = named_in_one_line(self._unread) if name == "columns_not_read" else detail
            yield from DOCTOR_RULES[name].count(len(origins), len(self.readable), self.label, origins, detail)
        yield from leak_findings(self.leaks, self.label)
        known = [pair for _, *pair in self._languages if None not in pair]
        if len(known) >= _MIN_LANGUAGES:
            differing = sum(chosen != rejected for chosen, rejected in known)
            yield from DOCTOR_RULES["language_differs"].count(
                differing, len(known), self.label, records="sampled records"
            )

    def _reading_findings(self) -> Iterator[Finding]:
        read, dropped = len(self.records), sum(len(records) for _, records in self._dropped)
        if not self._kept:
            remedy = reason_remedy(self._dropped[0][0]) if self._dropped else EMPTY_REMEDY
            findings = DOCTOR_RULES["no_records"].value(1, read, self.label, f"{read} were read")
            yield from (replace(finding, remedy=remedy) for finding in findings)
        elif dropped > self._config.max_bad_share * read:
            detail = f"{dropped} of {read} records"
            yield from DOCTOR_RULES["too_many_dropped"].value(dropped / read, dropped, self.label, detail)
        for reason, records in self._dropped:
            first, origins = records[0], [record.origin for record in records]
            detail = f"{reason} ({first.detail})" if first.detail else reason
            for finding in DOCTOR_RULES["dropped"].count(len(records), read, self.label, origins, detail):
                yield replace(finding, remedy=reason_remedy(reason))
