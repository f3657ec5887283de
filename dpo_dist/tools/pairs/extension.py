"""The verb `pairs`, and its keys."""

from dpo_dist.foundation.fields import section
from dpo_dist.kit import Extension, Verb
from dpo_dist.tools.sampling.keys import PairsConfig

EXTENSION = Extension(
    verbs={
        "pairs": Verb(
            "dpo_dist.tools.pairs",
            "make preference records, by scores, models and judges, or people",
            ("data.train",),
            takes_training=False,
            reads=("model.quantization", "parallelism.kind", "parallelism.timeout_seconds", "trainer.seed"),
        ),
    },
    sections={"pairs": section(PairsConfig, free=True, verbs="pairs")},
    rules="dpo_dist.tools.pairs.start",
)
