"""Facts and findings about one source, summed over its chunks."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from dpo_dist.data.counts import EMPTY_REMEDY, remedy_of
from dpo_dist.foundation.text import percent
from dpo_dist.generation.text_facts import language_of, shares
from dpo_dist.insight.doctor.features import GROUPS
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
from dpo_dist.insight.doctor.label_leaks import (
    ALL,
    LENGTH,
    MIN_DIFFERS,
    MIN_PAIRS,
    SIDE,
    SideSample,
    interval,
    leak_tests,
    single_test,
)
from dpo_dist.insight.doctor.observe import Named, Observed, PairFacts
from dpo_dist.insight.doctor.rules import LEAKS, RULES, SCORES, Judge

_EXACT = 1024
# 70 bins for each doubling: a bin is 1 % wide.
_BINS_PER_DOUBLING = 70
_DOUBLINGS = 40
_SHOWN_BINS = 32


class LengthSketch:
    """Counts of non-negative whole numbers: exact below 1024, above in bins 1 % wide."""

    def __init__(self) -> None:
        self._counts = np.zeros(_EXACT + _BINS_PER_DOUBLING * _DOUBLINGS, dtype=np.int64)
        self._sum = 0
        self._smallest = math.inf
        self._largest = -math.inf

    def add(self, values: npt.NDArray[np.int64]) -> None:
        """Add values, int64 [n], at least 0."""
        if not len(values):
            return
        above = np.maximum(values, _EXACT)
        binned = _EXACT + np.floor(np.log2(above / _EXACT) * _BINS_PER_DOUBLING).astype(np.int64)
        bins = np.where(values < _EXACT, values, np.minimum(binned, len(self._counts) - 1))
        self._counts += np.bincount(bins, minlength=len(self._counts))
        self._sum += int(values.sum())
        self._smallest = min(self._smallest, int(values.min()))
        self._largest = max(self._largest, int(values.max()))

    def distribution(self) -> Distribution | None:
        """Return the distribution; None without a value."""
        total = int(self._counts.sum())
        if not total:
            return None
        starts = _starts(np.arange(len(self._counts)))
        cumulative = np.cumsum(self._counts)
        ranks = [max(1, math.ceil(percent / 100 * total)) for percent in PERCENTILES]
        found = np.clip(starts[np.searchsorted(cumulative, ranks)], self._smallest, self._largest)
        edges = self._edges()
        counts, _ = np.histogram(np.clip(starts, edges[0], edges[-1]), bins=edges, weights=self._counts)
        return Distribution(
            count=total,
            mean=self._sum / total,
            smallest=self._smallest,
            largest=self._largest,
            percentiles=dict(zip(PERCENTILES, map(float, found), strict=True)),
            edges=tuple(map(float, edges)),
            counts=tuple(map(int, counts)),
        )

    def _edges(self) -> npt.NDArray[np.float64]:
        """Return edges from the smallest to the largest value, whole numbers, wider for larger values."""
        low, high = self._smallest, max(self._largest, self._smallest + 1)
        edges = np.round(np.geomspace(low + 1, high + 1, _SHOWN_BINS + 1) - 1)
        return np.unique(edges)


def _starts(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the smallest value of each bin."""
    above = _EXACT * 2.0 ** ((bins - _EXACT) / _BINS_PER_DOUBLING)
    return np.where(bins < _EXACT, bins, above)


Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """The first `size` items of a stream, then each later one in place of an earlier one with fair chance.

    Algorithm R (Vitter 1985, doi:10.1145/3147.3165); it depends on the seed and the order of the items only.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.items: list[Item] = []
        self.seen = 0
        self._size = size
        self._random = random.Random(seed)  # noqa: S311

    def add(self, items: Iterable[Item]) -> None:
        """Offer items to the sample."""
        for item in items:
            self.seen += 1
            if len(self.items) < self._size:
                self.items.append(item)
            elif (at := self._random.randrange(self.seen)) < self._size:
                self.items[at] = item


SAMPLED_PAIRS = 20_000
SAMPLED_LANGUAGES = 2_000
_PAIR_NAMES = {
    "chosen_longer",
    "model_name_chosen",
    "model_name_rejected",
    "refusal_chosen",
    "refusal_rejected",
    "trailing_space_chosen",
    "trailing_space_rejected",
}


class SourceTally:
    """Sums of one source.

    Attributes:
        names: readable records by their faults and properties.
        dropped: dropped records by reason.
        details: for each reason, details of the first such record, without texts.
        read: records read.
        readable: records that have a prompt and responses.
    """

    def __init__(self, label: str, path: str, is_eval: bool, seed: int):
        self.label, self.path, self.is_eval = label, path, is_eval
        self.names, self.dropped = Named(), Named()
        self.details: dict[str, str] = {}
        self.read = self.readable = 0
        self.sample: Reservoir[PairFacts] = Reservoir(SAMPLED_PAIRS, seed)
        self._held_out: int | None = None
        self._kept = self._pairs = self._tokens = self._unique_tokens = 0
        self._response_tokens = self._trained_tokens = 0
        self._changed: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()
        self._cut_tokens: Counter[str] = Counter()
        self._has_tokens = False
        self._lengths = {(side, unit): LengthSketch() for side in SIDES for unit in ("characters", "tokens")}

    @property
    def pair_records(self) -> int:
        """Readable records with at least two responses."""
        return self.names.counts["pair_or_ranking"]

    def add(self, observed: Observed) -> None:
        """Add the facts about the next records."""
        self.read += observed.read
        self.readable += len(observed.origins)
        if observed.kept_held_out is not None:
            self._held_out = (self._held_out or 0) + observed.kept_held_out
        self.names.update(observed.names)
        self.dropped.update(observed.dropped)
        self.details = observed.details | self.details
        self.sample.add(observed.pairs)
        self._add_lengths("characters", observed.characters)
        tokens = observed.tokens
        if tokens is None:
            return
        self._has_tokens = True
        self._add_lengths("tokens", tokens.lengths)
        self._kept += tokens.kept
        self._pairs += tokens.pairs
        self._tokens += tokens.tokens
        self._unique_tokens += tokens.unique_tokens
        self._response_tokens += tokens.response_tokens
        self._trained_tokens += tokens.trained_tokens
        self._changed.update(tokens.changed)
        self._cut.update(tokens.cut)
        self._cut_tokens.update(tokens.cut_tokens)

    def report(self) -> SourceReport:
        """Return the report of the source; its tests for label leaks run here."""
        languages = self._languages()
        return SourceReport(
            label=self.label,
            path=self.path,
            is_eval=self.is_eval,
            read=self.read,
            kept=self._kept if self._has_tokens else self.readable,
            pairs=self._pairs if self._has_tokens else self.readable,
            held_out=self._held_out,
            dropped=_occurrences(self.dropped),
            changed=dict(sorted(self._changed.items())),
            sides=self._sides(),
            prefix=PrefixSharing(self._tokens, self._unique_tokens) if self._has_tokens else None,
            shares=self._shares(),
            languages=shares([prompt for prompt, *_ in languages]),
            scores=self._scores(),
            leaks=self._leaks(languages),
            notes=tuple(self._notes()),
        )

    def language_differences(self) -> tuple[int, int]:
        """Return the number of sampled pairs in two languages, and of those whose languages are known."""
        known = [pair[1:] for pair in self._languages() if None not in pair[1:]]
        return sum(chosen != rejected for chosen, rejected in known), len(known)

    def _add_lengths(self, unit: str, lengths: Iterable[tuple[int, int, int]]) -> None:
        values = np.array(list(lengths), dtype=np.int64).reshape(-1, len(SIDES))
        for column, side in zip(values.T, SIDES, strict=True):
            self._lengths[side, unit].add(column[column >= 0])

    def _sides(self) -> dict[str, SideReport]:
        reports = {}
        for side in SIDES:
            characters = self._lengths[side, "characters"].distribution()
            if characters is not None:
                tokens = self._lengths[side, "tokens"].distribution()
                reports[side] = SideReport(characters, tokens, self._cut[side], self._cut_tokens[side])
        return reports

    def _shares(self) -> dict[str, float]:
        """Return the shares of records that are facts, not faults; and the share of trained tokens."""
        trained = self._trained_tokens / self._response_tokens if self._response_tokens else 0.0
        tokens = {"trained_tokens": trained} if self._response_tokens else {}
        return tokens | {
            name: count / (self.pair_records if name in _PAIR_NAMES else self.readable)
            for name, count in sorted(self.names.counts.items())
            if name not in RULES
        }

    def _languages(self) -> list[tuple[str | None, ...]]:
        if not hasattr(self, "_found_languages"):
            heads = (pair.heads for pair in self.sample.items[:SAMPLED_LANGUAGES])
            self._found_languages = [tuple(map(language_of, texts)) for texts in heads]
        return self._found_languages

    def _leaks(self, languages: list[tuple[str | None, ...]]) -> tuple[LeakTest, ...]:
        pairs = self.sample.items
        if len(pairs) < MIN_PAIRS:
            return ()
        prompts = np.array([pair.prompt for pair in pairs], dtype=np.uint64)
        tests = leak_tests(
            SideSample(np.stack([pair.features for pair in pairs]), [pair.words for pair in pairs], prompts)
        )
        is_prompt_language = np.array(
            [0 if None in found else (found[1] == found[0]) - (found[2] == found[0]) for found in languages],
            dtype=np.float64,
        )
        language = single_test(is_prompt_language, prompts[: len(languages)], "language of the prompt")
        return tuple(sorted((*tests, language), key=lambda test: -test.accuracy)) if tests else ()

    def _scores(self) -> Mapping[str, float]:
        """Return statistics of the sampled scores."""
        scores = np.array([pair.scores for pair in self.sample.items]).reshape(-1, 2)
        longer = np.array([pair.longer_by for pair in self.sample.items])
        scored = ~np.isnan(scores).any(axis=1)
        if not scored.any():
            return {}
        scores, longer = scores[scored], longer[scored]
        gaps = scores[:, 0] - scores[:, 1]
        spread = float(np.subtract(*np.percentile(scores, [95, 5])))
        small = (gaps > 0) & (gaps < spread / 10)
        varied = len(gaps) > 2 and gaps.std() > 0 and longer.std() > 0
        return {
            "sampled": len(gaps),
            "mean_chosen": float(scores[:, 0].mean()),
            "mean_rejected": float(scores[:, 1].mean()),
            "median_gap": float(np.median(gaps)),
            "small_gap_share": float(small.mean()),
            "small_gap_below": spread / 10,
            "length_correlation": float(spearmanr(gaps, longer).statistic) if varied else 0.0,
        }

    def _notes(self) -> Iterable[str]:
        yield "lengths above 1024 are within 1 %"
        if self.sample.seen > SAMPLED_PAIRS:
            yield f"label leaks and scores: a sample of {SAMPLED_PAIRS} of {self.sample.seen} pairs"
        if self.sample.seen > SAMPLED_LANGUAGES:
            yield f"languages: a sample of {SAMPLED_LANGUAGES} pairs"


def _occurrences(named: Named) -> dict[str, Occurrences]:
    return {
        name: Occurrences(count, tuple(named.examples[name])) for name, count in named.counts.most_common()
    }


# A group of features has to add so much accuracy to the length; else it only follows the length.
_ADDS = 0.03
_MIN_LANGUAGES = 20
_STYLE = {"punctuation", "markdown", "language", "refusal"}
# Features that are preferred on purpose, and need no hint if they are one-sided.
_INTENDED = {"characters", "refusal", "language of the prompt"}
_GROUPS = (*(name for name in GROUPS if name != LENGTH), "first words", "last words")
# Dozens of features and hundreds of words are compared; 17 pairs are enough if all are on one side.
_STANDARD_ERRORS_OF_FORMS = 4.0
_SHOWN_FORMS = 3
_MEMBERS = GROUPS | {"language": (*GROUPS["language"], "language of the prompt")}
_LENGTH_FEATURE = GROUPS[LENGTH][0]
_OF_PAIRS = {*LEAKS, *SCORES, "short_chosen", "short_rejected", "one_response_starts_the_other"}
_OF_PAIRS |= {"differs_only_in_spaces", "differs_only_in_case"}


def source_findings(
    tally: SourceTally, report: SourceReport, judge: Judge, max_bad_share: float
) -> Iterator[Finding]:
    """Yield the findings about a source, without those that compare records."""
    yield from _reading_findings(tally, report, judge, max_bad_share)
    for name in RULES:
        of = tally.pair_records if name in _OF_PAIRS else tally.readable
        yield from judge.count(
            name, tally.names.counts[name], of, tally.label, tally.names.examples.get(name, ())
        )
    yield from _score_findings(report, judge)
    yield from leak_findings(report.leaks, judge, tally.label)
    differing, known = tally.language_differences()
    if known >= _MIN_LANGUAGES:
        yield from judge.count("language_differs", differing, known, tally.label, records="sampled records")


def leak_findings(tests: Iterable[LeakTest], judge: Judge, source: str) -> Iterator[Finding]:
    """Yield the findings about label leaks.

    A group of features counts if it reveals the chosen response and adds to the length, which is a finding of
    its own.
    """
    by_name = {test.feature: test for test in tests}
    if not by_name:
        return
    length = by_name[_LENGTH_FEATURE]
    has_bias = _is_leak(length, judge, "length_bias")
    if has_bias:
        side = "shorter" if length.detail.endswith("less") else "longer"
        detail = f"the {side} one is chosen in {percent(length.accuracy)} of the pairs"
        yield from judge.value("length_bias", length.accuracy, length.pairs, source, detail)
    found: list[Finding] = []
    for name in _GROUPS:
        test = _group_test(name, by_name)
        if test is None or not _is_leak(test, judge, _rule_of(name)):
            continue
        both = by_name.get(f"length and {name}", test)
        if not has_bias or max(test.accuracy, both.accuracy) > length.accuracy + _ADDS:
            found += _leak(name, test, by_name, judge, source)
    yield from found
    if not found:
        yield from _joint_leak(by_name, judge, source, length.accuracy if has_bias else 0)
    yield from _one_sided_forms(by_name, judge, source)


def _group_test(name: str, by_name: Mapping[str, LeakTest]) -> LeakTest | None:
    """Return the most accurate test of a group or of one of its features."""
    members = [by_name[member] for member in (name, *_MEMBERS.get(name, ())) if member in by_name]
    return max(members, key=lambda test: test.accuracy, default=None)


def _leak(
    name: str, test: LeakTest, by_name: Mapping[str, LeakTest], judge: Judge, source: str
) -> Iterator[Finding]:
    detail = test.detail
    if name in _MEMBERS:
        best = max((by_name[member] for member in _MEMBERS[name]), key=lambda one: one.accuracy)
        detail = f"{best.feature}, {best.detail}, {percent(best.accuracy)}"
    text = f"by {name}, {_shown(test)} of held-out pairs are guessed ({detail})"
    yield from judge.value(_rule_of(name), test.accuracy, test.pairs, source, text)


def _joint_leak(
    by_name: Mapping[str, LeakTest], judge: Judge, source: str, explained: float
) -> Iterator[Finding]:
    """Yield the finding that all features together reveal the chosen response, if no group does alone."""
    whole = by_name.get(ALL)
    if whole is None or whole.accuracy <= explained + _ADDS or not _is_leak(whole, judge, "style_bias"):
        return
    groups = sorted((by_name[name] for name in _GROUPS if name in by_name), key=lambda test: -test.accuracy)
    names = " and ".join(f"{test.feature} ({percent(test.accuracy)})" for test in groups[:2])
    text = f"by several features, {_shown(whole)} of held-out pairs are guessed; mostly {names}"
    yield from judge.value("style_bias", whole.accuracy, whole.pairs, source, text)


def _one_sided_forms(by_name: Mapping[str, LeakTest], judge: Judge, source: str) -> Iterator[Finding]:
    """Yield the finding of features that few pairs have, and these almost always on the same side."""
    forms = [
        (differing, _one_sided_share(test, differing), test)
        for name, test in by_name.items()
        if test.detail.startswith(SIDE) and name not in _INTENDED and not _is_leak(test, judge, "label_leak")
        if (differing := round(test.differs * test.pairs)) >= MIN_DIFFERS * test.pairs
    ]
    found = [form for form in forms if form[1] > judge.threshold("one_sided_form")]
    if not found:
        return
    shown = [
        f"{test.feature} ({test.detail} in {percent(share)} of the {differing} pairs that differ in it)"
        for differing, share, test in sorted(found, key=lambda form: -form[0])[:_SHOWN_FORMS]
    ]
    more = f"; and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    largest = max(share for _, share, _ in found)
    yield from judge.value("one_sided_form", largest, found[0][2].pairs, source, "; ".join(shown) + more)


def _one_sided_share(test: LeakTest, differing: int) -> float:
    """Return the held-out share of a feature's pairs that have it on the same side; 0 if by chance."""
    share = 0.5 + (test.accuracy - 0.5) * test.pairs / max(differing, 1)
    # Pairs of the same prompt are not independent.
    prompts = test.differing_prompts
    low, _high = interval(share * prompts, prompts, _STANDARD_ERRORS_OF_FORMS)
    return share if low > 0.5 else 0.0


def _shown(test: LeakTest) -> str:
    return f"{percent(test.accuracy)} [{percent(test.low)}, {percent(test.high)}]"


def _rule_of(group: str) -> str:
    return "style_bias" if group in _STYLE else "label_leak"


def _is_leak(test: LeakTest, judge: Judge, rule: str) -> bool:
    """Return whether a test is above the threshold, and above chance beyond its interval."""
    return test.accuracy > judge.threshold(rule) and test.low > 0.5


def _reading_findings(
    tally: SourceTally, report: SourceReport, judge: Judge, max_bad_share: float
) -> Iterator[Finding]:
    reasons = tally.dropped.counts.most_common()
    dropped = sum(count for _, count in reasons)
    if not report.kept:
        found = judge.value("no_records", 1, tally.read, tally.label, f"{tally.read} were read")
        remedy = remedy_of(reasons[0][0]) if reasons else EMPTY_REMEDY
        yield from (replace(finding, remedy=remedy) for finding in found)
    elif dropped > max_bad_share * tally.read:
        yield from judge.value(
            "too_many_dropped",
            dropped / tally.read,
            dropped,
            tally.label,
            f"{dropped} of {tally.read} records",
        )
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


def _score_findings(report: SourceReport, judge: Judge) -> Iterator[Finding]:
    scores = report.scores
    if not scores:
        return
    sampled = int(scores["sampled"])
    below = f"below {scores['small_gap_below']:.3g}"
    small = round(scores["small_gap_share"] * sampled)
    yield from judge.count("score_gap_small", small, sampled, report.label, detail=below)
    correlation = scores["length_correlation"]
    shown = f"rank correlation {correlation:.2f} of the differences"
    yield from judge.value("length_follows_score", correlation, sampled, report.label, shown)
