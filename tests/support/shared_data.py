"""Folder with slices of real preference data; tests that need it are skipped without it."""

import os
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]


def shared_data_dir() -> Path | None:
    """The `data` folder of DPO_DIST_SHARED, or of ../shared beside the repository; None without one."""
    shared = Path(os.environ.get("DPO_DIST_SHARED", _REPOSITORY.parent / "shared"))
    data = shared / "data"
    return data if data.is_dir() else None
