"""Read back what wandb wrote: the rows of ``run-*.wandb`` files."""

from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.report.wandb_file import read_rows


def history_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The logged rows of all starts of a run, oldest first, without wandb's own keys."""
    id_file = RunFolder(run_dir).wandb_id
    rows = read_rows(id_file.parent, id_file.read_text().strip())
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
