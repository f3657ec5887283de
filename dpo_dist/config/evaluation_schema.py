"""The keys of `evaluation`; see `schema`."""

from dataclasses import dataclass

from dpo_dist.config.fields import key


@dataclass(frozen=True)
class EvaluationConfig:
    """The model that `python -m dpo_dist.evaluate` scores on the pairs of `data.eval`."""

    model: str | None = key(
        None,
        "Folder of a model, of an adapter on `model.path`, or of a checkpoint of this configuration "
        "(`<run.dir>/checkpoints/step-000100`); null: the run's own, `<run.dir>/model`.",
        filled=True,
    )
    resamples: int = key(
        1000, "Resamples of the prompts for 95 % confidence intervals; 0: no intervals.", at_least=0
    )
