"""Facts about a run that its page shows: the files of its directory, each read once."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.config.user_code import read_config
from dpo_dist.foundation.files import read_small
from dpo_dist.foundation.text import without_secrets
from dpo_dist.insight.metrics.log import WORKS, Work, final_and_best, metrics_by_source, read_latest_rows
from dpo_dist.insight.pages.charts import seconds_of_steps
from dpo_dist.insight.verdict.facts import RunFacts

Fields = Mapping[str, Any]
Content = TypeVar("Content")

_SAME = 1e-6
_OF_AN_END = frozenset(
    {"exit", "verdict", "final", "best", "steps", "pairs_seen", "train_seconds", "pairs_per_second", "work"}
    | {"best_checkpoints"}
)
_MAPPINGS = (
    "final",
    "best",
    "reference",
    "work",
    "settings",
    "verdict",
    "all",
    "tracking",
    "identity",
    "packages",
)
_NUMBERS = (
    *("steps", "pairs_seen", "train_seconds", "pairs_per_second", "peak_memory_bytes", "world_size"),
    "price_per_gpu_hour",
)
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(_MAPPINGS, dict),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(("findings", "gpus", "best_checkpoints"), list),
    "exit": str,
}
"""Types of fields that several sections of the page read."""
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
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def section(self, name: str) -> Fields:
        """Return a section of summary.json; empty if it is missing."""
        return self.summary.get(name) or {}

    @property
    def devices(self) -> int:
        """Number of processes, each with a GPU if there are any."""
        return int(self.summary.get("world_size") or self.environment.get("world_size") or 1)

    @property
    def has_gpus(self) -> bool:
        """Whether the run used GPUs."""
        return bool(self.environment.get("gpus"))

    @cached_property
    def training_seconds(self) -> float:
        """Seconds of the optimizer steps; those of the logged ones if the run has not ended."""
        seconds = self.summary.get("train_seconds")
        return float(seconds) if seconds is not None else sum(seconds_of_steps(self.run.rows))

    @cached_property
    def evaluation_seconds(self) -> float:
        """Seconds of all evaluations, without generated responses."""
        return sum(row.get("step_seconds", 0.0) for row in self.run.evaluations)


def read_facts(folder: RunFolder, price: float | None) -> PageFacts:
    """Read the files of a run directory; a warning names each that cannot be read.

    Args:
        folder: the run directory.
        price: in place of `tracking.price_per_gpu_hour`.
    """
    config = _read(folder.config, _yaml_fields) or {}
    doctor = _read(folder.doctor_report, _json_fields) or {}
    findings = [finding for finding in doctor.get("findings") or [] if isinstance(finding, Mapping)]
    summary = _read(folder.summary, _json_fields) or {}
    rows = _read(folder.log_history, lambda _: read_latest_rows(folder)) or []
    run = RunFacts.of(rows, {**final_and_best(rows), **_still_true(summary, rows)}, findings)
    evaluation = _read(folder.evaluation_of(LAST_EVALUATION).results, _json_fields) or {}
    if price is None:
        price = _fields_of_types(folder.config, config.get("tracking") or {}).get("price_per_gpu_hour")
    return PageFacts(
        folder=folder,
        config=config,
        environment=_read(folder.environment, _json_fields) or {},
        state=_read(folder.state, _json_fields) or {},
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
    return bool(common) and all(_is_same(row.get(f"eval_{name}"), last[name]) for name in common)


def _is_same(value: object, other: float) -> bool:
    return isinstance(value, int | float) and abs(value - other) <= _SAME * max(1.0, abs(other))


def _read(path: Path, parse: Callable[[Path], Content]) -> Content | None:
    try:
        return parse(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        _log.warning("%s cannot be read and is omitted from the report: %s", path, error)
        return None


def _yaml_fields(path: Path) -> Fields:
    return _fields(path, yaml.safe_load(read_config(path)))


def _json_fields(path: Path) -> Fields:
    return _fields(path, json.loads(read_small(path)))


def _fields(path: Path, content: Any) -> Fields:
    if not isinstance(content, dict):
        raise TypeError("it has no fields")
    return _fields_of_types(path, dict(without_secrets(content)))  # a page is made to be shared


def _fields_of_types(path: Path, fields: Fields) -> Fields:
    """Return the fields without those of a type that this program does not write; a warning names them."""
    odd = [
        name
        for name, expected in _TYPES.items()
        if fields.get(name) is not None and not isinstance(fields[name], expected)
    ]
    if odd:
        _log.warning("%s: omitted from the report, of another type than expected: %s", path, ", ".join(odd))
    return {name: value for name, value in fields.items() if name not in odd}


NAMES: Mapping[Work, str] = {
    "starting": "starting",
    "reference": "reference log-probs",
    "training": "training steps",
    "evaluation": "evaluations",
    "samples": "generating samples",
    "saving": "saving",
    "other": "the rest",
}
"""Name of each kind of work for people."""

_HOUR = 3600


def seconds_by_work(facts: PageFacts) -> dict[str, float]:
    """Return the wall-clock seconds of the kinds of work that a run measures, without those of 0 seconds.

    Runs of earlier versions measured training steps, evaluations and computing reference log-probs; these are
    also what the rows of a run that has not ended show.
    """
    found = _measured(facts).get("seconds")
    if found is None:
        found = {
            "reference": facts.section("reference").get("seconds") or 0.0,
            "training": facts.training_seconds,
            "evaluation": facts.evaluation_seconds,
        }
    return {NAMES[work]: found[work] for work in WORKS if found.get(work, 0.0) > 0}


def device_hours(facts: PageFacts) -> float:
    """Return the hours of this work on all devices, with the number of devices of each start."""
    measured = _measured(facts).get("device_seconds")
    seconds = facts.devices * sum(seconds_by_work(facts).values()) if measured is None else measured
    return float(seconds) / _HOUR


def first_measured_step(facts: PageFacts) -> int | None:
    """Return the step from which all work was measured; None for a run of an earlier version."""
    return _measured(facts).get("since_step")


def cost(facts: PageFacts) -> float | None:
    """Return the price of the measured hours on all devices; None without a price or a measurement."""
    hours = device_hours(facts)
    return None if facts.price is None or not hours else facts.price * hours


def _measured(facts: PageFacts) -> Mapping[str, Any]:
    return facts.section("work")
