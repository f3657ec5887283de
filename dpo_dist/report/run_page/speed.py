"""Section about time, memory, utilization and cost."""

from collections.abc import Sequence
from itertools import pairwise

from dpo_dist.diagnostics.run_facts import Row, last, mean_over_time
from dpo_dist.number_text import counted, duration, money, number, percent, size
from dpo_dist.report.blocks import note, paragraph, section, table
from dpo_dist.report.metrics_log import PHASES, Phase
from dpo_dist.report.run_page.cost import cost, device_hours, first_measured_step, seconds_by_work
from dpo_dist.report.run_page.facts import PageFacts

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
