"""The end of a run: write model, summary, curves and report, and the state file that records the outcome."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder
from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.tokenization.chat_template import with_chosen_template
from dpo_dist.diagnostics.verdict import verdict
from dpo_dist.distributed.checkpoint import drop_checkpoints
from dpo_dist.distributed.device_memory import peak_memory_bytes
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import WhileWaiting, World
from dpo_dist.errors import CheckpointError, DivergedError, ExitCode, RunOutcome
from dpo_dist.report.environment import package_versions
from dpo_dist.report.json_values import plain
from dpo_dist.report.metrics_log import final_and_best
from dpo_dist.report.model_card import model_card
from dpo_dist.report.recorder import Recorder, spared
from dpo_dist.report.terminal.closing_table import closing_table
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.loop import Loop
from dpo_dist.training.position import Position
from dpo_dist.training.run_start import write_on_main
from dpo_dist.training.run_state import Identity, RunState, write_state


def run_to_its_end(loop: Loop, position: Position, identity: Identity) -> int:
    """Train until the run completes, is stopped or diverges; write its last files and return the exit code.

    A kill between two of these files loses nothing: the same command writes the missing ones.

    Args:
        loop: the run.
        position: its progress; advanced.
        identity: digests of its inputs.

    Raises:
        DivergedError: loss or gradient stopped being finite.
        CheckpointError: a file cannot be written.
    """
    folder = RunFolder.of(loop.config)
    try:
        outcome = RunOutcome.completed if loop.run(position) else RunOutcome.preempted
    except DivergedError as error:
        # Above the closing table: the advice about it is part of the verdict, the last words of a run.
        loop.console.result("error", error.as_dict(), [f"{error.title}: {error.message}: {error.got}"])
        error.is_printed = True
        state = RunState(RunOutcome.diverged, position.step, identity)
        _close(loop, state, _summary(loop, position))
        raise
    state = RunState(outcome, position.step, identity)
    summary = _summary(loop, position)
    if outcome is RunOutcome.preempted:
        _close(loop, state, summary)
        return ExitCode.preempted
    writing = loop.console.heartbeat("writing the model")
    tokenizer, template = loop.inputs.tokenizer, loop.config.data.chat_template
    if template is not None:
        tokenizer = with_chosen_template(tokenizer, template)
    card = partial(_card, loop, summary)
    with loop.clock.of("saving"):
        export_model(loop.policy, tokenizer, folder.model, loop.world, writing, card)
    summary["work"] = loop.clock.read().as_dict()
    exported = replace(state, outcome=RunOutcome.exported, summary=plain(summary))
    write_on_main(lambda: write_state(folder, exported), folder, loop.world)
    finish(loop.config, exported, loop.recorder, loop.world, loop.console)
    return ExitCode.completed


def finish(
    config: RunConfig, state: RunState, recorder: Recorder | None, world: World, console: Console
) -> None:
    """Write the report of a run whose model is written; delete its checkpoints if none are kept. Collective.

    Raises:
        CheckpointError: a file cannot be written.
    """
    folder = RunFolder.of(config)

    def work() -> None:
        if state.outcome is not RunOutcome.completed:
            assert recorder is not None
            assert state.summary is not None
            _close_report(recorder, state.summary, RunOutcome.completed, folder, console)
            write_state(folder, replace(state, outcome=RunOutcome.completed))
        if config.trainer.keep_last == 0:
            drop_checkpoints(folder.checkpoints)

    write_on_main(work, folder, world, console.heartbeat("writing the report"))


def export_model(
    policy: PolicyEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    while_waiting: WhileWaiting | None = None,
    card: Callable[[], str] | None = None,
) -> None:
    """Write the trained model as a folder that transformers loads; collective.

    Args:
        policy: the model.
        tokenizer: written beside it.
        folder: its final name.
        world: of the run.
        while_waiting: called on rank 0 while it writes.
        card: returns the content of README.md, on rank 0; None or "": there is none.

    Raises:
        CheckpointError: it cannot be written.
    """
    weights = policy.whole_weights()

    def write() -> None:
        try:
            with staged_folder(folder) as temporary:
                policy.causal_lm.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
                tokenizer.save_pretrained(temporary)
                if card is not None and (text := card()):
                    (temporary / "README.md").write_text(text, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "the trained model cannot be written",
                where=str(folder),
                got=str(error),
                remedy="free disk space; the same command writes the model from the last checkpoint",
            ) from error

    world.on_main(write, while_waiting)


def _card(loop: Loop, summary: dict[str, Any]) -> str:
    """Return the model card of a run that has done its last step; "" if that fails. On rank 0."""
    text = ""
    with spared("the model card", loop.console.say):
        text = _whole_card(loop, summary)
    return text  # noqa: RET504 (a bug ends the block before)


def _whole_card(loop: Loop, summary: dict[str, Any]) -> str:
    assert loop.recorder is not None
    folder, rows = RunFolder.of(loop.config), loop.recorder.metrics.rows
    ended = {**summary, "exit": RunOutcome.completed.value}
    judged = verdict(rows, ended, _data_findings(folder, loop.console))
    results = folder.evaluation_of(LAST_EVALUATION).results
    evaluation = None
    if loop.inputs.eval_set is not None and results.is_file():  # an earlier version did not write it
        evaluation = json.loads(results.read_text(encoding="utf-8"))
    return model_card(
        loop.config, {**ended, "verdict": judged.as_dict()}, rows, evaluation, package_versions()
    )


def _close(loop: Loop, state: RunState, summary: dict[str, Any]) -> None:
    """Write report and state of a run that ends before its last step; collective."""
    folder = RunFolder.of(loop.config)

    def work() -> None:
        assert loop.recorder is not None
        _close_report(loop.recorder, summary, state.outcome, folder, loop.console)
        write_state(folder, state)

    write_on_main(work, folder, loop.world, loop.console.heartbeat("writing the report"))


def _close_report(
    recorder: Recorder, summary: dict[str, Any], outcome: RunOutcome, folder: RunFolder, console: Console
) -> None:
    """Write the report of a run with its verdict, and print the closing table and the verdict."""
    rows = recorder.metrics.rows
    ended = {**summary, "exit": outcome.value}
    lines: list[str] = []
    with spared("the verdict", console.say):
        judged = verdict(rows, ended, _data_findings(folder, console))
        ended["verdict"] = judged.as_dict()
        lines = judged.lines()
    recorder.close(ended)
    with spared("the closing table", console.say):
        lines = [*closing_table(folder, rows, ended), *lines]
    console.result("summary", {"run_dir": str(folder.path), **ended}, lines)


def _data_findings(folder: RunFolder, console: Console) -> list[dict[str, Any]]:
    """Return the doctor's findings about the data of this run; none if it was not asked."""
    try:
        found: list[dict[str, Any]] = json.loads(folder.doctor_report.read_text(encoding="utf-8"))["findings"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        console.say(f"warning: the verdict ignores {folder.doctor_report}, which cannot be read: {error}")
        return []
    return found


def _summary(loop: Loop, position: Position) -> dict[str, Any]:
    """Return the content of summary.json without `exit`; collective."""
    peak_bytes = max(loop.world.gather(peak_memory_bytes(loop.world.device)))
    seconds = position.train_seconds
    return {
        **final_and_best(loop.recorder.metrics.rows if loop.recorder is not None else []),
        "steps": position.step,
        "pairs_seen": position.pairs_seen,
        "bad_steps": position.bad_steps,
        "train_seconds": seconds,
        "pairs_per_second": position.pairs_seen / seconds if seconds else 0.0,
        "peak_memory_bytes": peak_bytes,
        "reference": position.reference_report,
        "work": loop.clock.read().as_dict(),
        "world_size": loop.world.size,
        "settings": settings(loop.config),
        "data": {name: dataset.counts for name, dataset in loop.inputs.named.items()},
    }
