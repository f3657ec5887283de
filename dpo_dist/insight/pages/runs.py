"""The page and the table of several runs: settings that differ, last evaluations, curves, samples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo_dist.config.metrics import ACCURACIES, CUSTOM, MAIN, METRICS, metric_of
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Direction
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.streams import printable
from dpo_dist.insight.evaluation import ALL, results_name
from dpo_dist.insight.pages import render
from dpo_dist.insight.pages.charts import charts_of_runs
from dpo_dist.insight.pages.run import PageFacts, verdict_of
from dpo_dist.insight.pages.samples import samples_of_runs
from dpo_dist.insight.tables import EVALUATED, aligned
from dpo_dist.insight.verdict.facts import MARGIN, Row
from dpo_dist.objective.metrics import AUC, ENTROPIES, MISMATCH, PAIR_METRICS
from dpo_dist.training.metrics_log import finite

Runs = Mapping[str, PageFacts]
"""The runs by their labels."""

_OF_NO_RESULT = ("run.", "console.", "tracking.")
_OF_NO_POLICY = ("samples/reference_", "samples/prompts", "samples/alarms")
_OF_REFERENCE = ("loss", "rewards/", "distance/")
_OF_LOSS = ("loss", "rewards/chosen", "rewards/rejected", MARGIN)
_MOST_SETTINGS = 4  # in the table of results


def compare_runs(folders: Sequence[RunFolder], page: Path) -> list[str]:
    """Write the page about runs, also such that still train; return the lines of its table of results."""
    names = [folder.path.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else list(map(str, folders))
    runs = {label: PageFacts(folder) for label, folder in zip(labels, folders, strict=True)}
    differing = differing_settings([facts.config for facts in runs.values()])
    others = {key: texts for key, texts in differing.items() if key.startswith(_OF_NO_RESULT)}
    settings = {key: texts for key, texts in differing.items() if key not in others}
    others |= differing_settings([facts.environment for facts in runs.values()])
    warnings, last = dict(_warnings(runs)), _last_rows(runs)
    not_comparable = sum(warnings.values(), ())
    metrics = {key: _cells(runs, last, key, not_comparable) for key in _keys(last)}

    is_short = len(settings) <= _MOST_SETTINGS
    outcomes = [facts.summary.get("exit", "not ended") for facts in runs.values()]
    columns = {"run": list(runs), "outcome": outcomes, **(settings if is_short else {})}
    has_known = any(key in metrics for key in ACCURACIES)
    shown = [key for key in ACCURACIES if key in metrics or (key != AUC and not has_known)]
    for key in dict.fromkeys(key for key in (*MAIN, *EVALUATED) if key in shown or key not in ACCURACIES):
        columns[METRICS[key].title] = metrics.get(key, ["-"] * len(runs))
    results = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    units = {facts.run.unit for facts in runs.values()}
    unit = units.pop() if len(units) == 1 else "example"
    html = render.page(
        "runs.jinja",
        f"{len(runs)} runs",
        ["charts.js"],
        labels=list(runs),
        results=results,
        verdicts=[(label, verdict_of(facts).get("sentence", "-")) for label, facts in runs.items()],
        warnings=list(warnings),
        settings=[(key, *texts) for key, texts in settings.items()],
        others=[(key, *texts) for key, texts in others.items()],
        metrics=[(key, *cells) for key, cells in metrics.items()],
        curves=charts_of_runs({label: _over_pairs(facts) for label, facts in runs.items()}, unit),
        unit=unit,
        samples=samples_of_runs(dict(zip(labels, folders, strict=True))),
    )
    write_text(page, html)
    hidden = [] if is_short else [f"{len(settings)} settings differ: see the page"]
    return list(map(printable, [*aligned(results), *hidden, *warnings]))


def differing_settings(configs: Sequence[Mapping[str, object]]) -> dict[str, list[str]]:
    """Return, by dotted key, the texts of its values if they are not all equal; "-" where it is missing."""
    plain = [dict(render.flat(config)) for config in configs]
    texts = {key: [each.get(key, "-") for each in plain] for each in plain for key in each}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}


def _warnings(runs: Runs) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield why metrics of the runs are not comparable, and how the names of these metrics start."""
    identities = [facts.state.get("identity") or {} for facts in runs.values()]
    evaluated, references = ([each.get(name) for each in identities] for name in ("eval_data", "reference"))
    losses = [facts.config.get("loss") for facts in runs.values()]
    if not any(facts.run.evaluations for facts in runs.values()):
        yield "No run has an evaluation: metrics are those of the last logged steps.", ()
    for values, sentence, metrics in (
        (evaluated, "Their evaluation data differ: metrics are not comparable.", ("",)),
        (references, "Their reference models differ: rewards are relative to other models.", _OF_REFERENCE),
        (losses, "Their losses differ: compare accuracies, not losses, rewards and margins.", _OF_LOSS),
    ):
        if len({str(value) for value in values if value is not None}) > 1:
            yield sentence, metrics


def _last_rows(runs: Runs) -> list[Row]:
    """Return the last evaluation of each run that has ended, or if none has one the last steps; else {}."""
    has_any = any(facts.run.evaluations for facts in runs.values())
    rows = (facts.run.evaluations if has_any else facts.run.steps for facts in runs.values())
    ended = ("exit" in facts.summary for facts in runs.values())
    return [of_run[-1] if is_over and of_run else {} for of_run, is_over in zip(rows, ended, strict=True)]


def _keys(last: Sequence[Row]) -> list[str]:
    """Return the metrics of the last rows, those of sources last."""
    known = dict.fromkeys(key for row in last for key in row)
    samples = (key for key in known if key.startswith("samples/") and not key.startswith(_OF_NO_POLICY))
    by_source = (
        key for key in known if key.startswith((*(f"{name}/" for name in (*ACCURACIES, MARGIN)), CUSTOM))
    )
    return [key for key in (*PAIR_METRICS, AUC, MISMATCH, *ENTROPIES, *samples, *by_source) if key in known]


def _cells(runs: Runs, rows: Sequence[Row], key: str, not_comparable: tuple[str, ...]) -> list[str]:
    """Return the value of a metric in each run with its interval; * marks the best of several."""
    values = [value for row in rows if (value := finite(row, key)) is not None]
    metric = metric_of("/".join(key.split("/")[:2]))
    best = None
    if metric.best and len(set(values)) > 1 and not key.startswith(not_comparable):
        best = (min if metric.best is Direction.lowest else max)(values)
    cells, form = [], metric.form
    for row, facts in zip(rows, runs.values(), strict=True):
        cell = form(row[key]) if key in row else "-"
        if key in row and (ends := _intervals(facts).get(key)):
            cell += f" [{form(ends[0])}, {form(ends[1])}]"
        cells.append(f"{cell}*" if row.get(key) == best is not None else cell)
    return cells


def _intervals(facts: PageFacts) -> Mapping[str, Sequence[float]]:
    """Return the intervals of the last evaluation by metric, also of sources."""
    intervals = {key.removeprefix("eval_"): ends for key, ends in facts.intervals(ALL).items()}
    for label in facts.by_source:
        of_source = facts.intervals(results_name(label))
        intervals |= {f"{key.removeprefix('eval_')}/{label}": ends for key, ends in of_source.items()}
    return intervals


def _over_pairs(facts: PageFacts) -> list[Row]:
    """Return the rows of a run with its pairs so far as their step: runs may have other batch sizes."""
    batch, most = facts.setting("trainer.global_batch_pairs") or 1, facts.summary.get("pairs_seen", math.inf)
    return [{**row, "step": min(row["step"] * batch, most)} for row in facts.run.rows]
