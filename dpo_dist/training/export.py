"""The verb `export`: write a checkpoint of a run as a model folder, with its card."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import RunFolder, step_of
from dpo_dist.config.schema import ExportedWeights, RunConfig
from dpo_dist.distributed.checkpoint import damaged_checkpoint, read_state
from dpo_dist.distributed.export import DTYPES, export_checkpoint
from dpo_dist.foundation.errors import RunOutcome, first_line
from dpo_dist.foundation.files import staged_folder
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import read_latest_rows
from dpo_dist.model.save import write_mean, writing_errors
from dpo_dist.training.finish import check_base, run_card


def export_model(config: RunConfig, checkpoint: Path, output: Path, console: Console) -> None:
    """Write `output` from a checkpoint, checked, whole or not at all."""
    console.say(f"reading {checkpoint}")
    try:
        state = read_state(checkpoint)
    except (OSError, ValueError) as error:
        raise damaged_checkpoint(checkpoint, [first_line(error)]) from error
    if config.model.adapter is not None and config.export.merge:  # the base is part of the result
        check_base(config, state.get("model"))

    def card() -> str:
        folder, step = RunFolder.of(config), step_of(checkpoint.name)
        is_end = step == state["steps"]
        summary = {
            "exit": (RunOutcome.completed if is_end else RunOutcome.preempted).value,
            "steps": step,
            "pairs_seen": state["pairs_seen"],
            "reference": state["reference_report"],
            "settings": settings(config),
            "data": state["counts"],
        }
        rows = [row for row in read_latest_rows(folder) if row["step"] <= state["step"]]
        versions = json.loads(folder.environment.read_bytes())["packages"]
        is_evaluated = is_end and config.export.weights is ExportedWeights.last
        merged = replace(config, model=replace(config.model, adapter=None)) if config.export.merge else config
        return run_card(merged, rows, summary, console.say, versions, is_evaluated=is_evaluated)

    export_checkpoint(checkpoint, output, config, card, replaces=False)


def export_average(config: RunConfig, members: Sequence[Path], output: Path) -> None:
    """Write the weighted mean of whole models, whole or not at all."""
    given = [member.weight for member in config.export.average]
    shares = [(weight / sum(given), member) for weight, member in zip(given, members, strict=True)]
    dtype = None if config.export.dtype is None else DTYPES[config.export.dtype]
    with writing_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(output, replaces=False) as temporary:
            write_mean(temporary, shares, dtype)
