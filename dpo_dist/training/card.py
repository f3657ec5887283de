"""The model card of a run, from its files and its progress."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.diagnostics.verdict import verdict
from dpo_dist.report.model_card import model_card
from dpo_dist.report.terminal.console import Console


def run_card(
    config: RunConfig,
    rows: Sequence[Mapping[str, float]],
    summary: dict[str, Any],
    console: Console,
    *,
    is_evaluated: bool,
    versions: Mapping[str, str],
) -> str:
    """Return the content of a model card, with a verdict.

    Args:
        config: of the run.
        rows: of log_history.json, up to the step of the model.
        summary: content of summary.json, with `exit`, without `verdict`.
        console: for a warning.
        is_evaluated: whether the last evaluation of training is one of this model.
        versions: of packages, by name.
    """
    folder = RunFolder.of(config)
    judged = verdict(rows, summary, data_findings(folder, console))
    results = folder.evaluation_of(LAST_EVALUATION).results
    evaluation = None
    if is_evaluated and results.is_file():  # an earlier version did not write it
        evaluation = json.loads(results.read_text(encoding="utf-8"))
    return model_card(config, {**summary, "verdict": judged.as_dict()}, rows, evaluation, versions)


def data_findings(folder: RunFolder, console: Console) -> list[dict[str, Any]]:
    """Return the doctor's findings about the data of this run; none if it was not asked."""
    try:
        found: list[dict[str, Any]] = json.loads(folder.doctor_report.read_text(encoding="utf-8"))["findings"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        console.say(f"warning: the verdict ignores {folder.doctor_report}, which cannot be read: {error}")
        return []
    return found
