"""Time and cost of a run."""

from dpo_dist.report.run_page.facts import PageFacts

_HOUR = 3600


def seconds_by_work(facts: PageFacts) -> dict[str, float]:
    """Return the wall-clock seconds of the kinds of work that a run measures, without those of 0 seconds."""
    summary = facts.summary
    spent = {
        "training steps": summary.get("train_seconds") or 0.0,
        "evaluations": facts.evaluation_seconds,
        "reference log-probs": (summary.get("reference") or {}).get("seconds") or 0.0,
    }
    return {name: seconds for name, seconds in spent.items() if seconds > 0}


def cost(facts: PageFacts) -> float | None:
    """Return the price of the measured hours on all devices; None without a price or a measurement."""
    seconds = sum(seconds_by_work(facts).values())
    if facts.price is None or not seconds:
        return None
    return facts.price * facts.devices * seconds / _HOUR
