"""Compare several runs on a page and in a table: differing settings, last evaluations, curves."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.streams import printable
from dpo_dist.kit import (
    ACCURACIES,
    ALL,
    EVALUATION_METRICS,
    LOSS_METRICS,
    MAIN,
    METRICS,
    Direction,
    MetricsRow,
    RunFolder,
    find_metric,
    finite,
    kinds_using,
)
from dpo_dist.tools.pages import render
from dpo_dist.tools.pages.blocks import (
    Chart,
    Folded,
    Heading,
    PageBlock,
    Table,
    Text,
    above_interval,
    titled_section,
)
from dpo_dist.tools.pages.charts import Curves, charts_of_runs
from dpo_dist.tools.report.facts import values
from dpo_dist.tools.report.run import PageFacts

_KEYS_WITHOUT_RESULT = ("run.", "console.", "tracking.")
_REFERENCE_METRICS = ("loss", "rewards/", "distance/")
_MOST_SETTINGS = 4  # in the table of results
_MOST_CHARACTERS = 80  # of a label made from settings
_SEED = "trainer.seed"
_RESULTS = (
    "Values are from the last evaluation of each run that has ended; * marks the best where runs can be "
    "compared, over several seeds the best mean. Metrics that some runs lack are under All metrics. "
    "Brackets: 95 % intervals by bootstrap over prompts. Intervals that do not overlap show a clear "
    "difference. Intervals that overlap leave it open, because the runs were evaluated on the same prompts."
)
_CURVES = (
    "Over the examples of training. Bold lines: moving means of training; rings: evaluations. Runs that "
    "differ in their seeds share a colour."
)


def compare_runs(
    folders: Sequence[RunFolder],
    page: Path,
    charts: Sequence[Chart] = (),
    points: Sequence[Mapping[str, str]] = (),
) -> list[str]:
    """Write the page about runs, which may still be training; return its tables of results as lines.

    Of a sweep, `charts` come first, and `points` has each run's swept values, which name it: what follows
    from them was not set.
    """
    facts = list(map(PageFacts, folders))
    names = [folder.path.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    settings = _differing(facts)
    naming = settings
    if points:
        keys_of_points = dict.fromkeys(itertools.chain(*points))
        naming = {key: [point.get(key, "-") for point in points] for key in keys_of_points}
    descriptions = _describe_settings(naming, len(facts))
    is_short = len(naming) <= _MOST_SETTINGS
    is_name = len(set(descriptions)) == len(facts) and max(map(len, descriptions)) <= _MOST_CHARACTERS
    labels = descriptions if is_short and is_name else names
    kinds = ["+".join(_kinds(each)) for each in facts]
    groups = _describe_settings({key: texts for key, texts in naming.items() if key != _SEED}, len(facts))
    if _SEED not in naming or len(set(groups)) == len(groups):
        groups = labels

    # Each ended run's last evaluation, or the last steps if no run has any.
    has_evaluation = any(each.run.evaluations for each in facts)
    last = list[MetricsRow]()
    for each in facts:
        rows = each.run.evaluations if has_evaluation else each.run.steps
        if "exit" not in each.summary:
            rows = []
        last.append(rows[-1] if rows else {})
    warnings = _not_comparable(facts)
    if not has_evaluation:
        warnings["No run has an evaluation, so metrics are from the last logged steps."] = ()
    results = _Results(groups, last, list(map(_intervals, facts)), sum(warnings.values(), ()))
    outcomes = [each.summary.get("exit", "not ended") for each in facts]
    keys = _result_metrics(last)
    parts = naming if is_short else {}
    metrics = {METRICS[key].title: results.cells(key) for key in keys}
    table = _table({"run": names, **parts, "outcome": outcomes, **metrics})
    tables = [table]
    if results.has_seeds:
        completed = [outcome == RunOutcome.completed for outcome in outcomes]
        tables.append(results.over_seeds(keys, completed))
    verdicts = [each.section("verdict").get("sentence", "-") for each in facts]
    all_metrics = [[key, *results.cells(key)] for key in dict.fromkeys(itertools.chain(*last))]
    sentence = "All settings of the training are equal."
    if settings:
        sentence = "These settings differ; all others that can change a result are equal."
    blocks: list[PageBlock] = [
        *titled_section("Sweep", charts),
        Heading("Results"),
        *(Text(warning, "warning") for warning in warnings),
        *reversed(tables),
        Text(_RESULTS, "note"),
        Text("", title="Verdicts"),
        Table([], list(zip(labels, verdicts, strict=True)), "facts"),
        Folded("All metrics", [Table(["metric", *labels], all_metrics)]),
        Heading("Settings"),
        Text(sentence, "note"),
        _settings(labels, settings),
    ]
    blocks += _curves(facts, groups, kinds)
    write_text(page, render.page(f"{len(facts)} runs", blocks))
    lines = table.lines()
    for other in tables[1:]:
        lines += ["", *other.lines()]
    if parts.keys() != settings.keys():
        lines.append(f"{len(settings)} settings differ: see the page")
    return list(map(printable, [*lines, *warnings]))


def _not_comparable(facts: Sequence[PageFacts]) -> dict[str, tuple[str, ...]]:
    """Return why some metrics cannot be compared, with the prefixes of their names."""
    warnings = dict[str, tuple[str, ...]]()
    identities = [each.state.get("identity") or {} for each in facts]
    if _differ(identity.get("eval_data") for identity in identities):
        warnings["Their evaluation data differ: metrics are not comparable."] = ("",)
    if _differ(identity.get("reference") for identity in identities):
        sentence = "Their reference models differ: rewards are relative to other models."
        warnings[sentence] = _REFERENCE_METRICS
    if _differ(each.config.get("loss") for each in facts):
        sentence = "Their losses differ: compare accuracies, not losses, rewards and margins."
        warnings[sentence] = LOSS_METRICS
    return warnings


def _curves(facts: Sequence[PageFacts], groups: Sequence[str], kinds: Sequence[str]) -> list[PageBlock]:
    """Return the section of curves, over pairs seen in place of steps, because batch sizes may differ."""
    units = {each.run.unit for each in facts}
    unit = units.pop() if len(units) == 1 else "example"
    curves = []
    for group, kind, each in zip(groups, kinds, facts, strict=True):
        batch = each.summary.get("global_batch_pairs") or each.setting("trainer.global_batch_pairs") or 1
        most = each.summary.get("pairs_seen", math.inf)
        rows = [{**row, "step": min(row["step"] * batch, most)} for row in each.run.rows]
        curves.append(Curves(group, kind, rows))
    charts = charts_of_runs(curves, unit, LOSS_METRICS if len(set(kinds)) > 1 else ())
    return titled_section("Curves", [Text(_CURVES, "note"), *charts] if charts else [])


def _settings(labels: Sequence[str], settings: Mapping[str, Sequence[str]]) -> Table:
    return Table(["setting", *labels], [[key, *texts] for key, texts in settings.items()], "settings")


def _differ(values: Iterable[object]) -> bool:
    return len({str(value) for value in values if value is not None}) > 1


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    return Table(list(columns), list(zip(*columns.values(), strict=True)))


def _differing(facts: Sequence[PageFacts]) -> dict[str, list[str]]:
    """Return by key the settings that differ and can change results."""
    differing = differing_settings([each.config for each in facts])
    differing.pop("loss.options", None)  # present only if null; each option has a row of its own
    settings = {}
    for key, texts in differing.items():
        if key.startswith(_KEYS_WITHOUT_RESULT):
            continue
        settings[key] = texts
        # Losses of other kinds do not depend on it.
        users = set(kinds_using(key.removeprefix("loss.")))
        for index, each in enumerate(facts):
            kinds = _kinds(each)
            if users and kinds and not users.intersection(kinds):
                texts[index] = "-"
    return settings


def _kinds(facts: PageFacts) -> list[str]:
    """Return the kinds of a run's loss; none if its configuration is not known."""
    loss = facts.config.get("loss") or {}
    kinds = [term.get("kind") for term in loss.get("terms") or [loss]]
    return [str(kind) for kind in kinds if kind is not None]


def _describe_settings(settings: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """Return for each run its values of these settings: "beta 0.1, seed 2"."""
    descriptions: list[list[str]] = [[] for _ in range(count)]
    names = [key.rpartition(".")[2] for key in settings]
    for (key, texts), name in zip(settings.items(), names, strict=True):
        title = name if names.count(name) == 1 else key
        for description, text in zip(descriptions, texts, strict=True):
            if text != "-":
                description.append(f"{title} {text}")
    without = "all others" if any(descriptions) else "all"
    return [", ".join(description) or without for description in descriptions]


def _result_metrics(last: Sequence[MetricsRow]) -> list[str]:
    """Return the metrics for the table of results: those that all rows have, and accuracies that any has."""
    rows = [row for row in last if row]
    metrics = []
    for key in dict.fromkeys((*MAIN, *EVALUATION_METRICS)):
        count = sum(key in row for row in rows)
        if count == len(rows) > 0 or (key in ACCURACIES and count):
            metrics.append(key)
    return metrics


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
        cells = []
        form = find_metric(key).form
        for row, intervals in zip(self.rows, self.intervals, strict=True):
            if key not in row:
                cells.append("-")
                continue
            cell = form(row[key])
            if row[key] == best:
                cell += "*"
            ends = intervals.get(key)
            cells.append(above_interval(cell, *map(form, ends)) if ends else cell)
        return cells

    def over_seeds(self, keys: Sequence[str], completed: Sequence[bool]) -> Table:
        """Return a row per group: mean and standard deviation (n - 1) of completed runs."""
        members: dict[str, list[MetricsRow]] = {group: [] for group in self.groups}
        for group, row, is_complete in zip(self.groups, self.rows, completed, strict=True):
            if is_complete:
                members[group].append(row)
        columns = {"setting": list(members)}
        columns["seeds"] = [f"{len(members[each])} of {self.groups.count(each)}" for each in members]
        for key in keys:
            metric = find_metric(key)
            results_of_groups = [[value for _, value in values(rows, key)] for rows in members.values()]
            best = self._best(key, [fmean(results) for results in results_of_groups if results])
            cells = []
            for results in results_of_groups:
                cell = "-"
                if results:
                    mean = fmean(results)
                    cell = metric.form(mean)
                    if mean == best:
                        cell += "*"
                if len(results) > 1:
                    cell += f" \u00b1 {metric.form(stdev(results))}"
                cells.append(cell)
            columns[metric.title] = cells
        return _table(columns)

    def _best(self, key: str, values: Sequence[float | None]) -> float | None:
        """Return the best value; None if the values are equal or cannot be compared."""
        numbers = [value for value in values if value is not None]
        direction = find_metric(key).best
        if direction is None or len(set(numbers)) < 2 or key.startswith(self.not_comparable):
            return None
        return min(numbers) if direction is Direction.lowest else max(numbers)


def differing_settings(configs: Sequence[Mapping[str, object]]) -> dict[str, list[str]]:
    """Return by dotted key the values, as texts, of each setting that differs; "-" where it is missing."""
    flat = [dict(render.flat(config)) for config in configs]
    differing = {}
    for key in dict.fromkeys(itertools.chain(*flat)):
        texts = [config.get(key, "-") for config in flat]
        if len(set(texts)) > 1:
            differing[key] = texts
    return differing


def _intervals(facts: PageFacts) -> Mapping[str, Sequence[float]]:
    """Return the intervals of the last evaluation by metric, with those of each source."""
    intervals = {}
    for label, results in facts.evaluation.items():
        suffix = "" if label == ALL else f"/{label}"
        for key, ends in (results.get("intervals") or {}).items():
            intervals[key.removeprefix("eval_") + suffix] = ends
    return intervals
