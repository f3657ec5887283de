"""The keys of `export`: checkpoints as a model folder; see `schema`."""

from dataclasses import dataclass
from enum import StrEnum

from dpo_dist.config.fields import key

ExportedWeights = StrEnum("ExportedWeights", ["last", "ema"])


@dataclass(frozen=True)
class ExportConfig:
    """The model folder that `python -m dpo_dist.export` writes from checkpoints of `run.dir`."""

    checkpoint: str = key(
        "latest",
        "`latest`, `best` (by `trainer.keep_best`), or the name of one: `step-000100`.",
        accepts="latest, best, or the name of a folder in checkpoints/, such as step-000100",
        pattern=r"latest|best|step-\d{1,18}",
    )
    weights: ExportedWeights = key(
        ExportedWeights.last,
        "`last`: the weights of the checkpoint's step; `ema`: their moving average (`trainer.ema_decay`).",
    )
    average: list[str] = key(
        [],
        "In place of one checkpoint, the average of several: names of checkpoints, or folders of models or "
        "of adapters on `model.path`.",
    )
    average_weights: list[float] = key(
        [], "The weights of `export.average`, divided by their sum; empty: equal ones.", above=0
    )
    merge: bool = key(False, "Write an adapter and its base as one model.")
    dtype: str | None = key(
        None,
        "Precision of the written weights; null: `model.dtype`, for the weights of a merged base that of "
        "its files.",
        accepts="bf16, fp16 or fp32",
        pattern=r"bf16|fp16|fp32",
    )
    check: bool = key(
        True,
        "Load the folder by transformers (and peft) before it gets its name, and compare log-probs of "
        "training pairs with those of the trained weights.",
    )
    output: str | None = key(
        None,
        "Folder to write, which must not exist; null: `<run.dir>/exported/<checkpoint>`, of `export.average` "
        "`<run.dir>/exported/average`, with `-ema` and `-merged` after it.",
        filled=True,
    )
