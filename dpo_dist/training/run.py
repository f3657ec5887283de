"""One run from its start to its end: build the parts, connect them, train, write the result.

No other module does. In this order: find where the run stands, load inputs and write the files of this start,
load models and set up the loop, train, write model, summary, report and outcome.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo_dist.batching.costs import Arrangement, ComputeCosts
from dpo_dist.batching.sampler import steps_in_words
from dpo_dist.config.identity import settings
from dpo_dist.config.load import to_yaml
from dpo_dist.config.losses import Weighting
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import AttentionBackend, ReferenceMode, Resume, RunConfig
from dpo_dist.distributed.checkpoint.saver import (
    Checkpoint,
    CheckpointSaver,
    checkpoint_state,
    drop_checkpoints,
    latest_checkpoint,
    reading_errors,
    remove_unfinished,
)
from dpo_dist.distributed.checkpoint.slices import SlicedWeights
from dpo_dist.distributed.deepspeed_config import unsharded_loading
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.zero import Engine, FrozenEngine, LossScale, PolicyEngine, load_to_train
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import DivergedError, ExitCode, RunOutcome, StoppedError, warn_on_bug
from dpo_dist.foundation.files import for_json, locked, recover_folder, remove_abandoned, write_text
from dpo_dist.foundation.installed import install_extra
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.foundation.text import first_few, pluralize
from dpo_dist.model.attention.kernels import computed_by_segment
from dpo_dist.model.experts import experts_kernel
from dpo_dist.model.files.load import TORCH_DTYPES
from dpo_dist.model.files.stops import padding_token, set_padding
from dpo_dist.model.flops import compute_costs, matmul_peak
from dpo_dist.model.states import lacks_delta_kernels
from dpo_dist.objective.metrics import CustomMetrics, MetricPlan
from dpo_dist.reference.engine import ReferenceProvider, run_start_check
from dpo_dist.training.after_checkpoint import AfterCheckpoint
from dpo_dist.training.export import export_checkpoint
from dpo_dist.training.reference import (
    REFERENCE,
    Reference,
    check_drift,
    choose_sample,
    describe_drift,
    prepare_reference,
    reference_without_store,
)
from dpo_dist.training.reporting.metrics_log import MetricsLog, final_and_best, read_rows
from dpo_dist.training.reporting.protocols import Reporting
from dpo_dist.training.reporting.recorder import Recorder
from dpo_dist.training.start.environment import describe_run, package_versions
from dpo_dist.training.start.footprint import check_disk_room
from dpo_dist.training.start.inputs import Inputs, check_keep_best, identify, load_inputs
from dpo_dist.training.start.open_run import Run, open_run, say_header
from dpo_dist.training.start.run_state import (
    RunState,
    check_configuration,
    check_identity,
    describe_changes,
    expected_start,
    model_damage,
    read_state,
    write_state,
)
from dpo_dist.training.steps.loop import Loop
from dpo_dist.training.steps.schedule import check_schedule
from dpo_dist.training.steps.state import Position
from dpo_dist.training.steps.step import Objective
from dpo_dist.training.teacher import PreparedTeacher, prepare_teacher


def train(config: RunConfig, console: Console, stop: StopRequest, reporting: Reporting) -> int:
    """Train `config`, from the last checkpoint if there is one; return the exit code.

    Call it inside `stop.listening()`.
    """
    with open_run(config, console, stop, trains=True) as run, lock_directory(run):
        run.stops.check()  # an import may have caught the StoppedError that a signal raised
        say_header(run)
        start = find_start(run)
        if isinstance(start, RunState):
            return _finish_complete_run(run, start, reporting)
        inputs, state, custom = _begin(run, start, reporting)
        with stop.deferred(), contextlib.ExitStack() as engines:
            try:
                loop, position = _set_up(run, start, inputs, state, custom, engines, reporting)
            except StoppedError:
                stopped = replace(state, outcome=RunOutcome.preempted, stopped_by=run.stops.agreed_reasons)
                if run.world.is_main:
                    with contextlib.suppress(OSError):
                        write_state(run.folder, stopped)
                raise
            if loop.recorder is not None:
                engines.enter_context(loop.recorder.trackers.finish_on_error())
            return run_to_its_end(loop, position, reporting.run_card)


@contextlib.contextmanager
def lock_directory(run: Run) -> Iterator[None]:
    """Lock the run directory until this start ends; remove unfinished files of a killed one. Collective."""
    folder = run.folder
    world = run.world
    with contextlib.ExitStack() as lock:
        world.on_main(lambda: lock.enter_context(locked(folder.lock, "is training in this run directory")))
        for path in (folder.path, folder.metrics, folder.samples, folder.logs, folder.wandb_id.parent):
            world.on_main(partial(remove_abandoned, path))
        world.on_main(partial(remove_unfinished, folder.checkpoints))
        yield


def find_start(run: Run) -> Checkpoint | RunState | None:
    """Return the checkpoint to continue from, or the state of a run that has its model; collective."""
    identity = run.config.identity
    folder = run.folder
    world = run.world
    resume = run.config.run.resume
    if resume is not Resume.never:
        world.on_main(partial(recover_folder, folder.model))
    with run.console.heartbeat("checking the files of the run"):
        expected = world.on_main(partial(expected_start, identity, resume, folder))
    if not isinstance(expected, Path):
        return expected
    checkpoint = latest_checkpoint(folder.checkpoints, world)
    assert checkpoint is not None, "the expected one, or an older one"
    damage = world.on_main(lambda: model_damage(identity, folder) if folder.model.is_dir() else [])
    if damage:
        run.warn(f"{folder.model} is damaged and written again: {first_few(damage, 'other file')}")
    world.on_main(partial(check_configuration, checkpoint.state, identity, folder))
    return checkpoint


def _begin(
    run: Run, checkpoint: Checkpoint | None, reporting: Reporting
) -> tuple[Inputs, RunState, CustomMetrics]:
    """Load and check the inputs, then write the files of this start; return inputs, state and own metrics.

    Collective.
    """
    config = run.config
    world = run.world
    environment, custom = describe_run(config, world)
    for name in ("loss", "metrics"):
        if f"{name}_function" in environment:
            run.say(f"{name}: {environment[f'{name}_function']}")
    inputs = load_inputs(run, trains=True)
    done = 0
    steps = inputs.sampler.steps
    if inputs.eval_set is not None and config.trainer.keep_best is not None:
        plan = MetricPlan(config.loss, inputs.eval_set.labels, is_evaluation=True, custom=custom)
        check_keep_best(config.trainer.keep_best, plan)
    identity = identify(config.identity, inputs)
    if checkpoint is not None:
        done = int(checkpoint.state["step"])
        world.on_main(partial(check_identity, checkpoint.state, identity, checkpoint.folder))
        batch = inputs.sampler.global_batch_pairs
        for change in world.on_main(partial(describe_changes, checkpoint.state, config, steps, batch)):
            run.say(change)
    check_schedule(config.optim, steps)
    state = RunState(RunOutcome.started, done, identity)
    world.on_main(partial(check_disk_room, run, inputs.weights, done, steps))
    record_start(run, environment, state, reporting.write_page)
    left = f", {done:,} of them done" if done else ""
    run.say(f"training: {steps_in_words(inputs.sampler, config.loss.unit)}{left}")
    return inputs, state, custom


def record_start(
    run: Run, environment: dict[str, Any], state: RunState, write_page: Callable[[RunFolder], object]
) -> None:
    """Write configuration, environment and state; remove the summary of an earlier start. Collective.

    Call it after all checks. A start at step 0 also removes samples, which may be of another model.
    """
    folder = run.folder

    def work() -> None:
        write_text(folder.config, to_yaml(run.config))
        write_text(folder.environment, json.dumps(environment, indent=2) + "\n")
        write_state(folder, state)
        if not state.step:
            shutil.rmtree(folder.samples, ignore_errors=True)
        if folder.summary.exists():
            folder.summary.unlink()
            with warn_on_bug(folder.report.name, run.warn):
                write_page(folder)

    run.write(work)


def _set_up(
    run: Run,
    checkpoint: Checkpoint | None,
    inputs: Inputs,
    state: RunState,
    custom: CustomMetrics,
    engines: contextlib.ExitStack,
    reporting: Reporting,
) -> tuple[Loop, Position]:
    """Load models, fill the store, load the checkpoint; return the loop and its position. Collective.

    `engines` gets the callbacks that free the loaded models.
    """
    config = run.config
    world = run.world
    # Prompts of samples are checked before a model is loaded: a mistake in them costs no loading.
    samples = reporting.prepare_samples(run, inputs, state.step)
    # The reference first: while it fills the store, no policy with its optimizer states is in memory.
    run.stops.check()
    scores = "scores" if config.loss.of_scores else "log-probs"
    run.note(f"loading the model, and checking its packed {scores} by its plain forward")
    prepared = _prepare_scored(run, inputs, engines, step0_follows=checkpoint is None)
    policy = load_policy(run, inputs)
    engines.push(partial(_free, policy, world))
    # In mode `adapter` the policy, with its adapter off, is the reference, too.
    reference = prepared.reference or reference_without_store(
        run, ReferenceProvider(policy=policy), policy_starts_as_reference=True
    )
    # How the ranks share the work of a step; after loading, which proves whether the model can be packed.
    costs = balance_costs(run, inputs, policy, reference)
    run.stops.check()
    objective = Objective(
        config.loss, reference.provider, inputs.router, custom, prepared.teacher.beside(policy)
    )
    # What a checkpoint holds, and what happens when one is committed.
    sharded: list[SlicedWeights] = [policy]
    reference_sync = None
    if config.loss.sync_reference.every is not None:
        engine = reference.provider.engine
        assert isinstance(engine, FrozenEngine)
        reference_sync = ReferenceSync(engine, policy, config.loss.sync_reference, world)
        sharded.append(reference_sync)
    command = None
    if world.is_main and config.run.after_checkpoint is not None:
        command = AfterCheckpoint(config.run.after_checkpoint, run.folder, run.console)
        run.after_checkpoint = command
        engines.callback(command.finish, lambda: True)  # after an error

    def committed(step: int) -> None:
        write_state(run.folder, replace(state, step=step))
        if command is not None:
            command.start(run.folder.checkpoint(step), checkpoints.end_deleting)

    checkpoints = CheckpointSaver(
        run.folder.checkpoints,
        config.trainer.keep_last,
        sharded,
        world,
        say=run.say,
        committed=committed,
        in_use=lambda: () if command is None else command.in_use(),
    )
    engines.callback(checkpoints.close)  # before the engines are freed: a save still reads their weights
    # The position: that of the checkpoint, or the start, where policy and reference must agree.
    if checkpoint is not None:
        for part in sharded:
            part.load_shards(checkpoint.folder)
        with reading_errors(checkpoint.folder):
            position = Position.from_state(checkpoint.state)
        run.say(f"resuming from {checkpoint.folder}, after step {position.step:,}")
        for name in checkpoint.damaged:
            run.warn(f"checkpoint {name} is damaged and not used")
        scale = checkpoint.state["loss_scale"]
        report = checkpoint.state["reference_report"]
        policy.set_loss_scale(None if scale is None else LossScale(**scale))
        checkpoints.resume(checkpoint.folder, position.best_step)
    else:
        position = Position()
        report = reference.report
        if "reference" in inputs.train_set.views:
            report = {**report, "reads_other_prompts": True}
        if prepared.teacher.report:
            report = {**report, "teacher": prepared.teacher.report}
        if reference.policy_starts_as_reference:
            policy.train(False)
            with run.console.heartbeat("comparing the log-probs of policy and reference"):
                sample = choose_sample(run, objective.reference.store, inputs.datasets_to_score, REFERENCE)
                drift = check_drift(run, policy.token_logps, objective, sample, costs)
            run.note(f"step-0 check passed: log-probs of policy and reference are {describe_drift(drift)}")
            report = {**report, "drift": drift}
    run.stops.check()
    if samples is not None:
        samples.open(policy)
    # The peak FLOP/s of all devices, measured while all of them work: some share power or a host.
    world.barrier()
    peak = sum(world.gather(matmul_peak(world.device, TORCH_DTYPES[config.model.dtype])))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # else the run's peak would count these matrices
    loop = Loop(
        run=run,
        inputs=inputs,
        costs=costs,
        policy=policy,
        objective=objective,
        policy_answers_as_reference=reference.policy_starts_as_reference
        and not any("reference" in dataset.views for dataset in inputs.datasets.values())
        and config.loss.weighting is not Weighting.wpo
        and not config.loss.needs_teacher,
        peak=peak,
        recorder=_open_recorder(run, position, reporting),
        samples=samples,
        on_step=reporting.on_step,
        reference_sync=reference_sync,
        checkpoints=checkpoints,
        identity=state.identity,
        reference_report=report,
    )
    return loop, position


class _Scored(NamedTuple):
    """The models that are only scored."""

    reference: Reference | None  # None: the policy with its adapter off
    teacher: PreparedTeacher


def _prepare_scored(
    run: Run, inputs: Inputs, engines: contextlib.ExitStack, *, step0_follows: bool
) -> _Scored:
    """Fill the store by the teacher and the reference, or load them beside the policy; collective."""
    teacher = prepare_teacher(run, inputs)
    if teacher.engine is not None:
        engines.push(partial(_free, teacher.engine, run.world))
    run.stops.check()
    if run.config.reference.mode is ReferenceMode.adapter:
        return _Scored(None, teacher)
    reference = prepare_reference(run, inputs, step0_follows=step0_follows)
    if reference.provider.engine is not None:
        engines.push(partial(_free, reference.provider.engine, run.world))
    run.stops.check()
    return _Scored(reference, teacher)


def _free(engine: Engine, world: World, error: type[BaseException] | None, *_: Any) -> None:
    """Free an engine.

    With several ranks, skip this after an error: freeing is collective and would wait for a rank that is
    exiting.
    """
    if error is None:
        engine.free()
    elif world.size == 1:
        with contextlib.suppress(RuntimeError):  # the device may have failed
            engine.free()


def load_policy(run: Run, inputs: Inputs) -> PolicyEngine:
    """Return the policy before training, with its adapter if it has one; collective."""
    config = run.config
    world = run.world
    files = inputs.policy_files
    longest = config.data.longest
    model = load_to_train(files.folder, config.model, longest, world, config.trainer.seed, files.adapter)
    if model.gives_scores:
        padding = padding_token(inputs.tokenizer, config.data)
        set_padding(model.causal_lm.config, inputs.tokenizer.convert_tokens_to_ids(padding))
    policy = PolicyEngine(model, config.optim, world, config.trainer.ema_decay, config.trainer.seed)
    texts = inputs.train_set.texts() if model.gives_scores else []
    run_start_check(policy, longest, world, processor=inputs.processor, texts=texts, trains=True)
    if world.device.type == "cuda":
        attention: str = model.backend
        if model.arrangement is not Arrangement.packed:
            attention = "the model itself"
        else:
            slow = computed_by_segment(model.causal_lm, model.backend, longest)
            if slow:
                attention += f", but {AttentionBackend.sdpa}, several times slower, for layers with {slow}"
        kernel = experts_kernel(model.causal_lm)
        experts = f"; experts by {kernel}" if kernel else ""
        run.note(f"kernels: attention by {attention}; fused layers: {model.fused}{experts}")
        if model.forks_states and lacks_delta_kernels(model.causal_lm):
            run.warn(
                "flash-linear-attention is not installed: plain PyTorch computes the delta rule, which takes "
                f"longer (docs/models.md); {install_extra('hybrid')}"
            )
    return policy


def balance_costs(run: Run, inputs: Inputs, policy: PolicyEngine, reference: Reference) -> ComputeCosts:
    """Return the costs that balance micro-batches; say if the policy cannot share prompts.

    A live reference scores the policy's micro-batches. If it pads rows, the padded rows must fit, too.
    """
    arrangement = policy.model.arrangement
    engine = reference.provider.engine
    if arrangement is not Arrangement.packed:
        how = "one response per forward"
        if arrangement is Arrangement.padded:
            how = "one response per row, padded to the longest of the micro-batch"
        run.say(f"unpacked: responses of this model cannot share a prompt in one forward: {how}")
    elif policy.model.forks_states:
        run.note("packed: recurrent layers compute a shared prompt once; each response starts in its state")
    reference_pads = engine is not None and engine.model.arrangement is Arrangement.padded
    prefixes = run.config.trainer.prefix_tree
    backend = policy.model.backend
    costs = compute_costs(inputs.flops, prefixes=prefixes, backend=backend, device=run.world.device)
    return replace(costs, arrangement=arrangement, reference_pads=reference_pads)


def _open_recorder(run: Run, position: Position, reporting: Reporting) -> Recorder | None:
    if not run.world.is_main:
        return None
    owes = position.evaluation_is_due
    resumed = position.step or None
    metrics = MetricsLog.open(run.folder, resumed, run.warn, evaluation_is_due=owes)
    return Recorder.open(run, metrics, reporting)


def _finish_complete_run(run: Run, finished: RunState, reporting: Reporting) -> int:
    """Check the inputs of a run that has its model, and write a missing report; collective."""
    world = run.world
    folder = run.folder
    environment, _ = describe_run(run.config, world)
    identity = identify(run.config.identity, load_inputs(run))
    world.on_main(partial(check_identity, finished.identity, identity, folder.state))
    if finished.outcome is RunOutcome.exported:
        assert finished.summary is not None
        recorder = _open_recorder(run, Position(finished.step), reporting)
        with run.stops.request.deferred():
            completed = replace(finished, outcome=RunOutcome.completed)
            finish(run, completed, recorder, finished.summary)
    report = f", report {folder.report}" if folder.report.exists() else ""
    run.say(f"{folder} is complete: model {folder.model}{report}")
    metrics_function = environment.get("metrics_function")
    former = folder.environment.read_text() if folder.environment.exists() else ""
    if metrics_function is not None and json.dumps(metrics_function) not in former:
        function = f"metrics.function={run.config.metrics.function}"
        run.say(f"to compute metrics of this function: dpo-dist evaluate run.dir={folder} {function}")
    if run.config.trainer.patience is None:
        run.say(f"to train it longer: run.dir={folder} and a larger trainer.epochs or trainer.max_steps")
    return ExitCode.completed


def run_to_its_end(loop: Loop, position: Position, run_card: Callable[..., str]) -> int:
    """Train until the run completes, stops or diverges; write its last files and return the exit code.

    If the process is killed between two of these files, the same command writes the missing ones.
    """
    run = loop.run
    identity = loop.identity
    try:
        outcome = RunOutcome.completed if loop.train(position) else RunOutcome.preempted
    except DivergedError:
        diverged = RunState(RunOutcome.diverged, position.step, identity)
        finish(run, diverged, loop.recorder, _summary(loop, position))
        raise
    summary = _summary(loop, position)
    if outcome is RunOutcome.preempted:
        why = run.stops.agreed_reasons
        state = RunState(outcome, position.step, identity, stopped_by=why)
        finish(run, state, loop.recorder, summary | {"stopped_by": why})
        return ExitCode.preempted
    best = position.best
    metric = run.config.trainer.keep_best
    step = position.step if best is None else best.step
    if position.step < loop.inputs.sampler.steps:
        summary["stopped_by"] = "trainer.patience"
        assert best is not None
        stale = pluralize(position.stale_evaluations, "evaluation")
        run.say(
            f"ending after step {position.step}: {best.metric} was best at step {best.step} "
            f"({best.value:.4g}), {stale} ago; the model has the weights of step {step}"
        )
    if metric is not None:
        summary["model_step"] = step
        run.say(f"the weights of step {step} of {position.step} are the model, by {metric}")
        if best is None:
            run.warn("no evaluation had a finite value of this metric: the model is that of the last step")
    _write_model(loop, step, summary, run_card)
    exported = RunState(RunOutcome.exported, position.step, identity, for_json(summary))
    completed = replace(exported, outcome=RunOutcome.completed)
    run.write(lambda: write_state(run.folder, exported))
    run.stops.check("after the model was written, before its report")
    finish(run, completed, loop.recorder, summary)
    return ExitCode.completed


def _summary(loop: Loop, position: Position) -> dict[str, Any]:
    """Return the content of summary.json without `exit`; collective."""
    world = loop.run.world
    peak_bytes = max(world.gather(peak_memory_bytes(world.device)))
    seconds = position.train_seconds
    results = final_and_best(loop.recorder.metrics.rows if loop.recorder is not None else [])
    best = position.best
    if best is not None:
        results["best"].setdefault(best.metric, {"value": best.value, "step": best.step})
    return {
        **results,
        "steps": position.step,
        "pairs_seen": position.pairs_seen,
        "global_batch_pairs": loop.inputs.sampler.global_batch_pairs,
        "bad_steps": position.health.bad_steps,
        "bad_in_a_row": position.health.bad_in_a_row,
        **({"overflows": position.health.overflows} if loop.policy.loss_scale is not None else {}),
        "train_seconds": seconds,
        "pairs_per_second": position.pairs_seen / seconds if seconds else 0.0,
        "peak_memory_bytes": peak_bytes,
        **({"best_checkpoint": asdict(best)} if best else {}),
        "reference": loop.reference_report,
        "world_size": world.size,
        "vocabulary": len(loop.inputs.tokenizer),
        "settings": settings(loop.run.config),
        "data": loop.inputs.counts,
    }


def _write_model(loop: Loop, step: int, summary: dict[str, Any], run_card: Callable[..., str]) -> None:
    """Write the checkpoint of `step` as the model of the run; collective."""
    run = loop.run
    is_last = step == summary["steps"]
    checkpoint = run.folder.checkpoint(step)

    def card(loader: str) -> str:
        assert loop.recorder is not None
        rows = loop.recorder.metrics.rows if is_last else read_rows(run.folder, step)
        ended = {**summary, "exit": RunOutcome.completed.value, "steps": step}
        ended["pairs_seen"] = checkpoint_state(checkpoint)["pairs_seen"]
        is_evaluated = loop.inputs.eval_set is not None and is_last
        versions = package_versions()
        return run_card(run.config, rows, ended, run.warn, versions, loader, is_evaluated=is_evaluated)

    def write() -> None:
        with unsharded_loading(run.world):
            export_checkpoint(checkpoint, run.folder.model, run.config, card, is_new=is_last)

    with run.console.heartbeat("writing the model"):
        run.world.on_main(write)


def finish(run: Run, state: RunState, recorder: Recorder | None, summary: dict[str, Any]) -> None:
    """Write a run's report and state, and delete its checkpoints if `keep_last` is 0. Collective.

    `recorder`: None on ranks above 0. `summary`: content of summary.json without `exit`.
    """

    def close() -> None:
        assert recorder is not None
        recorder.close(summary, state.outcome)

    with run.console.heartbeat("writing the report"):
        run.write(close)
    must_stop = run.stops.must_stop()

    def end() -> None:
        # The same command tries a diverged run again from its last checkpoint: keep the recorded step.
        former = read_state(run.folder) if state.outcome is RunOutcome.diverged else None
        write_state(run.folder, state if former is None else replace(state, step=former.step))
        # Behind the outcome: a command that hangs may last longer than the grace of a job.
        if run.after_checkpoint is not None:
            run.after_checkpoint.finish(lambda: must_stop or run.stops.request.is_urgent)
        if state.outcome is RunOutcome.completed and run.config.trainer.keep_last == 0:
            drop_checkpoints(run.folder.checkpoints)

    run.write(end)
