"""Time and cost of a run."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.report.metrics_log import WORKS, Work
from dpo_dist.report.run_page.facts import PageFacts

NAMES: Mapping[Work, str] = {
    "starting": "starting",
    "reference": "reference log-probs",
    "training": "training steps",
    "evaluation": "evaluations",
    "samples": "generating samples",
    "saving": "saving",
    "other": "the rest",
}
"""Name of each kind of work for people."""

_HOUR = 3600


def seconds_by_work(facts: PageFacts) -> dict[str, float]:
    """Return the wall-clock seconds of the kinds of work that a run measures, without those of 0 seconds.

    Runs of earlier versions measured training steps, evaluations and computing reference log-probs; these are
    also what the rows of a run that has not ended show.
    """
    found = _measured(facts).get("seconds")
    if found is None:
        found = {
            "reference": facts.section("reference").get("seconds") or 0.0,
            "training": facts.training_seconds,
            "evaluation": facts.evaluation_seconds,
        }
    return {NAMES[work]: found[work] for work in WORKS if found.get(work, 0.0) > 0}


def device_hours(facts: PageFacts) -> float:
    """Return the hours of this work on all devices, with the number of devices of each start."""
    measured = _measured(facts).get("device_seconds")
    seconds = facts.devices * sum(seconds_by_work(facts).values()) if measured is None else measured
    return float(seconds) / _HOUR


def first_measured_step(facts: PageFacts) -> int | None:
    """Return the step from which all work was measured; None for a run of an earlier version."""
    return _measured(facts).get("since_step")


def cost(facts: PageFacts) -> float | None:
    """Return the price of the measured hours on all devices; None without a price or a measurement."""
    hours = device_hours(facts)
    return None if facts.price is None or not hours else facts.price * hours


def _measured(facts: PageFacts) -> Mapping[str, Any]:
    return facts.section("work")
