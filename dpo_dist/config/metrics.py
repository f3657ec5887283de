"""The table of metrics: the title, digits, best direction and chart of each.

The log, the terminal, trackers, charts, pages and the model card read this table; `objective/metrics.py`
computes the means over pairs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.config.losses import LossKind
from dpo_dist.config.schema import Direction
from dpo_dist.foundation.text import number, percent

PREFIX = "eval_"
"""Prefix of a metric's name in the rows of evaluations."""
CUSTOM = "custom/"
"""Prefix of the names of `metrics.function`'s metrics."""
TERMS = {kind: f"loss/terms/{kind}" for kind in LossKind}
"""The metric of each kind of loss that is a term of `loss.terms`."""
AUC = "rewards/auc"
MISMATCH = "loss/kl"
"""Of labelled records: how often a good response has a higher reward than a bad one; mean log-ratio of
mismatched responses, whose part above 0 is the z of `kto`."""
AGREEMENT = "teacher/agreement"
"""Share of the chosen responses' tokens at which the most likely token is the teacher's."""
EXCESS = "loss/excess"
"""The loss minus the least that it can be with soft labels."""
PERCENTS = (5, 25, 50, 75, 95)
MARGIN_PERCENTILES = tuple(f"rewards/margins/p{percent:02}" for percent in PERCENTS)
"""Metrics of evaluations: percentiles of the margin over pairs."""


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    title: str
    form: Callable[[float], str] = number  # formats a value
    unit: str = ""
    best: Direction | None = None  # None: neither
    over_pairs: bool = False  # a mean over pairs, in all rows
    only_evaluated: bool = False  # a mean over pairs, in evaluations only
    by_group: bool = False  # also reported by source and by length
    is_share: bool = False  # between 0 and 1
    chart: str = ""  # title of the chart that draws it


def _digits(form: str) -> Callable[[float], str]:
    return lambda value: format(value, f"z{form}")  # z: no -0.000


def _pair_metric(
    title: str, chart: str = "", unit: str = "", best: Direction | None = None, **more: Any
) -> Metric:
    return Metric(title, _digits(".3f"), unit, best, over_pairs=True, chart=chart, **more)


_LOWEST, _HIGHEST = Direction.lowest, Direction.highest
_REWARDS = "Rewards"
_LOGPS = "Log-prob per token"
_DISTANCE = "Distance from the reference"
_MARGIN = "Margin of rewards"
_ACCURACY_CHART = "Accuracy: chosen above rejected"
_AUC_CHART = "AUC: good above bad responses"

METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss", _digits(".4f"), "", _LOWEST, over_pairs=True, chart="Loss"),
    "rewards/chosen": _pair_metric("reward chosen", _REWARDS, best=_HIGHEST),
    "rewards/rejected": _pair_metric("reward rejected", _REWARDS),
    "rewards/accuracies": _pair_metric(
        "accuracy", _ACCURACY_CHART, best=_HIGHEST, by_group=True, is_share=True
    ),
    "rewards/margins": _pair_metric("margin", _MARGIN, best=_HIGHEST, by_group=True),
    AUC: Metric("AUC", _digits(".3f"), best=_HIGHEST, by_group=True, is_share=True, chart=_AUC_CHART),
    **{
        name: Metric(f"loss term {kind}", _digits(".4f"), best=_LOWEST, chart=f"Loss term: {kind}")
        for kind, name in TERMS.items()
    },
    EXCESS: Metric(
        "loss above its floor", _digits(".4f"), best=_LOWEST, chart="Loss above that of soft labels"
    ),
    MISMATCH: Metric("mismatched log-ratio", unit="nats", chart="Log-ratio of mismatched responses"),
    "rewards/both_fall": _pair_metric("both fall", best=_LOWEST, is_share=True),
    "logps/chosen": _pair_metric("log-prob chosen", unit="nats"),
    "logps/rejected": _pair_metric("log-prob rejected", unit="nats"),
    "logps/chosen_per_token": _pair_metric("log-prob chosen / token", _LOGPS, "nats"),
    "logps/rejected_per_token": _pair_metric("log-prob rejected / token", _LOGPS, "nats"),
    "distance/chosen": _pair_metric("distance chosen", _DISTANCE, "nats/token", _LOWEST),
    "distance/rejected": _pair_metric("distance rejected", _DISTANCE, "nats/token", _LOWEST),
    "tokens/chosen": _pair_metric("tokens chosen", unit="tokens"),
    "tokens/rejected": _pair_metric("tokens rejected", unit="tokens"),
    "entropy/chosen": Metric("entropy chosen", unit="nats", only_evaluated=True),
    "entropy/rejected": Metric("entropy rejected", unit="nats", only_evaluated=True),
    AGREEMENT: Metric(
        "agreement with the teacher",
        _digits(".3f"),
        best=_HIGHEST,
        is_share=True,
        chart="Agreement with the teacher",
    ),
    "grad_norm": Metric("norm before clipping", chart="Gradient norm"),
    "learning_rate": Metric("learning rate", chart="Learning rate"),
    "pairs_per_second": Metric("pairs/s", _digits(",.1f")),
    "mfu": Metric("MFU", percent),
    "samples/length": Metric("tokens", _digits(",.0f"), "tokens", chart="Length of generated responses"),
    "samples/finished": Metric("ended", percent, chart="Generated responses that end"),
    "samples/distinct_3": Metric("distinct 3-grams", percent),
    "samples/longest_repeat": Metric("longest repeat", percent),
    "samples/empty": Metric("empty", percent),
}


def find_metric(name: str) -> Metric:
    """Return the table's row for a metric, or for one source's metric; a custom metric has only its name."""
    longest = max((metric for metric in METRICS if f"{name}/".startswith(f"{metric}/")), key=len, default="")
    return METRICS.get(longest, Metric(name))


PAIR_METRICS = tuple(name for name, metric in METRICS.items() if metric.over_pairs)
ENTROPIES = tuple(name for name, metric in METRICS.items() if metric.only_evaluated)
"""Metrics that need the whole distribution of each token."""
GROUP_METRICS = tuple(name for name, metric in METRICS.items() if metric.by_group)
"""Metrics that are also reported for groups of pairs: sources and lengths."""
ACCURACIES = ("rewards/accuracies", AUC)
"""How often the better response has the larger reward: in pairs, and in labelled records."""
LOSS_METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
"""Beginnings of the names of metrics that cannot be compared between losses."""
MAIN = ("loss", *ACCURACIES, "rewards/margins")
"""The metrics that tables, the terminal and the card show first, if the run has them."""

ALL = "all"
"""The key of the results of all pairs in an evaluation's file; those of a source have its label as key."""


def results_name(label: str) -> str:
    """Return the key of a source's results: its label, changed if it equals `ALL`."""
    return f"{ALL} (source)" if label == ALL else label


def is_evaluation(row: Iterable[str]) -> bool:
    """Return whether a row with these names is of an evaluation, not of a step."""
    return any(name.startswith(PREFIX) for name in row)
