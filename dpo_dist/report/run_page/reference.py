"""Section about the reference model and its stored log-probs."""

from collections.abc import Iterator

from dpo_dist.diagnostics.run_facts import finite
from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.number_text import counted, duration, number, size
from dpo_dist.report.blocks import facts_table, flat, folded, paragraph, section
from dpo_dist.report.run_page.cost import first_measured_step
from dpo_dist.report.run_page.facts import Fields, PageFacts

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


def _drift(drift: Fields) -> Iterator[str]:
    """Yield sentences about the step-0 check."""
    if not drift:
        return
    mean, limit = drift.get("mean_token_drift") or 0.0, RULES["reference_drift"].limits["drift"]
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
