"""Names of checkpoint folders, in order of their steps; imports no torch, so that errors appear at once."""

import re
from pathlib import Path

STATE = "state.json"
"""The file of a checkpoint with the state of the training loop."""
BEST = "best"
"""The file beside the checkpoints with the names of the best ones by `trainer.keep_best`, the best first."""
_NAME = re.compile(r"step-(\d{1,18})")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after a step: at least six digits."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the name and the state of a committed checkpoint."""
    return step_of(folder.name) is not None and (folder / STATE).is_file()


def best_checkpoints(root: Path) -> list[str]:
    """Return the names of the best checkpoints below `root`, the best first."""
    try:
        names = (root / BEST).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []
    return [name for name in names if step_of(name) is not None]


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, the newest first, damaged or not.

    The order is that of the numbers: from step 1,000,000 on, names have more digits.
    """
    folders = [folder for folder in root.glob("step-*") if step_of(folder.name) is not None]
    return sorted(filter(Path.is_dir, folders), key=lambda folder: step_of(folder.name) or 0, reverse=True)
