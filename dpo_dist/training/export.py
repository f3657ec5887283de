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
from dpo_dist.distributed.checkpoint_manifest import damaged_checkpoint
from dpo_dist.errors import ConfigError, RunOutcome, first_line
from dpo_dist.model.adapter_files import start_folder
from dpo_dist.model.folder import model_folder
from dpo_dist.reference.digest import digest_model
from dpo_dist.report.environment import package_versions
from dpo_dist.report.metrics_log import read_latest_rows
from dpo_dist.report.recorder import spared
from dpo_dist.report.terminal.console import Console
from dpo_dist.small_files import read_small
from dpo_dist.training.card import run_card
from dpo_dist.training.export_check import check_exported, read_pairs


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

    _check_base(config, sources)
    console.say(f"reading {', '.join(map(str, sources))}")
    check = None
    if config.export.check:  # pairs that cannot be read are an error before anything is written
        check = partial(check_exported, pairs=read_pairs(config), config=config, say=console.say)
    export_models(sources, output, config, None if config.export.average else card, check, replaces=False)


def _check_base(config: RunConfig, sources: Sequence[Path]) -> None:
    """Check that files that become part of the result are those that training started from.

    They are the base of a merged adapter, and the adapter below a new one. The check of the written folder
    reads the same files, so it would not see the difference.

    Raises:
        ConfigError: they have changed, or cannot be read.
    """
    adapter, own = config.model.adapter, RunFolder.of(config).checkpoints
    if adapter is not None:
        _check_one_start(sources)
    if adapter is None or not (config.export.merge or adapter.on_top):
        return
    recorded = {_model_digest(source) for source in sources if source.parent == own} - {""}
    if not recorded:
        return
    found = digest_model(
        model_folder(config.model.path, config.model.revision),
        Path(config.reference.store),
        remote_code=config.model.trust_remote_code,
        adapter=start_folder(config.model),
    )
    if recorded != {found.digest}:
        raise ConfigError(
            "the model that this run started from has changed since",
            where="model.path" if adapter.path is None else "model.path, model.adapter.path",
            got=f"digest {found.digest}",
            expected=f"digest {', '.join(sorted(recorded))}",
            remedy="restore its files"
            + ("" if adapter.on_top else ", or set export.merge=false to write the adapter by itself"),
        )


def _check_one_start(sources: Sequence[Path]) -> None:
    """Check that the checkpoints of adapters started from the same model, as far as they record it.

    Raises:
        ConfigError: they did not.
    """
    starts = {source: digest for source in sources if (digest := _model_digest(source))}
    if len(set(starts.values())) > 1:
        raise ConfigError(
            "the members of the average are adapters of different models",
            where="export.average",
            got=", ".join(f"{source} of {digest[:12]}" for source, digest in starts.items()),
            expected="checkpoints of runs that started from the same model",
            remedy="name checkpoints of one start; an adapter only means something on its own base",
        )


def _model_digest(checkpoint: Path) -> str:
    """Return the digest of the model that training started from; "" if the checkpoint has none."""
    try:
        return str(read_state(checkpoint).get("model") or "")
    except (OSError, ValueError):  # a damaged checkpoint, of which the export says more
        return ""


def _card(config: RunConfig, checkpoint: Path, console: Console) -> str:
    """Return the model card of a checkpoint; "" if its run has not recorded its data."""
    folder, step = RunFolder.of(config), step_of(checkpoint.name)
    try:
        state = read_state(checkpoint)
    except (OSError, ValueError) as error:  # its run has removed it meanwhile
        raise damaged_checkpoint(checkpoint, [first_line(error)]) from error
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
