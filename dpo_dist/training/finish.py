"""The end of a run: write model, summary, curves, report and outcome."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import checkpoint_name
from dpo_dist.config.schema import FinalModel
from dpo_dist.distributed.checkpoint.saver import checkpoint_state, drop_checkpoints
from dpo_dist.distributed.deepspeed_config import unsharded_loading
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.foundation.errors import DivergedError, ExitCode, RunOutcome
from dpo_dist.foundation.files import for_json
from dpo_dist.foundation.text import pluralize
from dpo_dist.training.export import check_base, export_checkpoint
from dpo_dist.training.reporting.metrics_log import final_and_best, read_latest_rows
from dpo_dist.training.reporting.protocols import Recorder
from dpo_dist.training.start.environment import package_versions
from dpo_dist.training.start.open_run import Run
from dpo_dist.training.start.resume import RunState, read_state, write_state
from dpo_dist.training.steps.loop import Loop
from dpo_dist.training.steps.state import Position


def run_to_its_end(loop: Loop, position: Position, run_card: Callable[..., str]) -> int:
    """Train until the run completes, stops or diverges; write its last files and return the exit code.

    If the process is killed between two of these files, the same command writes the missing ones.
    """
    run, identity = loop.run, loop.identity
    try:
        outcome = RunOutcome.completed if loop.train(position) else RunOutcome.preempted
    except DivergedError:
        diverged = RunState(RunOutcome.diverged, position.step, identity)
        finish(run, diverged, loop.recorder, _summary(loop, position))
        raise
    summary = _summary(loop, position)
    if outcome is RunOutcome.preempted:
        why = run.stops.agreed
        state = RunState(outcome, position.step, identity, stopped_by=why)
        finish(run, state, loop.recorder, summary | {"stopped_by": why})
        return ExitCode.preempted
    best, takes_best = position.best, run.config.trainer.final is FinalModel.best
    step = best.step if takes_best and best is not None else position.step
    if position.step < loop.inputs.sampler.steps:
        summary["stopped_by"] = "trainer.patience"
        assert best is not None
        which = "" if takes_best else ", whose weights are the model"
        run.say(
            f"ending after step {position.step}{which}: {best.metric} was best at step "
            f"{best.step} ({best.value:.4g}), {pluralize(position.stale_evaluations, 'evaluation')} before"
        )
    if takes_best:
        summary["model_step"] = step
        # A start that only writes the model may have another `keep_best` than the start that trained.
        metric = run.config.trainer.keep_best if best is None else best.metric
        run.say(f"the weights of step {step} of {position.step} are the model, by {metric}")
        if best is None:
            run.say(
                "warning: no evaluation had a finite value of this metric: the model is that of the last step"
            )
    with run.clock.measure("saving"):
        _write_model(loop, step, summary, run_card)
    summary["work"] = run.clock.read()
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
    if (kept := position.best) is not None:
        results["best"].setdefault(kept.metric, {"value": kept.value, "step": kept.step})
    return {
        **results,
        "steps": position.step,
        "pairs_seen": position.pairs_seen,
        "bad_steps": position.health.bad_steps,
        "bad_in_a_row": position.health.bad_in_a_row,
        **({"overflows": position.health.overflows} if loop.policy.loss_scale is not None else {}),
        "train_seconds": seconds,
        "pairs_per_second": position.pairs_seen / seconds if seconds else 0.0,
        "peak_memory_bytes": peak_bytes,
        **({"best_checkpoint": asdict(position.best)} if position.best else {}),
        "reference": loop.reference_report,
        "work": loop.run.clock.read(),
        "world_size": world.size,
        "vocabulary": len(loop.inputs.tokenizer),
        "settings": settings(loop.run.config),
        "bands": [asdict(band) for band in loop.run.config.metrics.bands],
        "data": loop.inputs.counts,
    }


def _write_model(loop: Loop, step: int, summary: dict[str, Any], run_card: Callable[..., str]) -> None:
    """Write the checkpoint of `step` as the model of the run; collective."""
    run, is_last = loop.run, step == summary["steps"]
    checkpoint = run.folder.checkpoints / checkpoint_name(step)

    def card(loader: str) -> str:
        assert loop.recorder is not None
        keep = [band.step for band in run.config.metrics.bands]
        rows = loop.recorder.metrics.rows if is_last else read_latest_rows(run.folder, step, keep)
        ended = {**summary, "exit": RunOutcome.completed.value, "steps": step}
        ended["pairs_seen"] = checkpoint_state(checkpoint)["pairs_seen"]
        is_evaluated, versions = loop.inputs.eval_set is not None and is_last, package_versions()
        return run_card(run.config, rows, ended, run.say, versions, loader, is_evaluated=is_evaluated)

    def write() -> None:
        check_base(run.config.model, Path(run.config.reference.store), loop.identity["model"])
        with unsharded_loading(run.world):
            export_checkpoint(checkpoint, run.folder.model, run.config, card, is_new=is_last)

    with run.console.heartbeat("writing the model"):
        run.world.on_main(write)


def finish(run: Run, state: RunState, recorder: Recorder | None, summary: dict[str, Any]) -> None:
    """Write a run's report and state, and delete its checkpoints if `keep_last` is 0. Collective.

    `recorder`: None on ranks above 0. `summary`: content of summary.json without `exit`.
    """

    def work() -> None:
        assert recorder is not None
        recorder.close(summary, state.outcome)
        if state.outcome is RunOutcome.completed and run.config.trainer.keep_last == 0:
            drop_checkpoints(run.folder.checkpoints)
        # The same command tries a diverged run again from its last checkpoint: keep the recorded step.
        former = read_state(run.folder) if state.outcome is RunOutcome.diverged else None
        write_state(run.folder, state if former is None else replace(state, step=former.step))

    with run.console.heartbeat("writing the report"):
        run.write(work)
    complete_mirror(run)


def complete_mirror(run: Run) -> None:
    """Upload what the mirror lacks; collective."""
    if run.config.run.mirror is None:
        return
    request, must_stop = run.stops.request, run.stops.must_stop()

    def upload() -> None:
        assert run.mirror is not None
        run.mirror.finish(lambda: must_stop or request.is_urgent)

    run.world.on_main(upload)
