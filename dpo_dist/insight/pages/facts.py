"""Facts about a run that its page shows: the files of its directory, each read once."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.foundation.text import without_secrets
from dpo_dist.insight.metrics.log import WORKS, Work, final_and_best, metrics_by_source, read_latest_rows
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
_OF_AN_END = (
    *("exit", "verdict", "final", "best", "best_checkpoints", "steps", "pairs_seen"),
    *("train_seconds", "pairs_per_second", "work"),
)


@dataclass(frozen=True)
class PageFacts:
    """The content of a run directory, without secrets; empty where a file is missing.

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
    def seconds_by_work(self) -> dict[str, float]:
        """Wall-clock seconds of the kinds of work above 0; before the end of a run those of its rows."""
        found = self.section("work").get("seconds") or {
            "training": sum(seconds for _, seconds in timed_steps(self.run.rows)),
            "evaluation": sum(row.get("step_seconds", 0.0) for row in self.run.evaluations),
        }
        return {WORK_NAMES[work]: found[work] for work in WORKS if found.get(work, 0.0) > 0}

    @property
    def device_hours(self) -> float:
        """Hours of this work on all devices, with the number of devices of each start."""
        measured = self.section("work").get("device_seconds")
        seconds = self.devices * sum(self.seconds_by_work.values()) if measured is None else measured
        return float(seconds) / 3600

    @property
    def cost(self) -> float | None:
        """Price of these hours; None without a price or a measurement."""
        return None if self.price is None or not self.device_hours else self.price * self.device_hours


def timed_steps(rows: Sequence[Mapping[str, float]]) -> list[tuple[Mapping[str, float], float]]:
    """Return the rows of training steps with the seconds of the steps since the row before."""
    timed = [row for row in rows if "step_seconds" in row]
    before = [0.0, *(row["step"] for row in timed)]
    return [
        (row, row["step_seconds"] * (row["step"] - last)) for row, last in zip(timed, before, strict=False)
    ]


def read_facts(folder: RunFolder, price: float | None) -> PageFacts:
    """Read the files of a run directory.

    Args:
        folder: the run directory.
        price: of a GPU for an hour.
    """
    config, doctor = _fields(folder.config, yaml.safe_load), _fields(folder.doctor_report)
    try:
        rows = read_latest_rows(folder)
    except FileNotFoundError:
        rows = []
    summary = _fields(folder.summary)
    if rows and rows[-1]["step"] > summary.get("steps", math.inf):  # it was continued after this end
        summary = {key: value for key, value in summary.items() if key not in _OF_AN_END}
    run = RunFacts.of(rows, {**final_and_best(rows), **summary}, doctor.get("findings") or [])
    evaluation = _fields(folder.evaluation_of(LAST_EVALUATION).results)
    # A run that was continued and stopped has the file of an earlier evaluation.
    last = run.evaluations[-1] if run.evaluations else {}
    loss = (evaluation.get("all") or {}).get("eval_loss")
    is_last = loss is not None and math.isclose(loss, last.get("loss", math.nan), rel_tol=1e-6)
    return PageFacts(
        folder=folder,
        config=config,
        environment=_fields(folder.environment),
        state=_fields(folder.state),
        run=run,
        evaluation=evaluation if is_last else {},
        doctor=doctor,
        price=price,
    )


def _fields(path: Path, parse: Callable[[str], Any] = json.loads) -> Fields:
    """Return the fields of a file without secrets, because a page is made to be shared; empty without it."""
    if not path.exists():
        return {}
    found: Fields = without_secrets(parse(path.read_text(encoding="utf-8")) or {})
    return found
