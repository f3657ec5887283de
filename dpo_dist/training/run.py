"""Build a run's parts, connect them, and train; no other module does."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dpo_dist.batching.costs import Arrangement, ComputeCosts
from dpo_dist.batching.sampler import BatchSampler
from dpo_dist.batching.step_batch import RankBatch
from dpo_dist.config.load import to_yaml
from dpo_dist.config.losses import Weighting
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import AttentionBackend, ReferenceMode, Resume, RunConfig
from dpo_dist.data.encoded.dataset import PreferenceDataset
from dpo_dist.distributed.checkpoint.saver import (
    Checkpoint,
    CheckpointSaver,
    latest_checkpoint,
    reading_errors,
    remove_unfinished,
)
from dpo_dist.distributed.checkpoint.slices import SlicedWeights
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.zero import Engine, FrozenEngine, LossScale, PolicyEngine
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ExitCode, RunOutcome, StoppedError, warn_on_bug
from dpo_dist.foundation.files import locked, recover_folder, remove_abandoned, write_text
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.foundation.text import duration, percent, pluralize
from dpo_dist.model.attention.kernels import computed_by_segment
from dpo_dist.model.files.load import TORCH_DTYPES, load_packed
from dpo_dist.model.flops import REACHED_SHARES, compute_costs, matmul_peak, recomputed_share
from dpo_dist.model.lora import add_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.objective.metrics import MetricPlan, custom_metrics
from dpo_dist.reference.engine import ReferenceProvider, run_start_check
from dpo_dist.training.finish import complete_mirror, finish, run_to_its_end
from dpo_dist.training.mirror import Mirror
from dpo_dist.training.reference import (
    Reference,
    check_drift,
    describe_drift,
    describe_saving,
    prepare_reference,
    reference_without_store,
)
from dpo_dist.training.reporting.metrics_log import MetricsLog
from dpo_dist.training.reporting.protocols import Recorder, Reporting, When
from dpo_dist.training.start.environment import describe_run
from dpo_dist.training.start.footprint import check_disk_room
from dpo_dist.training.start.inputs import Inputs, identify, load_inputs
from dpo_dist.training.start.open_run import Run, open_run, say_header
from dpo_dist.training.start.resume import (
    RunState,
    check_configuration,
    check_fresh_start,
    check_identity,
    describe_change,
    find_finished,
    write_state,
)
from dpo_dist.training.steps.health import check_keep_best
from dpo_dist.training.steps.loop import Loop
from dpo_dist.training.steps.schedule import check_schedule
from dpo_dist.training.steps.state import Position
from dpo_dist.training.steps.step import Objective
from dpo_dist.training.steps.watch import Watch

_PLANNED_STEPS = 8  # at most, to say what shared prefixes save


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
        inputs, state = _begin(run, start, reporting)
        with stop.deferred(), contextlib.ExitStack() as engines:
            try:
                loop, position = _set_up(run, start, inputs, state, engines, reporting)
            except StoppedError:
                stopped = replace(state, outcome=RunOutcome.preempted, stopped_by=run.stops.agreed)
                if run.world.is_main:
                    with contextlib.suppress(OSError):
                        write_state(run.folder, stopped)
                raise
            with contextlib.nullcontext() if loop.recorder is None else loop.recorder.close_on_error():
                return run_to_its_end(loop, position, reporting.run_card)


@contextlib.contextmanager
def lock_directory(run: Run) -> Iterator[None]:
    """Lock the run directory until this start ends; remove unfinished files of a killed one. Collective."""
    folder, world = run.folder, run.world
    with contextlib.ExitStack() as lock:
        world.on_main(lambda: lock.enter_context(locked(folder.lock, "is training in this run directory")))
        for written in (folder.path, folder.metrics, folder.samples, folder.logs, folder.wandb_id.parent):
            world.on_main(partial(remove_abandoned, written))
        world.on_main(partial(remove_unfinished, folder.checkpoints))
        yield


def find_start(run: Run) -> Checkpoint | RunState | None:
    """Return the checkpoint to continue from, or the state of a run that has its model; collective."""
    identity, folder, world, resume = run.config.identity, run.folder, run.world, run.config.run.resume
    if run.config.run.mirror is not None:
        world.on_main(partial(_open_mirror, run, run.config.run.mirror))
    checkpoint = None
    if resume is not Resume.never:
        world.on_main(partial(recover_folder, folder.model))
        if finished := world.on_main(partial(find_finished, identity, folder)):
            return finished
        checkpoint = latest_checkpoint(folder.checkpoints, world)
    if checkpoint is None:
        world.on_main(partial(check_fresh_start, resume, folder))
    else:
        world.on_main(partial(check_configuration, checkpoint.state, identity, folder))
    return checkpoint


def _open_mirror(run: Run, url: str) -> None:
    """Open the mirror on rank 0, and download the run if it is further there than in the run directory."""
    with run.console.heartbeat(f"looking for the run in {url}"):
        run.mirror = Mirror(url, run.folder, run.config.trainer.keep_last, run.console)
        run.mirror.restore(run.config.identity, run.config.run.resume)


def _begin(run: Run, checkpoint: Checkpoint | None, reporting: Reporting) -> tuple[Inputs, RunState]:
    """Load and check the inputs, then write the files of this start; return inputs and state. Collective."""
    config, world = run.config, run.world
    environment = describe_run(run)
    for name in ("loss", "metrics"):
        if f"{name}_function" in environment:
            run.say(f"{name}: {environment[f'{name}_function']}")
    inputs = load_inputs(run, trains=True)
    done, steps = 0, inputs.sampler.steps
    if inputs.eval_set is not None and config.trainer.keep_best is not None:
        custom = custom_metrics(config.metrics.function, config.loss, world.device)
        plan = MetricPlan(config.loss, inputs.eval_set.labels, is_evaluation=True, custom=custom)
        check_keep_best(config.trainer.keep_best, plan)
    identity = identify(config.identity, inputs)
    if checkpoint is not None:
        done = int(checkpoint.state["step"])
        world.on_main(partial(check_identity, checkpoint.state, identity, checkpoint.folder))
        if change := world.on_main(partial(describe_change, checkpoint.state, config.trainer, steps)):
            run.say(change)
    check_schedule(config.optim, steps)
    state = RunState(RunOutcome.started, done, identity)
    world.on_main(partial(check_disk_room, run, inputs.weights, done, steps))
    record_start(run, environment, state, reporting.write_page)
    left = f", {done:,} of them done" if done else ""
    pairs = pluralize(inputs.sampler.global_batch_pairs, config.loss.unit)
    run.say(f"training: {pluralize(steps, 'step')} of {pairs}{left}")
    return inputs, state


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
            with warn_on_bug(folder.report.name, run.say):
                write_page(folder)

    run.write(work)


def _set_up(
    run: Run,
    checkpoint: Checkpoint | None,
    inputs: Inputs,
    state: RunState,
    engines: contextlib.ExitStack,
    reporting: Reporting,
) -> tuple[Loop, Position]:
    """Load models, fill the store, load the checkpoint; return the loop and its position. Collective.

    `engines` gets the callbacks that free the loaded models.
    """
    config, world = run.config, run.world
    # Prompts of samples are checked before a model is loaded: a mistake in them costs no loading.
    with run.clock.measure("samples"):
        samples = reporting.prepare_samples(run, inputs, state.step)
    # Models, and how they share the work of a step.
    reference, policy = _load_models(run, inputs, engines, step0_follows=checkpoint is None)
    costs = balance_costs(run, inputs, policy, reference)
    planned = planned_steps(run, inputs.train_set, inputs.sampler, costs)
    if saved := describe_prefixes(planned):
        run.say(saved)
    run.stops.check()
    custom = custom_metrics(config.metrics.function, config.loss, world.device)
    objective = Objective(config.loss, reference.provider, inputs.router, custom)
    # What a checkpoint holds, and what happens when one is committed.
    reference_sync = _follow_policy(run, reference, policy)
    sharded: list[SlicedWeights] = [policy] if reference_sync is None else [policy, reference_sync]
    watch = Watch(reporting.on_moment, run, inputs.sampler, policy)

    def committed(step: int) -> None:
        write_state(run.folder, replace(state, step=step))
        watch.at(When.saved, step)
        if run.mirror is not None:
            run.mirror.upload()

    checkpoints = CheckpointSaver(
        run.folder.checkpoints,
        config.trainer.keep_last,
        sharded,
        world,
        say=run.say,
        committed=committed,
        in_use=lambda: () if run.mirror is None else run.mirror.in_use(),
    )
    engines.callback(checkpoints.close)  # before the engines are freed: a save still reads their weights
    # The position: that of the checkpoint, or the start, where policy and reference must agree.
    if checkpoint is not None:
        position = _resume(run, checkpoint, sharded)
        scale, report = checkpoint.state["loss_scale"], checkpoint.state["reference_report"]
        policy.set_loss_scale(None if scale is None else LossScale(**scale))
        checkpoints.resume(checkpoint.folder, position.best_step)
    else:
        position, report = Position(), reference.report
        if reference.is_start_of_policy:
            policy.train(False)
            with run.console.heartbeat("comparing the log-probs of policy and reference"):
                drift = check_drift(run, policy.token_logps, objective, *inputs.datasets_to_score[0], costs)
            run.say(f"step-0 check passed: log-probs of policy and reference are {describe_drift(drift)}")
            report = {**report, "drift": drift}
    run.stops.check()
    if samples is not None:
        with run.clock.measure("samples"):
            samples.open(policy)
    peak = _peak_flops(run)
    if world.device.type == "cuda":
        run.say(
            _describe_duration(inputs, planned, position.step, peak / (1 + recomputed_share(config.model)))
        )
    loop = Loop(
        run=run,
        inputs=inputs,
        costs=costs,
        policy=policy,
        objective=objective,
        starts_as_reference=reference.is_start_of_policy and config.loss.weighting is not Weighting.wpo,
        peak=peak,
        recorder=_open_recorder(run, position, reporting),
        samples=samples,
        watch=watch,
        reference_sync=reference_sync,
        checkpoints=checkpoints,
        identity=state.identity,
        reference_report=report,
    )
    return loop, position


def _follow_policy(run: Run, reference: Reference, policy: PolicyEngine) -> ReferenceSync | None:
    sync, engine = run.config.loss.sync_reference, reference.provider.engine
    if sync.every is None:
        return None
    assert isinstance(engine, FrozenEngine)
    return ReferenceSync(engine, policy, sync, run.world)


def _load_models(
    run: Run, inputs: Inputs, engines: contextlib.ExitStack, *, step0_follows: bool
) -> tuple[Reference, PolicyEngine]:
    """Load the reference, then the policy; a model that fills the store is freed in between. Collective.

    With `reference.mode=adapter` the policy is also the reference.
    """
    # The reference first: while it fills the store, no policy with its optimizer states is in memory.
    reference = None
    run.stops.check()
    run.say("loading the model, and checking its packed log-probs by its plain forward")
    if run.config.reference.mode is not ReferenceMode.adapter:
        with run.clock.measure("reference"):
            reference = prepare_reference(run, inputs, step0_follows=step0_follows)
        if reference.provider.engine is not None:
            engines.push(partial(_free, reference.provider.engine, run.world))
        run.stops.check()
    policy = load_policy(run, inputs)
    engines.push(partial(_free, policy, run.world))
    return reference or reference_without_store(run, ReferenceProvider(policy=policy), is_start=True), policy


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
    config, world, files = run.config, run.world, inputs.policy_files
    longest = config.data.max_length
    model = load_packed(files.folder, config.model, longest, world.device, sequence=world.sequence)
    if config.model.adapter is not None:
        add_adapter(model, config.model, config.trainer.seed, files.adapter)
    policy = PolicyEngine(model, config.optim, world, config.trainer.ema_decay)
    run_start_check(policy, longest, world, processor=inputs.processor, trains=True)
    if world.device.type == "cuda":
        run.say(f"kernels: attention by {_describe_attention(model, longest)}; fused layers: {model.fused}")
    return policy


def _describe_attention(model: PackedCausalLM, longest: int) -> str:
    if model.arrangement is not Arrangement.packed:
        return "the model itself"
    if slow := computed_by_segment(model.causal_lm, model.backend, longest):
        return f"{model.backend}, but {AttentionBackend.sdpa}, several times slower, for layers with {slow}"
    return model.backend


def balance_costs(run: Run, inputs: Inputs, policy: PolicyEngine, reference: Reference) -> ComputeCosts:
    """Return the costs that balance micro-batches; say if the policy cannot share prompts.

    A live reference scores the policy's micro-batches. If it pads rows, the padded rows must fit, too.
    """
    arrangement, engine = policy.model.arrangement, reference.provider.engine
    if arrangement is not Arrangement.packed:
        how = "one response per forward"
        if arrangement is Arrangement.padded:
            how = "one response per row, padded to the longest of the micro-batch"
        run.say(f"unpacked: responses of this model cannot share a prompt in one forward: {how}")
    pads = engine is not None and engine.model.arrangement is Arrangement.padded
    prefixes, backend = run.config.trainer.prefix_tree, policy.model.backend
    costs = compute_costs(inputs.flops, prefixes=prefixes, backend=backend, device=run.world.device)
    return replace(costs, arrangement=arrangement, pads=pads)


def planned_steps(
    run: Run, dataset: PreferenceDataset, sampler: BatchSampler, costs: ComputeCosts
) -> list[RankBatch]:
    """Return the global batches of a few steps, spread over the first epoch."""
    steps = min(sampler.steps, math.ceil(sampler.pairs_per_epoch / sampler.global_batch_pairs))
    some = range(0, steps, math.ceil(steps / _PLANNED_STEPS))
    return [run.shard(dataset, sampler.indices(step), costs) for step in some]


def describe_prefixes(planned: Sequence[RankBatch]) -> str | None:
    """Return what shared prefixes save in these steps; None if it is little."""
    batches = [*planned, *(batch.partners for batch in planned if batch.partners is not None)]
    computed, tokens = (sum(getattr(b, name) for b in batches) for name in ("computed_tokens", "tokens"))
    saved = describe_saving(computed, tokens)
    return f"prefixes: {saved}" if saved else None


def _resume(run: Run, checkpoint: Checkpoint, sharded: Sequence[SlicedWeights]) -> Position:
    """Load a checkpoint into the engines and return its position; collective.

    The clock continues from the checkpoint's times.
    """
    for part in sharded:
        part.load_shards(checkpoint.folder)
    with reading_errors(checkpoint.folder):
        position = Position.from_state(checkpoint.state)
    run.clock.resume(checkpoint.state["work"])
    run.say(f"resuming from {checkpoint.folder}, after step {position.step:,}")
    for name in checkpoint.damaged:
        run.say(f"warning: checkpoint {name} is damaged and not used")
    return position


def _open_recorder(run: Run, position: Position, reporting: Reporting) -> Recorder | None:
    if not run.world.is_main:
        return None
    owes = position.owes_evaluation
    resumed, plan = position.step or None, MetricPlan(run.config.loss)
    keep = [band.step for band in run.config.metrics.bands]
    metrics = MetricsLog.open(run.folder, resumed, run.say, plan, owes_evaluation=owes, keep=keep)
    return reporting.open_recorder(run, metrics)


def _finish_complete_run(run: Run, finished: RunState, reporting: Reporting) -> int:
    """Check the inputs of a run that has its model, and write a missing report; collective."""
    world, folder = run.world, run.folder
    environment, written = describe_run(run), folder.environment
    identity = identify(run.config.identity, load_inputs(run))
    world.on_main(partial(check_identity, finished.identity, identity, folder.state))
    if finished.outcome is RunOutcome.exported:
        assert finished.summary is not None
        recorder = _open_recorder(run, Position(finished.step), reporting)
        with run.stops.request.deferred():
            completed = replace(finished, outcome=RunOutcome.completed)
            finish(run, completed, recorder, finished.summary)
    else:
        complete_mirror(run)
    run.say(f"{folder} is complete: model {folder.model}, report {folder.report}")
    wanted, former = environment.get("metrics_function"), written.read_text() if written.exists() else ""
    if wanted is not None and json.dumps(wanted) not in former:
        function = f"metrics.function={run.config.metrics.function}"
        run.say(f"to compute metrics of this function: dpo-dist evaluate run.dir={folder} {function}")
    if run.config.trainer.patience is None:
        run.say(f"to train it longer: run.dir={folder} and a larger trainer.epochs or trainer.max_steps")
    return ExitCode.completed


def _describe_duration(inputs: Inputs, planned: Sequence[RankBatch], done: int, peak: float) -> str:
    """Return in words how long the remaining steps take; `peak`: FLOP/s of all devices."""
    sampler = inputs.sampler
    work = sum(
        inputs.flops.step(some.computed_tokens, some.targets, some.attended, some.image_tokens)
        for some in planned
    ) / sum(some.pairs for some in planned)
    work *= (sampler.steps - done) * sampler.global_batch_pairs
    ends = (duration(work / peak / share) for share in REACHED_SHARES)
    shares = " to ".join(map(percent, REACHED_SHARES))
    return f"training takes about {' to '.join(ends)}, at {shares} of the measured peak of matrix products"


def _peak_flops(run: Run) -> float:
    """Return the peak FLOP/s of all devices, measured while all of them are busy; collective."""
    # Together, because devices that share power or a host are slower when all work.
    world = run.world
    world.barrier()
    peaks = world.gather(matmul_peak(world.device, TORCH_DTYPES[run.config.model.dtype]))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # else the run's peak would count these matrices
    return sum(peaks)
