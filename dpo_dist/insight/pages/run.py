"""The page about a run: verdict, results, samples, curves, data, time, reference, and how to repeat it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_dist.config.metrics import METRICS
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.data.counts import in_words
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import counted, duration, number, percent, size
from dpo_dist.insight.doctor.findings import Level
from dpo_dist.insight.evaluation import ALL, results_name
from dpo_dist.insight.pages.charts import charts
from dpo_dist.insight.pages.facts import Fields, PageFacts, read_facts
from dpo_dist.insight.pages.render import estimate, flat, page, part
from dpo_dist.insight.pages.samples import samples_of
from dpo_dist.insight.tables import describe_reference
from dpo_dist.insight.verdict.facts import ACCURACY, MARGIN, last
from dpo_dist.insight.verdict.rules import RULES

Table = tuple[list[str], list[list[object]]]
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


def write_page(folder: RunFolder, output: Path | None = None) -> Path:
    """Write the report page of a run directory, or `output`, and return its path."""
    facts = read_facts(folder)
    parts = {"train": "Training data", "eval": "Evaluation data"}
    content: dict[str, Any] = {
        "outcome": facts.summary.get("exit"),
        "about": "; ".join(_about(facts)),
        "verdict": verdict_of(facts),
        "last_step": facts.run.rows[-1]["step"] if facts.run.rows and not facts.summary.get("exit") else None,
        "tiles": list(_tiles(facts)),
        "samples": samples_of(folder),
        "curves": charts(facts.run.rows),
        "accuracy": _by_source(facts),
        "data": [_records(parts[name], counts) for name, counts in facts.section("data").items() if counts],
        "doctor": facts.doctor.get("findings") or [],
        "is_examined": bool(facts.doctor),
        "speed": _shares(facts.seconds_by_work),
        "reference": list(_reference(facts.section("reference"))),
        "repeat": _repeat(facts),
        "config": list(flat(facts.config)),
        "environment": list(flat(facts.environment)),
    }
    links = [(name, title) for name, title in _SECTIONS.items() if content[name]]
    scripts = ["charts.js"] if content["curves"] else []
    path = output or folder.report
    files.write_text(path, page("run.jinja", folder.path.resolve().name, scripts, links=links, **content))
    return path


def _about(facts: PageFacts) -> Iterator[str]:
    """Yield model, method, data and size of the run; nothing without a configuration."""
    if not facts.config:
        return
    weights = "LoRA adapter" if facts.setting("model.adapter") else "all weights"
    yield f"{facts.setting('model.path')} ({weights}, {facts.setting('model.dtype')})"
    terms = facts.setting("loss.terms")
    loss = " + ".join(term["kind"] for term in terms) if terms else facts.setting("loss.kind")
    beta = facts.section("settings").get("loss.beta")
    yield f"loss {loss}" + (f" with beta {number(beta, 3)}" if beta is not None else "")
    yield f"learning rate {number(facts.setting('optim.lr') or 0, 3)}"
    for name, noun in (("train", "training pair"), ("eval", "evaluation pair")):
        if pairs := facts.run.counts(name).get("pairs"):
            yield counted(pairs, noun)
    if steps := facts.summary.get("steps"):
        yield f"{counted(steps, 'step')} of {counted(facts.setting('trainer.global_batch_pairs'), 'pair')}"
    processes = facts.summary.get("world_size") or facts.environment.get("world_size") or 1
    yield counted(processes, "process", "processes") + "."


def verdict_of(facts: PageFacts) -> Mapping[str, Any]:
    """Return level, sentence and findings of the verdict; empty before the end of a run."""
    judged: Fields = facts.summary.get("verdict") or {}
    if not judged:
        return {}
    findings = []
    for found in judged["findings"]:
        fact, _, advice = found["text"].partition(". Try: ")
        # The verdict's sentence has the facts of its own finding.
        fact = "" if fact in judged["sentence"] else fact
        findings.append({"headline": RULES[found["rule"]].text, "fact": fact, "advice": advice})
    has_faults = any(RULES[found["rule"]].level is not Level.note for found in judged["findings"])
    is_diverged = facts.summary["exit"] == RunOutcome.diverged
    level = "error" if is_diverged else "warning" if has_faults else "good"
    return {"level": level, "sentence": judged["sentence"], "findings": findings}


def _tiles(facts: PageFacts) -> Iterator[tuple[str, str, str]]:
    """Yield label, value and remark of the main results that were measured."""
    summary, final, best = facts.summary, facts.section("final"), facts.section("best")
    ends = facts.intervals(ALL)
    remarks = {
        key: [f"95 %: {number(ends[key][0])} to {number(ends[key][1])}"] if key in ends else []
        for key in (f"eval_{ACCURACY}", f"eval_{MARGIN}", "eval_loss")
    }
    for key, found in best.items():
        remarks.setdefault(key, []).append(f"best {number(found['value'])} at step {number(found['step'])}")
    gpus = ", ".join(dict.fromkeys(facts.environment.get("gpus") or ())) or "without GPU"
    pairs, finished = summary.get("pairs_seen"), last(facts.run.evaluations, "samples/finished")
    seconds = facts.section("work").get("device_seconds")
    hours = None if seconds is None else seconds / 3600
    shown: tuple[tuple[str, Any, Callable[[Any], str], str], ...] = (
        ("final loss", final.get("loss"), number, "training, mean of the last logged steps"),
        *(
            (f"eval {METRICS[key.removeprefix('eval_')].title}", final.get(key), number, "; ".join(remark))
            for key, remark in sorted(remarks.items())
        ),
        *(
            ("best checkpoint", one["step"], number, f"step; {one['metric']} {number(one['value'])}")
            for one in summary.get("best_checkpoints", [])[:1]
        ),
        ("sampled responses that end", finished, percent, "by themselves, at the last evaluation"),
        ("steps", summary.get("steps"), number, f"{number(pairs)} pairs" if pairs is not None else ""),
        ("training time", summary.get("train_seconds"), duration, "of optimizer steps"),
        ("pairs per second", summary.get("pairs_per_second"), number, ""),
        ("peak memory", summary.get("peak_memory_bytes"), size, "of the process with the most"),
        ("processes", summary.get("world_size"), number, gpus),
        ("hours of all processes", hours, number, "all work of all starts"),
    )
    for label, value, form, small in shown:
        if value is not None:
            yield label, form(value), small


def _by_source(facts: PageFacts) -> Table | None:
    """Return a row for all pairs and one for each source: evaluation with intervals, training."""
    whole = {
        prefix + key: value
        for prefix, rows in (("", facts.run.steps), ("eval_", facts.run.evaluations))
        for key in (ACCURACY, MARGIN)
        if (value := last(rows, key)) is not None
    }
    rows = [("all pairs", ALL, whole)]
    rows += [(label, results_name(label), row) for label, row in sorted(facts.by_source.items())]
    titles = {
        f"eval_{ACCURACY}": "evaluation accuracy",
        f"eval_{MARGIN}": "evaluation margin",
        ACCURACY: "training accuracy",
        MARGIN: "training margin",
    }
    keys = [key for key in titles if any(key in row for _, _, row in rows)]
    lines: list[list[object]] = []
    for label, results, row in rows:
        ends, pairs = facts.intervals(results), (facts.evaluation.get(results) or {}).get("eval_pairs")
        remarks = [counted(pairs, "evaluation pair")] if pairs else []
        low, high = ends.get(f"eval_{ACCURACY}", (1, 1))
        remarks += ["not better than guessing"] if low <= 1 / 2 <= high else []
        name = part("macros.jinja", "named", label, ", ".join(remarks))
        lines.append([name, *(estimate(row.get(key), ends.get(key)) for key in keys)])
    return (["source", *(titles[key] for key in keys)], lines) if keys else None


def _records(title: str, counts: Fields) -> Mapping[str, Any]:
    """Return the numbers of read, kept, dropped and changed records of one of the datasets."""
    read, dropped = counts["read"], counts.get("dropped") or {}
    rows = [
        (count, read, f"dropped: {in_words(name)}", f"dropped.{name}")
        for name, count in sorted(dropped.items(), key=lambda item: -item[1])
    ]
    rows += [
        (count, counts["kept"], in_words(name), name)
        for name, count in counts.items()
        if isinstance(count, int) and name not in ("read", "kept", "pairs")
    ]
    return {
        "title": title,
        "pairs": None,
        "examples": [],
        "details": {},
        **counts,
        "rows": [
            (
                f"{count:,} ({percent(count / total)})",
                part("macros.jinja", "named", words, part("macros.jinja", "code", name)),
            )
            for count, total, words, name in rows
            if count
        ],
        "sources": [
            (each["label"], *(number(each[key]) for key in ("kept", "read", "pairs")), each["path"])
            for each in counts.get("sources") or []
        ],
    }


def _shares(seconds: Mapping[Any, float]) -> list[tuple[Any, float, float]]:
    """Return each kind of work with its seconds and their share."""
    whole = sum(seconds.values()) or 1.0
    return [(name, spent, spent / whole) for name, spent in seconds.items()]


def _reference(report: Fields) -> Iterator[str]:
    """Yield sentences about the reference log-probs and the check before the first step."""
    if not report:
        return
    yield f"{describe_reference(report)}."
    if drift := report.get("drift"):
        yield (
            f"Before the first step {counted(drift['responses'], 'log-prob')} were computed again: they "
            f"differ from the stored ones by {number(drift['mean_token_drift'], 3)} nats per token on "
            f"average, by at most {number(drift['largest_token_drift'], 3)} in a token."
        )


def _repeat(facts: PageFacts) -> Mapping[str, Any]:
    """Return command and commit of the run; empty without any."""
    environment, origins = facts.environment, []
    if commit := environment.get("git_commit"):
        changed = environment.get("git_changed_files")
        origins.append(("commit", commit + (f", with {changed:,} changed files" if changed else "")))
    found = {"command": environment.get("command"), "origins": origins}
    return found if any(found.values()) else {}
