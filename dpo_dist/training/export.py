"""Write a model folder from a checkpoint of a run, with the card that training would have written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo_dist.config.checkpoint_folders import step_of
from dpo_dist.config.export_schema import ExportedWeights
from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint_export import export_models
from dpo_dist.distributed.checkpoint_loading import read_state
from dpo_dist.errors import RunOutcome
from dpo_dist.report.environment import package_versions
from dpo_dist.report.metrics_log import read_latest_rows
from dpo_dist.report.recorder import spared
from dpo_dist.report.terminal.console import Console
from dpo_dist.small_files import read_small
from dpo_dist.training.card import run_card
from dpo_dist.training.export_check import check_exported


def export_model(config: RunConfig, sources: Sequence[Path], output: Path, console: Console) -> None:
    """Write `output` from a checkpoint or an average, checked, whole or not at all.

    Raises:
        CheckpointError: a checkpoint is damaged, or `output` cannot be written or computes other log-probs.
        ConfigError: the base model or the pairs of the check cannot be read, or members do not go together.
    """

    def card() -> str:
        text = ""
        with spared("the model card", console.say):
            text = _card(config, sources[0], console)
        return text  # noqa: RET504 (a bug ends the block before)

    console.say(f"reading {', '.join(map(str, sources))}")
    check = partial(check_exported, config=config, say=console.say) if config.export.check else None
    export_models(sources, output, config, None if config.export.average else card, check)


def _card(config: RunConfig, checkpoint: Path, console: Console) -> str:
    """Return the model card of a checkpoint; "" if its run has not recorded its data."""
    folder, state, step = RunFolder.of(config), read_state(checkpoint), step_of(checkpoint.name)
    counts = state.get("counts") or _read(folder.summary).get("data")
    if counts is None:  # of an earlier version, before the end of its run
        console.say("warning: no model card: this run has no counts of its data yet")
        return ""
    is_end = step == state["steps"]
    summary = {
        "exit": (RunOutcome.completed if is_end else RunOutcome.preempted).value,
        "steps": step,
        "pairs_seen": state["pairs_seen"],
        "reference": state.get("reference_report", {}),
        "settings": settings(config),
        "data": counts,
    }
    rows = [row for row in read_latest_rows(folder) if row["step"] <= state["step"]]
    versions = _read(folder.environment).get("packages") or package_versions()
    is_evaluated = is_end and config.export.weights is ExportedWeights.last
    written = replace(config, model=replace(config.model, adapter=None)) if config.export.merge else config
    return run_card(written, rows, summary, console, is_evaluated=is_evaluated, versions=versions)


def _read(file: Path) -> Mapping[str, Any]:
    """Return the object in a file of the run; empty if it cannot be read."""
    try:
        content: Any = json.loads(read_small(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
