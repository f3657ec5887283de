"""The keys of `export`: a checkpoint as a model folder; see `schema`."""

from dataclasses import dataclass
from enum import StrEnum

from dpo_dist.config.fields import key

ExportedWeights = StrEnum("ExportedWeights", ["last", "ema"])


@dataclass(frozen=True)
class ExportConfig:
    """The model folder that `python -m dpo_dist.export` writes from a checkpoint of `run.dir`."""

    checkpoint: str = key(
        "latest",
        "`latest`, `best` (by `trainer.keep_best`), or the name of one: `step-000100`.",
        accepts="latest, best, or the name of a folder in checkpoints/, such as step-000100",
        pattern=r"latest|best|step-\d{6,18}",
    )
    weights: ExportedWeights = key(
        ExportedWeights.last,
        "`last`: the weights of the checkpoint's step; `ema`: their moving average (`trainer.ema_decay`).",
    )
    output: str | None = key(
        None,
        "Folder to write, which must not exist; null: `<run.dir>/exported/<checkpoint>`, of an average "
        "`<checkpoint>-ema`.",
        filled=True,
    )
