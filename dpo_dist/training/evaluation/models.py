"""The verb `evaluate`: models, adapters and checkpoints, scored on pairs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dpo_dist.config.identity import RunIdentity
from dpo_dist.config.load import changed_keys
from dpo_dist.config.metrics import ALL
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint.saver import checkpoint_state
from dpo_dist.distributed.zero import Engine
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError, ExitCode
from dpo_dist.model.files.folder import base_warnings, has_tokenizer, hub_commit, is_adapter
from dpo_dist.model.files.load import check_has_score, check_same_vocabulary, load_tokenizer
from dpo_dist.model.files.stops import set_padding
from dpo_dist.model.flops import compute_costs
from dpo_dist.model.lora import load_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.objective.metrics import custom_metrics
from dpo_dist.reference.digest import digest_on_every_node
from dpo_dist.reference.engine import load_for_scoring, scoring_config
from dpo_dist.training.evaluation.results import Results, write_evaluation
from dpo_dist.training.evaluation.table import evaluation_table
from dpo_dist.training.evaluation.trained_prompts import count_trained
from dpo_dist.training.export import whole_model
from dpo_dist.training.reference import prepare_reference
from dpo_dist.training.start.inputs import (
    EvaluationInputs,
    load_evaluation_inputs,
    loads_whole,
    shared_model_folder,
)
from dpo_dist.training.start.named_models import EVALUATION_MODEL_KEY, EvaluatedModel
from dpo_dist.training.start.open_run import Run, open_run
from dpo_dist.training.start.run_state import Identity, check_identity, read_state
from dpo_dist.training.steps.step import Objective, evaluate
from dpo_dist.training.teacher import prepare_teacher

_MODELS = {"model.path", "model.revision", "model.adapter", "reference.path", "teacher.path"}


def evaluate_models(config: RunConfig, models: Sequence[EvaluatedModel], console: Console) -> int:
    """Evaluate models and write their results; return the exit code."""
    if config.loss.needs_teacher and config.teacher.is_policy:
        raise ConfigError(
            "a policy that is its own teacher is evaluated while it trains",
            where="teacher.mode",
            got=config.teacher.mode,
            remedy="set teacher.mode=live teacher.path=MODEL, or another loss",
        )
    with open_run(config, console) as run:
        inputs = load_evaluation_inputs(run)
        run.world.on_main(partial(check_models_of_run, run.folder, config.identity, inputs))
        for entry in models:  # before the reference is computed, which may take hours
            whole_model(entry.path, run.folder.exported, run)
        custom = run.world.together(
            lambda: custom_metrics(config.metrics.function, config.loss, run.world.device)
        )
        reference = prepare_reference(run, inputs).provider
        teacher = prepare_teacher(run, inputs).teacher
        objective = Objective(config.loss, reference, custom=custom, teacher=teacher)
        evaluations = {entry.path: _evaluate(run, entry, inputs, objective) for entry in models}
        if len(evaluations) > 1 and run.world.is_main:
            by_model = {path: results[ALL] for path, results in evaluations.items()}
            console.result("comparison", by_model, evaluation_table(by_model))
    return ExitCode.completed


def check_models_of_run(folder: RunFolder, identity: RunIdentity, inputs: EvaluationInputs) -> None:
    """Check that the models of a run that was trained are those of its training."""
    state = read_state(folder)
    if state is None or _MODELS & changed_keys(folder.config, identity).keys():
        return  # no run, or other models on purpose
    models: Identity = {"model": inputs.policy_files.digest}
    # A run whose loss has no reference may be scored by a loss that has one.
    if inputs.reference_files is not None and state.identity.get("reference") is not None:
        models["reference"] = inputs.reference_files.digest
    if inputs.teacher_files is not None and state.identity.get("teacher") is not None:
        models["teacher"] = inputs.teacher_files.digest
    if not has_tokenizer(folder.model):
        models["description"] = inputs.description
    check_identity(state.identity, models, folder.state)


def _evaluate(run: Run, entry: EvaluatedModel, inputs: EvaluationInputs, objective: Objective) -> Results:
    config = run.config
    world = run.world
    console = run.console
    run.say(f"evaluating {entry.path}")
    model, running, commit = load_evaluated(run, entry, inputs)
    ((dataset, every),) = inputs.datasets_to_score
    prefixes = config.trainer.prefix_tree
    backend = model.model.backend
    costs = compute_costs(inputs.flops, prefixes=prefixes, backend=backend, device=world.device)
    costs = replace(costs, arrangement=model.model.arrangement)
    means, values = evaluate(model, objective, run.shard(dataset, every, costs), world, running)

    def write() -> Results:
        folder = run.folder
        hashes = map(int, dataset.prompt_hashes[:])
        in_train = count_trained(entry.path, hashes, config.loss.unit, console)
        counts = {**dataset.counts, "prompts_also_in_train": in_train}
        dataset_with_count = replace(dataset, counts=counts)
        named = folder.named_evaluation(entry.name(dataset, config.identity.digest))
        results = write_evaluation(run, named, entry.path, means, values, dataset_with_count, commit)
        console.result("results", {"model": entry.path, **results}, evaluation_table(results))
        run.say(f"evaluation: {folder.evaluation.results}   also in {named.path}")
        return results

    with console.heartbeat("reading the prompts of its training, computing intervals, writing the scores"):
        results = world.on_main(write)
    model.free()
    return results


def _identify(run: Run, base: Path, model: Path) -> None:
    """Check a model's files on every node, and for an adapter those of its base; collective."""
    config = run.config
    adapter = model if is_adapter(model) else None
    with run.console.heartbeat(f"reading the files of {model} to identify them"):
        digest_on_every_node(
            model if adapter is None else base,
            Path(config.reference.store),
            config.model.trust_remote_code,
            loads_whole(config.model, config.parallelism),
            run.world,
            adapter,
        )


def load_evaluated(
    run: Run, entry: EvaluatedModel, inputs: EvaluationInputs
) -> tuple[Engine, RunningMeans, str | None]:
    """Return the loaded model, the running means of its training if known, and its commit on the hub.

    Collective. `model.revision` applies to `model.path` only. `model.quantization` applies to `model.path`
    and to the base of an adapter.
    """
    config = run.config
    world = run.world
    base = inputs.policy_files.folder
    bits = config.model.quantization
    running = RunningMeans()
    folder = base
    key = "model.path"
    finish: Callable[[PackedCausalLM], None] | None = None
    if entry.is_checkpoint:
        state = world.on_main(lambda: checkpoint_state(Path(entry.path)))
        running = RunningMeans(**state["running"])
    location = whole_model(entry.path, run.folder.exported, run)
    revision = config.model.revision if location == config.model.path else None
    files = shared_model_folder(run, location, revision, EVALUATION_MODEL_KEY, accepts_adapter=True)
    commit = hub_commit(files)
    _identify(run, base, files)
    if is_adapter(files):
        for warning in base_warnings(config.model, files):
            run.warn(warning)
        if config.loss.of_scores:
            check_has_score(base, files, EVALUATION_MODEL_KEY)

        def add_saved_adapter(model: PackedCausalLM) -> None:
            load_adapter(model, folder=files)
            if model.gives_scores and has_tokenizer(files):  # the base's padding may end texts
                tokenizer = load_tokenizer(files, config.model, EVALUATION_MODEL_KEY)
                set_padding(model.causal_lm.config, tokenizer.pad_token_id)

        finish = add_saved_adapter
    else:
        folder = files
        key = EVALUATION_MODEL_KEY
        if folder.resolve() != base.resolve():
            bits = None
        world.on_main(
            partial(
                check_same_vocabulary,
                folder,
                inputs.tokenizer,
                config.model,
                inputs.processor,
                EVALUATION_MODEL_KEY,
            )
        )
    offload = config.parallelism.offload_parameters
    placement = replace(config.reference, offload=offload, quantization=bits)
    longest = config.data.longest
    texts = inputs.datasets_to_score[0][0].texts() if config.loss.of_scores else []
    model = load_for_scoring(
        folder,
        scoring_config(config.model, bits),
        placement,
        longest,
        world,
        finish,
        key=key,
        processor=inputs.processor,
        texts=texts,
    )
    return model, running, commit
