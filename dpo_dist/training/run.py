"""Build the parts of a run and connect them: the only module that does."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.losses import Weighting
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.distributed.checkpoint import Checkpoint, CheckpointSaver, load_checkpoint
from dpo_dist.distributed.slices import Sharded
from dpo_dist.distributed.world import Stops, World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import ExitCode, RunOutcome
from dpo_dist.foundation.process import BY_TRACKER, StopRequest
from dpo_dist.foundation.text import percent
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import MetricsLog
from dpo_dist.insight.metrics.trackers import open_trackers
from dpo_dist.insight.recorder import Recorder
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.reference.engine import ReferenceEngine, settle_engine
from dpo_dist.reference.scoring import LiveReference
from dpo_dist.training.finish import finish, keep_files, run_to_its_end
from dpo_dist.training.inputs import Inputs, ModelInputs, load_inputs
from dpo_dist.training.loop import Loop, check_keep_best, still_there
from dpo_dist.training.loss import Objective
from dpo_dist.training.reference import (
    Reference,
    adapter_reference,
    check_drift,
    describe_drift,
    open_reference_sync,
    over_starts,
    prepare_reference,
)
from dpo_dist.training.resume import (
    Identity,
    RunState,
    check_configuration,
    check_identity,
    describe_change,
    identify,
    write_state,
)
from dpo_dist.training.samples import prepare_samples
from dpo_dist.training.start import (
    Start,
    check_disk_room,
    describe_run,
    find_start,
    locked,
    mark_started,
    open_world,
    peak_flops,
    recorded_stop,
    say_header,
    say_steps,
    write_description,
)
from dpo_dist.training.state import Position, WorkClock

_SAMPLED_EXAMPLES = 10_000


def train(config: RunConfig, console: Console, stop: StopRequest) -> int:
    """Train as `config` says, from the last checkpoint if there is one; return the exit code.

    `stop` is listening.
    """
    began = time.monotonic()
    folder = RunFolder.of(config)
    with open_world(config, console, trains=True) as world, locked(folder, world):
        stops = Stops(stop, world)
        stops.check()  # a library may have caught an error that a signal raised while it was imported
        clock = WorkClock(world.size, began)
        say_header(config, world, console)
        start = find_start(config, folder, world)
        if start.finished is not None:
            return _complete(config, start.finished, stops, world, console)
        inputs, environment, state = _begin(config, start, world, console)
        with stop.deferred(), contextlib.ExitStack() as engines:
            with recorded_stop(folder, state, stops):
                kept, loop, position = _set_up(
                    config, start, inputs, environment, state.identity, stops, clock, console, engines
                )
            with _ended_trackers(loop):
                return run_to_its_end(loop, position, state.identity, kept)


def _begin(
    config: RunConfig, start: Start, world: World, console: Console
) -> tuple[Inputs, dict[str, Any], RunState]:
    """Read the inputs, and write the files of every start when no check refuses it any more; collective.

    Returns:
        Inputs, content of environment.json, and the state of the run.
    """
    environment = describe_run(config, world)
    if "loss_function" in environment:
        console.say(f"loss: {environment['loss_function']}")
    inputs = load_inputs(config, world, console, trains=True)
    steps = inputs.sampler.steps
    if inputs.eval_set is not None:
        check_keep_best(config, inputs.eval_set.labels)
    identity = identify(config, inputs)
    if start.checkpoint is not None:
        former = start.checkpoint
        world.on_main(partial(check_identity, former.state, identity, former.folder))
        if change := describe_change(former.state, config, steps):
            console.say(change)
    state = RunState(RunOutcome.started, start.step, identity)
    world.on_main(lambda: check_disk_room(config, inputs.weights, start.step, steps))
    write_description(config, environment, world)
    mark_started(RunFolder.of(config), state, world, console)
    say_steps(inputs.sampler, start.step, config.trainer.ema_decay, console)
    return inputs, environment, state


def _set_up(
    config: RunConfig,
    start: Start,
    inputs: Inputs,
    environment: dict[str, Any],
    identity: Identity,
    stops: Stops,
    clock: WorkClock,
    console: Console,
    engines: contextlib.ExitStack,
) -> tuple[dict[str, Any], Loop, Position]:
    """Return the files of the result, the loop and its position: load models, fill the store, load the
    checkpoint. Collective.

    `engines` frees what is loaded.
    """
    world, folder = stops.world, RunFolder.of(config)
    with clock.of("samples"):
        samples = prepare_samples(config, inputs, start.step, world, console)
    reference, policy = _load_models(config, start, inputs, stops, clock, console, engines)
    inputs = arranged(inputs, policy, reference, console)
    kept = keep_files(config, inputs, world)
    stops.check()
    objective = Objective(config.loss, reference.provider, inputs.router)
    reference_sync = open_reference_sync(config, reference.provider, policy, world)
    sharded: list[Sharded] = [policy] if reference_sync is None else [policy, reference_sync]
    checkpoints = CheckpointSaver(
        folder.checkpoints,
        config.trainer.keep_last,
        sharded,
        world,
        () if start.checkpoint is None else start.checkpoint.damaged,
        say=console.say,
        committed=lambda step: write_state(folder, RunState(RunOutcome.started, step, identity)),
    )
    engines.callback(checkpoints.close)  # before the weights that it writes are freed
    if start.checkpoint is not None:
        position = _resume(start.checkpoint, sharded, reference.report, clock, world, console)
        policy.set_loss_scale(position.loss_scale)
        checkpoints.resume(start.checkpoint.folder, [one.step for one in position.best])
    else:
        checked = _check_start(config, inputs, policy, reference, objective, world, console)
        position = Position(reference_report=reference.report | checked)
    stops.check()
    if samples is not None:
        with clock.of("samples"):
            samples.open(policy)
    loop = Loop(
        config=config,
        world=world,
        inputs=inputs,
        policy=policy,
        objective=objective,
        reference_sync=reference_sync,
        start_is_known=reference.is_policys_start and config.loss.weighting is not Weighting.wpo,
        peak=peak_flops(config, world),
        checkpoints=checkpoints,
        identity=identity,
        samples=samples,
        recorder=_open_recorder(config, position, stops, environment, console),
        console=console,
        clock=clock,
        stops=stops,
    )
    return kept, loop, position


def _load_models(
    config: RunConfig,
    start: Start,
    inputs: Inputs,
    stops: Stops,
    clock: WorkClock,
    console: Console,
    engines: contextlib.ExitStack,
) -> tuple[Reference, PolicyEngine]:
    """Load the reference, then the policy: a model that filled the store is freed before. Collective.

    With `reference.mode=adapter` the policy itself is the reference.
    """
    world, reference = stops.world, None
    stops.check()
    if config.reference.mode is not ReferenceMode.adapter:
        with clock.of("reference"):
            is_first = start.checkpoint is None
            reference = prepare_reference(config, inputs, world, console, stops, step0_follows=is_first)
        if isinstance(reference.provider, LiveReference):
            engines.push(partial(_free, reference.provider.engine, world))
        stops.check()
    policy = load_policy(config, inputs, world)
    engines.push(partial(_free, policy, world))
    return reference or adapter_reference(policy, inputs), policy


def _free(
    engine: PolicyEngine | ReferenceEngine, world: World, error: type[BaseException] | None, *_: Any
) -> None:
    """Free an engine; after an error only of a process alone: others end, and could be waited for."""
    if error is None:
        engine.free()
    elif world.size == 1:
        with contextlib.suppress(RuntimeError):  # of a device that has failed
            engine.free()


def load_policy(config: RunConfig, inputs: ModelInputs, world: World) -> PolicyEngine:
    """Return the policy at its start, with its adapter if it has one; collective."""
    folder = inputs.policy_files.folder
    model = load_packed(folder, config.model, config.data.max_length, world.device, sequence=world.sequence)
    if config.model.adapter is not None:
        add_adapter(model, config.model, config.trainer.seed, inputs.policy_files.adapter)
    policy = PolicyEngine(model, config.optim, world, config.trainer.ema_decay)
    settle_engine(policy, config.data.max_length, world, trains=True)
    return policy


def arranged(inputs: Inputs, policy: PolicyEngine, reference: Reference, console: Console) -> Inputs:
    """Return the inputs for the arrangement of a policy; print the cost of one that shares no prompts.

    A live reference computes the policy's micro-batches, which also fit the budget in its padded rows.
    """
    arrangement, provider, pads = policy.model.arrangement, reference.provider, False
    if isinstance(provider, LiveReference):
        pads = provider.engine.model.arrangement is Arrangement.padded
    inputs = replace(inputs, arrangement=arrangement, reference_pads=pads)
    if arrangement is Arrangement.packed:
        if pads:
            rows = "the reference computes padded rows, one response each; micro-batches fit them"
            console.say(f"unpacked: {rows}")
        return inputs
    dataset, visited = inputs.visited[0]
    sample = np.unique(visited[:_SAMPLED_EXAMPLES])
    responses, counts = dataset.response_indices(sample), dataset.response_counts(sample)
    packed, own = (
        dataset.sizes(sample, responses, counts, replace(inputs.costs, arrangement=each)).tokens.sum()
        for each in (Arrangement.packed, arrangement)
    )
    how = "one response per forward"
    if arrangement is Arrangement.padded:
        how = "one response per row, padded to the longest of the micro-batch"
    console.say(
        f"unpacked: responses of this model cannot share a prompt in one forward: {how}, "
        f"{percent(own / packed - 1)} more tokens than packed, padding not counted"
    )
    return inputs


def _resume(
    checkpoint: Checkpoint,
    sharded: Sequence[Sharded],
    report: dict[str, Any],
    clock: WorkClock,
    world: World,
    console: Console,
) -> Position:
    """Load a checkpoint into the engines and return its position; collective.

    `report`, of this start's reference, is added to that of the starts before, and so is the time of `clock`.
    """
    load_checkpoint(checkpoint, sharded, world)
    position = Position.of(checkpoint.state)
    position.best = world.on_main(lambda: still_there(position.best, checkpoint.folder.parent))
    position.reference_report = over_starts(position.reference_report, report)
    clock.resume(position.work)
    console.say(f"resuming from {checkpoint.folder}, after step {position.step:,}")
    for name in checkpoint.damaged:
        console.say(f"warning: checkpoint {name} is damaged and not used")
    return position


def _check_start(
    config: RunConfig,
    inputs: Inputs,
    policy: PolicyEngine,
    reference: Reference,
    objective: Objective,
    world: World,
    console: Console,
) -> dict[str, Any]:
    """Run the step-0 check if the policy starts as the reference model; return its report. Collective."""
    if not reference.is_policys_start:
        return {}
    policy.train(False)
    drift = check_drift(policy.token_logps, objective, *reference.audited, inputs.costs, config, world)
    console.say(f"step-0 check passed: log-probs of policy and reference are {describe_drift(drift)}")
    return {"drift": drift}


def _open_recorder(
    config: RunConfig, position: Position, stops: Stops, environment: dict[str, Any], console: Console
) -> Recorder | None:
    """Return the recorder of a run that continues at `position`; None on all ranks but 0."""
    if not stops.world.is_main:
        return None
    folder, owes = RunFolder.of(config), position.owes_evaluation
    metrics = MetricsLog.open(folder, position.step or None, console.say, owes_evaluation=owes)
    trackers = open_trackers(
        config,
        folder,
        partial(stops.request.ask, BY_TRACKER),
        rows=metrics.rows,
        environment=environment,
        say=console.say,
    )
    return Recorder(metrics, trackers, console.say)


@contextlib.contextmanager
def _ended_trackers(loop: Loop) -> Iterator[None]:
    """End the trackers of a run by the error that leaves the block."""
    trackers = None if loop.recorder is None else loop.recorder.trackers
    with contextlib.nullcontext() if trackers is None else trackers.ended_by_errors():
        yield


def _complete(config: RunConfig, finished: RunState, stops: Stops, world: World, console: Console) -> int:
    """Write the missing files of a run whose model is written, if its inputs are the same; collective."""
    folder = RunFolder.of(config)
    world.on_main(partial(check_configuration, finished.identity, config, folder))
    inputs = load_inputs(config, world, console)
    world.on_main(partial(check_identity, finished.identity, identify(config, inputs), folder.state))
    recorder = None
    if finished.outcome is RunOutcome.exported:
        environment = describe_run(config, world)
        write_description(config, environment, world)
        recorder = _open_recorder(config, Position(finished.step), stops, environment, console)
    with stops.request.deferred():
        finish(config, finished, recorder, world, console)
    console.say(f"{folder} is complete: model {folder.model}, report {folder.report}")
    console.say(f"to train it longer: run.dir={folder} and a larger trainer.epochs or trainer.max_steps")
    console.say("change the configuration or run.dir to train again")
    return ExitCode.completed
