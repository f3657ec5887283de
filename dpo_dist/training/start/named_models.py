"""Find the model that a command names by run, checkpoint, adapter, folder or hub name. Imports no torch."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import (
    RunFolder,
    best_checkpoint,
    checkpoint_folders,
    checkpoint_step,
    existing_run,
    is_checkpoint,
    no_model_error,
)
from dpo_dist.config.schema import (
    ExportedWeights,
    ReferenceMode,
    RunConfig,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.text import first_few
from dpo_dist.model.files.folder import CONFIG_FILE, local_model_folder

if TYPE_CHECKING:
    from dpo_dist.encoded.dataset import PreferenceDataset

EVALUATION_MODEL_KEY = "evaluation.model"
# Folders of every run, whose names do not identify a model.
_USUAL_NAMES = frozenset({RunFolder(Path()).model.name, RunFolder(Path()).checkpoints.name})


def locate_model(path: str, key: str) -> str:
    """Return the folder or hub name of the model at `path`; for a run directory, its trained model."""
    folder = Path(path).expanduser()
    run = RunFolder(folder)
    if run.config.is_file() and not (folder / CONFIG_FILE).is_file():
        if not run.model.is_dir():
            raise no_model_error(run, key, "let the run complete")
        folder = run.model
    elif is_checkpoint(folder):
        return str(folder)
    location = str(folder) if folder.is_dir() else path
    local_model_folder(location, None, key, accepts_adapter=True)
    return location


def short_name(path: str) -> str:
    """Return a path's last folder, `RUN/CHECKPOINT` for a checkpoint, or a hub name without its owner."""
    parts = [part for part in Path(path).expanduser().resolve().parts if part not in _USUAL_NAMES]
    if not Path(path).expanduser().exists():  # a hub name
        return path.rpartition("/")[2]
    return "/".join(parts[-2:]) if checkpoint_step(parts[-1]) is not None else parts[-1]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, adapter or checkpoint to evaluate; `path` is its folder or its name on the hub."""

    path: str
    is_checkpoint: bool

    def name(self, data: "PreferenceDataset", digest: str) -> str:
        """Return a name for the results on these pairs, such as `step-000100-1a2b3c4d`.

        `digest`: that of the configuration, as another loss or reference has other results.
        """
        folder = Path(self.path)
        place = str(folder.resolve()) if folder.is_dir() else self.path
        facts = [place, data.fingerprint, list(data.source_labels), digest]
        stem = folder.resolve().name if folder.is_dir() else self.path.replace("/", "-")
        return f"{stem}-{text_digest(json.dumps(facts))[:8]}"


def find_evaluation_models(config: RunConfig) -> tuple[RunConfig, list[EvaluatedModel]]:
    """Return the configuration and the models of the verb `evaluate`.

    The configuration has no training data. Its reference's log-probs come from the store, also if training
    computes them with `reference.mode` `live` or `adapter`: the model is the same.
    """
    data, reference = config.data, config.reference
    evaluation = config.evaluation
    if evaluation.data:
        data = replace(data, eval=evaluation.data, eval_share=0.0)
    if reference.mode in (ReferenceMode.adapter, ReferenceMode.live):
        bits = (
            config.model.quantization if reference.mode is ReferenceMode.adapter else reference.quantization
        )
        reference = replace(reference, mode=ReferenceMode.cached, quantization=bits)
    if data.eval:
        data = replace(data, train=[])
    config = replace(config, data=data, reference=reference)
    config.data.check_has_evaluation_data()
    run = RunFolder(config.run.path)
    if None in evaluation.models and not run.model.is_dir():
        pairs = "its name depends on data.eval: to evaluate on other pairs, set evaluation.data"
        raise no_model_error(run, EVALUATION_MODEL_KEY, f"set run.dir to a complete run ({pairs})")
    paths = [
        locate_model(str(run.model) if model is None else model, EVALUATION_MODEL_KEY)
        for model in evaluation.models
    ]
    return config, [EvaluatedModel(path, is_checkpoint(Path(path))) for path in paths]


def find_export_paths(config: RunConfig) -> tuple[Path, Path]:
    """Return the checkpoint, and the folder to write.

    Does not check their files.
    """
    run = existing_run(config.run.path)
    differing = changed_keys(run.config, config.identity)
    if differing:
        raise ConfigError(
            "an export cannot change the run's configuration",
            where=first_few(list(differing), "other"),
            got=first_few([as_written(new) for _, new in differing.values()], "other"),
            expected=first_few([as_written(old) for old, _ in differing.values()], "other"),
            remedy="set only run.dir and keys of export: all other keys, also model.path, come from the run",
        )
    folders = checkpoint_folders(run.checkpoints)
    best = best_checkpoint(run.checkpoints)
    choice = config.export.checkpoint or ("latest" if best is None else "best")
    latest = folders[0].name if folders else None
    step = checkpoint_step({"best": best, "latest": latest}.get(choice) or choice)
    checkpoint = next((path for path in folders if checkpoint_step(path.name) == step), None)
    if checkpoint is None:
        raise ConfigError(
            "this run does not have this checkpoint",
            where="export.checkpoint",
            got=choice,
            expected=", ".join(path.name for path in folders) or f"{run} has no checkpoint",
            remedy=f"name one of these checkpoints (`best` needs trainer.keep_best), or use {run.model}",
        )
    name = checkpoint.name
    if config.export.weights is ExportedWeights.ema:
        name += "-ema"
    if config.export.merge:
        name += "-merged"
    folder = config.export.output
    output = run.exported / name if folder is None else Path(folder).expanduser()
    if os.path.lexists(output):
        remedy = "name another folder, or delete this one"
        raise ConfigError("the folder to write exists", where="export.output", got=str(output), remedy=remedy)
    return checkpoint, output
