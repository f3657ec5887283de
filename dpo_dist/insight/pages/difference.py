"""The page about two runs: verdicts, settings that differ, results, curves, time and responses of both."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpo_dist.config.keys import all_keys
from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import counted, duration, money, number, percent, size
from dpo_dist.insight.evaluation import ALL, results_name
from dpo_dist.insight.pages.charts import comparison_charts
from dpo_dist.insight.pages.facts import NAMES, Fields, PageFacts, cost, read_facts, seconds_by_work
from dpo_dist.insight.pages.render import (
    flat,
    folded,
    html_page,
    inert_html,
    json_rows,
    made,
    note,
    paragraph,
    section,
    table,
    text,
    text_of,
)
from dpo_dist.insight.pages.run import PAGE_STYLE, verdict_section
from dpo_dist.insight.pages.samples import SAMPLES_STYLE, model_notes, sample_files, sample_rows
from dpo_dist.insight.pages.side_by_side import LONGEST, Response, difference, prompt_title, side_by_side
from dpo_dist.insight.pages.svg import SCRIPT, STYLE
from dpo_dist.insight.verdict.facts import ACCURACY, MARGIN, mean_over_time
from dpo_dist.objective.metrics import ENTROPIES, PAIR_METRICS

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


Row = Mapping[str, Any]

_MOST_SHOWN = 8
_OPEN = 2
_LONGEST = 6000


def samples_of_both(two: Two) -> str:
    """Return the last responses of both runs to common prompts, the most different first."""
    (first_step, first), (second_step, second) = (_last_samples(facts.folder) for facts in two.facts)
    common = [(row, second[name]) for name, row in first.items() if name in second]
    common.sort(key=lambda rows: _similarity(*rows))
    steps = first_step, second_step
    items = [_item(rows, steps, is_open=number < _OPEN) for number, rows in enumerate(common[:_MOST_SHOWN])]
    explained = (
        f"Last responses (steps {first_step:,} and {second_step:,}) to {counted(len(items), 'prompt')} of "
        f"{len(common):,} that both runs answered, those that differ most first. Marked words are not in the "
        "response of A. Texts of data and models can be offensive or private."
    )
    return section("samples", "Responses of both", note(explained), *items) if items else ""


def _item(rows: tuple[Row, Row], steps: tuple[int, int], *, is_open: bool) -> str:
    prompt, responses = text_of(rows[0], "prompt") or "", _responses(rows, steps)
    return (
        f'<details class="sample"{" open" if is_open else ""}>'
        f'<summary dir="auto">{prompt_title(prompt)}</summary>'
        f"{side_by_side(prompt, responses, responses[0].label, _LONGEST)}</details>"
    )


def _last_samples(folder: RunFolder) -> tuple[int, dict[str, Row]]:
    """Return the last step with samples and its rows by prompt."""
    for step, file in sorted(sample_files(folder).items(), reverse=True):
        found = (row for row in sample_rows(file) if row is not None and isinstance(row.get("policy"), str))
        rows = {str(row.get("prompt_id")): row for row in found}
        if rows:
            return step, rows
    return 0, {}


def _similarity(first: Row, second: Row) -> float:
    return difference(str(first["policy"])[:LONGEST], str(second["policy"])[:LONGEST]).similarity


def _responses(rows: tuple[Row, Row], steps: tuple[int, int]) -> list[Response]:
    """Return both policies' responses, the references' (one if they are equal), and the chosen one."""
    policies = [
        Response(f"{label}, step {step}", text_of(row, "policy"), model_notes(row, "policy"))
        for label, row, step in zip(LABELS, rows, steps, strict=True)
    ]
    first, second = (text_of(row, "reference") for row in rows)
    references = [Response("reference", first, model_notes(rows[0], "reference"))]
    if first != second:
        references = [
            Response(f"reference of {label}", text_of(row, "reference"), model_notes(row, "reference"))
            for label, row in zip(LABELS, rows, strict=True)
        ]
    return [*policies, *references, Response("chosen", text_of(rows[0], "chosen"))]


def time_section(two: Two) -> str:
    """Return the amounts of both runs side by side, with their ratio; empty without any."""
    first, second = (_amounts(facts) for facts in two.facts)
    lines = []
    for name, (before, form) in first.items():
        after = second[name][0]
        if before is not None or after is not None:
            cells = ["" if value is None else inert_html(form(value)) for value in (before, after)]
            lines.append((name, *cells, number(after / before, 3) if before and after is not None else ""))
    shown = table(("", *LABELS, "B / A"), lines)
    return section("time", "Time, memory and cost", shown) if shown else ""


def _amounts(facts: PageFacts) -> dict[str, tuple[Any, Callable[[Any], str]]]:
    """Return each amount, None if it was not measured, with the function that writes it."""
    summary, steps, spent = facts.summary, facts.run.steps, seconds_by_work(facts)
    return {
        "steps": (summary.get("steps") or (int(steps[-1]["step"]) if steps else None), number),
        "training pairs seen": (summary.get("pairs_seen"), number),
        "processes": (summary.get("world_size") or facts.environment.get("world_size"), number),
        **{f"time: {name}": (spent.get(name), duration) for name in NAMES.values()},
        "pairs per second": (summary.get("pairs_per_second"), number),
        "tokens per second": (mean_over_time(steps, "tokens_per_second"), number),
        "MFU of the measured peak": (mean_over_time(steps, "mfu"), percent),
        "peak memory of a process": (summary.get("peak_memory_bytes"), size),
        "cost": (cost(facts), money),
    }


_NAME_BYTES = 80
_ABSENT = "not recorded"
_SETTINGS = "Settings that define the result and differ. All others that were recorded are equal."
_SAME_SETTINGS = "All settings that define the result are equal."
_CURVES = (
    "Both runs in each chart: light lines are logged values, bold ones their moving mean, rings evaluations."
)

_STYLE = """
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 0 24px; }
.two > div { min-width: 0; }
.name { border-bottom: 3px solid currentColor; padding-bottom: 2px; overflow-wrap: anywhere; }
.name b { color: CanvasText; }
.verdict { margin-top: 10px; }
.results td:first-child { min-width: 116px; }
@media (max-width: 600px) { .results td, .results th { padding-right: 8px; } }
"""


def write_difference(
    folders: tuple[RunFolder, RunFolder],
    price_per_gpu_hour: float | None = None,
    output: Path | None = None,
) -> Path:
    """Write the page about two runs, and return its path.

    Parts whose file is missing or damaged are omitted, with a warning if it is damaged.

    Args:
        folders: run directories, which may still be written by training.
        price_per_gpu_hour: in place of `tracking.price_per_gpu_hour` of both runs.
        output: the page; None: `difference-A-B.html` in the working folder, with the names of the runs.

    Raises:
        ConfigError: both are the same run directory.
    """
    if folders[0].path.resolve() == folders[1].path.resolve():
        raise ConfigError(
            "both are the same run directory",
            where=str(folders[0].path.resolve()),
            remedy="name two runs, or one for its own page",
        )
    first, second = (read_facts(folder, price_per_gpu_hour) for folder in folders)
    two = Two((first, second), names_of(folders))
    makers: tuple[Callable[[Two], str], ...] = (
        _header,
        _verdicts,
        _settings,
        results_section,
        _curves,
        time_section,
        samples_of_both,
        _environment,
    )
    sections = [made(make, two, "comparison") for make in makers]
    title = " and ".join(two.names)
    path = output or Path("-".join(["difference", *map(_in_file_name, two.names)]) + ".html")
    files.write_text(path, html_page(title, sections, PAGE_STYLE + SAMPLES_STYLE + STYLE + _STYLE, SCRIPT))
    return path


def names_of(folders: Sequence[RunFolder]) -> tuple[str, str]:
    """Return the names of two run directories, with as many parent folders as distinguish them."""
    parts = [folder.path.resolve().parts for folder in folders]
    count = 1
    while parts[0][-count:] == parts[1][-count:] and count < max(map(len, parts)):
        count += 1
    first, second = ("/".join(each[-count:]) for each in parts)
    return first, second


def _in_file_name(name: str) -> str:
    return name.replace("/", "-").encode()[-_NAME_BYTES:].decode(errors="ignore")


def _header(two: Two) -> str:
    return f"<header><h1>{' and '.join(map(inert_html, two.names))}</h1></header>"


def _verdicts(two: Two) -> str:
    """Return outcome and verdict of both runs side by side."""
    columns = ""
    for label, name, color, facts in zip(LABELS, two.names, ("c0", "c1"), two.facts, strict=True):
        outcome = text(facts.summary["exit"]) if facts.summary.get("exit") else "not ended"
        judged = verdict_section(facts).replace(' id="verdict"', "")
        columns += (
            f'<div><h3 class="name {color}"><b>{label}: {inert_html(name)}</b></h3>'
            f'<span class="badge {inert_html(outcome)}">{inert_html(outcome)}</span>{judged}</div>'
        )
    return f'<section id="verdicts"><div class="two">{columns}</div></section>'


def _settings(two: Two) -> str:
    """Return the keys of the configuration whose values differ; those without effect on the result folded."""
    first, second = (_values(facts) for facts in two.facts)
    if not first or not second:
        return ""
    defining = {name for name, key in all_keys().items() if key.defines_result}
    differing, head = list(_differing(first, second)), ("setting", *LABELS)
    shown = table(head, (row for row in differing if row[0] in defining), "settings")
    others = table(head, (row for row in differing if row[0] not in defining), "settings")
    return section(
        "settings",
        "Settings",
        note(_SETTINGS if shown else _SAME_SETTINGS),
        shown,
        folded("Other settings that differ", others),
    )


def _values(facts: PageFacts) -> dict[str, str]:
    """Return the settings of a run as text, by `section.key`."""
    return {
        f"{name}.{key}": text(value)
        for name, fields in facts.config.items()
        if isinstance(fields, dict)
        for key, value in fields.items()
    }


def _curves(two: Two) -> str:
    first, second = two.facts
    shown = comparison_charts(dict(zip(LABELS, (first.run.rows, second.run.rows), strict=True)))
    return section("curves", "Curves", note(_CURVES), shown) if shown else ""


def _environment(two: Two) -> str:
    """Return versions and hardware that differ, folded."""
    first, second = (dict(flat(facts.environment)) for facts in two.facts)
    return folded("Environment that differs", table(("", *LABELS), _differing(first, second), "settings"))


def _differing(first: dict[str, str], second: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the keys with different values, as cells of a table."""
    for key in dict.fromkeys([*first, *second]):
        values = first.get(key, _ABSENT), second.get(key, _ABSENT)
        if values[0] != values[1]:
            yield inert_html(key), inert_html(values[0]), inert_html(values[1])
