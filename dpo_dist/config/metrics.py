"""The table of metrics: what people see of each one, and which values are the best."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpo_dist.config.schema import Direction
from dpo_dist.foundation.text import number, percent

PREFIX = "eval_"
"""Start of the name of a metric in the row of an evaluation."""


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    `form` writes a value; `best` says which values are the best; None: neither end is.
    """

    title: str
    form: Callable[[float], str] = number
    unit: str = ""
    best: Direction | None = None


def _digits(form: str) -> Callable[[float], str]:
    return lambda value: format(value, form)


METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss", _digits(".4f"), best=Direction.lowest),
    "rewards/accuracies": Metric("accuracy", _digits(".3f"), best=Direction.highest),
    "rewards/margins": Metric("margin", _digits(".3f"), best=Direction.highest),
    "rewards/chosen": Metric("reward chosen", _digits(".3f"), best=Direction.highest),
    "rewards/rejected": Metric("reward rejected", _digits(".3f")),
    "rewards/both_fall": Metric("both fall", _digits(".3f"), best=Direction.lowest),
    "logps/chosen": Metric("log-prob chosen", _digits(".3f"), "nats"),
    "logps/rejected": Metric("log-prob rejected", _digits(".3f"), "nats"),
    "logps/chosen_per_token": Metric("log-prob chosen / token", _digits(".3f"), "nats"),
    "logps/rejected_per_token": Metric("log-prob rejected / token", _digits(".3f"), "nats"),
    "distance/chosen": Metric("distance chosen", _digits(".3f"), "nats/token", Direction.lowest),
    "distance/rejected": Metric("distance rejected", _digits(".3f"), "nats/token", Direction.lowest),
    "grad_norm": Metric("norm before clipping"),
    "learning_rate": Metric("learning rate"),
    "pairs_per_second": Metric("pairs/s", _digits(",.1f")),
    "mfu": Metric("MFU", percent),
    "samples/length": Metric("tokens", _digits(",.0f"), "tokens"),
    "samples/finished": Metric("ended", percent),
    "samples/distinct_3": Metric("distinct 3-grams", percent),
    "samples/longest_repeat": Metric("longest repeat", percent),
    "samples/language_changed": Metric("language changed", percent),
    "samples/refusals": Metric("refusals", percent),
    "samples/empty": Metric("empty", percent),
}


MAIN = ("loss", "rewards/accuracies", "rewards/margins")
"""The metrics that say first how a run goes: of tables, the terminal and the card."""
