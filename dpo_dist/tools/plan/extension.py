"""The verb `plan`, and its keys."""

from typing import Literal

from dpo_dist.foundation.fields import key, schema, section
from dpo_dist.kit import Extension, Verb

GpuKind = Literal["h100-80g", "h200-141g", "b200-180g", "a100-80g", "a100-40g", "l40s-48g", "rtx4090-24g"]


@schema
class PlanConfig:
    """The machines that `plan` computes for."""

    gpus: int | None = key(None, ge=1)
    """Number of GPUs, 8 to a node; null: this machine's, or else 8."""
    gpu: GpuKind | None = key(None)
    """Kind of the GPUs; null: this machine's, measured, or else h100-80g."""
    network: float = key(50.0, gt=0)
    """GB a second of a GPU to GPUs of other nodes: 50 is 400 Gbit/s."""
    pairs: int | None = key(None, ge=1)
    """Pairs in an epoch; null: counted in local `data.train`, or those of the presets' datasets."""
    tokens_per_pair: float | None = key(None, gt=1)
    """Tokens of a pair, its prompt counted once; null: found as `pairs` is."""


EXTENSION = Extension(
    verbs={
        "plan": Verb(
            "dpo_dist.tools.plan",
            "compute memory and hours of a run on GPUs that one does not have yet",
            ("model.path",),
            is_one_process=True,
            takes_word="model.path",
        ),
    },
    sections={"plan": section(PlanConfig, free=True, verbs="plan")},
)
