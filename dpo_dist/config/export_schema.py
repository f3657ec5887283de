"""The keys of `export`: a checkpoint as a model folder; see `schema`."""

from dataclasses import dataclass

from dpo_dist.config.fields import key


@dataclass(frozen=True)
class ExportConfig:
    """The model folder that `python -m dpo_dist.export` writes from a checkpoint of `run.dir`."""

    checkpoint: str = key(
        "latest",
        "`latest`, `best` (by `trainer.keep_best`), or the name of one: `step-000100`.",
        accepts="latest, best, or the name of a folder in checkpoints/",
        pattern=r"latest|best|step-\d{6,18}",
    )
    output: str | None = key(
        None,
        "Folder to write, which must not exist; null: `<run.dir>/exported/<checkpoint>`.",
        filled=True,
    )
