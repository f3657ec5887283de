"""Evaluate a model, an adapter or a checkpoint on pairs: load it, score, write the results."""

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.checkpoint import is_checkpoint, open_checkpoint
from dpo_dist.distributed.same_processes import check_same_processes
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError, ConfigError, ExitCode
from dpo_dist.evaluation.results import ALL
from dpo_dist.model.folder import is_adapter, local_model_folder
from dpo_dist.objective.metrics import MetricSums
from dpo_dist.objective.pair_values import PairValues
from dpo_dist.objective.running_stats import RunningMeans
from dpo_dist.reference.engine import load_scored, scored_model
from dpo_dist.reference.vocabulary import check_same_vocabulary
from dpo_dist.report.console import Console
from dpo_dist.report.evaluation_table import evaluation_table
from dpo_dist.training.batch_loss import Objective, ScoredModel
from dpo_dist.training.data_setup import EvaluationInputs, load_evaluation_inputs, shared_model_folder
from dpo_dist.training.evaluation_files import write_evaluation
from dpo_dist.training.reference_setup import prepare_reference
from dpo_dist.training.run import load_policy, open_world
from dpo_dist.training.step import evaluate

Kind = StrEnum("Kind", ["model", "adapter", "checkpoint"])


class _Freeable(ScoredModel, Protocol):
    """A model that can be freed."""

    def free(self) -> None:
        """Release its memory."""
        ...


@dataclass(frozen=True)
class Evaluated:
    """The model to evaluate: its folder, or its name on the hub."""

    path: str
    kind: Kind


def evaluate_model(config: RunConfig, console: Console) -> int:
    """Evaluate `evaluation.model` on the pairs of `data.eval` and write the results; return the exit code.

    Raises:
        ConfigError: the model or its adapter cannot be loaded.
        CheckpointError: these processes cannot load the checkpoint.
    """
    evaluated, config = find_evaluated(config), with_stored_reference(config)
    with open_world(config, console) as world:
        console.say(f"evaluating {evaluated.path} ({evaluated.kind})")
        inputs = load_evaluation_inputs(config, world, console)
        dataset = inputs.eval_set
        world.on_main(lambda: check_labels(dataset))
        reference = prepare_reference(config, inputs, world, console)
        model, running = _load(evaluated, config, inputs, world, console)
        objective = Objective(config.loss, reference.provider)
        every = np.arange(len(dataset), dtype=np.int64)
        budget, one_sided = config.trainer.micro_batch_tokens, config.loss.is_one_sided
        rank_batch = shard_batch(dataset, every, world.rank, world.size, budget, inputs.costs, one_sided)
        evaluation = evaluate(model, objective, rank_batch, world, running)
        means = MetricSums(evaluation.sums.names, world.sum(evaluation.sums.values)).means()

        def write() -> None:
            assert evaluation.values is not None
            _write(config, means, evaluation.values, dataset, console)

        world.on_main(write, console.heartbeat("computing intervals and writing the scores"))
        model.free()
    return ExitCode.completed


def find_evaluated(config: RunConfig) -> Evaluated:
    """Return the model that `config` evaluates; needs no other process.

    Raises:
        ConfigError: there are no pairs, or the folder has no model.
    """
    if not config.data.eval_sources:
        raise ConfigError(
            "there are no pairs to evaluate on",
            where="data.eval",
            got="no source",
            remedy="set data.eval to preference data: 'data.eval=[pairs.jsonl]'",
        )
    named = config.evaluation.model
    folder = RunFolder.of(config).model if named is None else Path(named).expanduser()
    if named is None and not folder.is_dir():
        raise ConfigError(
            "this run directory has no model",
            where="evaluation.model",
            got=f"null: {folder}",
            remedy="set run.dir to a complete run (its default name depends on data.eval, too), or "
            "evaluation.model to a model, an adapter or a checkpoint",
        )
    path = str(folder) if folder.is_dir() else str(named)
    if is_checkpoint(folder):
        return Evaluated(path, Kind.checkpoint)
    if is_adapter(folder):
        return Evaluated(path, Kind.adapter)
    local_model_folder(path, None, "evaluation.model")
    return Evaluated(path, Kind.model)


def with_stored_reference(config: RunConfig) -> RunConfig:
    """Return `config` with the reference in the store, unless the loss uses none.

    A reference beside the policy, or its base, is the same model.
    """
    former = config.reference
    if former.mode in (ReferenceMode.none, ReferenceMode.cached):
        return config
    bits = config.model.quantization if former.mode is ReferenceMode.adapter else former.quantization
    return replace(config, reference=replace(former, mode=ReferenceMode.cached, quantization=bits))


def check_labels(dataset: PreferenceDataset) -> None:
    """Check that no label is the name of the results of all pairs.

    Raises:
        ConfigError: one of several is.
    """
    if ALL in dataset.labels:
        raise ConfigError(
            "a label is the name of the results of all pairs",
            where="data.eval",
            got=f"label: {ALL}",
            remedy="give this source another label",
        )


def _load(
    evaluated: Evaluated, config: RunConfig, inputs: EvaluationInputs, world: World, console: Console
) -> tuple[_Freeable, RunningMeans]:
    """Return the model, ready to score, and the running means of its training if known; collective."""
    if evaluated.kind is Kind.checkpoint:
        return _load_checkpoint(Path(evaluated.path), config, inputs, world)
    folder, adapter, model_config = inputs.policy_files.folder, None, scored_model(config)
    if evaluated.kind is Kind.adapter:
        adapter, bits = Path(evaluated.path), config.model.quantization
    else:
        folder = shared_model_folder(evaluated.path, None, "evaluation.model", world, console)
        world.on_main(partial(check_same_vocabulary, folder, inputs.tokenizer, config.model))
        bits = None
    placement = replace(
        config.reference, offload=config.parallelism.offload_parameters, nvme_path=None, quantization=bits
    )
    model_config = replace(model_config, quantization=bits)
    placed = replace(config, reference=placement)
    return load_scored(folder, model_config, placed, world, adapter), RunningMeans()


def _load_checkpoint(
    folder: Path, config: RunConfig, inputs: EvaluationInputs, world: World
) -> tuple[_Freeable, RunningMeans]:
    """Return the policy of a checkpoint, on as many processes as wrote it; collective.

    Raises:
        CheckpointError: it is damaged, or is not of this model and these processes.
    """
    checkpoint = open_checkpoint(folder, world)
    otherwise = "let the run end and evaluate its model, which any number of processes loads"
    check_same_processes(checkpoint, config.parallelism, world, otherwise)
    former = checkpoint.state.get("model")
    if former != inputs.policy_files.digest:
        raise CheckpointError(
            "the checkpoint is of a run that started from another model",
            where=str(folder),
            got=f"model.path={config.model.path}, digest {inputs.policy_files.digest}",
            expected=f"digest {former}",
            remedy="set model.path, model.adapter and parallelism as in the config.yaml of its run",
        )
    policy = load_policy(config, inputs, world)
    policy.load_shards(str(folder))
    policy.train(False)
    return policy, RunningMeans(**checkpoint.state["running"])


def _write(
    config: RunConfig,
    means: dict[str, float],
    values: PairValues,
    dataset: PreferenceDataset,
    console: Console,
) -> None:
    """Write both files and print the table."""
    folder = RunFolder.of(config)
    for line in evaluation_table(write_evaluation(config, means, values, dataset)):
        console.say(line)
    console.say(f"evaluation: {folder.evaluation}   scores: {folder.evaluation_scores}")
