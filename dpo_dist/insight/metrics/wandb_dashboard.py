"""Sections and panels of the W&B dashboard, as data; `scripts/wandb_dashboard.py` saves them."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dpo_dist.insight.metrics.names import MARGINS

Needs = Literal["", "reference", "evaluations", "samples", "sources"]


@dataclass(frozen=True)
class Panel:
    """Curves over `train/global_step`; of a histogram, W&B shows its counts by color.

    Attributes:
        title: above the curves.
        metrics: W&B names of the curves.
        pattern: regular expression of further names, for metrics by source or length.
        needs: part of a run without which the panel is empty.
    """

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    needs: Needs = ""

    def missing(self, logged: Collection[str]) -> list[str]:
        """Return its metrics and pattern that a run with these W&B names does not fill."""
        unmatched = self.pattern and not any(re.search(self.pattern, name) for name in logged)
        return [name for name in self.metrics if name not in logged] + ([self.pattern] if unmatched else [])


def _both(name: str) -> tuple[str, str]:
    """Return the name of a metric in steps and in evaluations."""
    return f"train/{name}", f"eval/{name}"


def _sides(name: str, where: str = "train") -> tuple[str, str]:
    """Return the names of a metric of chosen and rejected responses."""
    return f"{where}/{name.format('chosen')}", f"{where}/{name.format('rejected')}"


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Preference": (
        Panel("Loss", _both("loss")),
        Panel("Accuracy: chosen above rejected", _both("rewards/accuracies")),
        Panel("Margin of rewards", _both("rewards/margins")),
        Panel("Rewards", _sides("rewards/{}")),
        Panel("Rewards, evaluation", _sides("rewards/{}", "eval"), needs="evaluations"),
        Panel("Accuracy by source", pattern="^eval/rewards/accuracies/.", needs="sources"),
        Panel("Margins of the pairs of an evaluation", (MARGINS,), needs="evaluations"),
        Panel("Log-prob per token", _sides("logps/{}_per_token")),
        Panel("Distance from the reference, nats per token", _sides("kl/{}"), needs="reference"),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Learning rate", ("train/learning_rate",)),
    ),
    "Samples": (
        Panel("Length of a response, tokens", ("eval/samples/length",), needs="samples"),
        Panel("Ended by itself", ("eval/samples/finished",), needs="samples"),
        Panel("Distinct 3-grams", ("eval/samples/distinct_3",), needs="samples"),
        Panel("Longest repeat", ("eval/samples/longest_repeat",), needs="samples"),
    ),
}
"""Panels by section, in the order of the page."""

COMPARED = ("loss.kind", "loss.beta", "optim.lr", "trainer.seed")
"""Keys of the configuration that a report of several runs compares."""
RESULTS = ("eval/rewards/accuracies", "eval/rewards/margins", "eval/loss")
"""Results that it compares them by."""
