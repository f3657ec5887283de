"""Findings about one source."""

from collections.abc import Iterable, Iterator

from dpo_dist.diagnostics.features import GROUPS
from dpo_dist.diagnostics.findings import Finding, LeakTest, SourceReport
from dpo_dist.diagnostics.judge import Judge
from dpo_dist.diagnostics.label_leaks import ALL, LENGTH
from dpo_dist.diagnostics.rules import LEAKS, RULES, SCORES
from dpo_dist.diagnostics.tally import SourceTally

# A group of features has to add so much accuracy to the length; else it only follows the length.
_ADDS = 0.03
_STYLE = {"punctuation", "markdown", "language", "refusal"}
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
    leaking = [
        test
        for name in (*GROUPS, "first words", "last words")
        if name != LENGTH
        for test in [by_name.get(name)]
        if test is not None and _is_leak(test, judge, _rule_of(name))
    ]
    found = False
    if _is_leak(length, judge, "length_bias"):
        found = True
        detail = f"the longer one is chosen in {length.accuracy:.1%}"
        if length.detail.endswith("less"):
            detail = f"the shorter one is chosen in {length.accuracy:.1%}"
        yield from judge.value("length_bias", length.accuracy, length.pairs, source, f"{detail} of the pairs")
    for test in leaking:
        both = by_name.get(f"length and {test.feature}", test)
        if not found or both.accuracy > length.accuracy + _ADDS:
            yield from _leak(test, by_name, judge, source)
    whole = by_name[ALL]
    adds = not found or whole.accuracy > length.accuracy + _ADDS
    if not leaking and adds and _is_leak(whole, judge, "label_leak"):
        strongest = sorted(
            (by_name[name] for name in (*GROUPS, "first words", "last words") if name in by_name),
            key=lambda test: -test.accuracy,
        )[:2]
        names = " and ".join(f"{test.feature} ({test.accuracy:.1%})" for test in strongest)
        yield from judge.value(
            "style_bias",
            whole.accuracy,
            whole.pairs,
            source,
            f"{_shown(whole)} by several features, mostly {names}",
        )


def _leak(test: LeakTest, by_name: dict[str, LeakTest], judge: Judge, source: str) -> Iterator[Finding]:
    detail = test.detail
    members = GROUPS.get(test.feature, ())
    if members:
        best = max((by_name[name] for name in members), key=lambda one: one.accuracy)
        detail = f"{best.feature}, {best.detail}, {best.accuracy:.1%}"
    text = f"{test.feature} guess it in {_shown(test)} of held-out pairs ({detail})"
    yield from judge.value(_rule_of(test.feature), test.accuracy, test.pairs, source, text)


def _shown(test: LeakTest) -> str:
    return f"{test.accuracy:.1%} [{test.low:.1%}, {test.high:.1%}]"


def _rule_of(group: str) -> str:
    return "style_bias" if group in _STYLE else "label_leak"


def _is_leak(test: LeakTest, judge: Judge, rule: str) -> bool:
    """Return whether a test is above the threshold, and above chance beyond its interval."""
    return test.accuracy > judge.threshold(rule) and test.low > 0.5


def _reading_findings(
    tally: SourceTally, report: SourceReport, judge: Judge, max_bad_share: float
) -> Iterator[Finding]:
    dropped = sum(tally.dropped.counts.values())
    if not report.kept:
        yield from judge.value("no_records", 1, tally.read, tally.label, f"{tally.read} were read")
    elif dropped > max_bad_share * tally.read:
        yield from judge.value(
            "too_many_dropped", dropped / tally.read, dropped, tally.label, f"{dropped} of {tally.read}"
        )
    for reason, count in tally.dropped.counts.most_common():
        detail = tally.details.get(reason, "")
        yield from judge.count(
            "dropped",
            count,
            tally.read,
            tally.label,
            tally.dropped.examples[reason],
            detail=f"{reason} ({detail})" if detail else reason,
        )


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
