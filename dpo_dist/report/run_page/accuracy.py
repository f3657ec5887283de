"""Section about accuracy and margin: of all pairs, by source, by length, and over the evaluations."""

from collections.abc import Iterable, Mapping, Sequence

from dpo_dist.diagnostics.run_facts import ACCURACY, MARGIN, Row, evaluation_rows, last
from dpo_dist.evaluation.results import ALL, results_name
from dpo_dist.number_text import counted, number
from dpo_dist.objective.metrics import BUCKETS
from dpo_dist.report.blocks import folded, note, section, table
from dpo_dist.report.inert import inert_html
from dpo_dist.report.run_page.facts import Fields, PageFacts

_ALL_PAIRS = "all pairs"
_HALF = 0.5
_EVALUATION_COLUMNS = {
    "step": "step",
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward chosen",
    "rewards/rejected": "reward rejected",
    "logps/chosen": "log-prob chosen",
    "logps/rejected": "log-prob rejected",
}
_MOST_EVALUATIONS = 20
_MEANING = (
    "Accuracy: share of pairs whose chosen response has the larger reward; guessing gives 0.5. Margin: "
    "reward of the chosen response minus that of the rejected one. A reward is beta times the log-ratio of "
    "policy and reference."
)
_INTERVALS = (
    "Brackets: 95 % intervals, by bootstrap over prompts (Wilson's where all agree). They are the "
    "uncertainty of this choice of prompts, not of another training seed. Bars: the same on an axis from 0 "
    "to 1, with a line at 0.5."
)
_GUESSING = "not better than guessing"


def accuracy_section(facts: PageFacts) -> str:
    """Return all tables of accuracies and margins; empty without a measurement."""
    sources, lengths = _by_source(facts), _by_length(facts)
    tables = sources + lengths
    explained = note(_MEANING, _INTERVALS if "[" in tables else "", _calibration(facts)) if tables else ""
    evaluations = _evaluations(evaluation_rows(facts.run.rows))
    return section("accuracy", "Accuracy and margin", sources, lengths, explained, evaluations)


def _by_source(facts: PageFacts) -> str:
    """Return a row for all pairs and one for each source: training, evaluation, intervals."""
    whole = {
        **_present(facts.run.steps, ""),
        **_present(facts.run.evaluations, "eval_"),
    }
    rows = [(_ALL_PAIRS, ALL, whole)]
    rows += [(label, results_name(label), row) for label, row in sorted(facts.by_source.items())]
    columns = [
        (key, title)
        for key, title in (
            (f"eval_{ACCURACY}", "evaluation accuracy"),
            (f"eval_{MARGIN}", "evaluation margin"),
            (ACCURACY, "training accuracy"),
            (MARGIN, "training margin"),
        )
        if any(key in row for _, _, row in rows)
    ]
    if not columns:
        return ""
    lines = []
    for label, results, row in rows:
        of_label = facts.evaluation.get(results) or {}
        intervals, pairs = of_label.get("intervals") or {}, of_label.get("eval_pairs")
        cells = [_cell(row.get(key), intervals.get(key), key) for key, _ in columns]
        size = counted(pairs, "evaluation pair") if pairs else ""
        lines.append((_name(label, size, intervals.get(f"eval_{ACCURACY}")), *cells))
    head = ("source", *(title for _, title in columns))
    return "<h3>By source</h3>" + table(head, lines)


def _present(rows: Sequence[Row], prefix: str) -> dict[str, float]:
    found = {prefix + key: last(rows, key) for key in (ACCURACY, MARGIN)}
    return {key: value for key, value in found.items() if value is not None}


def _by_length(facts: PageFacts) -> str:
    """Return a row for each bucket of lengths: of the evaluation, or of training without one."""
    intervals = (facts.evaluation.get(ALL) or {}).get("intervals") or {}
    lines = []
    for bucket in BUCKETS:
        keys = {key: f"{key}_by_length/{bucket}" for key in (ACCURACY, MARGIN)}
        values = {key: last(facts.run.last_rows, name) for key, name in keys.items()}
        if values[ACCURACY] is not None:
            cells = [_cell(values[key], intervals.get(f"eval_{keys[key]}"), key) for key in keys]
            name = f"{bucket.rstrip('-')} and more" if bucket.endswith("-") else bucket
            lines.append((_name(name, "", intervals.get(f"eval_{keys[ACCURACY]}")), *cells))
    part = facts.run.part
    head = ("tokens of the longer response", f"{part} accuracy", f"{part} margin")
    return "<h3>By length</h3>" + table(head, lines) if lines else ""


def _cell(value: float | None, ends: Sequence[float] | None, key: str) -> str:
    if value is None:
        return ""
    if not ends:
        return number(value)
    low, high = ends
    shown = f"{number(value)} <small>[{number(low, 3)}, {number(high, 3)}]</small>"
    return shown + _bar(value, low, high) if key.endswith(ACCURACY) else shown


def _name(label: str, size: str, ends: Sequence[float] | None) -> str:
    """Return the first cell of a row: its group with a remark."""
    doubt = _GUESSING if ends and ends[0] <= _HALF <= ends[1] else ""
    remark = ", ".join(filter(None, (size, doubt)))
    return inert_html(label) + (f" <small>{remark}</small>" if remark else "")


def _bar(value: float, low: float, high: float) -> str:
    """Return an interval on an axis from 0 to 1, with a line at one half."""
    title = f"{value:.3f}, between {low:.3f} and {high:.3f}"
    width = max(1.0, 100 * (high - low))
    return (
        f'<svg class="interval" viewBox="0 0 100 12" role="img" aria-label="{title}"><title>{title}</title>'
        '<path class="track" d="M0 6H100"/><path class="half" d="M50 0V12"/>'
        f'<path class="fill" d="M{100 * low:.1f} 6h{width:.1f}"/>'
        f'<circle class="fill" cx="{100 * value:.1f}" cy="6" r="3.5"/></svg>'
    )


def _calibration(facts: PageFacts) -> str:
    found: Fields = (facts.evaluation.get(ALL) or {}).get("calibration") or {}
    error = found.get("expected_calibration_error")
    undefined = found.get("not_a_number") or 0
    uncounted = f" Without {counted(undefined, 'pair')} whose margin is not a number." if undefined else ""
    if error is None:
        return uncounted
    return (
        "Calibration: the probability that the margins imply differs from the accuracy by "
        f"{number(error, 3)} on average (expected calibration error).{uncounted}"
    )


def _evaluations(evaluations: Sequence[Mapping[str, float]]) -> str:
    """Return the last evaluations as a table."""
    shown = evaluations[-_MOST_EVALUATIONS:]
    keys = [key for key in _EVALUATION_COLUMNS if any(key in row for row in shown)]
    rows: Iterable[list[str]] = ([number(row[key]) if key in row else "" for key in keys] for row in shown)
    more = note(f"The last {len(shown)} of {len(evaluations):,}.") if len(shown) < len(evaluations) else ""
    content = table([_EVALUATION_COLUMNS[key] for key in keys], rows)
    return folded(f"Evaluations ({len(evaluations):,})", content + more) if shown else ""
