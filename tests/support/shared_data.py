"""The folder beside the repository with real preference data; tests skip without it."""

import os
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]


def shared_data_dir() -> Path | None:
    """The `data` folder of DPO_DIST_SHARED, or of ../shared beside the repository; None without one."""
    folder = Path(os.environ.get("DPO_DIST_SHARED", _REPOSITORY.parent / "shared")) / "data"
    return folder if folder.is_dir() else None
