"""Environment of a process: the launcher's variables, and the file that reports saved progress."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_dist.foundation.errors import ConfigError

# Environment variable: a file to which rank 0 adds a line whenever it has saved something.
PROGRESS = "DPO_DIST_PROGRESS"


def note_progress(saved: str) -> None:
    """Add a line to the progress file, if there is one; a file that cannot be written is ignored."""
    if PROGRESS in os.environ and this_rank() == 0:
        with contextlib.suppress(OSError), Path(os.environ[PROGRESS]).open("a") as file:
            file.write(f"{saved}\n")


def this_rank() -> int:
    """Return RANK; 0 if it is not set or not a number."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """Return whether a launcher's variable is a switch that is on."""
    return environ.get(name, "").lower() in ("1", "true", "yes")


WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets: a process's ranks, the sizes of world and node, rank 0's address."""
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
"""Prefixes of the launchers' own variables."""


def is_launched(environ: Mapping[str, str]) -> bool:
    """Return whether a launcher has started this process, or a scheduler's job decides how many there are."""
    return not {*WORLD_VARIABLES, "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"}.isdisjoint(environ)


def outside_of_launch(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a program of its own, which must not join the world of this process."""
    variables = {}
    for name, value in environ.items():
        if name not in WORLD_VARIABLES and not name.startswith(LAUNCHER_PREFIXES):
            variables[name] = value
    return variables


_OFF = ("", "0", "false", "no", "none")


def check_launch(environ: Mapping[str, str], repeated: Mapping[str, tuple[str, str]]) -> None:
    """Check that the launcher's variables describe one process of a world, and that none has no effect.

    `repeated` maps each variable of `accelerate launch` that repeats a key to this key, and to the key's
    value, with which the variable must agree; "": no value of the variable agrees.
    """
    for name, (key, value) in repeated.items():
        setting = environ.get(name, "").lower()
        agrees = value and (setting == "auto" or _as_number(setting) == _as_number(value))
        if setting not in _OFF and not agrees:
            raise ConfigError(
                "an option of the launcher would have no effect",
                where="environment: accelerate launch",
                got=f"{name}={environ[name]}" + (f" with {key}" if value else ""),
                expected="a launcher that only starts processes, as with the files of launch/accelerate",
                remedy=f"set {key}, and remove this option from the launcher's file",
            )
    if not _is_one_process(environ):
        error = ConfigError(
            "the launcher's environment variables do not describe one process of a world",
            where="environment",
            got=", ".join(f"{name}={environ.get(name, '')}" for name in WORLD_VARIABLES),
            remedy="start with accelerate launch or torchrun, which set them, or unset all of them for one "
            "process",
        )
        error.is_printed_here = True  # by each rank: rank 0 may not have this error
        raise error


def _as_number(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def _is_one_process(environ: Mapping[str, str]) -> bool:
    if ("RANK" in environ) != ("WORLD_SIZE" in environ):
        return False
    try:
        rank, size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        local, node_size = int(environ.get("LOCAL_RANK", 0)), int(environ.get("LOCAL_WORLD_SIZE", 1))
        has_address = bool(environ.get("MASTER_ADDR")) and 0 < int(environ.get("MASTER_PORT", 0)) < 2**16
    except ValueError:
        return False
    # srun and DeepSpeed set no LOCAL_WORLD_SIZE: then LOCAL_RANK has no upper limit.
    has_place = local >= 0 and (local < node_size or "LOCAL_WORLD_SIZE" not in environ)
    has_world = size == 1 or (has_address and "LOCAL_RANK" in environ)
    return 0 <= rank < size and has_place and has_world


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    """Restore the environment variables at the end of the block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():  # never empty: other threads read it
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_rank() -> int:
    """Return how many cores this process may use if the ranks of a node divide them; at least one."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
