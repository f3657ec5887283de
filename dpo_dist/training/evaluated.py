"""The models of an evaluation: find them and name their results; imports no torch: errors appear at once."""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.checkpoint_folders import is_checkpoint
from dpo_dist.config.existing_run import without_model
from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sources import check_has_evaluation_data
from dpo_dist.digests import text_digest
from dpo_dist.model.folder import is_adapter, local_model_folder
from dpo_dist.model.safe_weights import check_adapter

if TYPE_CHECKING:
    from dpo_dist.training.data_setup import EvaluationInputs

KEY = "evaluation.model"
Kind = StrEnum("Kind", ["model", "adapter", "checkpoint", "hub"])
"""`hub`: a model or an adapter, which only its files show."""


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate: its folder, or its name on the hub."""

    path: str
    kind: Kind

    def name(self, config: RunConfig, inputs: "EvaluationInputs") -> str:
        """Return a name for the results: another model, base, precision, reference or loss, other pairs or
        labels have another name.

        Example: `step-000100-1a2b3c4d`.
        """
        folder = Path(self.path)
        place = str(folder.resolve()) if folder.is_dir() else self.path
        reference = inputs.reference_files.digest if inputs.reference_files is not None else None
        data, model = inputs.eval_set, config.model
        precision = [str(model.dtype), None if model.quantization is None else str(model.quantization)]
        own = [place, inputs.policy_files.digest, precision, reference, plain(config.loss)]
        facts = [*own, data.fingerprint, list(data.source_labels)]
        stem = folder.resolve().name if folder.is_dir() else self.path.replace("/", "-")
        return f"{stem}-{text_digest(json.dumps(facts, sort_keys=True))[:8]}"


def find_evaluated(config: RunConfig) -> list[Evaluated]:
    """Return the models that `config` evaluates; needs no other process and no torch.

    Raises:
        ConfigError: there are no pairs, or a folder has no model.
    """
    check_has_evaluation_data(config.data, "evaluate models on")
    return [_find(model, RunFolder.of(config)) for model in config.evaluation.models]


def _find(named: str | None, run: RunFolder) -> Evaluated:
    folder = run.model if named is None else Path(named).expanduser()
    if named is None and not folder.is_dir():
        pairs = "its name depends on data.eval: name other pairs by evaluation.data"
        raise without_model(run, KEY, f"set run.dir to a complete run ({pairs})")
    path = str(folder) if folder.is_dir() else str(named)
    if is_checkpoint(folder):
        return Evaluated(path, Kind.checkpoint)
    if is_adapter(folder):
        check_adapter(folder, KEY)
        return Evaluated(path, Kind.adapter)
    is_local = local_model_folder(path, None, KEY) is not None
    return Evaluated(path, Kind.model if is_local else Kind.hub)
