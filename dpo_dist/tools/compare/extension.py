"""The verb `compare`, and its keys."""

from dpo_dist.foundation.fields import section
from dpo_dist.kit import Extension, Verb
from dpo_dist.tools.sampling.keys import CompareConfig

EXTENSION = Extension(
    verbs={
        "compare": Verb(
            "dpo_dist.tools.compare",
            "ask two models the same prompts, side by side",
            takes_training=False,
            takes_word="compare.models",
            reads=(
                "data.eval",
                "data.eval_share",
                "model.attention",
                "model.quantization",
                "parallelism.kind",
                "parallelism.timeout_seconds",
            ),
        ),
    },
    sections={"compare": section(CompareConfig, free=True, verbs="compare")},
)
