"""Load a model of an evaluation with its weights; check where a checkpoint comes from."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint_loading import open_checkpoint, read_state
from dpo_dist.distributed.checkpoint_manifest import check_sealed
from dpo_dist.distributed.checkpoint_weights import load_checkpoint_weights
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError
from dpo_dist.model.adapter_files import initial_values
from dpo_dist.model.adapters import add_adapter, load_adapter
from dpo_dist.model.folder import hub_commit, is_adapter, read_model_json
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.objective.running_stats import RunningMeans
from dpo_dist.reference.engine import load_scored, scored_model
from dpo_dist.reference.vocabulary import check_same_vocabulary
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.batch_loss import ScoredModel
from dpo_dist.training.data_setup import EvaluationInputs, shared_model_folder
from dpo_dist.training.evaluated import KEY, Evaluated, Kind


class FreeableModel(ScoredModel, Protocol):
    """A model that can be freed."""

    @property
    def model(self) -> PackedCausalLM:
        """Return the model."""
        ...

    def free(self) -> None:
        """Release its memory."""
        ...


def load_evaluated(
    evaluated: Evaluated, config: RunConfig, inputs: EvaluationInputs, world: World, console: Console
) -> tuple[FreeableModel, RunningMeans, str | None]:
    """Return the model, ready to score, running means of its training if known, and its commit on the hub.

    Collective. `model.revision` counts for `model.path` only.

    The base of an adapter is quantized as `model.quantization` says, and so is `model.path` itself.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the model or the adapter cannot be loaded.
    """
    base, bits, running = inputs.policy_files.folder, config.model.quantization, RunningMeans()
    folder, finish, commit = base, None, None
    if evaluated.kind is Kind.checkpoint:
        state = open_checkpoint(Path(evaluated.path), world).state
        running = RunningMeans(**state["running"])
        start = inputs.policy_files.adapter
        finish = partial(_load_trained, Path(evaluated.path), start, config, world)
    else:
        revision = config.model.revision if evaluated.path == config.model.path else None
        found = shared_model_folder(evaluated.path, revision, KEY, world, console, accepts_adapter=True)
        commit = hub_commit(found)
        if is_adapter(found):
            if named := foreign_base(found, base, config):
                console.say(f"warning: {evaluated.path} names {named} as its base, not {config.model.path}")
            finish = partial(load_adapter, folder=found)
        else:
            folder, bits = found, bits if found.resolve() == base.resolve() else None
            world.on_main(partial(check_same_vocabulary, found, inputs.tokenizer, config.model, KEY))
    placement = replace(
        config.reference, offload=config.parallelism.offload_parameters, nvme_path=None, quantization=bits
    )
    model_config = replace(scored_model(config), quantization=bits)
    placed = replace(config, reference=placement)
    return load_scored(folder, model_config, placed, world, finish), running, commit


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


def _load_trained(
    folder: Path, start: Path | None, config: RunConfig, world: World, model: PackedCausalLM
) -> None:
    """Give a model the weights that training changed: its own, or those of an adapter; collective."""
    if config.model.adapter is not None:
        run = RunFolder(folder.resolve().parents[1])
        world.on_main(lambda: check_sealed(run.initial_adapter))
        initial = initial_values(config.model.adapter, run.initial_adapter)
        add_adapter(model, config.model, config.trainer.seed, start, initial)
    load_checkpoint_weights(model, folder, world)
