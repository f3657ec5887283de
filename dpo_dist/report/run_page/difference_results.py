"""Section of two runs about their results: metrics side by side, pairs that one of them gets right."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from dpo_dist.config.run_folder import LAST_EVALUATION
from dpo_dist.diagnostics.run_facts import ACCURACY, MARGIN
from dpo_dist.evaluation.results import ALL, results_name
from dpo_dist.number_text import counted, number
from dpo_dist.objective.metrics import ENTROPIES, PAIR_METRICS
from dpo_dist.report.blocks import note, paragraph, section, table
from dpo_dist.report.inert import inert_html
from dpo_dist.report.json_rows import json_rows
from dpo_dist.report.run_page.facts import Fields, PageFacts

_Z95 = 1.96
_TIE = 0.5
_KEY = ("source", "line", "tokens_chosen", "tokens_rejected")
_OF_NO_POLICY = ("samples/reference_", "samples/prompts", "samples/alarms")
_TABLE = "numbers results"
_DIFFERENCE = "B \u2212 A"
_INTERVALS = (
    "Brackets: 95 % intervals by bootstrap over prompts. Intervals that do not overlap are a clear "
    "difference; intervals that overlap leave it open, because both runs have the same prompts."
)


LABELS = ("A", "B")


@dataclass(frozen=True)
class Two:
    """Two runs, A and B on the page, with their names."""

    facts: tuple[PageFacts, PageFacts]
    names: tuple[str, str]


def results_section(two: Two) -> str:
    """Return the last metrics of both runs with their differences; empty without a common metric."""
    is_evaluated = all(facts.run.evaluations for facts in two.facts)
    part = "the last evaluation" if is_evaluated else "the last logged steps"
    rows = [_last(facts, is_evaluated) for facts in two.facts]
    keys = [key for key in (*PAIR_METRICS, *ENTROPIES, *_samples(rows)) if all(key in row for row in rows)]
    intervals = [_intervals(facts, ALL) if is_evaluated else {} for facts in two.facts]
    lines = [_line(key, key, rows, intervals, two) for key in keys]
    shown = table(("metric", *LABELS, _DIFFERENCE, "intervals"), lines, _TABLE)
    if not shown:
        return ""
    by_source = _by_source(two) if is_evaluated else ""
    return section(
        "results",
        "Results",
        paragraph(*(text for text, _ in _warnings(two))),
        note(f"Values of {part}."),
        shown,
        by_source,
        note(_INTERVALS) if "overlap" in shown + by_source else "",
        _paired(two),
    )


def _last(facts: PageFacts, is_evaluated: bool) -> Mapping[str, float]:
    rows = facts.run.evaluations if is_evaluated else facts.run.steps
    return rows[-1] if rows else {}


def _samples(rows: Sequence[Mapping[str, float]]) -> list[str]:
    return [key for key in rows[0] if key.startswith("samples/") and not key.startswith(_OF_NO_POLICY)]


def _intervals(facts: PageFacts, name: str) -> Mapping[str, Sequence[float]]:
    """Return the intervals of the last evaluation by metric, of all pairs or of a source."""
    found = (facts.evaluation.get(name) or {}).get("intervals") or {}
    return {key.removeprefix("eval_"): ends for key, ends in found.items()}


def _line(
    name: str,
    key: str,
    rows: Sequence[Mapping[str, float]],
    intervals: Sequence[Mapping[str, Sequence[float]]],
    two: Two,
) -> tuple[str, ...]:
    """Return the cells of a metric; those that compare both values are empty if they are not comparable."""
    values = [row[key] for row in rows]
    ends = [each.get(key) for each in intervals]
    cells = [_cell(value, each) for value, each in zip(values, ends, strict=True)]
    if not _is_comparable(two, key):
        return inert_html(name), *cells, "", ""
    return inert_html(name), *cells, _signed(values[1] - values[0]), _overlap(ends)


def _signed(difference: float) -> str:
    return (
        f"{difference:+.3g}" if math.isfinite(difference) and difference else "0" if difference == 0 else ""
    )


def _cell(value: float, ends: Sequence[float] | None) -> str:
    return number(value) + (f" <small>[{number(ends[0], 3)}, {number(ends[1], 3)}]</small>" if ends else "")


def _overlap(ends: Sequence[Sequence[float] | None]) -> str:
    first, second = ends
    if not first or not second:
        return ""
    return "overlap" if max(first[0], second[0]) <= min(first[1], second[1]) else "<b>do not overlap</b>"


def _by_source(two: Two) -> str:
    """Return accuracy and margin of each source that both runs have."""
    first, second = (facts.by_source for facts in two.facts)
    lines = []
    for label in sorted(first.keys() & second.keys()):
        intervals = [_intervals(facts, results_name(label)) for facts in two.facts]
        for metric, name in ((ACCURACY, "accuracy"), (MARGIN, "margin")):
            rows = [{metric: each[label].get(f"eval_{metric}", math.nan)} for each in (first, second)]
            if all(math.isfinite(row[metric]) for row in rows):
                lines.append(_line(f"{label}: {name}", metric, rows, intervals, two))
    shown = table(("source", *LABELS, _DIFFERENCE, "intervals"), lines, _TABLE)
    return f"<h3>By source</h3>{shown}" if shown else ""


def _is_comparable(two: Two, key: str) -> bool:
    return not any(key.startswith(prefixes) for _, prefixes in _warnings(two))


def _warnings(two: Two) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the reasons for which values of the two runs are not comparable, with prefixes of their names."""
    first, second = two.facts
    identities: list[Fields] = [facts.state.get("identity") or {} for facts in two.facts]
    evaluated = [each.get("eval_data") for each in identities]
    if all(evaluated) and evaluated[0] != evaluated[1]:
        yield "The runs were evaluated on different data: their metrics are not comparable.", ("",)
    references = [each.get("reference") for each in identities]
    if all(references) and references[0] != references[1]:
        text = "Their reference models differ: rewards, margins and accuracies are relative to other models."
        yield text, ("loss", "rewards/", "kl/")
    if not (first.config and second.config):
        return
    if any(first.setting(key) != second.setting(key) for key in ("loss.kind", "loss.terms")):
        yield "Their losses differ: values of the loss are not comparable.", ("loss",)
    betas = [facts.setting("loss.beta") for facts in two.facts]
    if all(betas) and betas[0] != betas[1]:
        values = " and ".join(number(beta, 3) for beta in betas)
        yield (
            (
                f"Rewards and margins are multiples of beta, which differs ({values}), and the loss depends "
                "on it: compare accuracies, log-probs and KL."
            ),
            ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"),
        )


def _paired(two: Two) -> str:
    """Return the numbers of evaluation pairs that each run gets right; empty if the pairs differ."""
    if not all(facts.evaluation for facts in two.facts) or not _is_comparable(two, ACCURACY):
        return ""
    counts, damaged = _agreement(two)
    if not counts:
        return ""
    pairs = sum(counts.values())
    difference = sum((second - first) * each for (first, second), each in counts.items()) / pairs
    squares = sum((second - first) ** 2 * each for (first, second), each in counts.items()) / pairs
    ties = sum(each for both, each in counts.items() if _TIE in both)
    lines = (
        ("both", f"{counts[1.0, 1.0]:,}"),
        ("only A", f"{counts[1.0, 0.0]:,}"),
        ("only B", f"{counts[0.0, 1.0]:,}"),
        ("neither", f"{counts[0.0, 0.0]:,}"),
        *([("equal rewards in one of them, counted as half", f"{ties:,}")] if ties else []),
    )
    shown = table(("prefer the chosen response", "pairs"), lines)
    lost = (
        f"Without {counted(damaged, 'pair')}: their line of a scores.jsonl cannot be read." if damaged else ""
    )
    return "<h3>The same pairs</h3>" + shown + note(_paired_sentence(difference, squares, pairs), lost)


def _paired_sentence(difference: float, squares: float, pairs: int) -> str:
    """Return the difference of accuracies with its interval; equal outcomes of all pairs have none.

    Args:
        difference: mean over the pairs.
        squares: mean of the squares.
        pairs: their number.
    """
    said = f"Accuracy of B minus that of A, pair by pair: {_signed(difference)}"
    spread = math.sqrt(max(squares - difference**2, 0.0) / pairs)
    if not spread:
        return f"{said}, the same for every pair, so that it has no interval."
    low, high = difference - _Z95 * spread, difference + _Z95 * spread
    return (
        f"{said} [{low:+.3g}, {high:+.3g}], a 95 % interval that "
        "counts pairs of one prompt as independent. It says more than the two intervals above, because both "
        "runs have the same pairs."
    )


def _agreement(two: Two) -> tuple[Counter[tuple[float, float]], int]:
    """Return numbers of pairs by the credit of each run: 1 if it prefers the chosen response, of a tie half.

    No pairs if those of the runs differ; a pair without a margin in one of them is not counted. Second: the
    number of pairs whose line is damaged in a file.
    """
    counts, damaged = Counter[tuple[float, float]](), 0
    files = [json_rows(facts.folder.evaluation_of(LAST_EVALUATION).scores) for facts in two.facts]
    for first, second in zip_longest(*files, fillvalue={}):
        if first is None or second is None:
            damaged += 1
        elif _key(first) != _key(second):
            return Counter(), 0
        elif None not in (first.get("margin"), second.get("margin")):
            counts[_credit(first), _credit(second)] += 1
    return counts, damaged


def _key(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(name) for name in _KEY]


def _credit(row: Mapping[str, Any]) -> float:
    margin = row["margin"]
    return _TIE if margin == 0 else float(margin > 0)
