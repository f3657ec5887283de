"""Findings about one source."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dpo_dist.data.counts import EMPTY_REMEDY, remedy_of
from dpo_dist.diagnostics.findings import Finding, LeakTest, SourceReport
from dpo_dist.diagnostics.judge import Judge
from dpo_dist.diagnostics.label_leaks import ALL, LENGTH, MIN_DIFFERS, SIDE, interval
from dpo_dist.diagnostics.measures.features import GROUPS
from dpo_dist.diagnostics.rules import LEAKS, RULES, SCORES
from dpo_dist.diagnostics.tally import SourceTally
from dpo_dist.number_text import percent

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
