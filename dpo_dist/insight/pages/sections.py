"""Sections of the page about a run: accuracy, data, displacement, reference, speed, repetition."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from dpo_dist.config.run_folder import LAST_EVALUATION
from dpo_dist.data.counts import in_words
from dpo_dist.foundation.text import counted, duration, money, number, percent, size
from dpo_dist.insight.evaluation import ALL, results_name
from dpo_dist.insight.metrics.log import PHASES, Phase
from dpo_dist.insight.pages.facts import (
    Fields,
    PageFacts,
    cost,
    device_hours,
    first_measured_step,
    seconds_by_work,
)
from dpo_dist.insight.pages.render import (
    facts_table,
    flat,
    folded,
    inert_html,
    joined_origins,
    note,
    paragraph,
    section,
    table,
    text,
)
from dpo_dist.insight.verdict.facts import (
    ACCURACY,
    MARGIN,
    MovedLogps,
    Row,
    evaluation_rows,
    finite,
    last,
    mean_over_time,
)
from dpo_dist.insight.verdict.rules import BOTH_FALL, CHOSEN_FALL
from dpo_dist.objective.metrics import BUCKETS

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


_PARTS = {"train": "Training data", "eval": "Evaluation data"}
_NOT_SHOWN = frozenset({"read", "kept", "pairs"})
_MOST_FINDINGS = 8
_SHOWN_EXAMPLES = 5
_LEVELS = ("error", "warning", "note")


def data_section(facts: PageFacts) -> str:
    """Return counts of both datasets and the doctor's findings; empty without any."""
    data = facts.section("data")
    parts = {"train": data} if "read" in data else data  # of early versions: of the training data only
    counts = [_counts(_PARTS.get(name, name), found) for name, found in parts.items() if found]
    doctor = _doctor(facts.doctor)
    missing = note(
        "The doctor has not examined these data. It finds copies, leaks, labels that the length gives "
        "away and more: python -m dpo_dist.doctor with the configuration of this run."
    )
    return section("data", "Data", *counts, doctor or (missing if counts else ""))


def _counts(title: str, counts: Fields) -> str:
    read, kept = counts.get("read") or 0, counts.get("kept") or 0
    sources = counts.get("sources") or []
    pairs = counts.get("pairs")
    of = f" of {counted(len(sources), 'source')}" if len(sources) > 1 else ""
    head = f"{kept:,} of {counted(read, 'record')}{of} kept"
    head += f", as {counted(pairs, 'pair')}." if pairs not in (None, kept) else "."
    rows = [*_dropped(counts.get("dropped") or {}, read), *_changed(counts, kept)]
    return (
        f"<h3>{title}</h3>{paragraph(head)}{table(('records', 'meaning'), rows, 'counts')}"
        f"{_origins(counts)}{folded(f'Sources ({len(sources)})', _sources(sources))}"
    )


def _dropped(dropped: Mapping[str, int], read: int) -> Iterator[tuple[str, ...]]:
    for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
        if count:
            yield _row(count, read, f"dropped: {in_words(reason)}", f"dropped.{reason}")


def _changed(counts: Fields, kept: int) -> Iterator[tuple[str, ...]]:
    for name, count in counts.items():
        if isinstance(count, int) and count and name not in _NOT_SHOWN:
            yield _row(count, kept, in_words(name), name)


def _row(count: int, total: int, meaning: str, name: str) -> tuple[str, ...]:
    share = f" ({percent(count / total)})" if 0 < count <= total else ""
    return f"{count:,}{share}", f"{inert_html(meaning)} <small><code>{inert_html(name)}</code></small>"


def _origins(counts: Fields) -> str:
    """Return the first dropped records, without their texts, and details of each reason."""
    examples, details = counts.get("examples") or [], counts.get("details") or {}
    shown = "".join(f"<li><code>{inert_html(str(example))}</code></li>" for example in examples)
    content = (f"<ul>{shown}</ul>" if shown else "") + facts_table(
        (str(reason), str(detail)) for reason, detail in details.items()
    )
    return folded("First dropped records", content)


def _sources(sources: Sequence[Fields]) -> str:
    rows = (
        (
            inert_html(str(source.get("label", ""))),
            f"{source.get('kept', 0):,}",
            f"{source.get('read', 0):,}",
            f"{source.get('pairs', 0):,}",
            f"<code>{inert_html(str(source.get('path', '')))}</code>",
        )
        for source in sources
    )
    return table(("source", "kept", "read", "pairs", "path"), rows)


def _doctor(report: Fields) -> str:
    """Return the findings of the doctor, the most serious first; those that ask for nothing are folded."""
    if not report:
        return ""
    findings: Sequence[Fields] = report.get("findings") or []
    by_level = {level: [each for each in findings if each.get("level") == level] for level in _LEVELS}
    counts = [counted(len(found), level) for level, found in by_level.items() if found]
    head = f"The doctor examined these data: {', '.join(counts) or 'no findings'}."
    *serious, notes = (
        "".join(_rule(level, found) for found in _by_rule(by_level[level])) for level in _LEVELS
    )
    return (
        f"<h3>Findings of the doctor</h3>{paragraph(head)}{''.join(serious)}"
        f"{folded(f'Notes ({len(by_level[_LEVELS[-1]])})', notes)}"
    )


def _by_rule(findings: Sequence[Fields]) -> list[list[Fields]]:
    rules: dict[str, list[Fields]] = {}
    for finding in findings:
        rules.setdefault(str(finding.get("rule")), []).append(finding)
    return list(rules.values())


def _rule(level: str, findings: Sequence[Fields]) -> str:
    """Return the findings of one rule, with the remedy of the first one."""
    shown = "".join(f"<li>{_finding(finding)}</li>" for finding in findings[:_MOST_FINDINGS])
    more = len(findings) - _MOST_FINDINGS
    rest = note(f"{more:,} further ones are in doctor/doctor.html.") if more > 0 else ""
    rule, remedy = str(findings[0].get("rule")).replace("_", " "), str(findings[0].get("remedy"))
    return (
        f'<article class="finding"><span class="badge {level}">{level}</span> <b>{inert_html(rule)}</b>'
        f"<ul>{shown}</ul>{rest}"
        f'<div class="advice"><b>Try</b> {inert_html(remedy)}</div></article>'
    )


def _finding(finding: Fields) -> str:
    source = finding.get("source")
    where = f"{inert_html(str(source))}: " if source is not None else ""
    origins = joined_origins([str(each) for each in finding.get("examples") or []], _SHOWN_EXAMPLES)
    first = f"<br><small>First: <code>{inert_html(origins)}</code></small>" if origins else ""
    return f"{where}{inert_html(str(finding.get('text')))}{first}"


_LEAST_FALL = 0.05
"""Nats per token; a smaller fall is usual and has no section."""
_WHY = (
    "The loss only sees the difference between the two responses, so it also falls when both become less "
    "likely and the rejected one faster. Some of this is usual, because the two responses share many words, "
    "which lose together. It harms when the probability moves to texts that are neither (likelihood "
    "displacement): then the curves look fine and generated responses get worse."
)
_HELP = (
    "What helps, in this order: a lower optim.lr; a larger loss.beta; an sft term beside the loss "
    "(loss=sigmoid_sft); loss=dpop, which penalises a chosen response that falls below the reference; pairs "
    "that differ more."
)


def displacement_section(facts: PageFacts) -> str:
    """Return the section; empty for a run whose chosen responses did not become less likely."""
    chosen, rejected = facts.run.moved_logps("chosen"), facts.run.moved_logps("rejected")
    if chosen is None or chosen.start - chosen.end < _LEAST_FALL:
        return ""
    fall = (
        f"The chosen responses became less likely: {_nats(chosen)} nats per token, so that a token is on "
        f"average {percent(math.exp(chosen.end - chosen.start))} as likely as before."
    )
    other = f"The rejected ones: {_nats(rejected)}." if rejected is not None else ""
    origin = (
        f"These are the {facts.run.part} pairs of the last metrics row, under reference and policy."
        if chosen.is_of_same
        else "These are the pairs of the first and of the last logged steps: a small change is noise."
    )
    both = last(facts.run.last_rows, "rewards/both_fall")
    share = (
        f"In {percent(both)} of the {facts.run.part} pairs both are less likely than under the reference."
        if both
        else ""
    )
    return section(
        "displacement",
        "Chosen responses became less likely",
        paragraph(fall, other, origin, share, _judgement(chosen.start - chosen.end, both)),
        paragraph(_WHY),
        paragraph(_HELP),
    )


def _nats(logps: MovedLogps) -> str:
    return f"{logps.start:.2f} to {logps.end:.2f}"


def _judgement(fall: float, both: float | None) -> str:
    if fall >= CHOSEN_FALL and both is not None and both >= BOTH_FALL:
        return "Both are beyond the verdict's limits: read the sampled responses before you use the model."
    named = f"{number(CHOSEN_FALL, 3)} nats per token and {percent(BOTH_FALL)} of the pairs"
    return f"The verdict remarks on it when both reach {named}."


_MODES = {
    "cached": "Reference log-probs come from the store; the reference model is not loaded beside the policy.",
    "live": "The reference model was loaded beside the policy and computed its log-probs in every step.",
    "adapter": "The reference is the policy with its adapter switched off, computed in every step.",
    "none": "This loss uses no reference model.",
}
_RESPONSES = 2


def reference_section(facts: PageFacts) -> str:
    """Return the origin of the reference log-probs, the time saved and their drift, in words."""
    report = facts.section("reference")
    if not report:
        return ""
    mode = str(report.get("mode"))
    store = facts.setting("reference.store") if mode == "cached" else None
    sentences = [
        _MODES.get(mode, f"Mode {mode}."),
        *_entries(facts, report),
        f"Store: {store}." if store else "",
    ]
    return section(
        "reference",
        "Reference model",
        paragraph(*sentences),
        paragraph(*_drift(report.get("drift") or {})),
        paragraph(*_numerics(report)),
        folded("All values", facts_table(flat(report))),
    )


def _entries(facts: PageFacts, report: Fields) -> Iterator[str]:
    """Yield sentences about entries computed and reused, and the time that reuse saved."""
    hits, computed = report.get("hits") or 0, report.get("computed") or 0
    if not hits and not computed:
        return
    seconds = report.get("seconds") or 0.0
    spent = f" in {duration(seconds)}" if computed and seconds else ""
    since = first_measured_step(facts)
    part = "In the last start" if since is None else f"Since step {since:,}" if since else "In this run"
    yield f"{part}: {counted(computed, 'log-prob')} computed{spent}, {hits:,} reused."
    if hits and computed and seconds:
        yield f"Reuse saved about {duration(hits * seconds / computed)}, at the speed of the computed ones."
    elif hits and (each := _forward_seconds(facts)) is not None:
        yield f"Reuse saved about {duration(hits * each)}, at the speed of the policy's forward passes."
    peak = report.get("peak_memory_bytes")
    if peak:
        yield f"Computing them needed {size(peak)} of memory."


def _forward_seconds(facts: PageFacts) -> float | None:
    """Return the seconds of a response in the policy's forward passes, or None."""
    seconds = pairs = before = 0.0
    for row in facts.run.steps:
        spent, count = finite(row, "time/forward"), finite(row, "pairs")
        if spent is not None and count:
            seconds, pairs = seconds + spent * (row["step"] - before), pairs + count
        before = row["step"]
    return seconds / pairs / _RESPONSES if pairs else None


_DRIFT = 0.01
"""Nats per token between log-probs of the same tokens, above which margins are noise."""


def _drift(drift: Fields) -> Iterator[str]:
    """Yield sentences about the step-0 check."""
    if not drift:
        return
    mean, limit = drift.get("mean_token_drift") or 0.0, _DRIFT
    yield (
        f"Before the first step {counted(drift.get('responses') or 0, 'log-prob')} were computed again: they "
        f"differ from the stored ones by {number(mean, 3)} nats per token on average, by at most "
        f"{number(drift.get('largest_token_drift') or 0.0, 3)} in a token and by at most "
        f"{number(drift.get('largest_response_drift') or 0.0, 3)} in a response."
    )
    yield (
        f"That is above {number(limit, 3)} nats: margins of this size are noise."
        if mean > limit
        else "That is rounding."
        if mean < limit / 10
        else "That is the noise of low precision, far below the margins of a trained model."
    )


def _numerics(report: Fields) -> Iterator[str]:
    served = report.get("served") or {}
    if len(served) > 1:
        yield "Used by numerics: " + "; ".join(f"{count:,} of {name}" for name, count in served.items()) + "."
    damaged = report.get("damaged") or []
    if damaged:
        yield f"{counted(len(damaged), 'file')} of the store cannot be read and were computed again."


_PHASES: dict[Phase, str] = {
    "data": "waiting for the next batch",
    "reference": "reference log-probs",
    "forward": "the policy's log-probs, and the loss",
    "backward": "gradients",
    "optimizer": "clipping, all-reduce of metrics, update",
    "checkpoint": "committing checkpoints",
    "other": "the rest",
}
_MEASURED = (
    "Measured: the useful operations of training per second, relative to the fastest product of large "
    "matrices on these devices, measured before the first step."
)
_DATASHEET = "Data sheet: the same relative to the peak that the maker states."
_USEFUL = (
    "Useful operations are those of one forward and backward over the unpadded tokens, each prompt once; "
    "recomputation (gradient checkpointing) and the reference do not count."
)


def speed_section(facts: PageFacts) -> str:
    """Return the tables of time by work and by phase, then memory, MFU and cost; empty without any."""
    parts = (_work(facts), _phases(facts.run.steps), _memory(facts), _utilization(facts), _cost(facts))
    return section("speed", "Time, memory and cost", *parts)


def _work(facts: PageFacts) -> str:
    spent = seconds_by_work(facts)
    total = sum(spent.values())
    rows = (
        (name, duration(seconds), percent(seconds / total), _meter(seconds / total))
        for name, seconds in spent.items()
    )
    content = table(("work", "time", "share", ""), rows, "phases")
    return f"<h3>Time by work</h3>{content}{note(_extent(facts))}" if content else ""


def _extent(facts: PageFacts) -> str:
    """Return a sentence about the work that the table contains."""
    since = first_measured_step(facts)
    if since is None:
        return (
            "Not measured: starting, loading, encoding, saving, generating samples. Reference log-probs: of "
            "the last start only."
        )
    earlier = f" Of the work up to step {since:,} only training steps were measured." if since else ""
    return (
        "All work of all starts, from joining the processes to the written model; of a start that was "
        f"killed, up to its last checkpoint.{earlier}"
    )


def _phases(rows: Sequence[Row]) -> str:
    """Return each phase's mean seconds over all logged steps, and its share of a step."""
    timed = [row for row in rows if all(f"time/{phase}" in row for phase in PHASES)]
    if not timed:
        return ""
    counts = [after - before for before, after in pairwise([0, *(row["step"] for row in timed)])]
    seconds = {
        phase: sum(row[f"time/{phase}"] * count for row, count in zip(timed, counts, strict=True))
        / sum(counts)
        for phase in PHASES
    }
    step = sum(seconds.values()) or 1.0
    lines = (
        (
            f"{phase} <small>{_PHASES[phase]}</small>",
            f"{1000 * spent:,.1f} ms",
            percent(spent / step),
            _meter(spent / step),
        )
        for phase, spent in seconds.items()
    )
    content = table(("phase", "time", "share", ""), lines, "phases")
    return f"<h3>Time of a step by phase</h3>{content}" + note(
        f"Mean of {counted(int(sum(counts)), 'step')}, on the first process."
    )


def _meter(share: float) -> str:
    return f'<meter value="{min(max(share, 0.0), 1.0):.4f}"></meter>'


def _memory(facts: PageFacts) -> str:
    peak, reference = facts.summary.get("peak_memory_bytes"), facts.section("reference")
    allocated = last(facts.run.steps, "memory/peak_allocated_bytes")
    of_reference = reference.get("peak_memory_bytes")
    sentences = [
        f"The process with the most memory needed {size(peak)} at its peak." if peak else "",
        f"PyTorch's tensors on the first GPU: {size(allocated)}." if allocated else "",
        f"Computing the reference log-probs needed {size(of_reference)}." if of_reference else "",
    ]
    return f"<h3>Memory</h3>{paragraph(*sentences)}" if any(sentences) else ""


def _utilization(facts: PageFacts) -> str:
    measured, datasheet = (mean_over_time(facts.run.steps, key) for key in ("mfu", "mfu/datasheet"))
    if measured is None:
        return ""
    amounts = [percent(measured) + " of the measured peak"]
    if datasheet is not None:
        amounts.append(percent(datasheet) + " of the data sheet's")
    speed = [
        f"{number(value)} {unit} per second"
        for key, unit in (("pairs_per_second", "pairs"), ("tokens_per_second", "tokens"))
        if (value := mean_over_time(facts.run.steps, key)) is not None
    ]
    sentence = f"{', '.join(amounts)}; {', '.join(speed)}."
    return f"<h3>Model FLOPs utilization (MFU)</h3>{paragraph(sentence)}" + (
        note(_MEASURED, _DATASHEET if datasheet is not None else "", _USEFUL)
    )


def _cost(facts: PageFacts) -> str:
    amount = cost(facts)
    if amount is None or facts.price is None:
        return ""
    hours = device_hours(facts)
    unit = "GPU" if facts.has_gpus else "process"
    pairs = facts.summary.get("pairs_seen")
    each = f"That is {money(1000 * amount / pairs)} for 1,000 pairs." if pairs else ""
    spent = f"{number(hours, 3)} {unit}-hours at {money(facts.price)} each"
    total = f"{money(amount)}, for {spent}, of the work above."
    return f"<h3>Cost</h3>{paragraph(total, each)}"


_HIGHLIGHTS = (
    "model.path",
    "model.revision",
    "model.dtype",
    "model.adapter",
    "model.quantization",
    "data.train",
    "data.eval",
    "data.max_length",
    "loss.kind",
    "loss.beta",
    "loss.terms",
    "reference.mode",
    "reference.path",
    "optim.lr",
    "optim.schedule",
    "trainer.global_batch_pairs",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.seed",
    "parallelism.kind",
)
_DIGESTS = {
    "run_digest": "configuration",
    "data": "training data",
    "eval_data": "evaluation data",
    "model": "model",
    "reference": "reference model",
}
_ADVICE = (
    "From the same folder this command gives the same run, if commit, versions and data are the same; in an "
    "empty run.dir, as it resumes or completes an existing one."
)


def repeat_section(facts: PageFacts) -> str:
    """Return command, commit, digests and versions of the run; empty without any."""
    command = facts.environment.get("command")
    shown = f"<pre>{inert_html(str(command))}</pre>" if command else ""
    origins = facts_table(_sources_of_run(facts))
    return section("repeat", "Repeat this run", shown, note(_ADVICE) if command else "", origins)


def _sources_of_run(facts: PageFacts) -> Iterator[tuple[str, str]]:
    environment = facts.environment
    commit = environment.get("git_commit")
    if commit:
        changed = environment.get("git_changed_files")
        edits = f", with {changed:,} changed files" if changed else ""
        yield "commit", f"{commit}{edits}"
    identity: Fields = facts.state.get("identity") or {}
    for key, name in _DIGESTS.items():
        if identity.get(key):
            yield f"digest of the {name}", str(identity[key])
    packages: Fields = environment.get("packages") or {}
    if packages:
        python = environment.get("python")
        versions = [f"{name} {version}" for name, version in packages.items()]
        yield "versions", ", ".join([f"python {python}", *versions] if python else versions)


def settings_sections(facts: PageFacts) -> str:
    """Return configuration and environment, folded."""
    config, environment = facts.config, facts.environment
    return (
        folded("Configuration", facts_table(_highlights(facts)))
        + folded("Complete configuration", facts_table(flat(config)))
        + folded("Environment", facts_table(flat(environment)))
    )


def _highlights(facts: PageFacts) -> Iterator[tuple[str, str]]:
    for key in _HIGHLIGHTS:
        value = facts.setting(key)
        if value not in (None, [], {}):
            yield key, text(value)


def files_section(facts: PageFacts) -> str:
    """Return the paths of the other files of the run that exist."""
    folder = facts.folder
    files = {
        "model": folder.model,
        "curves as an image": folder.curves,
        "metrics as a table": folder.metrics_table,
        "report of the doctor": folder.doctor_page,
        "scores of every pair in the last evaluation": folder.evaluation_of(LAST_EVALUATION).scores,
        "sampled responses": folder.samples,
    }
    items = "".join(
        f"<li>{escape(name)}: <code>{inert_html(str(path.relative_to(folder.path)))}</code></li>"
        for name, path in files.items()
        if path.exists()
    )
    return section("files", "Files of this run", f"<ul>{items}</ul>") if items else ""
