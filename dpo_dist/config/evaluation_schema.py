"""The keys of `evaluation`; see `schema`."""

from dataclasses import dataclass
from typing import Any

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.config.fields import key


@dataclass(frozen=True)
class EvaluationConfig:
    """The models that `python -m dpo_dist.evaluate` scores, and the pairs."""

    model: Any = key(
        None,
        "Folder or hub name of a model or of an adapter on `model.path`, folder of a checkpoint of this "
        "configuration (`<run.dir>/checkpoints/step-000100`), or a list of them; null: `<run.dir>/model`.",
        accepts="a path, or a list of paths",
    )
    data: list[Any] = key(
        [],
        "Pairs in place of `data.eval`, in the same form; the run directory stays that of the run.",
        of=SourceConfig,
    )
    resamples: int = key(
        1000,
        "Resamples of the prompts for 95 % confidence intervals, also of training's last evaluation; "
        "0: no intervals.",
        at_least=0,
        verbs="train evaluate",
    )

    @property
    def models(self) -> list[str | None]:
        """The models to evaluate, one after the other."""
        return list(self.model) if isinstance(self.model, list) else [self.model]
