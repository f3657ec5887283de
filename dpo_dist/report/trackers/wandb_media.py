"""Tables, histograms and artifacts of a wandb run."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_dist.config.checkpoint_folders import checkpoint_folders
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import first_line
from dpo_dist.report.json_rows import json_rows
from dpo_dist.report.trackers.histogram import Histogram
from dpo_dist.report.trackers.tracked_values import MARGINS, SAMPLES
from dpo_dist.secret_text import without_secrets

if TYPE_CHECKING:
    import wandb

_COLUMNS = (
    "step",
    "source",
    "prompt",
    "policy",
    "reference",
    "chosen",
    "policy_tokens",
    "policy_finished",
)
_MOST_CHARACTERS = 4000
_SAMPLED = "eval_samples/"
_LARGEST_FILE_BYTES = 5_000_000
_STAGING = "WANDB_DATA_DIR"

_log = logging.getLogger(__name__)


@dataclass
class RunMedia:
    """Tables, histograms and artifacts of a run.

    Attributes:
        folder: the run directory.
        most_samples: rows of a table of samples; with 0 no texts of data or responses are sent.
        margins: histogram of a row, by the row's index.
        is_wanted: False: there is time for rows only.
    """

    folder: RunFolder
    most_samples: int
    margins: dict[int, Histogram] = field(default_factory=dict)
    is_wanted: bool = True

    def of_row(self, index: int, row: Mapping[str, float]) -> dict[str, Any]:
        """Return the histogram and the table of a row, as far as it has them."""
        margins = self.margins.pop(index, None)
        if not self.is_wanted:
            return {}
        media: dict[str, Any] = {}
        if margins is not None:
            import wandb  # noqa: PLC0415

            media[MARGINS] = wandb.Histogram(np_histogram=(margins.counts, margins.edges))
        if self.most_samples and any(name.startswith(_SAMPLED) for name in row):
            media |= _samples_table(self.folder.samples_file(int(row["step"])), self.most_samples)
        return media

    def log_artifacts(self, run: "wandb.Run", summary: Mapping[str, Any]) -> None:
        """Log the run's files as artifacts, by reference: no file but a small report page is read or sent."""
        for kind, paths in self._files(summary).items():
            if self.is_wanted and paths:
                try:
                    run.log_artifact(self._artifact(run, kind, paths))
                except ConnectionError:
                    raise
                except Exception as error:
                    _log.warning("wandb does not take the artifact %s: %s", kind, first_line(error))

    def _files(self, summary: Mapping[str, Any]) -> dict[str, list[Path]]:
        """Return the existing files and folders by the type of their artifact."""
        folder = self.folder
        checkpoints = checkpoint_folders(folder.checkpoints)
        entries = summary.get("reference", {}).get("entries")
        files: dict[str, list[Path]] = {
            "model": [folder.model],
            "checkpoint": checkpoints[:1],
            "reference-store": list(Path(entries).glob("*.json")) if entries else [],
            "report": [folder.report, folder.doctor_report, folder.doctor_page, folder.evaluation.results],
        }
        return {kind: [path for path in paths if path.exists()] for kind, paths in files.items()}

    def _artifact(self, run: "wandb.Run", kind: str, paths: list[Path]) -> "wandb.Artifact":
        import wandb  # noqa: PLC0415

        metadata = {"paths": [str(path.absolute()) for path in paths], "run directory": str(self.folder)}
        artifact = wandb.Artifact(f"{run.id}-{kind}", type=kind, metadata=without_secrets(metadata))
        for path in paths:
            is_small = path == self.folder.report and path.stat().st_size <= _LARGEST_FILE_BYTES
            if is_small and self.most_samples:
                artifact.add_file(str(path))
            else:
                name = None if path.is_file() else path.name
                artifact.add_reference(path.absolute().as_uri(), name=name, checksum=False)
        return artifact


@contextlib.contextmanager
def staged_in(folder: RunFolder) -> Iterator[None]:
    """Let wandb write the files of tables into the run directory; by default it writes them into the home.

    wandb reads the folder from a variable only. The main thread sets it, for as long as trackers are open.
    """
    if _STAGING in os.environ:
        yield
        return
    os.environ[_STAGING] = str((folder.wandb_id.parent / "staging").absolute())
    try:
        yield
    finally:
        os.environ.pop(_STAGING, None)


def _samples_table(path: Path, most: int) -> dict[str, Any]:
    """Return the table of an evaluation's samples; nothing if their file cannot be read."""
    import wandb  # noqa: PLC0415

    try:
        rows = [row for row in islice(json_rows(path), most) if row is not None]
        data = [[_cell(row[name]) for name in _COLUMNS] for row in rows]
    except (OSError, KeyError) as error:
        _log.warning("no table of samples: %s: %s", path, first_line(error))
        return {}
    if not data:
        _log.warning("no table of samples: %s has none", path)
        return {}
    return {SAMPLES: wandb.Table(columns=list(_COLUMNS), data=data, allow_mixed_types=True)}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    cut = value[:_MOST_CHARACTERS]
    return without_secrets(cut if len(cut) == len(value) else f"{cut} ...")
