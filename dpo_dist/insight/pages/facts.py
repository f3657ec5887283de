"""Facts about a run that its page shows: the files of its directory, each read once."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.foundation.text import without_secrets
from dpo_dist.insight.metrics.log import WORKS, Work, final_and_best, metrics_by_source, read_latest_rows
from dpo_dist.insight.pages.charts import seconds_of_steps
from dpo_dist.insight.verdict.facts import RunFacts

Fields = Mapping[str, Any]

WORK_NAMES: Mapping[Work, str] = {
    "starting": "starting",
    "reference": "reference log-probs",
    "training": "training steps",
    "evaluation": "evaluations",
    "samples": "generating samples",
    "saving": "saving",
    "other": "the rest",
}
"""Name of each kind of work for people."""

_SAME = 1e-6
_HOUR = 3600
_OF_AN_END = frozenset(
    {"exit", "verdict", "final", "best", "steps", "pairs_seen", "train_seconds", "pairs_per_second", "work"}
    | {"best_checkpoints"}
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageFacts:
    """The content of a run directory, without secrets; empty where a file is missing or cannot be read.

    Attributes:
        folder: the run directory.
        config: of config.yaml.
        environment: of environment.json.
        state: of run_state.json.
        run: metrics rows and summary.
        evaluation: of the last evaluation of training, with intervals.
        doctor: of doctor.json.
        price: of a GPU for an hour; None: not known.
    """

    folder: RunFolder
    config: Fields
    environment: Fields
    state: Fields
    run: RunFacts
    evaluation: Fields
    doctor: Fields
    price: float | None

    @property
    def summary(self) -> Fields:
        """Content of summary.json."""
        return self.run.summary

    @cached_property
    def by_source(self) -> dict[str, dict[str, float]]:
        """The last metrics of each source, see `metrics_by_source`."""
        return metrics_by_source(self.run.rows)

    def setting(self, key: str) -> Any:
        """Return the value of a key of the configuration; None if it is not known."""
        section, name = key.split(".")
        return (self.config.get(section) or {}).get(name)

    def section(self, name: str) -> Fields:
        """Return a section of summary.json; empty if it is missing."""
        return self.summary.get(name) or {}

    def intervals(self, name: str) -> Mapping[str, Sequence[float]]:
        """Return the intervals of the last evaluation by metric, of all pairs or of a source."""
        return (self.evaluation.get(name) or {}).get("intervals") or {}

    @property
    def devices(self) -> int:
        """Number of processes, each with a GPU if there are any."""
        return int(self.summary.get("world_size") or self.environment.get("world_size") or 1)

    @property
    def has_gpus(self) -> bool:
        """Whether the run used GPUs."""
        return bool(self.environment.get("gpus"))

    @property
    def seconds_by_work(self) -> dict[str, float]:
        """Wall-clock seconds of the kinds of work above 0; before the end of a run those of its rows."""
        found = self.section("work").get("seconds") or {
            "training": sum(seconds_of_steps(self.run.rows)),
            "evaluation": sum(row.get("step_seconds", 0.0) for row in self.run.evaluations),
        }
        return {WORK_NAMES[work]: found[work] for work in WORKS if found.get(work, 0.0) > 0}

    @property
    def device_hours(self) -> float:
        """Hours of this work on all devices, with the number of devices of each start."""
        measured = self.section("work").get("device_seconds")
        seconds = self.devices * sum(self.seconds_by_work.values()) if measured is None else measured
        return float(seconds) / _HOUR

    @property
    def cost(self) -> float | None:
        """Price of these hours; None without a price or a measurement."""
        return None if self.price is None or not self.device_hours else self.price * self.device_hours


def read_facts(folder: RunFolder, price: float | None) -> PageFacts:
    """Read the files of a run directory; a warning names each that cannot be read.

    Args:
        folder: the run directory.
        price: of a GPU for an hour.
    """
    config = _fields(folder.config, yaml.safe_load)
    doctor = _fields(folder.doctor_report)
    summary = _fields(folder.summary)
    try:
        rows = read_latest_rows(folder)
    except FileNotFoundError:
        rows = []
    run = RunFacts.of(
        rows, {**final_and_best(rows), **_still_true(summary, rows)}, doctor.get("findings") or []
    )
    evaluation = _fields(folder.evaluation_of(LAST_EVALUATION).results)
    return PageFacts(
        folder=folder,
        config=config,
        environment=_fields(folder.environment),
        state=_fields(folder.state),
        run=run,
        evaluation=evaluation if _is_last(evaluation, run) else {},
        doctor=doctor,
        price=price,
    )


def _still_true(summary: Fields, rows: Sequence[Mapping[str, float]]) -> Fields:
    """Return the summary; of a run that was continued since, without the results of its earlier end."""
    steps = summary.get("steps")
    is_continued = bool(rows) and steps is not None and rows[-1]["step"] > steps
    return {key: value for key, value in summary.items() if not (is_continued and key in _OF_AN_END)}


def _is_last(evaluation: Fields, run: RunFacts) -> bool:
    """Return whether an evaluation has the values of the last one of training.

    A run that was continued and stopped has the file of an earlier evaluation.
    """
    row, last = evaluation.get("all") or {}, run.evaluations[-1] if run.evaluations else {}
    common = [name for name in ("loss", "rewards/margins", "logps/chosen") if name in last]
    values = [(row.get(f"eval_{name}"), last[name]) for name in common]
    return bool(common) and all(
        own is not None and abs(own - value) <= _SAME * max(1.0, abs(value)) for own, value in values
    )


def _fields(path: Path, parse: Callable[[str], Any] = json.loads) -> Fields:
    """Return the fields of a file without secrets, because a page is made to be shared; empty without it."""
    try:
        found: Fields = without_secrets(dict(parse(path.read_text(encoding="utf-8")) or {}))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        _log.warning("%s cannot be read and is omitted from the report: %s", path, error)
        return {}
    return found
