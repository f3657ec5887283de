"""The keys of `tracking`: programs that show the metrics of a run; see `schema`."""

from dataclasses import dataclass
from enum import StrEnum

from dpo_dist.config.fields import key

WandbMode = StrEnum("WandbMode", ["auto", "online", "offline", "off"])
OtherTracker = StrEnum("OtherTracker", ["tensorboard", "mlflow"])
DEFAULT_PROJECT = "dpo_dist"
"""Project of runs without `tracking.project`."""


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases; the report of the run."""

    wandb: WandbMode = key(WandbMode.auto, "`auto`: online if there is an API key, else offline.")
    project: str | None = key(None, "Project of the run; null: WANDB_PROJECT, else `dpo_dist`.")
    entity: str | None = key(None, "User or team; null: WANDB_ENTITY, else the API key's own.")
    group: str | None = key(None, "Group of the run; null: WANDB_RUN_GROUP.")
    tags: list[str] = key([], "Tags of the run; empty: WANDB_TAGS.")
    notes: str | None = key(None, "A sentence about the run, shown on its page; null: WANDB_NOTES.")
    price_per_gpu_hour: float | None = key(
        None,
        "Price of one GPU for an hour, in any currency, for the cost in `report.html`; null: no cost.",
        at_least=0,
    )
    samples: int = key(
        8,
        "Rows of W&B's table of samples at each evaluation; 0: no texts of data or responses are sent.",
        at_least=0,
        at_most=1000,
    )
    also: list[OtherTracker] = key([], "Further programs that get the metrics: `tensorboard`, `mlflow`.")
