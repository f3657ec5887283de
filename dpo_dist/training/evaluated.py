"""The models of an evaluation: find them, load one with its weights, name its results."""

import json
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Protocol

from dpo_dist.config.identity import plain
from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.digests import text_digest
from dpo_dist.distributed.checkpoint import is_checkpoint, open_checkpoint, read_state
from dpo_dist.distributed.checkpoint_weights import load_checkpoint_weights
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError, ConfigError
from dpo_dist.model.adapters import add_adapter, load_adapter
from dpo_dist.model.folder import is_adapter, local_model_folder, read_model_json
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.objective.running_stats import RunningMeans
from dpo_dist.reference.engine import load_scored, scored_model
from dpo_dist.reference.vocabulary import check_same_vocabulary
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.batch_loss import ScoredModel
from dpo_dist.training.data_setup import EvaluationInputs, shared_model_folder

Kind = StrEnum("Kind", ["model", "adapter", "checkpoint", "hub"])
"""`hub`: a model or an adapter, which only its files show."""


class FreeableModel(ScoredModel, Protocol):
    """A model that can be freed."""

    def free(self) -> None:
        """Release its memory."""
        ...


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate: its folder, or its name on the hub."""

    path: str
    kind: Kind

    def name(self, config: RunConfig, inputs: EvaluationInputs) -> str:
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
    """Return the models that `config` evaluates; needs no other process.

    Raises:
        ConfigError: there are no pairs, or a folder has no model.
    """
    if not config.data.eval_sources:
        raise ConfigError(
            "there are no pairs to evaluate on",
            where="data.eval",
            got="no source",
            remedy="set evaluation.data to preference data: 'evaluation.data=[pairs.jsonl]'",
        )
    return [_find(model, RunFolder.of(config)) for model in config.evaluation.models]


def _find(named: str | None, run: RunFolder) -> Evaluated:
    folder = run.model if named is None else Path(named).expanduser()
    if named is None and not folder.is_dir():
        raise ConfigError(
            "this run directory has no model",
            where="evaluation.model",
            got=f"null: {folder}",
            remedy="set run.dir to a complete run (its name depends on data.eval: name other pairs by "
            "evaluation.data), or evaluation.model to a model, an adapter or a checkpoint",
        )
    path = str(folder) if folder.is_dir() else str(named)
    if is_checkpoint(folder):
        return Evaluated(path, Kind.checkpoint)
    if is_adapter(folder):
        return Evaluated(path, Kind.adapter)
    is_local = local_model_folder(path, None, "evaluation.model") is not None
    return Evaluated(path, Kind.model if is_local else Kind.hub)


def load_evaluated(
    evaluated: Evaluated, config: RunConfig, inputs: EvaluationInputs, world: World, console: Console
) -> tuple[FreeableModel, RunningMeans]:
    """Return the model, ready to score, and the running means of its training if known; collective.

    The base of an adapter is quantized as `model.quantization` says, and so is `model.path` itself.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the model or the adapter cannot be loaded.
    """
    base, bits, running = inputs.policy_files.folder, config.model.quantization, RunningMeans()
    folder, finish = base, None
    if evaluated.kind is Kind.checkpoint:
        state = open_checkpoint(Path(evaluated.path), world).state
        running = RunningMeans(**state["running"])
        finish = partial(_load_trained, folder=Path(evaluated.path), config=config, world=world)
    else:
        key = "evaluation.model"
        found = shared_model_folder(evaluated.path, None, key, world, console, accepts_adapter=True)
        if is_adapter(found):
            if named := foreign_base(found, base, config):
                console.say(f"warning: {evaluated.path} names {named} as its base, not {config.model.path}")
            finish = partial(load_adapter, folder=found)
        else:
            folder, bits = found, bits if found.resolve() == base.resolve() else None
            world.on_main(partial(check_same_vocabulary, found, inputs.tokenizer, config.model, key))
    placement = replace(
        config.reference, offload=config.parallelism.offload_parameters, nvme_path=None, quantization=bits
    )
    model_config = replace(scored_model(config), quantization=bits)
    placed = replace(config, reference=placement)
    return load_scored(folder, model_config, placed, world, finish), running


def foreign_base(adapter: Path, base: Path, config: RunConfig) -> str | None:
    """Return the base that an adapter names, unless it is `model.path` or is not named."""
    named = read_model_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or named in ("", config.model.path):
        return None
    return None if Path(named).expanduser().resolve() == base.resolve() else named


def check_origin(evaluated: Evaluated, config: RunConfig, inputs: EvaluationInputs) -> None:
    """Check that a checkpoint is of this configuration, before the reference is computed for another.

    Raises:
        CheckpointError: its run started from another model or with another adapter.
    """
    if evaluated.kind is not Kind.checkpoint:
        return
    folder, digest = Path(evaluated.path), inputs.policy_files.digest
    try:
        former = read_state(folder).get("model")
    except (OSError, ValueError):
        return  # `open_checkpoint` says what is damaged
    own_config = RunFolder(folder.resolve().parent.parent).config
    adapters = changed_keys(own_config, config).get("model.adapter")
    if former != digest:
        what, got, expected = "model", f"{config.model.path}, digest {digest}", f"digest {former}"
    elif adapters is not None:
        what, got, expected = "adapter", str(adapters[1]), str(adapters[0])
    else:
        return
    raise CheckpointError(
        f"the checkpoint is of a run with another {what}",
        where=str(folder),
        got=got,
        expected=expected,
        remedy="set model.path and model.adapter as in the config.yaml of its run",
    )


def _load_trained(model: PackedCausalLM, folder: Path, config: RunConfig, world: World) -> None:
    """Give a model the weights that training changed: its own, or those of an adapter; collective."""
    if config.model.adapter is not None:
        add_adapter(model, config.model, config.trainer.seed)
    load_checkpoint_weights(model, folder, world)
