"""The verb `evaluate`, and its keys."""

from dpo_dist.data import Source
from dpo_dist.foundation.fields import Names, NonEmpty, key, schema, section
from dpo_dist.kit import Extension, Verb


@schema
class EvaluationConfig:
    """The models and pairs that `dpo-dist evaluate` scores."""

    model: NonEmpty | Names | None = key(None, accepts="a path, or a list of paths")
    """Folder or hub name of a model or of an adapter on `model.path`, a checkpoint
    (`<run.dir>/checkpoints/step-000100`), or a list; null: `<run.dir>/model`."""
    data: list[Source] = key([])
    """Pairs in place of `data.eval`, in the same form; the run directory stays that of the run."""

    @property
    def models(self) -> list[str | None]:
        """The models to evaluate, one after the other."""
        return list(self.model) if isinstance(self.model, list) else [self.model]


EXTENSION = Extension(
    verbs={
        "evaluate": Verb(
            "dpo_dist.tools.evaluation",
            "score pairs with trained models and the reference",
            ("model.path",),
            reuses_config=True,
            takes_words=("run.dir",),
            reads=(
                *("data", "loss", "loss.kind", "loss.terms", "loss.reference_free", "metrics"),
                *("reference", "reference.path", "reference.quantization"),
                *("model.attention", "model.fused", "model.quantization"),
                *("parallelism", "parallelism.kind", "parallelism.timeout_seconds"),
                *("trainer.deterministic", "trainer.micro_batch_tokens", "trainer.prefix_tree"),
                "trainer.seed",
            ),
        ),
    },
    sections={"evaluation": section(EvaluationConfig, free=True, verbs="evaluate")},
    rules="dpo_dist.tools.evaluation.rules",
    named_code={"evaluation.data": "Python code of a reader of data is run"},
)
