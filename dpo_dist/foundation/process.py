"""A process of a run: its launcher's variables, and the file that says what is saved."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from dpo_dist.foundation.errors import ConfigError

# Environment variable: a file to which rank 0 adds a line whenever it has saved something.
PROGRESS = "DPO_DIST_PROGRESS"


def note_progress(saved: str) -> None:
    """Add a line to the file of what is saved, if there is one; a file that cannot be written is ignored."""
    if PROGRESS in os.environ and this_rank() == 0:
        with contextlib.suppress(OSError), Path(os.environ[PROGRESS]).open("a") as file:
            file.write(f"{saved}\n")


def this_rank() -> int:
    """Return RANK; 0 if it is not set or not a number."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which a launcher tells a process its place in the world."""
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
"""The beginnings of the variables that launchers keep for themselves."""
_OFF = ("", "0", "false", "no", "none")


def check_launch(environ: Mapping[str, str], repeated: Mapping[str, tuple[str, str]]) -> None:
    """Check that the variables of a launcher describe one process of a world, and that none is ignored.

    `repeated` are variables of accelerate with the key to set in place of each, and the value that only
    repeats this key's; no value does if it is empty.
    """
    for name, (key, value) in repeated.items():
        given = environ.get(name, "").lower()
        if given not in _OFF and not (value and given in ("auto", value)):
            raise ConfigError(
                "an option of the launcher would have no effect",
                where="environment: accelerate launch",
                got=f"{name}={environ[name]}" + (f" with {key}" if value else ""),
                expected="a launcher that only starts processes, as with the files of launch/accelerate",
                remedy=f"set {key}, and remove this option from the launcher's file",
            )
    if not _is_one_process(environ):
        error = ConfigError(
            "the variables of a launcher do not describe one process of a world",
            where="environment",
            got=", ".join(f"{name}={environ.get(name, '')}" for name in WORLD_VARIABLES),
            remedy="start with accelerate launch or torchrun, which set them, or unset all of them for one "
            "process",
        )
        error.is_printed_here = True  # rank 0 may not have it
        raise error


def _is_one_process(environ: Mapping[str, str]) -> bool:
    if ("RANK" in environ) != ("WORLD_SIZE" in environ):
        return False
    try:
        rank, size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        local, of_node = int(environ.get("LOCAL_RANK", 0)), int(environ.get("LOCAL_WORLD_SIZE", 1))
        has_address = bool(environ.get("MASTER_ADDR")) and 0 < int(environ.get("MASTER_PORT", 0)) < 2**16
    except ValueError:
        return False
    # srun and DeepSpeed set no LOCAL_WORLD_SIZE.
    has_place = local >= 0 and (local < of_node or "LOCAL_WORLD_SIZE" not in environ)
    has_world = size == 1 or (has_address and "LOCAL_RANK" in environ)
    return 0 <= rank < size and has_place and has_world
