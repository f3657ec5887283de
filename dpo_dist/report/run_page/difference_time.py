"""Section of two runs about size, time, memory and cost."""

from collections.abc import Callable
from typing import Any

from dpo_dist.diagnostics.run_facts import mean_over_time
from dpo_dist.number_text import duration, money, number, percent, size
from dpo_dist.report.blocks import section, table
from dpo_dist.report.inert import inert_html
from dpo_dist.report.run_page.cost import NAMES, cost, seconds_by_work
from dpo_dist.report.run_page.difference_results import LABELS, Two
from dpo_dist.report.run_page.facts import PageFacts


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
