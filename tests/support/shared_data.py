"""Folders beside the repository, with real preference data and a SLURM; tests skip without them."""

import os
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]


def shared_data_dir() -> Path | None:
    """The `data` folder of DPO_DIST_SHARED, or of ../shared beside the repository; None without one."""
    return _shared("data")


def shared_cluster_dir() -> Path | None:
    """The folder of scripts that start a SLURM of two nodes on one machine; None without one."""
    return _shared("cluster")


def _shared(name: str) -> Path | None:
    folder = Path(os.environ.get("DPO_DIST_SHARED", _REPOSITORY.parent / "shared")) / name
    return folder if folder.is_dir() else None
