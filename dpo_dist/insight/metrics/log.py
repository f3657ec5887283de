"""Files of a run that grow with it: metrics rows as JSON and CSV, summary.json, environment.json."""

import contextlib
import csv
import importlib.metadata
import io
import json
import logging
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch

from dpo_dist.config.metrics import MAIN, METRICS, PREFIX
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Direction
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import for_json
from dpo_dist.foundation.text import without_secrets
from dpo_dist.objective.metrics import GROUP_METRICS, MARGIN_PERCENTILES, PAIR_METRICS

Row = dict[str, float]

Phase = Literal["data", "reference", "forward", "backward", "optimizer", "checkpoint", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Parts of a step, with the key `time/<phase>` in a metrics row."""

Work = Literal["starting", "reference", "training", "evaluation", "samples", "saving", "other"]
WORKS: tuple[Work, ...] = get_args(Work)
"""Kinds of work of a run, with the key `work.seconds.<work>` in summary.json."""

_OF_STEP = ("step", "epoch", *PAIR_METRICS, "grad_norm", "learning_rate", "pairs", "tokens")
_SPEED = ("step_seconds", "pairs_per_second", "tokens_per_second", *(f"time/{phase}" for phase in PHASES))
_OTHERS = ("mfu", "memory/peak_allocated_bytes", "bad_steps", "loss_spikes")
COLUMNS = (*_OF_STEP, *_SPEED, *_OTHERS, *(PREFIX + key for key in PAIR_METRICS))
"""Columns of a new CSV file."""
BEST = ("loss", *(PREFIX + key for key in MAIN))
"""Metrics whose best value is in the summary of a tracker; summary.json has two of them."""
_BEST = ("eval_loss", "eval_rewards/accuracies")
_CORE = ("dpo-dist", "torch", "accelerate", "deepspeed", "transformers", "peft", "datasets")
_PACKAGES = (*_CORE, "wandb", "hydra-core", "flash-attn", "liger-kernel")
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]

_log = logging.getLogger(__name__)


class MetricsLog:
    """The metrics rows of one run, in memory and on disk."""

    def __init__(self, folder: RunFolder, rows: list[Row]):
        self.folder = folder
        self.rows = rows
        self._columns = list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)]))

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        resume_step: int | None,
        say: Callable[[str], None] = _log.warning,
        *,
        owes_evaluation: bool = False,
    ) -> "MetricsLog":
        """Start a log, or continue the one in `folder`.

        Rows after `resume_step` (None: of a new run) are computed again, with `owes_evaluation` the
        evaluation after it, too. `say` gets a warning if there is no file of the existing rows, or if they
        are replaced.
        """
        rows: list[Row] = []
        if resume_step is None and read_latest_rows(folder):
            say("warning: training starts again: an earlier start left no checkpoint; its rows are replaced")
        elif resume_step is not None:
            if not folder.log_history.exists() and not folder.metrics_table.exists():
                say(f"warning: metrics up to step {resume_step} are lost: {folder.log_history} is missing")
            rows = [row for row in read_latest_rows(folder) if row["step"] <= resume_step]
        if owes_evaluation:
            rows = [row for row in rows if row["step"] != resume_step or "eval_loss" not in row]
        history = cls(folder, rows)
        folder.metrics.mkdir(parents=True, exist_ok=True)
        history.save()
        return history

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, which has its `step`, to the CSV file, which is written anew for a new column."""
        self.rows.append(dict(row))
        if new := [key for key in row if key not in self._columns]:
            self._columns += new
            self._write_csv()
            return
        with self.folder.metrics_table.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def save(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write both files, and `summary.json`, whole or not at all. What is not finite is null in JSON.

        Call it before a checkpoint of the same step is committed, so that a resumed run finds all its rows.
        A run directory that was moved away is not created again.
        """
        self.folder.metrics.stat()
        lines = ",\n".join(json.dumps(for_json(row)) for row in self.rows)
        files.write_text(self.folder.log_history, f"[\n{lines}\n]\n")
        self._write_csv()
        if summary is not None:
            files.write_text(self.folder.summary, json.dumps(for_json(summary), indent=2) + "\n")

    def _write_csv(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        files.write_text(self.folder.metrics_table, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a `log_history.json`; null becomes nan."""
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for row in json.loads(path.read_bytes())
    ]


def read_latest_rows(folder: RunFolder) -> list[Row]:
    """Return the rows of a run, also those that are only in the CSV file, which grows during the run."""
    try:
        rows = read_rows(folder.log_history) if folder.log_history.exists() else []
    except ValueError as error:
        raise ConfigError(
            "the metrics of this run cannot be read",
            where=str(folder.log_history),
            got=str(error),
            remedy=f"delete this file: {folder.metrics_table.name} has the same rows",
        ) from error
    table = folder.metrics_table.read_text(encoding="utf-8") if folder.metrics_table.exists() else ""
    whole, _, _ = table.rpartition("\n")  # the last line may be unfinished
    return rows + [
        {key: int(value) if value.isdecimal() else float(value) for key, value in row.items() if value}
        for row in islice(csv.DictReader(io.StringIO(whole)), len(rows), None)
    ]


def final_and_best(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return `final` and `best` of `summary.json`; the evaluation before the first step is no result.

    `final` has metrics of the last logged step and of the last evaluation (its step is `eval_step`); `best`
    has the lowest `eval_loss` and the highest `eval_rewards/accuracies`, the earliest of equal ones.
    """
    final: Row = {}
    for prefix in ("", PREFIX):
        measured = [row for row in rows if row["step"] > 0 and f"{prefix}loss" in row]
        if measured:
            last = measured[-1]
            final[f"{prefix}step"] = last["step"]
            final |= {prefix + key: last[prefix + key] for key in PAIR_METRICS if prefix + key in last}
            final |= {key: value for key, value in last.items() if key.startswith(_grouped(prefix))}
    best = {key: {"value": row[key], "step": row["step"]} for key, row in best_rows(rows) if key in _BEST}
    return {"final": final, "best": best}


def best_rows(rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield each metric of `BEST` that is finite after a step, with the first row that has its best value."""
    for key in BEST:
        found = [row for row in rows if row["step"] > 0 and math.isfinite(row.get(key, math.nan))]
        if found:
            sign = 1 if METRICS[key.removeprefix(PREFIX)].best is Direction.lowest else -1
            yield key, min(found, key=lambda row: sign * row[key])


def metrics_by_source(rows: Sequence[Mapping[str, float]]) -> dict[str, Row]:
    """Return, by source, the last value of each metric of `GROUP_METRICS`, those of evaluations with `eval_`.

    A run with one source has none.
    """
    last = {key: value for row in rows if row["step"] > 0 for key, value in row.items()}
    found: dict[str, Row] = {}
    for prefix in ("", PREFIX):
        percentiles = {prefix + key for key in MARGIN_PERCENTILES}
        for metric in _grouped(prefix):
            for key, value in last.items():
                if key.startswith(metric) and key not in percentiles:
                    found.setdefault(key.removeprefix(metric), {})[metric.removesuffix("/")] = value
    return found


def _grouped(prefix: str) -> tuple[str, ...]:
    """Return how the names of metrics by source and of percentiles start."""
    return tuple(f"{prefix}{metric}/" for metric in GROUP_METRICS)


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return command, versions, git commit and hardware, without secrets and environment variables.

    `git_commit` and `git_changed_files`, the number of tracked files that differ from it, are of the current
    folder; null outside a git checkout.
    """
    changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "command": _command(world_size),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changed is None else len(changed.splitlines()),
        "world_size": world_size,
        "cpus": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of this program and of the libraries that decide its results."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _command(world_size: int) -> str | None:
    """Return the command line for a shell, without secrets; None if another program uses this package."""
    program = Path(sys.argv[0])
    if program.resolve().parent != _PACKAGE_FOLDER:
        return None
    launcher = ["python"]
    if world_size > 1:
        launcher = ["accelerate", "launch", "--num_processes", str(world_size)]
    command = [*launcher, "-m", f"{_PACKAGE_FOLDER.name}.{program.stem}", *sys.argv[1:]]
    return str(without_secrets(shlex.join(command)))


def _git(*arguments: str) -> str | None:
    """Return the output of git in the current folder; None outside a checkout."""
    try:
        result = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
