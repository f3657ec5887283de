"""Build the parts of a run and connect them: the only module that does."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Offload, ReferenceMode, RunConfig
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.checkpoint_loading import Checkpoint, load_checkpoint
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.engine import FrozenEngine, PolicyEngine
from dpo_dist.distributed.joined import joined
from dpo_dist.distributed.nvme import check_async_io
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.signals import StopRequest
from dpo_dist.distributed.slices import Sharded
from dpo_dist.distributed.world import World
from dpo_dist.errors import ExitCode, RunOutcome
from dpo_dist.model.adapters import add_adapter
from dpo_dist.model.flops import PeakFlops, datasheet_peak, matmul_peak
from dpo_dist.model.load import TORCH_DTYPES, load_packed
from dpo_dist.model.numerics import deterministic_kernels
from dpo_dist.model.optional_packages import check_bitsandbytes
from dpo_dist.reference.providers import LiveReference, ReferenceProvider
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.recorder import Recorder
from dpo_dist.report.terminal.console import Console
from dpo_dist.report.trackers.run_trackers import open_trackers, sampled_system
from dpo_dist.training.batch_loss import Objective
from dpo_dist.training.data_setup import Inputs, ModelInputs, load_inputs
from dpo_dist.training.disk_room import Sizes, check_disk_room
from dpo_dist.training.finish import finish, run_to_its_end
from dpo_dist.training.loop import Loop
from dpo_dist.training.position import Position
from dpo_dist.training.reference_check import check_drift, describe_drift
from dpo_dist.training.reference_setup import Reference, adapter_reference, over_starts, prepare_reference
from dpo_dist.training.run_start import Start, describe_run, find_start, locked, mark_started
from dpo_dist.training.run_state import Identity, RunState, check_configuration, check_identity, identify
from dpo_dist.training.samples_setup import prepare_samples
from dpo_dist.training.work_clock import WorkClock


def train(config: RunConfig, console: Console) -> int:
    """Train as `config` says, from the last checkpoint if there is one; return the exit code."""
    began = time.monotonic()
    stop = StopRequest(config.trainer.stop_after_steps, config.trainer.max_seconds)
    folder = RunFolder.of(config)
    with stop.listening(), open_world(config, console) as world, locked(folder, world, console):
        console.say(f"run directory: {folder}")
        clock = WorkClock(world.size, began)
        start = find_start(config, folder, world)
        if start.finished is not None:
            return _complete(config, start.finished, stop, world, console)
        environment = describe_run(config, folder, world)
        if "loss_function" in environment:
            console.say(f"loss: {environment['loss_function']}")
        inputs = load_inputs(config, world, console)
        identity = identify(config, inputs)
        if start.checkpoint is not None:
            former = start.checkpoint
            world.on_main(partial(check_identity, former.state, identity, former.folder, inputs.named))
        mark_started(folder, RunState(RunOutcome.started, start.step, identity), world, console)

        _look_for_room(config, start, inputs, world, console)
        with clock.of("samples"):
            samples = prepare_samples(config, inputs, start.step, world, console)
        reference, policy = _load_models(config, inputs, world, clock, console)
        world.together(inputs.policy_files.check_unchanged)
        objective = Objective(config.loss, reference.provider)
        reference_sync = _reference_sync(config, reference.provider, policy, world)
        sharded: list[Sharded] = [policy] if reference_sync is None else [policy, reference_sync]
        checkpoints = _checkpoint_saver(config, start, inputs, sharded, world, console)
        if start.checkpoint is not None:
            position = _resume(start.checkpoint, sharded, reference.report, clock, world, console)
        else:
            checked = _check_start(config, inputs, policy, reference, objective, world, console)
            position = Position(reference_report=reference.report | checked)
        loop = Loop(
            config=config,
            world=world,
            inputs=inputs,
            policy=policy,
            objective=objective,
            reference_sync=reference_sync,
            peaks=_peak_flops(config, world),
            checkpoints=checkpoints,
            identity=identity,
            samples=None if samples is None else samples.open(policy, clock),
            recorder=_open_recorder(config, position.step, world, stop, environment, console),
            console=console,
            clock=clock,
            stop=stop,
        )
        with contextlib.closing(checkpoints):
            exit_code = _run_tracked(loop, position, identity)
        if isinstance(reference.provider, LiveReference):
            reference.provider.engine.free()
        policy.free()
        return exit_code


def _run_tracked(loop: Loop, position: Position, identity: Identity) -> int:
    """Train to the end of the run with its trackers, and return the exit code; collective."""
    trackers = None if loop.recorder is None else loop.recorder.trackers
    with (
        contextlib.nullcontext() if trackers is None else trackers.ended_by_errors(),
        sampled_system(loop.config, loop.world, trackers),
    ):
        return run_to_its_end(loop, position, identity)


def precompute(config: RunConfig, console: Console) -> int:
    """Fill the reference store with all log-probs that the run of `config` uses; return the exit code."""
    with open_world(config, console) as world:
        console.say(f"run directory: {config.run.dir}")
        inputs = load_inputs(config, world, console)
        prepare_reference(config, inputs, world, console)
        console.say(f"reference: all log-probs of this run are in the store {config.reference.store}")
    return ExitCode.completed


def _complete(
    config: RunConfig, finished: RunState, stop: StopRequest, world: World, console: Console
) -> int:
    """Write the missing files of a run whose model is written, if its inputs are the same; collective."""
    folder = RunFolder.of(config)
    world.on_main(partial(check_configuration, finished.identity, config, folder))
    inputs = load_inputs(config, world, console)
    identity = identify(config, inputs)
    world.on_main(partial(check_identity, finished.identity, identity, folder.state, inputs.named))
    recorder = None
    if finished.outcome is RunOutcome.exported:
        environment = describe_run(config, folder, world)
        recorder = _open_recorder(config, finished.step, world, stop, environment, console)
    finish(config, finished, recorder, world, console)
    console.say(f"{folder} is complete: model {folder.model}, report {folder.report}")
    console.say("change the configuration or run.dir to train again")
    return ExitCode.completed


def _load_models(
    config: RunConfig, inputs: Inputs, world: World, clock: WorkClock, console: Console
) -> tuple[Reference, PolicyEngine]:
    """Load the reference, then the policy: a model that filled the store is freed before. Collective.

    With `reference.mode=adapter` the policy itself is the reference.
    """
    if config.reference.mode is ReferenceMode.adapter:
        policy = load_policy(config, inputs, world)
        return adapter_reference(policy, inputs), policy
    with clock.of("reference"):
        reference = prepare_reference(config, inputs, world, console)
    return reference, load_policy(config, inputs, world)


def load_policy(config: RunConfig, inputs: ModelInputs, world: World) -> PolicyEngine:
    """Return the policy at its start, with its adapter if it has one; collective."""
    model = load_packed(inputs.policy_files.folder, config.model, config.data.max_length, world.device)
    if config.model.adapter is not None:
        add_adapter(model, config.model, config.trainer.seed)
    return PolicyEngine(model, config.optim, world)


def _look_for_room(config: RunConfig, start: Start, inputs: Inputs, world: World, console: Console) -> None:
    """Check the room on the disk before models are loaded, if all weights are trained; collective."""
    if config.model.adapter is None:
        sizes = world.on_main(lambda: Sizes.of_files(inputs.policy_files.folder, config))
        check_disk_room(config, sizes, start.step, inputs.sampler.steps, world, console)


def _checkpoint_saver(
    config: RunConfig,
    start: Start,
    inputs: Inputs,
    sharded: Sequence[Sharded],
    world: World,
    console: Console,
) -> CheckpointSaver:
    """Return the saver of a run whose disk has room for its checkpoints; collective."""
    sizes = Sizes.of_slices([part.shards() for part in sharded], config, world)
    check_disk_room(config, sizes, start.step, inputs.sampler.steps, world, console)
    return CheckpointSaver(
        RunFolder.of(config).checkpoints,
        config.trainer.keep_last,
        sharded,
        world,
        () if start.checkpoint is None else start.checkpoint.damaged,
        behind=config.trainer.save_behind,
        say=console.say,
    )


def _resume(
    checkpoint: Checkpoint,
    sharded: Sequence[Sharded],
    report: dict[str, Any],
    clock: WorkClock,
    world: World,
    console: Console,
) -> Position:
    """Load a checkpoint into the engines and return its position; collective.

    Args:
        report: of this start's reference; added to that of the starts before.
        clock: of this start; continues the time of the starts before.
    """
    load_checkpoint(checkpoint, sharded, world)
    position = Position.of(checkpoint.state)
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
    if not (reference.is_policys_start and config.reference.audit_pairs):
        return {}
    policy.train(False)
    drift = check_drift(policy.token_logps, objective, *reference.audited, inputs.costs, config, world)
    console.say(f"step-0 check passed: log-probs of policy and reference are {describe_drift(drift)}")
    return {"drift": drift}


def _reference_sync(
    config: RunConfig, reference: ReferenceProvider, policy: PolicyEngine, world: World
) -> ReferenceSync | None:
    """Return the updater of a reference that follows the policy; None without `loss.sync_reference`."""
    sync = config.loss.sync_reference
    if sync.every is None:
        return None
    assert isinstance(reference, LiveReference)
    assert isinstance(reference.engine, FrozenEngine)
    return ReferenceSync(reference.engine, policy, sync, world)


def _peak_flops(config: RunConfig, world: World) -> PeakFlops:
    """Return the peak of all devices, measured while all of them are busy; collective."""
    dtype = TORCH_DTYPES[config.model.dtype]
    is_cuda = world.device.type == "cuda"
    datasheet = datasheet_peak(torch.cuda.get_device_name(world.device), dtype) if is_cuda else None
    world.barrier()
    peaks = world.gather((matmul_peak(world.device, dtype), datasheet))
    sheets = [sheet for _, sheet in peaks if sheet is not None]
    return PeakFlops(sum(peak for peak, _ in peaks), sum(sheets) if len(sheets) == world.size else None)


@contextlib.contextmanager
def open_world(config: RunConfig, console: Console) -> Iterator[World]:
    """Yield the world of this process's launch, set up as `config` says; collective."""
    if config.reference.offload is Offload.nvme:
        check_async_io()
    if config.reference.quantization is not None:
        check_bitsandbytes(config.reference.quantization, "reference.quantization")
    deepspeed_config = policy_config(config.parallelism, config.optim, config.model.dtype)
    with (
        deterministic_kernels(config.trainer.deterministic),
        joined(deepspeed_config, config.parallelism.timeout_seconds, console.alarm) as world,
    ):
        torch.manual_seed(config.trainer.seed)
        yield world


def _open_recorder(
    config: RunConfig,
    step: int,
    world: World,
    stop: StopRequest,
    environment: dict[str, Any],
    console: Console,
) -> Recorder | None:
    """Return the recorder of a run that continues after `step`; None on all ranks but 0."""
    if not world.is_main:
        return None
    folder = RunFolder.of(config)
    metrics = MetricsLog.open(folder, step or None, console.say)
    trackers = open_trackers(
        config,
        folder,
        partial(stop.ask, "the tracker"),
        rows=metrics.rows,
        environment=environment,
        say=console.say,
    )
    return Recorder(metrics, trackers, console.say)
