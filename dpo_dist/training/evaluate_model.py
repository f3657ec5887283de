"""Evaluate models, adapters or checkpoints on pairs, one after the other: load, score, write the results."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.errors import ExitCode
from dpo_dist.evaluation.results import ALL
from dpo_dist.objective.metrics import MetricSums
from dpo_dist.report.terminal.console import Console
from dpo_dist.report.terminal.evaluation_table import evaluation_table
from dpo_dist.training.batch_loss import Objective
from dpo_dist.training.data_setup import EvaluationInputs, load_evaluation_inputs
from dpo_dist.training.evaluated import Evaluated
from dpo_dist.training.evaluation_files import write_evaluation
from dpo_dist.training.load_evaluated import check_origin, load_evaluated
from dpo_dist.training.reference_setup import prepare_reference
from dpo_dist.training.step import evaluate
from dpo_dist.training.world_setup import open_world

Results = dict[str, dict[str, Any]]


def evaluate_models(config: RunConfig, models: Sequence[Evaluated], console: Console) -> int:
    """Evaluate models and write their results; return the exit code.

    Raises:
        ConfigError: a model or its adapter cannot be loaded.
        CheckpointError: a checkpoint is damaged, or is not of this model.
    """
    config = with_stored_reference(config)
    with open_world(config, console) as world:
        inputs = load_evaluation_inputs(config, world, console)
        for evaluated in models:
            world.on_main(partial(check_origin, evaluated, config, inputs))
        reference = prepare_reference(config, inputs, world, console)
        objective = Objective(config.loss, reference.provider)
        found = {
            evaluated.path: _evaluate(evaluated, config, inputs, objective, world, console)
            for evaluated in models
        }
        if len(found) > 1 and world.is_main:
            of_all = {path: results[ALL] for path, results in found.items()}
            console.result("comparison", of_all, evaluation_table(of_all))
    return ExitCode.completed


def with_stored_reference(config: RunConfig) -> RunConfig:
    """Return `config` with the reference in the store, unless the loss uses none.

    A reference beside the policy, or its base, is the same model.
    """
    former = config.reference
    if former.mode in (ReferenceMode.none, ReferenceMode.cached):
        return config
    bits = config.model.quantization if former.mode is ReferenceMode.adapter else former.quantization
    return replace(config, reference=replace(former, mode=ReferenceMode.cached, quantization=bits))


def _evaluate(
    evaluated: Evaluated,
    config: RunConfig,
    inputs: EvaluationInputs,
    objective: Objective,
    world: World,
    console: Console,
) -> Results:
    """Evaluate one model, write and print its results; return them on rank 0, else nothing. Collective."""
    console.say(f"evaluating {evaluated.path} ({evaluated.kind})")
    model, running, commit = load_evaluated(evaluated, config, inputs, world, console)
    dataset, budget = inputs.eval_set, config.trainer.micro_batch_tokens
    every, one_sided = np.arange(len(dataset), dtype=np.int64), config.loss.is_one_sided
    costs = replace(inputs.costs, arrangement=model.model.arrangement)
    rank_batch = shard_batch(dataset, every, world.replica, world.replicas, budget, costs, one_sided)
    evaluation = evaluate(model, objective, rank_batch, world, running)
    means = MetricSums(evaluation.sums.names, world.sum_replicas(evaluation.sums.values)).means()
    found: Results = {}

    def write() -> None:
        assert evaluation.values is not None
        name = evaluated.name(config, inputs)
        values = evaluation.values
        found.update(write_evaluation(name, evaluated.path, config, means, values, dataset, commit))
        console.result("results", {"model": evaluated.path, **found}, evaluation_table(found))
        folder = RunFolder.of(config)
        console.say(f"evaluation: {folder.evaluation.results}   also in {folder.evaluation_of(name).path}")

    world.on_main(write, console.heartbeat("computing intervals and writing the scores"))
    model.free()
    return found
