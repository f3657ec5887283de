"""Write the page about a run, from the verdict to the command that repeats it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dpo_dist.config.metrics import GROUP_METRICS, MARGIN_PERCENTILES
from dpo_dist.data.counts import in_words
from dpo_dist.data.records import COUNTS_OF_OTHERS
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import duration, number, percent, pluralize, size, without_secrets
from dpo_dist.foundation.types import Fields
from dpo_dist.kit import (
    ALL,
    METRICS,
    PREFIX,
    MetricsRow,
    RunFolder,
    RunHistory,
    final_and_best,
    results_name,
)
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.pages.charts import charts, distribution, histogram
from dpo_dist.tools.pages.render import flat, number_above_interval, page, part
from dpo_dist.tools.pages.samples import samples_section, worst_pairs
from dpo_dist.tools.report.facts import MARGIN, RunFacts, data_findings, last
from dpo_dist.tools.report.verdict import RUN_RULES
from dpo_dist.tools.tables import describe_reference

_BINS = 32  # of the histogram of margins
_ROOM = 0.02  # the share of its width that is free on both sides
_Table = tuple[list[str], list[list[object]]]
"""Titles of the columns, and rows."""

_SECTIONS = {
    "samples": "Samples",
    "curves": "Curves",
    "accuracy": "Accuracy and margin",
    "data": "Data",
    "speed": "Time",
    "reference": "Reference model",
    "repeat": "Repeat this run",
}
"""Sections of the page with their titles, in their order."""
_WORK_NAMES = {
    "starting": "starting",
    "reference": "reference log-probs",
    "training": "training steps",
    "evaluation": "evaluations",
    "samples": "generating samples",
    "saving": "saving",
    "other": "the rest",
}
"""Kinds of work in summary.json, in the order of the page."""


class PageFacts:
    """The content of a run directory's files, without secrets; empty where a file is missing.

    `evaluation` has the results of the last evaluation of training, with intervals. `rows`: those of its
    file, if they have been read.
    """

    def __init__(self, folder: RunFolder, rows: Sequence[MetricsRow] | None = None):
        history = RunHistory(folder)
        self.config: Fields = without_secrets(history.written_config())
        self.environment = _fields(folder.environment)
        self.state = _fields(folder.state)
        summary = _fields(folder.summary)
        rows = history.latest_rows() if rows is None else rows
        self.summary = {**final_and_best(rows), **summary}
        self.run = RunFacts(rows, self.summary, data_findings(folder))
        self.by_source = metrics_by_source(rows)
        evaluation = _fields(folder.last_evaluation.results)
        # If a resumed run stopped early, the file has an earlier evaluation than the rows, and is not used.
        last = self.run.evaluations[-1] if self.run.evaluations else {}
        loss = (evaluation.get("all") or {}).get("eval_loss")
        is_last = loss is not None and math.isclose(loss, last.get("loss", math.nan), rel_tol=1e-6)
        self.evaluation: Fields = evaluation if is_last else {}

    def setting(self, key: str) -> Any:
        """Return the value of a key of the configuration; None if it is not known."""
        section, name = key.split(".")
        return (self.config.get(section) or {}).get(name)

    def section(self, name: str) -> Fields:
        """Return a section of summary.json; empty if it is missing."""
        return self.summary.get(name) or {}

    def intervals(self, name: str) -> Mapping[str, Sequence[float]]:
        """Return the intervals of the last evaluation by metric, of all pairs or of a source."""
        return (self.evaluation.get(name) or {}).get("intervals") or {}


def metrics_by_source(rows: Sequence[Mapping[str, float]]) -> dict[str, MetricsRow]:
    """Return, by source, the last values of `GROUP_METRICS`; those of evaluations begin with `eval_`.

    Empty for a run with one source.
    """
    last: dict[str, float] = {}
    for row in rows:
        if row["step"] > 0:
            last |= row
    by_source: dict[str, MetricsRow] = {}
    for prefix in ("", PREFIX):
        percentiles = {prefix + key for key in MARGIN_PERCENTILES}
        for metric in GROUP_METRICS:
            name = prefix + metric
            for key, value in last.items():
                if key.startswith(f"{name}/") and key not in percentiles:
                    by_source.setdefault(key.removeprefix(f"{name}/"), {})[name] = value
    return by_source


def _fields(path: Path) -> Fields:
    """Return a file's fields without secrets, because pages are shared; empty if there is no file."""
    fields: Fields = without_secrets(files.read_fields(path)) if path.exists() else {}
    return fields


def write_page(
    folder: RunFolder, output: Path | None = None, rows: Sequence[MetricsRow] | None = None
) -> Path:
    """Write the report page of a run directory, or `output`; return its path. `rows`: as in `PageFacts`."""
    facts = PageFacts(folder, rows)
    environment = facts.environment
    run = facts.run
    seconds = facts.section("work").get("seconds", {})
    speed = []
    for work, name in _WORK_NAMES.items():
        if seconds.get(work, 0.0) > 0:
            share = seconds[work] / sum(seconds.values())
            speed.append((name, seconds[work], share))
    parts = {"train": "Training data", "eval": "Evaluation data"}
    data = [_records(parts[name], counts) for name, counts in facts.section("data").items() if counts]
    worst = worst_pairs(folder.last_evaluation.worst) if facts.evaluation else []
    accuracy_title = f"{run.accuracy_title[0].upper()}{run.accuracy_title[1:]} and margin"
    is_running = "exit" not in facts.summary
    last_step = last(run.rows, "step") if is_running else None
    content: dict[str, Any] = {
        "outcome": facts.summary.get("exit"),
        "about": "; ".join(_about(facts)),
        "verdict": verdict_for_page(facts),
        "last_step": last_step,
        "tiles": list(_tiles(facts)),
        "samples": samples_section(folder),
        "curves": charts(run.rows, run.noise(run.steps)),
        "accuracy": _by_source(facts),
        "margins": _margins(facts, folder),
        "worst": worst,
        "data": data,
        "doctor": run.data_findings,
        "is_examined": DoctorFolder(folder.path).doctor_report.is_file(),
        "speed": speed,
        "reference": describe_reference(facts.section("reference")),
        "repeat": environment.get("command"),
        "config": list(flat(facts.config)),
        "environment": list(flat(environment)),
        "accuracy_title": accuracy_title,
        "unit": run.unit,
    }
    sections = {**_SECTIONS, "accuracy": accuracy_title}
    links = [(name, title) for name, title in sections.items() if content[name]]
    scripts = ["charts.js"] if content["curves"] else []
    path = output or folder.report
    name = folder.path.resolve().name
    files.write_text(path, page("run.jinja", name, scripts, reloads=is_running, links=links, **content))
    return path


def _about(facts: PageFacts) -> Iterator[str]:
    """Yield phrases on the run's model, loss, data and size; nothing without a configuration."""
    if not facts.config:
        return
    weights = "LoRA adapter" if facts.setting("model.adapter") else "all weights"
    yield f"{facts.setting('model.path')} ({weights}, {facts.setting('model.dtype')})"
    terms = facts.setting("loss.terms")
    loss = " + ".join(term["kind"] for term in terms) if terms else facts.setting("loss.kind")
    beta = facts.section("settings").get("loss.beta")
    with_beta = "" if beta is None else f" with beta {number(beta, 3)}"
    yield f"loss {loss}{with_beta}"
    yield f"learning rate {number(facts.setting('optim.lr') or 0, 3)}"
    unit = facts.run.unit
    for name, noun in (("train", "training"), ("eval", "evaluation")):
        counts = facts.run.counts(name)
        if counts.get("pairs"):
            labels = counts.get("labels")
            label_counts = f" ({labels['good']:,} good, {labels['bad']:,} bad)" if labels else ""
            yield pluralize(counts["pairs"], f"{noun} {unit}") + label_counts
    steps = facts.summary.get("steps")
    batch = facts.setting("trainer.global_batch_pairs")
    if steps and batch:
        yield f"{pluralize(steps, 'step')} of {pluralize(batch, unit)}"
    processes = facts.summary.get("world_size") or facts.environment.get("world_size") or 1
    yield pluralize(processes, "process", "processes") + "."


def verdict_for_page(facts: PageFacts) -> Mapping[str, Any]:
    """Return the verdict's level, sentence and findings; empty before the run has ended."""
    stored: Fields = facts.summary.get("verdict") or {}
    if not stored:
        return {}
    sentence = stored["sentence"]
    findings = []
    level = "good"
    for finding in stored["findings"]:
        # The verdict's sentence already has the facts of the worst finding.
        fact = "" if finding["text"] in sentence else finding["text"]
        rule = RUN_RULES.get(finding["rule"])  # None: of another version
        headline = rule.text if rule else finding["rule"]
        findings.append({"headline": headline, "fact": fact, "advice": finding["remedy"]})
        level = "warning"
    if facts.summary.get("exit") == RunOutcome.diverged:
        level = "error"
    return {"level": level, "sentence": sentence, "findings": findings}


def _tiles(facts: PageFacts) -> Iterator[tuple[str, str, str]]:
    """Yield label, value and remark of each main result that was measured."""
    summary = facts.summary
    final = facts.section("final")
    best = facts.section("best")
    ends = facts.intervals(ALL)
    unit = facts.run.unit
    evaluations = []
    for name in sorted((facts.run.accuracy_key, MARGIN, "loss")):
        key = f"eval_{name}"
        remarks = []
        if key in ends:
            low, high = ends[key]
            remarks.append(f"95 %: {number(low)} to {number(high)}")
        if key in best:
            remarks.append(f"best {number(best[key]['value'])} at step {number(best[key]['step'])}")
        evaluations.append((f"eval {METRICS[name].title}", final.get(key), number, "; ".join(remarks)))
    gpus = ", ".join(dict.fromkeys(facts.environment.get("gpus") or ())) or "without GPU"
    pairs = summary.get("pairs_seen")
    pairs_of_steps = "" if pairs is None else f"{number(pairs)} {unit}s"
    finished_share = last(facts.run.evaluations, "samples/finished")
    seconds = facts.section("work").get("device_seconds")
    checkpoint = facts.section("best_checkpoint") or {"step": None, "metric": "", "value": 0}
    metric = f"step; {checkpoint['metric']} {number(checkpoint['value'])}"
    if "model_step" in summary:
        metric += ", the model"
    tiles: tuple[tuple[str, Any, Callable[[Any], str], str], ...] = (
        ("final loss", final.get("loss"), number, "training, mean of the last logged steps"),
        *evaluations,
        ("best checkpoint", checkpoint["step"], number, metric),
        ("sampled responses that end", finished_share, percent, "by themselves, at the last evaluation"),
        ("steps", summary.get("steps"), number, pairs_of_steps),
        ("training time", summary.get("train_seconds"), duration, "of optimizer steps"),
        (f"{unit}s per second", summary.get("pairs_per_second"), number, ""),
        ("peak memory", summary.get("peak_memory_bytes"), size, f"of the process with the most; {gpus}"),
        ("time of all processes", seconds, duration, "all work of all starts"),
    )
    for label, value, form, remark in tiles:
        if value is not None:
            yield label, form(value), remark


def _by_source(facts: PageFacts) -> _Table | None:
    """Return the table of accuracy and margin, of evaluation and training: all pairs, then each source."""
    accuracy = facts.run.accuracy_key
    title = facts.run.accuracy_title
    unit = facts.run.unit
    over_all = dict[str, float]()
    for prefix, steps in (("", facts.run.steps), ("eval_", facts.run.evaluations)):
        for key in (accuracy, MARGIN):
            value = last(steps, key)
            if value is not None:
                over_all[prefix + key] = value
    rows = [(f"all {unit}s", ALL, over_all)]
    for label, row in sorted(facts.by_source.items()):
        rows.append((label, results_name(label), row))
    titles = {
        f"eval_{accuracy}": f"evaluation {title}",
        f"eval_{MARGIN}": "evaluation margin",
        accuracy: f"training {title}",
        MARGIN: "training margin",
    }
    keys = [key for key in titles if any(key in row for _, _, row in rows)]
    lines: list[list[object]] = []
    for label, results, row in rows:
        ends = facts.intervals(results)
        pairs = (facts.evaluation.get(results) or {}).get("eval_pairs")
        remarks = [pluralize(pairs, f"evaluation {unit}")] if pairs else []
        low, high = ends.get(f"eval_{accuracy}", (1, 1))
        if low <= 1 / 2 <= high:
            remarks.append("not better than guessing")
        name = part("macros.jinja", "named", label, ", ".join(remarks))
        lines.append([name, *(number_above_interval(row.get(key), ends.get(key)) for key in keys)])
    return (["source", *(titles[key] for key in keys)], lines) if keys else None


def _margins(facts: PageFacts, folder: RunFolder) -> Mapping[str, Any] | None:
    """Return the distribution of the margin over the pairs of the last evaluation, with its picture."""
    if f"eval_{MARGIN_PERCENTILES[0]}" not in (facts.evaluation.get(ALL) or {}):
        return None  # labelled records have no margin of their own, and some losses none
    rows = files.read_lines(folder.last_evaluation.scores)
    margins = np.array([row["margin"] for row in rows if row.get("margin") is not None])
    if not len(margins):
        return None
    low, high = np.percentile(margins, (1, 99))
    room = _ROOM * max(high - low, abs(high), abs(low)) or 1.0
    # With 0 inside, so that the line of guessing is drawn, and the axis is linear.
    edges = np.linspace(min(low, 0.0) - room, max(high, 0.0) + room, _BINS + 1)
    facts_of_margins = distribution(margins, edges)
    right = float((margins > 0).mean())
    return {**facts_of_margins, "right": right, "picture": histogram(facts_of_margins, "margins", 0.0)}


def _records(title: str, counts: Fields) -> Mapping[str, Any]:
    """Return a dataset's numbers of read, kept, dropped and changed records, for the page."""
    read = counts["read"]
    dropped = counts.get("dropped") or {}
    rows = []
    for name, count in sorted(dropped.items(), key=lambda item: -item[1]):
        if count:
            rows.append(_counted(count, read, f"dropped: {in_words(name)}", f"dropped.{name}"))
    for name, count in counts.items():
        if count and isinstance(count, int) and name not in ("read", "kept", "pairs"):
            # Records that the split gives to the other part are not among the `read` ones.
            total = read + count if name in COUNTS_OF_OTHERS else counts["kept"]
            rows.append(_counted(count, total, in_words(name), name))
    sources = [
        (each["label"], *(number(each[key]) for key in ("kept", "read", "pairs")), each["path"])
        for each in counts.get("sources") or []
    ]
    return {"title": title, "pairs": None, "examples": [], **counts, "rows": rows, "sources": sources}


def _counted(count: int, total: int, words: str, name: str) -> tuple[str, Markup]:
    share = f" ({percent(count / total)})" if count <= total else ""
    return f"{count:,}{share}", part("macros.jinja", "named", words, part("macros.jinja", "code", name))
