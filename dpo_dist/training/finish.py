"""The end of a run: write model, summary, curves and report, and the state file that records the outcome."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.template import with_chosen_template
from dpo_dist.distributed.checkpoint import drop_checkpoints
from dpo_dist.distributed.export import adapter_below
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.distributed.world import WhileWaiting, World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import DivergedError, ExitCode, RunOutcome
from dpo_dist.foundation.files import plain
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.card import model_card
from dpo_dist.insight.metrics.log import MetricsLog, final_and_best, package_versions, read_latest_rows
from dpo_dist.insight.metrics.trackers import Trackers
from dpo_dist.insight.recorder import Recorder, spared
from dpo_dist.insight.tables import closing_table
from dpo_dist.insight.verdict.rules import verdict
from dpo_dist.model.save import read_description, read_tokenizer, write_model_folder
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.loop import Loop
from dpo_dist.training.resume import Identity, RunState, read_state, write_state
from dpo_dist.training.start import write_on_main
from dpo_dist.training.state import Position


def run_to_its_end(loop: Loop, position: Position, identity: Identity, kept: Mapping[str, Any]) -> int:
    """Train until the run completes, is stopped or diverges; write its last files and return the exit code.

    A kill between two of these files loses nothing: the same command writes the missing ones.

    Args:
        position: its progress; advanced.
        kept: of `keep_files`.
    """
    folder, world, console = RunFolder.of(loop.config), loop.world, loop.console
    try:
        outcome = RunOutcome.completed if loop.run(position) else RunOutcome.preempted
    except DivergedError as error:
        # Above the closing table: the advice about it is part of the verdict, the last words of a run.
        console.result("error", error.as_dict(), [f"{error.title}: {error.message}: {error.got}"])
        error.is_printed = True
        _close(loop, RunState(RunOutcome.diverged, position.step, identity), _summary(loop, position))
        raise
    summary = _summary(loop, position)
    if outcome is RunOutcome.preempted:
        why = loop.stops.agreed
        state = RunState(outcome, position.step, identity, stopped_by=why)
        _close(loop, state, summary | {"stopped_by": why})
        return ExitCode.preempted
    tokenizer, template = loop.inputs.tokenizer, loop.config.data.chat_template
    if template is not None:
        tokenizer = with_chosen_template(tokenizer, template)
    writing, card = console.heartbeat("writing the model"), partial(_card, loop, summary)
    with loop.clock.of("saving"):
        export_model(loop.policy, tokenizer, folder.model, world, writing, card, kept)
    summary["work"] = loop.clock.read().as_dict()
    exported = RunState(RunOutcome.exported, position.step, identity, plain(summary))
    write_on_main(lambda: write_state(folder, exported), folder, world)
    loop.stops.check("after the model was written, before its report")
    finish(loop.config, exported, loop.recorder, world, console)
    return ExitCode.completed


def _summary(loop: Loop, position: Position) -> dict[str, Any]:
    """Return the content of summary.json without `exit`; collective."""
    peak_bytes = max(loop.world.gather(peak_memory_bytes(loop.world.device)))
    seconds = position.train_seconds
    return {
        **final_and_best(loop.recorder.metrics.rows if loop.recorder is not None else []),
        "steps": position.step,
        "pairs_seen": position.pairs_seen,
        "bad_steps": position.bad_steps,
        "bad_in_a_row": position.bad_in_a_row,
        **({"overflows": position.overflows} if loop.policy.loss_scale is not None else {}),
        "train_seconds": seconds,
        "pairs_per_second": position.pairs_seen / seconds if seconds else 0.0,
        "peak_memory_bytes": peak_bytes,
        **({"best_checkpoints": [asdict(one) for one in position.best]} if position.best else {}),
        "reference": position.reference_report,
        "work": loop.clock.read().as_dict(),
        "world_size": loop.world.size,
        "settings": settings(loop.config),
        "data": loop.inputs.counts,
    }


def keep_files(config: RunConfig, inputs: Inputs, world: World) -> dict[str, Any]:
    """Return options of `write_model_folder`: files of the inputs, as they are at the start; collective."""

    def read() -> dict[str, Any]:
        if not world.is_main:
            return {}
        is_chosen = config.data.chat_template is not None
        return {
            "below": adapter_below(config, inputs.policy_files.adapter),
            "tokenizer_files": None if is_chosen else read_tokenizer(inputs.tokenizer_files) or None,
            "description": read_description(inputs.policy_files.folder),
        }

    return world.together(read)


def export_model(
    policy: PolicyEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    while_waiting: WhileWaiting | None = None,
    card: Callable[[], str] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write the trained model as a folder that transformers loads; collective.

    Args:
        while_waiting: called on rank 0 while it writes.
        card: returns the content of README.md, on rank 0; None or "": there is none.
        kept: further options of `write_model_folder`.
    """
    weights = policy.whole_weights()

    def write() -> None:
        assert weights is not None
        remedy = "free disk space; the same command writes the model from the last checkpoint"
        write_model_folder(folder, policy.causal_lm, weights, tokenizer, card, remedy, **(kept or {}))

    world.on_main(write, while_waiting)


def _card(loop: Loop, summary: dict[str, Any]) -> str:
    """Return the model card of a run that has done its last step; "" if that fails. On rank 0."""
    assert loop.recorder is not None
    has_eval, found = loop.inputs.eval_set is not None, [""]
    ended = {**summary, "exit": RunOutcome.completed.value}
    rows, console = loop.recorder.metrics.rows, loop.console
    with spared("the model card", console.say):
        found = [run_card(loop.config, rows, ended, console, package_versions(), is_evaluated=has_eval)]
    return found[0]


def run_card(
    config: RunConfig,
    rows: Sequence[Mapping[str, float]],
    summary: dict[str, Any],
    console: Console,
    versions: Mapping[str, str],
    *,
    is_evaluated: bool,
) -> str:
    """Return the content of a model card, with a verdict.

    Args:
        rows: of log_history.json, up to the step of the model.
        summary: content of summary.json, with `exit`, without `verdict`.
        versions: of packages, by name.
        is_evaluated: whether the last evaluation of training is one of this model.
    """
    folder = RunFolder.of(config)
    judged = verdict(rows, summary, data_findings(folder, console))
    results = folder.evaluation_of(LAST_EVALUATION).results
    evaluation = {}
    if is_evaluated and results.is_file():
        evaluation = json.loads(results.read_text(encoding="utf-8"))
    return model_card(config, {**summary, "verdict": judged.as_dict()}, evaluation, versions)


def data_findings(folder: RunFolder, console: Console) -> list[dict[str, Any]]:
    """Return the doctor's findings about the data of this run; none if it was not asked."""
    try:
        found: list[dict[str, Any]] = json.loads(folder.doctor_report.read_text(encoding="utf-8"))["findings"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        console.say(f"warning: the verdict ignores {folder.doctor_report}, which cannot be read: {error}")
        return []
    return found


def _close(loop: Loop, state: RunState, summary: dict[str, Any]) -> None:
    """Write report and state of a run that ends before its last step; collective."""
    folder = RunFolder.of(loop.config)

    def work() -> None:
        assert loop.recorder is not None
        _close_report(loop.recorder, summary, state.outcome, folder, loop.console)
        # A run that diverged is tried again from its last checkpoint, whose step stays recorded.
        former = read_state(folder) if state.outcome is RunOutcome.diverged else None
        write_state(folder, state if former is None else replace(state, step=former.step))

    write_on_main(work, folder, loop.world, loop.console.heartbeat("writing the report"))


def finish(
    config: RunConfig, state: RunState, recorder: Recorder | None, world: World, console: Console
) -> None:
    """Write the report of a run whose model is written; delete its checkpoints if none are kept. Collective.

    Of a completed run, files of the report that were deleted are written again.
    """
    folder = RunFolder.of(config)

    def work() -> None:
        if state.outcome is not RunOutcome.completed:
            assert recorder is not None
            assert state.summary is not None
            _close_report(recorder, state.summary, RunOutcome.completed, folder, console)
            write_state(folder, replace(state, outcome=RunOutcome.completed))
        elif state.summary is not None:
            _write_missing(state.summary, folder, console)
        if config.trainer.keep_last == 0:
            drop_checkpoints(folder.checkpoints)

    write_on_main(work, folder, world, console.heartbeat("writing the report"))


def _write_missing(summary: dict[str, Any], folder: RunFolder, console: Console) -> None:
    """Write the files of a completed run's report again if one is missing, from its metrics rows."""
    files = (folder.log_history, folder.metrics_table, folder.summary, folder.curves, folder.report)
    missing = [file.name for file in files if not file.exists()]
    if not missing:
        return
    try:
        metrics = MetricsLog(folder, read_latest_rows(folder))
    except FileNotFoundError:
        console.say(f"warning: {', '.join(missing)} cannot be written again: the metrics rows are gone")
        return
    console.say(f"written again: {', '.join(missing)}")
    _close_report(Recorder(metrics, Trackers(), console.say), summary, RunOutcome.completed, folder, console)


def _close_report(
    recorder: Recorder, summary: dict[str, Any], outcome: RunOutcome, folder: RunFolder, console: Console
) -> None:
    """Write the report of a run with its verdict, and print the closing table and the verdict."""
    rows = recorder.metrics.rows
    ended = {**summary, "exit": outcome.value}
    lines: list[str] = []
    with spared("the verdict", console.say):
        judged = verdict(rows, ended, data_findings(folder, console))
        ended["verdict"] = judged.as_dict()
        lines = judged.lines()
    recorder.close(ended)
    with spared("the closing table", console.say):
        lines = [*closing_table(folder, rows, ended), *lines]
    console.result("summary", {"run_dir": str(folder.path), **ended}, lines)
