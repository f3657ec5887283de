"""The only place where the parts of a run are built and wired."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder, write_text
from dpo_dist.config.load import run_digest, to_yaml
from dpo_dist.config.schema import ReferenceMode, Resume, RunConfig, SourceConfig
from dpo_dist.data.dataset import PairDataset, open_dataset
from dpo_dist.data.prepare import prepare_dataset
from dpo_dist.data.schedule import Rows, Schedule, make_schedule
from dpo_dist.distributed.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from dpo_dist.distributed.runtime import World, start_world, stop_world
from dpo_dist.distributed.zero import FrozenEngine, PolicyEngine, policy_config
from dpo_dist.errors import CheckpointError, ConfigError, DivergedError
from dpo_dist.model.attention import choose_backend
from dpo_dist.model.load import load_packed, load_tokenizer, model_folder, numerics_of
from dpo_dist.reference.engine import load_reference
from dpo_dist.reference.fill import FillReport, Scorer, fill_store, open_filled
from dpo_dist.reference.key import ReferenceSpace, model_digest, tokenizer_digest
from dpo_dist.reference.provider import LiveReference, NoReference, ReferenceProvider, StoredReference
from dpo_dist.reference.store import LogpStore
from dpo_dist.report.console import Console
from dpo_dist.report.environment import describe_environment
from dpo_dist.report.history import History, final_and_best
from dpo_dist.report.page import METRICS_FOLDER
from dpo_dist.report.recorder import Recorder
from dpo_dist.report.tracking import open_tracker
from dpo_dist.training.gate import pass_gate
from dpo_dist.training.loop import Loop, Position, StopRequest
from dpo_dist.training.step import Objective

EXIT_COMPLETED = 0
EXIT_PREEMPTED = 75


@dataclass(frozen=True)
class Inputs:
    """What is there before any weights are loaded."""

    policy_folder: Path
    tokenizer: PreTrainedTokenizerBase
    train_set: PairDataset
    eval_set: PairDataset | None
    schedule: Schedule

    @property
    def visited(self) -> list[tuple[PairDataset, Rows]]:
        """Each data set with the rows of it that the run visits."""
        visited = [(self.train_set, self.schedule.all_rows())]
        if self.eval_set is not None:
            visited.append((self.eval_set, np.arange(len(self.eval_set), dtype=np.int64)))
        return visited


@dataclass(frozen=True)
class Reference:
    """The reference of a run and what getting it ready took."""

    provider: ReferenceProvider
    is_policys_start: bool
    report: dict[str, Any]


def train(config: RunConfig, console: Console) -> int:
    """Train as `config` says, from the last checkpoint if there is one; returns the exit code."""
    run_dir = Path(str(config.run.dir))
    with _world(config) as world, _locked(run_dir, world):
        checkpoint = _find_checkpoint(config, run_dir, world)
        if checkpoint is not None and _is_complete(checkpoint, run_dir):
            console.say(f"{run_dir} is complete; change the configuration or run.dir to train again")
            return EXIT_COMPLETED
        _describe_run(config, run_dir, world)
        inputs = load_inputs(config, world, console)
        reference = build_reference(config, inputs, world, console)
        policy = _build_policy(config, inputs, world)
        objective = Objective(config.loss, reference.provider)
        report = reference.report
        position = Position()
        if checkpoint is not None:
            load_checkpoint(checkpoint, policy, world)
            position = Position(**{name: checkpoint.state[name] for name in vars(position)})
            console.say(f"resuming from {checkpoint.folder}")
        elif reference.is_policys_start and config.reference.audit_pairs:
            drift = pass_gate(policy, objective, *inputs.visited[0], config, world)
            report = {**report, "drift": drift}
            console.say(f"step-0 gate passed: {json.dumps(drift)}")
        stop = StopRequest(config.trainer.stop_after_steps, config.trainer.max_seconds)
        recorder = _open_recorder(config, run_dir, world, position, stop)
        loop = Loop(
            config=config,
            world=world,
            policy=policy,
            objective=objective,
            schedule=inputs.schedule,
            train_set=inputs.train_set,
            eval_set=inputs.eval_set,
            recorder=recorder,
            console=console,
            identity=_identity(config, inputs),
            stop_wanted=stop,
        )
        return _run(loop, position, inputs, report)


def _run(loop: Loop, position: Position, inputs: Inputs, reference: dict[str, Any]) -> int:
    """Run the loop to whatever end it has, and leave the files that tell of it."""
    run_dir = Path(str(loop.config.run.dir))
    outcome = "diverged"
    try:
        outcome = "completed" if loop.run(position) else "preempted"
        if outcome == "completed":
            _export(loop.policy, inputs.tokenizer, run_dir / "model", loop.world)
    except DivergedError:
        _close(loop, position, outcome, inputs, reference)
        raise
    _close(loop, position, outcome, inputs, reference)
    if outcome == "preempted":
        loop.console.say(f"stopped after step {position.step}; the same command goes on from there")
        return EXIT_PREEMPTED
    loop.console.say(f"model: {run_dir / 'model'}   report: {run_dir / 'report.html'}")
    return EXIT_COMPLETED


def precompute(config: RunConfig, console: Console) -> int:
    """Fill the reference store with what the run of `config` would need, and end."""
    if config.reference.mode is not ReferenceMode.cached:
        raise ConfigError(
            "only a stored reference can be precomputed",
            where="reference.mode",
            got=config.reference.mode,
            expected="cached",
        )
    with _world(config) as world:
        inputs = load_inputs(config, world, console)
        build_reference(config, inputs, world, console)
    return EXIT_COMPLETED


@contextlib.contextmanager
def _world(config: RunConfig) -> Iterator[World]:
    deepspeed_config = policy_config(config.parallelism, config.optim, config.model.dtype)
    world = start_world(deepspeed_config, config.parallelism.timeout_seconds)
    torch.manual_seed(config.trainer.seed)
    with world.watch():
        yield world
    stop_world()


@contextlib.contextmanager
def _locked(run_dir: Path, world: World) -> Iterator[None]:
    """Keep a second start of the same run out of its folder; a dead process holds nothing."""
    files = []

    def lock() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
        files.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                "another process is training in this run folder",
                where=str(run_dir),
                remedy="wait for it, or set another run.dir",
            ) from None

    world.on_main(lock)
    try:
        yield
    finally:
        for file in files:
            file.close()


def _find_checkpoint(config: RunConfig, run_dir: Path, world: World) -> Checkpoint | None:
    """The checkpoint to go on from, as `run.resume` wants it."""
    root = run_dir / "checkpoints"
    if config.run.resume is Resume.never:
        world.on_main(partial(_refuse_used_folder, run_dir))
        return None
    checkpoint = latest_checkpoint(root, world)
    if checkpoint is None and config.run.resume is Resume.must:
        raise CheckpointError(
            "there is no checkpoint to resume from",
            where=str(root),
            remedy="set run.resume=auto to start afresh",
        )
    if checkpoint is not None and checkpoint.state["run_digest"] != run_digest(config):
        raise CheckpointError(
            "the run folder belongs to another configuration",
            where=str(run_dir),
            got=f"digest {run_digest(config)}",
            expected=f"digest {checkpoint.state['run_digest']}, see its config.yaml",
            remedy="leave run.dir out, so that every configuration has its own, or name another one",
        )
    return checkpoint


def _refuse_used_folder(run_dir: Path) -> None:
    used = [name for name in ("checkpoints", METRICS_FOLDER, "model") if (run_dir / name).exists()]
    if used:
        raise CheckpointError(
            "the run folder is in use and run.resume=never",
            where=str(run_dir),
            got=", ".join(used),
            remedy="set run.resume=auto to go on, or another run.dir",
        )


def _is_complete(checkpoint: Checkpoint, run_dir: Path) -> bool:
    return bool(checkpoint.state["step"] == checkpoint.state["steps"]) and (run_dir / "model").is_dir()


def _describe_run(config: RunConfig, run_dir: Path, world: World) -> None:
    def write() -> None:
        write_text(run_dir / "config.yaml", to_yaml(config))
        environment = describe_environment(world.size)
        write_text(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")

    world.on_main(write)


def load_inputs(config: RunConfig, world: World, console: Console) -> Inputs:
    """Tokenizer and encoded data; rank 0 reads and encodes, all map the result. Collective."""
    folder = world.on_main(lambda: model_folder(config.model.path, config.model.revision))
    tokenizer = load_tokenizer(folder, config.model)
    train_set = _encode(config, config.data.train, folder, tokenizer, world)
    eval_set = None
    if config.data.eval:
        eval_set = _encode(config, config.data.eval, folder, tokenizer, world)
    for name, dataset in (("train", train_set), ("eval", eval_set)):
        if dataset is not None:
            console.say(f"{name} data: {_told(dataset.counts)}")
    spans = train_set.spans([source.weight for source in config.data.train])
    return Inputs(folder, tokenizer, train_set, eval_set, make_schedule(spans, config.trainer))


def _encode(
    config: RunConfig,
    sources: Sequence[SourceConfig],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> PairDataset:
    encoded = world.on_main(
        lambda: prepare_dataset(sources, config.data, tokenizer, tokenizer_digest(folder))
    )
    return world.together(lambda: open_dataset(encoded, config.data))


def _told(counts: dict[str, Any]) -> str:
    """Counts as one line: what was kept, and every reason for which something was not."""
    told = [f"{counts['kept']} of {counts['read']} records kept"]
    told += [f"{number} dropped ({reason})" for reason, number in sorted(counts["dropped"].items())]
    told += [
        f"{counts[name]} {name.replace('_', ' ')}" for name in sorted(counts) if _is_change(name, counts)
    ]
    return ", ".join(told)


def _is_change(name: str, counts: dict[str, Any]) -> bool:
    return name not in ("read", "kept", "dropped", "examples") and counts[name] > 0


def build_reference(config: RunConfig, inputs: Inputs, world: World, console: Console) -> Reference:
    """The provider of reference values; fills the store if it lacks any. Collective."""
    mode = config.reference.mode
    if mode is ReferenceMode.none:
        return Reference(NoReference(), False, {"mode": mode.value, **FillReport().as_dict()})
    path = config.reference.path or config.model.path
    revision = config.reference.revision if config.reference.path else config.model.revision
    folder = world.on_main(lambda: model_folder(path, revision, "reference.path"))
    store_root = Path(config.reference.store)
    digest = world.on_main(lambda: model_digest(folder, store_root))
    is_start = digest == world.on_main(lambda: model_digest(inputs.policy_folder, store_root))
    if mode is ReferenceMode.live:
        engine = load_reference(folder, config, world)
        return Reference(LiveReference(engine), is_start, {"mode": mode.value, **FillReport().as_dict()})
    backend = choose_backend(config.model.attention, config.model.dtype, world.device)
    space = ReferenceSpace(digest, numerics_of(config.model, backend, world.device))
    open_store = partial(LogpStore.open, store_root, space)
    report = _fill(config, inputs, folder, open_store, world, console)
    console.say(f"reference: {report.hits} rows found in the store, {report.computed} computed")
    store = open_filled(open_store, world)
    return Reference(StoredReference(store), is_start, {"mode": mode.value, **report.as_dict()})


def _fill(
    config: RunConfig,
    inputs: Inputs,
    folder: Path,
    open_store: Callable[[Sequence[str] | None], LogpStore],
    world: World,
    console: Console,
) -> FillReport:
    """Fill the store for all data of the run; the engine is loaded if needed, once, and freed."""
    engines: list[FrozenEngine] = []

    def scorer() -> Scorer:
        if not engines:
            engines.append(load_reference(folder, config, world))
        return engines[0].token_logps

    report = FillReport()
    for dataset, rows in inputs.visited:
        with console.bar("reference", 0, 0, "pair") as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report += fill_store(
                open_store,
                dataset,
                rows,
                scorer,
                world,
                config.trainer.micro_batch_tokens,
                config.reference.rows_per_shard,
                progress,
            )
    for engine in engines:
        engine.free()
    return report


def _build_policy(config: RunConfig, inputs: Inputs, world: World) -> PolicyEngine:
    model = load_packed(inputs.policy_folder, config.model, config.data.max_length, world.device)
    return PolicyEngine(model, config.optim, world)


def _identity(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    return {"run_digest": run_digest(config), "data_fingerprint": inputs.train_set.fingerprint}


def _open_recorder(
    config: RunConfig, run_dir: Path, world: World, position: Position, stop: StopRequest
) -> Recorder | None:
    if not world.is_main:
        return None
    environment = describe_environment(world.size)
    history = History.open(run_dir / METRICS_FOLDER, position.step or None)
    return Recorder(run_dir, history, open_tracker(config, run_dir, stop.ask, environment=environment))


def _export(policy: PolicyEngine, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World) -> None:
    """Write the result as a folder that transformers loads; collective."""
    weights = policy.whole_weights()

    def write() -> None:
        with staged_folder(folder) as temporary:
            policy.causal_lm.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
            tokenizer.save_pretrained(temporary)

    world.on_main(write)


def _close(loop: Loop, position: Position, outcome: str, inputs: Inputs, reference: dict[str, Any]) -> None:
    """Write summary, curves and report; collective: no rank leaves before rank 0 has written."""
    peak_bytes = max(loop.world.gather(_peak_bytes(loop.world)))
    if loop.recorder is not None:
        seconds = position.train_seconds
        data = {"train": inputs.train_set.counts}
        if inputs.eval_set is not None:
            data["eval"] = inputs.eval_set.counts
        summary = {
            **final_and_best(loop.recorder.history.rows),
            "steps": position.step,
            "pairs_seen": position.pairs_seen,
            "train_seconds": seconds,
            "pairs_per_second": position.pairs_seen / seconds if seconds else 0.0,
            "peak_memory_bytes": peak_bytes,
            "reference": reference,
            "world_size": loop.world.size,
            "data": data,
            "exit": outcome,
        }
        loop.recorder.close(summary)
    loop.world.barrier()


def _peak_bytes(world: World) -> int:
    """GPU memory where there is one, else the largest resident set of this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # noqa: PLC0415  (POSIX only)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
