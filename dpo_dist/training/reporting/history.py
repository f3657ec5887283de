"""A run on disk, which may still be training: its configuration, rows and state. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from dpo_dist.config.load import read_saved, saved_config
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.training.reporting.metrics_log import (
    MetricsRow,
    read_rows,
    write_csv,
)
from dpo_dist.training.start.run_state import RunState, read_state


@dataclass(frozen=True)
class RunHistory:
    """What a run has written to its folder."""

    folder: RunFolder

    def config(self) -> RunConfig:
        """Return the configuration; raise ConfigError if this version cannot read it."""
        return saved_config(self.folder.config)

    def written_config(self) -> dict[str, Any]:
        """Return the values of config.yaml, also of another version; empty without the file."""
        return read_saved(self.folder.config) if self.folder.config.exists() else {}

    def state(self) -> RunState | None:
        """Return how far the run is; None if it has not begun."""
        return read_state(self.folder)

    def rows(self) -> list[MetricsRow]:
        """Return the rows of all logged steps and evaluations."""
        return read_rows(self.folder)

    def write_csv(self) -> None:
        """Write the rows as training_metrics.csv."""
        write_csv(self.folder, self.rows())
