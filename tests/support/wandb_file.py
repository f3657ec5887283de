"""Read back what wandb wrote: rows, tables and histograms of ``run-*.wandb`` files."""

from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight.metrics.wandb_file import read_rows


def history_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The logged numbers of all starts of a run, oldest first, without wandb's own keys."""
    return [
        {key: value for key, value in row.items() if not key.startswith("_") and not isinstance(value, dict)}
        for row in _rows(run_dir)
    ]


def media_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The tables and histograms of the same rows."""
    return [{key: value for key, value in row.items() if isinstance(value, dict)} for row in _rows(run_dir)]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    id_file = RunFolder(run_dir).wandb_id
    return read_rows(id_file.parent, id_file.read_text().strip())
