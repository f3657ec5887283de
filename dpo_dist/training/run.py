"""The only place where the parts of a run are built and wired."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpo_dist.config.load import run_digest
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Offload, ReferenceMode, RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.checkpoint import CheckpointSaver, Sharded, load_checkpoint, saved_parallelism
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.engine import FrozenEngine, PolicyEngine
from dpo_dist.distributed.nvme import check_async_io
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.signals import StopRequest
from dpo_dist.distributed.world import World, start_world, stop_world
from dpo_dist.errors import ExitCode, Outcome
from dpo_dist.model.adapters import add_adapter
from dpo_dist.model.flops import PeakFlops, datasheet_peak, matmul_peak
from dpo_dist.model.load import TORCH_DTYPES, load_packed
from dpo_dist.model.numerics import use_deterministic_kernels
from dpo_dist.model.optional_packages import check_bitsandbytes
from dpo_dist.reference.digest import model_label
from dpo_dist.reference.engine import load_digested
from dpo_dist.reference.fill import FillReport
from dpo_dist.reference.providers import AdapterReference, LiveReference, NoReference, ReferenceProvider
from dpo_dist.reference.vocabulary import check_same_vocabulary
from dpo_dist.report.console import Console
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.recorder import Recorder
from dpo_dist.report.tracking import open_tracker
from dpo_dist.training.data_setup import Inputs, load_inputs
from dpo_dist.training.finish import Ending, finish, run_to_its_end
from dpo_dist.training.loop import Loop, Position
from dpo_dist.training.reference_check import describe_drift, pass_gate
from dpo_dist.training.reference_setup import stored_reference
from dpo_dist.training.run_start import describe_run, find_start, locked, mark_started
from dpo_dist.training.run_state import RunState, check_identity, identify
from dpo_dist.training.step import Objective


@dataclass(frozen=True)
class Reference:
    """The reference of a run and what getting it ready took.

    Attributes:
        is_policys_start: whether it is the model that the policy starts from, in the same precision.
        audited: a data set and rows of it whose reference values are to be tested by a fresh computation.
        report: for summary.json.
    """

    provider: ReferenceProvider
    is_policys_start: bool
    audited: tuple[PreferenceDataset, Indices]
    report: dict[str, Any]


def train(config: RunConfig, console: Console) -> int:
    """Train as `config` says, from the last checkpoint if there is one; returns the exit code."""
    folder = RunFolder.of(config)
    stop = StopRequest(config.trainer.stop_after_steps, config.trainer.max_seconds)
    with _world(config, console) as world, locked(folder, world, console):
        console.say(f"run directory: {folder}")
        start = find_start(config, folder, world)
        checkpoint = start.checkpoint
        if start.finished is not None:
            return _complete(config, start.finished, stop, world, console)
        environment = describe_run(config, folder, world)
        inputs = load_inputs(config, world, console)
        identity = identify(config, inputs)
        if checkpoint is not None:
            check_identity(checkpoint.state, identity, checkpoint.folder)
        first_step = checkpoint.state["step"] if checkpoint is not None else 0
        mark_started(folder, RunState(Outcome.started, first_step, identity), world)
        reference = build_reference(config, inputs, world, console)
        policy = _load_policy(config, inputs, world)
        world.together(inputs.policy_files.check_unchanged)
        if config.reference.mode is ReferenceMode.adapter:
            reference = replace(reference, provider=AdapterReference(policy))
        objective = Objective(config.loss, reference.provider)
        reference_sync = _reference_sync(config, reference.provider, policy, world)
        changing: list[Sharded] = [policy] if reference_sync is None else [policy, reference_sync]
        report = reference.report
        position = Position()
        if checkpoint is not None:
            load_checkpoint(checkpoint, changing, world)
            position = Position.of(checkpoint.state)
            console.say(f"resuming from {checkpoint.folder}")
            for name in checkpoint.damaged:
                console.say(f"warning: checkpoint {name} is damaged and not used")
        elif reference.is_policys_start and config.reference.audit_pairs:
            policy.train(False)
            drift = pass_gate(policy.token_logps, objective, *reference.audited, inputs.costs, config, world)
            report = {**report, "drift": drift}
            console.say(f"step-0 gate passed: {describe_drift(drift)}")
        loop = Loop(
            config=config,
            world=world,
            policy=policy,
            flops=inputs.flops,
            peaks=_peak_flops(config, world),
            objective=objective,
            reference_sync=reference_sync,
            sampler=inputs.sampler,
            train_set=inputs.train_set,
            eval_set=inputs.eval_set,
            costs=inputs.costs,
            recorder=_open_recorder(config, position.step, world, stop, environment, console),
            console=console,
            checkpoints=CheckpointSaver(
                folder.checkpoints,
                config.trainer.keep_last,
                changing,
                world,
                checkpoint.damaged if checkpoint is not None else (),
            ),
            identity={**identity, **saved_parallelism(config.parallelism)},
            stop_wanted=stop,
        )
        exit_code = run_to_its_end(loop, position, Ending(inputs, identity, report))
        if isinstance(reference.provider, LiveReference):
            reference.provider.engine.free()
        return exit_code


def _complete(
    config: RunConfig, finished: RunState, stop: StopRequest, world: World, console: Console
) -> int:
    """Write what a run whose model is written still lacks, if its inputs are those it had; collective."""
    folder = RunFolder.of(config)
    where = folder.state
    check_identity(finished.identity, {"run_digest": run_digest(config)}, where)
    check_identity(finished.identity, identify(config, load_inputs(config, world, console)), where)
    recorder = None
    if finished.outcome is Outcome.exported:
        environment = describe_run(config, folder, world)
        recorder = _open_recorder(config, finished.step, world, stop, environment, console)
    finish(config, finished, recorder, world, console)
    console.say(f"{folder} is complete; change the configuration or run.dir to train again")
    return ExitCode.completed


def _reference_sync(
    config: RunConfig, reference: ReferenceProvider, policy: PolicyEngine, world: World
) -> ReferenceSync | None:
    """What has the reference follow the policy, where `loss.sync_reference` says so."""
    sync = config.loss.sync_reference
    if sync.every is None:
        return None
    assert isinstance(reference, LiveReference)
    assert isinstance(reference.engine, FrozenEngine)
    return ReferenceSync(reference.engine, policy, sync, world)


def _load_policy(config: RunConfig, inputs: Inputs, world: World) -> PolicyEngine:
    """The policy at its start, with its adapter if it has one; collective."""
    model = load_packed(inputs.policy_files.folder, config.model, config.data.max_length, world.device)
    if config.model.adapter is not None:
        add_adapter(model, config.model, config.trainer.seed)
    return PolicyEngine(model, config.optim, world)


def _peak_flops(config: RunConfig, world: World) -> PeakFlops:
    """Return the peak of all devices, measured while all of them are busy; collective."""
    dtype = TORCH_DTYPES[config.model.dtype]
    is_cuda = world.device.type == "cuda"
    datasheet = datasheet_peak(torch.cuda.get_device_name(world.device), dtype) if is_cuda else None
    world.barrier()
    peaks = world.gather((matmul_peak(world.device, dtype), datasheet))
    sheets = [sheet for _, sheet in peaks if sheet is not None]
    return PeakFlops(sum(peak for peak, _ in peaks), sum(sheets) if len(sheets) == world.size else None)


def precompute(config: RunConfig, console: Console) -> int:
    """Fill the reference store with what the run of `config` would need, and end."""
    with _world(config, console) as world:
        console.say(f"run directory: {config.run.dir}")
        inputs = load_inputs(config, world, console)
        build_reference(config, inputs, world, console)
    return ExitCode.completed


@contextlib.contextmanager
def _world(config: RunConfig, console: Console) -> Iterator[World]:
    if config.reference.offload is Offload.nvme:
        check_async_io()
    if config.reference.quantization is not None:
        check_bitsandbytes(config.reference.quantization, "reference.quantization")
    if config.trainer.deterministic:
        use_deterministic_kernels()
    deepspeed_config = policy_config(config.parallelism, config.optim, config.model.dtype)
    world = start_world(deepspeed_config, config.parallelism.timeout_seconds)
    torch.manual_seed(config.trainer.seed)
    with world.watch(console.alarm):
        yield world
    stop_world()


def build_reference(config: RunConfig, inputs: Inputs, world: World, console: Console) -> Reference:
    """The provider of reference values; fills the store if it lacks any. Collective.

    In mode `adapter` it is the policy that provides them, once it is there.
    """
    mode = config.reference.mode
    audited = inputs.visited[0]
    if mode is ReferenceMode.none:
        report = {"mode": mode.value, **FillReport().as_dict()}
        return Reference(NoReference(), False, audited, report)
    files = inputs.reference_files
    assert files is not None, "there is one in every other mode"
    if config.reference.path:
        world.on_main(lambda: check_same_vocabulary(files.folder, inputs.tokenizer, config.model))
    same_precision = config.reference.quantization is config.model.quantization
    is_start = same_precision and files.digest == inputs.policy_files.digest
    report = FillReport().as_dict()
    if mode is ReferenceMode.adapter:
        provider: ReferenceProvider = NoReference()
        is_start = True
    elif mode is ReferenceMode.live:
        provider = LiveReference(load_digested(files, config, world))
    else:
        label = model_label(config.reference.path or config.model.path, files.folder)
        provider, report, audited = stored_reference(config, inputs, files, label, is_start, world, console)
    return Reference(provider, is_start, audited, {"mode": mode.value, **report})


def _open_recorder(
    config: RunConfig,
    step: int,
    world: World,
    stop: StopRequest,
    environment: dict[str, Any],
    console: Console,
) -> Recorder | None:
    """The recorder of a run that goes on after `step`; on rank 0 only."""
    if not world.is_main:
        return None
    folder = RunFolder.of(config)
    history = MetricsLog.open(folder, step or None, console.say)
    tracker = open_tracker(config, folder.path, stop.ask, environment=environment, say=console.say)
    return Recorder(history, tracker)
