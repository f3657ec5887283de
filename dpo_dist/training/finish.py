"""How a run ends: model, summary, curves and report, and a state file that says which of them are there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_dist.config.identity import settings
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint import drop_checkpoints
from dpo_dist.distributed.world import World
from dpo_dist.errors import DivergedError, ExitCode, Outcome
from dpo_dist.report.console import Console
from dpo_dist.report.metrics_log import final_and_best, plain
from dpo_dist.report.recorder import Recorder
from dpo_dist.training.data_setup import Inputs
from dpo_dist.training.loop import Loop, Position
from dpo_dist.training.run_folder import CHECKPOINTS, MODEL, export_model, peak_memory_bytes, write_on_main
from dpo_dist.training.run_state import Identity, RunState, write_state


@dataclass(frozen=True)
class Ending:
    """What the end of a run is written from, beside its loop.

    `reference` is what getting the reference ready took, for summary.json.
    """

    inputs: Inputs
    identity: Identity
    reference: dict[str, Any]


def run_to_its_end(loop: Loop, position: Position, ending: Ending) -> int:
    """Run the loop to whatever end it has, write the files that describe it, and return the exit code.

    A kill between two of these files costs nothing: the same command writes those that are missing.

    Raises:
        DivergedError: loss or gradient stopped being finite.
        CheckpointError: a file cannot be written.
    """
    run_dir = Path(str(loop.config.run.dir))
    try:
        outcome = Outcome.completed if loop.run(position) else Outcome.preempted
    except DivergedError:
        _close(
            loop, RunState(Outcome.diverged, position.step, ending.identity), _summary(loop, position, ending)
        )
        raise
    state = RunState(outcome, position.step, ending.identity)
    summary = _summary(loop, position, ending)
    if outcome is Outcome.preempted:
        _close(loop, state, summary)
        loop.console.say(f"stopped after step {position.step}; the same command resumes from there")
        return ExitCode.preempted
    writing = loop.console.heartbeat("writing the model")
    export_model(loop.policy, ending.inputs.tokenizer, run_dir / MODEL, loop.world, writing)
    exported = replace(state, outcome=Outcome.exported, summary=plain(summary))
    write_on_main(lambda: write_state(run_dir, exported), run_dir, loop.world)
    finish(loop.config, exported, loop.recorder, loop.world, loop.console)
    return ExitCode.completed


def finish(
    config: RunConfig, state: RunState, recorder: Recorder | None, world: World, console: Console
) -> None:
    """Write the report of a run whose model is written; checkpoints go if none are to be kept. Collective.

    Raises:
        CheckpointError: a file cannot be written.
    """
    run_dir = Path(str(config.run.dir))

    def work() -> None:
        if state.outcome is not Outcome.completed:
            assert recorder is not None
            assert state.summary is not None
            recorder.close({**state.summary, "exit": Outcome.completed.value})
            write_state(run_dir, replace(state, outcome=Outcome.completed))
        if config.trainer.keep_last == 0:
            drop_checkpoints(run_dir / CHECKPOINTS)

    write_on_main(work, run_dir, world)
    console.say(f"model: {run_dir / MODEL}   report: {run_dir / 'report.html'}")


def _close(loop: Loop, state: RunState, summary: dict[str, Any]) -> None:
    """Write report and state of a run that ends before its last step; collective."""
    run_dir = Path(str(loop.config.run.dir))

    def work() -> None:
        assert loop.recorder is not None
        loop.recorder.close({**summary, "exit": state.outcome.value})
        write_state(run_dir, state)

    write_on_main(work, run_dir, loop.world)


def _summary(loop: Loop, position: Position, ending: Ending) -> dict[str, Any]:
    """What summary.json tells, but for `exit`; collective."""
    peak_bytes = peak_memory_bytes(loop.world)
    seconds = position.train_seconds
    return {
        **final_and_best(loop.recorder.metrics.rows if loop.recorder is not None else []),
        "steps": position.step,
        "pairs_seen": position.pairs_seen,
        "train_seconds": seconds,
        "pairs_per_second": position.pairs_seen / seconds if seconds else 0.0,
        "peak_memory_bytes": peak_bytes,
        "reference": ending.reference,
        "world_size": loop.world.size,
        "settings": settings(loop.config),
        "data": {name: dataset.counts for name, dataset in ending.inputs.named.items()},
    }
