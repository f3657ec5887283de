"""Parts of the work: each is a file, written whole; an interrupted start repeats open ones only."""

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.atomic import collect_abandoned, staged_file, write_text
from dpo_dist.digests import text_digest
from dpo_dist.distributed.world import WhileWaiting, World
from dpo_dist.errors import ConfigError

_FAILED = "failed-"


@dataclass(frozen=True)
class Parts:
    """The folder of the parts of one stage: generation by a model, or scoring by a judge.

    Attributes:
        folder: named by the digest of `settings`; shared by all processes.
        count: number of parts of the whole stage.
        settings: everything that the content of the parts depends on.
    """

    folder: Path
    count: int
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, root: Path, stage: str, settings: Mapping[str, Any], count: int) -> "Parts":
        """Return the parts of a stage below `root`; other settings have another folder."""
        return cls(root / f"{stage}-{settings_digest(settings)[:16]}", count, settings)

    def file(self, index: int) -> Path:
        """Return the file of a part, which exists if the part is finished."""
        return self.folder / f"{index:06d}.jsonl"

    def open(self) -> list[int]:
        """Return the indices of unfinished parts; create the folder, remove files of dead writers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        collect_abandoned(self.folder)
        for flag in self.folder.glob(f"{_FAILED}*"):
            flag.unlink(missing_ok=True)
        write_text(self.folder / "settings.json", json.dumps(self.settings, indent=1, sort_keys=True))
        return [index for index in range(self.count) if not self.file(index).is_file()]

    def finished(self) -> int:
        """Return the number of finished parts."""
        return sum(1 for _ in self.folder.glob("*[0-9].jsonl"))

    def write(self, index: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a finished part."""
        with staged_file(self.file(index)) as temporary:
            lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")

    def read(self, index: int) -> list[dict[str, Any]]:
        """Return the rows of a finished part.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        try:
            return [json.loads(line) for line in self.file(index).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as fault:
            raise ConfigError(
                "a finished part cannot be read",
                where=str(self.file(index)),
                got=(str(fault).splitlines() or [""])[0],
                remedy="delete this file and run the same command again",
            ) from fault


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return 32 hex digits over settings."""
    return text_digest(json.dumps(settings, sort_keys=True))


def work_on(
    parts: Parts,
    unfinished: list[int],
    world: World,
    work: Callable[[int], list[dict[str, Any]]],
    while_waiting: WhileWaiting,
) -> None:
    """Finish all parts; the processes share them. If one process fails, all end with its error. Collective.

    Args:
        parts: the stage.
        unfinished: from `Parts.open`, the same on all ranks.
        world: the processes.
        work: returns the rows of a part.
        while_waiting: called with the seconds so far.

    Raises:
        DpoDistError: that of the lowest rank that failed.
    """
    flag = parts.folder / world.on_main(lambda: f"{_FAILED}{uuid.uuid4().hex}")

    def my_parts() -> None:
        try:
            for index in unfinished[world.rank :: world.size]:
                if flag.exists():
                    return
                parts.write(index, work(index))
        except BaseException:
            with contextlib.suppress(OSError):
                flag.touch()
            raise

    try:
        world.together(my_parts, while_waiting)
    finally:
        if world.is_main:
            flag.unlink(missing_ok=True)
