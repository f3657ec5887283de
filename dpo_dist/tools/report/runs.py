"""Compare several runs on a page and in a table: differing settings, last evaluations, curves, samples."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from markupsafe import Markup

from dpo_dist.config.losses import kinds_using
from dpo_dist.config.metrics import (
    ACCURACIES,
    ALL,
    AUC,
    CUSTOM,
    ENTROPIES,
    LOSS_METRICS,
    MAIN,
    METRICS,
    MISMATCH,
    PAIR_METRICS,
    TERMS,
    find_metric,
    results_name,
)
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Direction
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.streams import printable
from dpo_dist.tools.pages import render
from dpo_dist.tools.pages.charts import Curves, charts_of_runs, color_classes
from dpo_dist.tools.pages.samples import samples_side_by_side
from dpo_dist.tools.report.facts import MARGIN
from dpo_dist.tools.report.run import PageFacts, verdict_for_page
from dpo_dist.tools.tables import EVALUATION_METRICS, aligned
from dpo_dist.training.reporting.metrics_log import MetricsRow, finite

_KEYS_WITHOUT_RESULT = ("run.", "console.", "tracking.")
_NOT_POLICY_METRICS = ("samples/reference_", "samples/prompts", "samples/alarms")
_REFERENCE_METRICS = ("loss", "rewards/", "distance/")
_MOST_SETTINGS, _MOST_CHARACTERS = 4, 80  # in the table of results; of a label made from settings
_SEED = "trainer.seed"


def compare_runs(
    folders: Sequence[RunFolder],
    page: Path,
    charts: Sequence[Markup] = (),
    swept: Sequence[Markup] = (),
    points: Sequence[Mapping[str, str]] = (),
) -> list[str]:
    """Write the page about runs, which may still be training; return its tables of results as lines.

    `charts` come before the runs' curves. Of a sweep, `swept` are charts of metrics over swept values, and
    `points` has each run's swept values, which name it: what follows from them was not set.
    """
    facts, names = list(map(PageFacts, folders)), [folder.path.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else list(map(str, folders))
    settings, others = _differing(facts)
    naming = settings
    if points:
        keys = list(dict.fromkeys(key for point in points for key in point))
        naming = {key: [point.get(key, "-") for point in points] for key in keys}
    descriptions = _describe_settings(naming, len(facts))
    is_short = len(naming) <= _MOST_SETTINGS
    is_name = len(set(descriptions)) == len(facts) and max(map(len, descriptions)) <= _MOST_CHARACTERS
    labels = descriptions if is_short and is_name else names
    runs, kinds = dict(zip(labels, facts, strict=True)), ["+".join(_kinds(each)) for each in facts]
    groups = _describe_settings({key: texts for key, texts in naming.items() if key != _SEED}, len(facts))
    if _SEED not in naming or len(set(groups)) == len(groups):
        groups = labels

    # Each ended run's last evaluation, or the last steps if no run has any.
    has_evaluation = any(each.run.evaluations for each in facts)
    rows = (each.run.evaluations if has_evaluation else each.run.steps for each in facts)
    last = [
        found[-1] if "exit" in each.summary and found else {} for each, found in zip(facts, rows, strict=True)
    ]
    # Why some metrics cannot be compared, with the prefixes of their names.
    warnings = dict[str, tuple[str, ...]]()
    if not has_evaluation:
        warnings["No run has an evaluation, so metrics are from the last logged steps."] = ()
    identities = [each.state.get("identity") or {} for each in facts]
    eval_data, references = ([each.get(name) for each in identities] for name in ("eval_data", "reference"))
    losses = [each.config.get("loss") for each in facts]
    for values, sentence, metrics in (
        (eval_data, "Their evaluation data differ: metrics are not comparable.", ("",)),
        (
            references,
            "Their reference models differ: rewards are relative to other models.",
            _REFERENCE_METRICS,
        ),
        (losses, "Their losses differ: compare accuracies, not losses, rewards and margins.", LOSS_METRICS),
    ):
        if len({str(value) for value in values if value is not None}) > 1:
            warnings[sentence] = metrics
    results = _Results(groups, last, [_intervals(each) for each in facts], sum(warnings.values(), ()))
    outcomes = [each.summary.get("exit", "not ended") for each in facts]
    shown = {METRICS[key].title: results.cells(key) for key in _result_metrics(last)}
    own = {key: _own_parts(texts) for key, texts in naming.items()} if is_short else {}
    columns = {"run": names, **own, "outcome": outcomes, **shown}
    completed = [outcome == RunOutcome.completed for outcome in outcomes]
    over_seeds = results.over_seeds(_result_metrics(last), completed) if results.has_seeds else []
    units = {each.run.unit for each in facts}
    unit = units.pop() if len(units) == 1 else "example"
    curves = []
    for group, kind, each in zip(groups, kinds, facts, strict=True):
        # Over pairs seen in place of steps, because batch sizes may differ.
        batch, most = (
            each.setting("trainer.global_batch_pairs") or 1,
            each.summary.get("pairs_seen", math.inf),
        )
        seen = [{**row, "step": min(row["step"] * batch, most)} for row in each.run.rows]
        curves.append(Curves(group, kind, seen))
    apart = LOSS_METRICS if len(set(kinds)) > 1 else ()
    colors = list(dict.fromkeys(groups))
    html = render.page(
        "runs.jinja",
        f"{len(runs)} runs",
        ["charts.js"],
        labels=labels,
        swept=swept,
        has_short_names=max(map(len, names)) <= _MOST_CHARACTERS / 4,
        results=_table(columns | {title: list(map(_on_two_lines, cells)) for title, cells in shown.items()}),
        over_seeds=over_seeds,
        verdicts=[(label, verdict_for_page(each).get("sentence", "-")) for label, each in runs.items()],
        warnings=list(warnings),
        settings=[(key, *texts) for key, texts in settings.items()],
        is_short=own == settings,
        others=[(key, *texts) for key, texts in others.items()],
        metrics=[(key, *map(_on_two_lines, results.cells(key))) for key in _keys(last)],
        curves=[*charts, *charts_of_runs(curves, unit, apart)],
        legend=[(color_classes(colors, label), label, groups.count(label)) for label in colors],
        unit=unit,
        samples=samples_side_by_side(dict(zip(labels, folders, strict=True))),
    )
    write_text(page, html)
    hidden = [] if own.keys() == settings.keys() else [f"{len(settings)} settings differ: see the page"]
    seeds = ["", *aligned(over_seeds)] if over_seeds else []
    return list(map(printable, [*aligned(_table(columns)), *seeds, *hidden, *warnings]))


def _on_two_lines(cell: str) -> Markup:
    """Return the HTML of a value above its interval."""
    value, bracket, interval = cell.partition(" [")
    return render.part("macros.jinja", "named", value, bracket.strip() + interval)


def _table(columns: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the titles, then the rows."""
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def _differing(facts: Sequence[PageFacts]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return by key the settings that differ and can change results, and other differences."""
    differing = differing_settings([each.config for each in facts])
    differing.pop("loss.options", None)  # present only if null; each option has a row of its own
    others = {key: texts for key, texts in differing.items() if key.startswith(_KEYS_WITHOUT_RESULT)}
    settings = {key: texts for key, texts in differing.items() if key not in others}
    for key, texts in settings.items():
        if users := set(kinds_using(key.removeprefix("loss."))):  # other losses do not depend on it
            settings[key] = [
                text if users & set(_kinds(each)) or not _kinds(each) else "-"
                for text, each in zip(texts, facts, strict=True)
            ]
    return settings, others | differing_settings([each.environment for each in facts])


def _kinds(facts: PageFacts) -> list[str]:
    """Return the kinds of a run's loss; none if its configuration is not known."""
    loss = facts.config.get("loss") or {}
    kinds = [term.get("kind") for term in loss.get("terms") or ()] or [loss.get("kind")]
    return [str(kind) for kind in kinds if kind is not None]


def _describe_settings(settings: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """Return for each run its values of these settings: "beta 0.1, seed 2"."""
    parts: list[list[str]] = [[] for _ in range(count)]
    names = [key.rpartition(".")[2] for key in settings]
    for (key, texts), name in zip(settings.items(), names, strict=True):
        for part, text, own in zip(parts, texts, _own_parts(texts), strict=True):
            part.extend([f"{name if names.count(name) == 1 else key} {own}"] if text != "-" else [])
    return [", ".join(part) or ("all others" if any(parts) else "all") for part in parts]


def _own_parts(texts: Sequence[str]) -> list[str]:
    """Return the texts; if one is long, without words and folders that all of them begin or end with."""
    if max(map(len, texts)) <= _MOST_CHARACTERS / 4:
        return list(texts)
    pieces = [re.split(r"(?<=[/ ])", text) for text in texts]
    for step in (1, -1):
        columns = zip(*(each[::step] for each in pieces), strict=False)
        same = next((number for number, column in enumerate(columns) if len(set(column)) > 1), 0)
        pieces = [each[::step][same:][::step] for each in pieces]
    own = ["".join(each) for each in pieces]
    return own if own == list(texts) else [each.strip(" ,[]{}") for each in own]


def _result_metrics(last: Sequence[MetricsRow]) -> list[str]:
    """Return the metrics for the table of results: those that all rows have, and accuracies that any has."""
    rows = [row for row in last if row]
    return [
        key
        for key in dict.fromkeys((*MAIN, *EVALUATION_METRICS))
        if (any if key in ACCURACIES else all)(key in row for row in rows) and rows
    ]


@dataclass(frozen=True)
class _Results:
    """The runs' last rows; runs of one group differ in their seeds only."""

    groups: Sequence[str]
    rows: Sequence[MetricsRow]
    intervals: Sequence[Mapping[str, Sequence[float]]]
    not_comparable: tuple[str, ...]

    @property
    def has_seeds(self) -> bool:
        """Whether some runs differ in their seeds only."""
        return len(set(self.groups)) < len(self.groups)

    def cells(self, key: str) -> list[str]:
        """Return each run's value of a metric with its interval; * marks the best, unless seeds differ."""
        best = None if self.has_seeds else self._best(key, [finite(row, key) for row in self.rows])
        cells, form = [], find_metric(key).form
        for row, intervals in zip(self.rows, self.intervals, strict=True):
            cell = form(row[key]) if key in row else "-"
            cell += "*" if row.get(key) == best is not None else ""
            if key in row and (ends := intervals.get(key)):
                cell += f" [{form(ends[0])}, {form(ends[1])}]"
            cells.append(cell)
        return cells

    def over_seeds(self, keys: Sequence[str], completed: Sequence[bool]) -> list[list[str]]:
        """Return titles, then a row per group: mean and standard deviation (n - 1) of completed runs."""
        members: dict[str, list[MetricsRow]] = {group: [] for group in self.groups}
        for group, row, is_complete in zip(self.groups, self.rows, completed, strict=True):
            members[group] += [row] if is_complete else []
        columns = {"setting": list(members)}
        columns["seeds"] = [f"{len(members[each])} of {self.groups.count(each)}" for each in members]
        for key in keys:
            known = [
                [value for row in rows if (value := finite(row, key)) is not None]
                for rows in members.values()
            ]
            means = [fmean(values) if values else None for values in known]
            best, form = self._best(key, means), find_metric(key).form
            columns[find_metric(key).title] = [
                "-"
                if mean is None
                else form(mean)
                + "*" * (mean == best)
                + (f" \u00b1 {form(stdev(values))}" if len(values) > 1 else "")
                for values, mean in zip(known, means, strict=True)
            ]
        return _table(columns)

    def _best(self, key: str, values: Sequence[float | None]) -> float | None:
        """Return the best value; None if the values are equal or cannot be compared."""
        known, direction = [value for value in values if value is not None], find_metric(key).best
        if direction is None or len(set(known)) < 2 or key.startswith(self.not_comparable):
            return None
        return (min if direction is Direction.lowest else max)(known)


def differing_settings(configs: Sequence[Mapping[str, object]]) -> dict[str, list[str]]:
    """Return by dotted key the values, as texts, of each setting that differs; "-" where it is missing."""
    plain = [dict(render.flat(config)) for config in configs]
    texts = {key: [each.get(key, "-") for each in plain] for each in plain for key in each}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}


def _keys(last: Sequence[MetricsRow]) -> list[str]:
    """Return the names of the metrics in the last rows; those of single sources come last."""
    known = dict.fromkeys(key for row in last for key in row)
    samples = (key for key in known if key.startswith("samples/") and not key.startswith(_NOT_POLICY_METRICS))
    by_source = (
        key for key in known if key.startswith((*(f"{name}/" for name in (*ACCURACIES, MARGIN)), CUSTOM))
    )
    return [
        key
        for key in (*PAIR_METRICS, *TERMS.values(), AUC, MISMATCH, *ENTROPIES, *samples, *by_source)
        if key in known
    ]


def _intervals(facts: PageFacts) -> Mapping[str, Sequence[float]]:
    """Return the intervals of the last evaluation by metric, with those of each source."""
    intervals = {key.removeprefix("eval_"): ends for key, ends in facts.intervals(ALL).items()}
    for label in facts.by_source:
        found = facts.intervals(results_name(label))
        intervals |= {f"{key.removeprefix('eval_')}/{label}": ends for key, ends in found.items()}
    return intervals
