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

_WORK_NAMES: Mapping[Work, str] = {
    "reference": "reference log-probs",
    "training": "training steps",
    "evaluation": "evaluations",
    "samples": "generating samples",
    "other": "the rest",
}
_OF_AN_END = (
    *("exit", "verdict", "final", "best", "best_checkpoints", "steps", "pairs_seen"),
    *("train_seconds", "pairs_per_second", "work"),
)


@dataclass(frozen=True)
class PageFacts:
    """The content of the files of a run directory, without secrets; empty where one is missing.

    `evaluation` is that of the last evaluation of training, with intervals.
    """

    config: Fields
    environment: Fields
    state: Fields
    run: RunFacts
    evaluation: Fields
    doctor: Fields

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
    def seconds_by_work(self) -> dict[str, float]:
        """Wall-clock seconds of the kinds of work above 0; before the end of a run those of its rows."""
        found = self.section("work").get("seconds") or {
            "training": _seconds(self.run.rows),
            "evaluation": sum(row.get("step_seconds", 0.0) for row in self.run.evaluations),
        }
        return {_WORK_NAMES.get(work, work): found[work] for work in WORKS if found.get(work, 0.0) > 0}


def _seconds(rows: Sequence[Mapping[str, float]]) -> float:
    """Return the seconds of the steps of the rows, each of which has the mean since the row before."""
    timed = [row for row in rows if "step_seconds" in row]
    before = [0.0, *(row["step"] for row in timed)]
    return sum(row["step_seconds"] * (row["step"] - last) for row, last in zip(timed, before, strict=False))


def read_facts(folder: RunFolder) -> PageFacts:
    """Read the files of a run directory."""
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
        config=config,
        environment=_fields(folder.environment),
        state=_fields(folder.state),
        run=run,
        evaluation=evaluation if is_last else {},
        doctor=doctor,
    )


def _fields(path: Path, parse: Callable[[str], Any] = json.loads) -> Fields:
    """Return the fields of a file without secrets, because a page is made to be shared; empty without it."""
    if not path.exists():
        return {}
    found: Fields = without_secrets(parse(path.read_text(encoding="utf-8")) or {})
    return found
