"""The keys of `run`; see `schema`."""

from dataclasses import dataclass
from enum import StrEnum

from dpo_dist.config.fields import key

Resume = StrEnum("Resume", ["auto", "never", "must"])


@dataclass(frozen=True)
class FolderConfig:
    """The run directory, and whether to resume the run in it."""

    dir: str | None = key(None, "Run directory; null: `<run.root>/<run.name>-<digest>`.", filled=True)
    name: str = key("run", "Name of the run, for its directory and for reports.")
    root: str = key("output", "Folder of run directories, encoded data and the reference store.", filled=True)
    resume: Resume = key(
        Resume.auto,
        "`auto`: resume if there is a checkpoint; `must`: error without one; "
        "`never`: error if the directory has results.",
        verbs="train",
    )
