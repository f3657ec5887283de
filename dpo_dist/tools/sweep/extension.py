"""The verb `sweep`, and its keys."""

from dpo_dist.foundation.fields import NonEmpty, key, schema, section
from dpo_dist.kit import Extension, Verb


@schema
class SweepConfig:
    """How the points of a sweep are run."""

    parallel: int | None = key(None, ge=1)
    """Points that train at a time, each on an equal part of the GPUs; null: as many as GPUs, or 1 without."""
    launcher: NonEmpty | None = key(None)
    """Command before `-m dpo_dist train` that starts the processes of a point; null:
    `dpo-dist launch` if a point has several GPUs, else one process that imports nothing again."""
    trials: int | None = key(None, ge=1, le=1000)
    """Points to train of a search, which samples the swept values by optuna; null: train all combinations."""
    by: NonEmpty | None = key(None)
    """Metric that a search improves, in the last evaluation of a run: `eval_rewards/accuracies`."""


EXTENSION = Extension(
    verbs={
        "sweep": Verb(
            "dpo_dist.tools.sweep",
            "train a run for each point of a grid of values",
            ("model.path", "data.train"),
            is_one_process=True,
        ),
    },
    sections={"sweep": section(SweepConfig, free=True, verbs="sweep")},
    rules="dpo_dist.tools.sweep.rules",
)
