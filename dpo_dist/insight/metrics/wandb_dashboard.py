"""Sections and panels of the W&B dashboard, as data; `scripts/wandb_dashboard.py` saves them."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dpo_dist.insight.metrics.log import PHASES
from dpo_dist.insight.metrics.names import MARGINS, STEP_AXIS
from dpo_dist.objective.router import AUX_LOSS, BUSIEST, Z_LOSS

Needs = Literal["", "reference", "evaluations", "samples", "gpu", "sources", "fp16", "routers"]
TIME_AXIS = "_absolute_runtime"
"""W&B's seconds since the start of a run, the axis of its system metrics."""


@dataclass(frozen=True)
class Panel:
    """Curves over `train/global_step`; of a histogram, W&B shows its counts by color.

    Attributes:
        title: above the curves.
        metrics: W&B names of the curves.
        pattern: regular expression of further names, for metrics by source or length.
        needs: part of a run without which the panel is empty.
        is_stacked: areas on top of each other instead of lines.
        axis: of the curves.
    """

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    needs: Needs = ""
    is_stacked: bool = False
    axis: str = STEP_AXIS

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


def _system(title: str, name: str, needs: Needs = "") -> Panel:
    """Return the panel of a system metric of all ranks, whose names W&B begins with `system/`."""
    return Panel(title, pattern=f"^system/{name}/l:rank-", needs=needs, axis=TIME_AXIS)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Preference": (
        Panel("Loss", _both("loss")),
        Panel("Accuracy: chosen above rejected", _both("rewards/accuracies")),
        Panel("Margin of rewards", _both("rewards/margins")),
        Panel("Rewards", _sides("rewards/{}")),
        Panel("Rewards, evaluation", _sides("rewards/{}", "eval"), needs="evaluations"),
        Panel(
            "Accuracy by length", pattern="^eval/rewards/accuracies_by_length/[0-9]+-", needs="evaluations"
        ),
        Panel("Accuracy by source", pattern="^eval/rewards/accuracies/.", needs="sources"),
        Panel("Margins of the pairs of an evaluation", (MARGINS,), needs="evaluations"),
        Panel(
            "Margin by percentile", pattern="^eval/rewards/margins/p(05|25|50|75|95)$", needs="evaluations"
        ),
    ),
    "Health": (
        Panel("Both responses fall (share of pairs)", _both("rewards/both_fall"), needs="reference"),
        Panel("Log-prob per token", _sides("logps/{}_per_token")),
        Panel("Log-prob of a response", _sides("logps/{}")),
        Panel("Distance from the reference, nats per token", _sides("kl/{}"), needs="reference"),
        Panel("Entropy, nats per token", _sides("entropy/{}", "eval"), needs="evaluations"),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Learning rate", ("train/learning_rate",)),
        Panel("Skipped steps and spikes of the loss", ("train/bad_steps", "train/loss_spikes")),
        Panel("Overflows in fp16", ("train/overflows",), needs="fp16"),
        Panel("Loss scale in fp16", ("train/loss_scale",), needs="fp16"),
        Panel("Losses of routers", (f"train/{AUX_LOSS}", f"train/{Z_LOSS}"), needs="routers"),
        Panel("Busiest expert of a layer, share of tokens", (f"train/{BUSIEST}",), needs="routers"),
    ),
    "Samples": (
        Panel("Length of a response, tokens", ("eval/samples/length",), needs="samples"),
        Panel("Ended by itself", ("eval/samples/finished",), needs="samples"),
        Panel("Distinct 3-grams", ("eval/samples/distinct_3",), needs="samples"),
        Panel("Longest repeat", ("eval/samples/longest_repeat",), needs="samples"),
        Panel(
            "Refused, empty, in another language",
            ("eval/samples/refusals", "eval/samples/empty", "eval/samples/language_changed"),
            needs="samples",
        ),
    ),
    "Speed": (
        Panel("Pairs per second", ("train/pairs_per_second",)),
        Panel("Tokens per second", ("train/tokens_per_second",)),
        Panel("Seconds of a step", tuple(f"train/time/{phase}" for phase in PHASES), is_stacked=True),
        Panel("Model FLOPs utilization", ("train/mfu",)),
        Panel("Peak memory of rank 0, bytes", ("train/memory/peak_allocated_bytes",), needs="gpu"),
    ),
    "Data": (
        Panel("Counted tokens of a response", _sides("tokens/{}")),
        Panel("Tokens of a step", ("train/tokens",)),
        Panel("Pairs of a step", ("train/pairs",)),
        Panel("Epoch", ("train/epoch",)),
        Panel("Margin by source", pattern="^train/rewards/margins/.", needs="sources"),
    ),
    "System": (
        _system("Load of the GPU of a rank, %", r"gpu\.[0-9]+\.gpu", "gpu"),
        _system("Memory of a rank on its GPU, bytes", r"gpu\.process\.[0-9]+\.memoryAllocatedBytes", "gpu"),
        _system("Power of the GPU of a rank, W", r"gpu\.[0-9]+\.powerWatts", "gpu"),
        _system("Memory of the process of a rank, MB", r"proc\.memory\.rssMB"),
        _system("Free memory of the node of a rank, MB", r"proc\.memory\.availableMB"),
        _system("Share of the node's cores that a rank uses, %", "cpu"),
    ),
}
"""Panels by section, in the order of the page."""

COMPARED = ("loss.kind", "loss.beta", "optim.lr", "trainer.seed")
"""Keys of the configuration that a report of several runs compares."""
RESULTS = ("eval/rewards/accuracies", "eval/rewards/margins", "eval/loss")
"""Results that it compares them by."""
