"""What sampling adds: how responses are drawn, and those at evaluations."""

from dpo_dist.foundation.fields import section
from dpo_dist.kit import Extension
from dpo_dist.tools.sampling.keys import SamplingConfig

EXTENSION = Extension(
    sections={
        "sampling": section(SamplingConfig, free=True, verbs="train compare pairs"),
    },
    rules="dpo_dist.tools.sampling.rules",
)
