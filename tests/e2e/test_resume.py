"""A run that is stopped, by any signal at any rank, or killed, resumes bit for bit (law L4)."""

import importlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Overrides
from tests.support import launch
from tests.support.invented import write_pairs
from tests.support.launch import constants, history, run_state, run_verb, summary, train
from tests.support.tiny_model import write_model
from tests.support.warm import context, launcher_variables, start_module, start_parent, start_verb, wait
from tests.support.warm_launch import fork_python


def signalled(
    overrides: list[str],
    number: signal.Signals,
    ranks: Sequence[int],
    when: Callable[[], bool],
    prepare: Callable[[], None] | None = None,
) -> tuple[list[int], str]:
    """Train on two ranks without a launcher, and send a signal to `ranks` once `when()` is true.

    `prepare` is called in each rank before the verb. Exit codes of the ranks, and the screen.
    """
    variables = launch.environment() | launcher_variables(launch.TWO_PROCESSES)
    with tempfile.TemporaryDirectory() as temporary:
        screen = Path(temporary) / "screen"
        screen.touch()
        processes = start_verb("train", overrides, variables, 2, launch.ROOT, screen, prepare)
        deadline = time.monotonic() + 240
        try:
            while not when():
                assert time.monotonic() < deadline, screen.read_text()
                assert all(process.is_alive() for process in processes), screen.read_text()
                time.sleep(0.01)
            for rank in ranks:
                os.kill(processes[rank].pid, number)
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            return [process.exitcode for process in processes], screen.read_text()
        finally:
            for process in processes:
                process.kill()


def test_signals_save_and_the_same_command_resumes_exactly(overrides: Overrides, tmp_path: Path) -> None:
    """One run: a signal to one rank, then to both, as launchers send it; that checkpoint is damaged."""
    steps = ["trainer.epochs=6", "optim.lr=1e-3", "trainer.save_every=3", "parallelism=zero2"]
    as_on_gpus = ["model.dtype=bf16", "trainer.deterministic=true"]
    run, whole, command = tmp_path / "run", tmp_path / "whole", overrides(*steps, *as_on_gpus)
    latest, former = run / "checkpoints" / "latest", ""

    def has_saved() -> bool:
        return latest.is_file() and latest.read_text() > former

    for number, ranks in ((signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1])):
        codes, said = signalled(command, number, ranks, has_saved)
        assert codes == [75, 75], said
        assert not re.search("Traceback|process lost", said)
        state = run_state(run)
        assert state["outcome"] == summary(run)["exit"] == "preempted"
        assert state["stopped_by"] == summary(run)["stopped_by"] == number.name
        former = latest.read_text()
        assert former == f"step-{state['step']:06d}"
        log = (run / "logs/rank-0.log").read_text()
        assert f"stopping after step {state['step']}, with a checkpoint" in log
    max((latest.parent / former).rglob("*.safetensors")).write_bytes(b"")  # that rank 1 checks
    resumed = train(command, processes=2).output
    assert f"warning: checkpoint {former} is damaged and not used" in resumed, resumed
    train([*command, f"run.dir={whole}"], processes=2)
    assert history(run) == history(whole)
    for file in ("model.safetensors", "README.md"):
        assert (run / "model" / file).read_bytes() == (whole / "model" / file).read_bytes(), file


def test_a_sigterm_to_accelerate_launch_saves(overrides: Overrides, tmp_path: Path) -> None:
    """The launcher has a traceback and an exit code of its own."""
    run, screen = tmp_path / "run", tmp_path / "screen"
    latest, long = run / "checkpoints/latest", overrides("trainer.epochs=1000", "trainer.save_every=4")
    _, _, module, *words = launch.command("train", long, 2)
    screen.touch()
    start_parent()
    where = launch.environment(), 1, launch.ROOT, screen
    (launcher,) = start_module(context, module, words, *where, fork_python)
    launcher.screen = screen
    try:
        launch.wait_until(latest.is_file, launcher)
        launcher.terminate()
        assert wait([launcher], 240) == 1, screen.read_text()
    finally:
        launcher.kill()
    state = run_state(run)
    assert state["outcome"] == summary(run)["exit"] == "preempted", screen.read_text()
    assert state["stopped_by"] == "SIGTERM"
    assert latest.read_text() == f"step-{state['step']:06d}"


def test_a_fill_stops_with_what_is_scored_and_the_next_start_scores_the_rest(
    overrides: Overrides, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "many.jsonl", 300, seed=3)
    command = overrides(f"data.train=[{tmp_path}/many.jsonl]")
    small_shards = constants(**{"dpo_dist.training.reference.ENTRIES_PER_SHARD": 16})
    store = tmp_path / "store"
    codes, said = signalled(
        command, signal.SIGUSR2, [1], lambda: len(list(store.rglob("*.safetensors"))) >= 4, small_shards
    )
    found = r"by SIGUSR2 after ([\d,]+) of the ([\d,]+) missing reference log-probs were stored"
    assert codes == [75, 75], said
    assert not re.search("Traceback|process lost", said)
    assert len(re.findall("^stopped: ", said, re.MULTILINE)) == 1, said
    [counts] = re.findall(found, said)
    stored, wanted = (int(count.replace(",", "")) for count in counts)
    assert 0 < stored < wanted
    state = run_state(tmp_path / "run")
    assert (state["outcome"], state["step"], state["stopped_by"]) == ("preempted", 0, "SIGUSR2")
    again = run_verb("precompute", command)
    assert again.code == 0, again.output
    assert f"{wanted - stored:,} log-probs computed, {stored:,} reused" in again.output


def _stopped_at(module: str, name: str) -> None:
    """Send this process a SIGTERM when it first calls a function."""
    room = importlib.import_module(module)
    function = getattr(room, name)

    def call(*arguments: Any, **options: Any) -> Any:
        setattr(room, name, function)
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    setattr(room, name, call)


def test_stops_while_encoding_saving_evaluating_sampling_exporting_and_reporting(
    assets: Path, overrides: Overrides, tmp_path: Path
) -> None:
    """One run, stopped at each of these places in turn, ends as one that nothing stops.

    The checkpoint of the last step is older than the evaluation's row, which must be there once.
    """
    run, whole, cache = tmp_path / "run", tmp_path / "whole", tmp_path / "encoded"
    usual = [f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=4", "trainer.save_every=1"]
    samples = ["sampling.prompts=2", "sampling.max_new_tokens=4", "sampling.temperature=0"]
    command = overrides(*usual, *samples, f"data.cache={cache}", "trainer.keep_best=eval_loss")
    places = [
        ("dpo_dist.encoded.build", "in_order", "before the first step"),
        ("dpo_dist.tools.sampling.generate", "generate_batch", "stopped: by SIGTERM before the first"),
        ("dpo_dist.distributed.checkpoint.saver", "commit_folder", "stopping after step [1-3]"),
        ("dpo_dist.training.steps.loop", "evaluate", "stopping after step 4"),
        ("dpo_dist.tools.report.samples", "generate_together", "stopping after step 4"),
        ("dpo_dist.training.run", "export_checkpoint", "after the model was written"),
    ]
    for module, name, words in places:
        stopped = run_verb("train", command, prepare=partial(_stopped_at, module, name))
        assert stopped.code == 75, stopped.output
        assert "Traceback" not in stopped.output
        assert re.search(words, stopped.output), stopped.output
        if name == "in_order":
            assert [path.name for path in cache.iterdir()] == ["file_digests"], "half-encoded data are left"
        if name == "generate_batch":
            assert not (run / "samples").exists(), "responses of the reference that were cut"
    assert run_state(run)["outcome"] == "exported"
    last = run_verb(
        "train", command, prepare=partial(_stopped_at, "dpo_dist.tools.report.recorder", "closing_table")
    )
    assert last.code == 0, last.output
    assert run_state(run)["outcome"] == summary(run)["exit"] == "completed"
    assert (run / "checkpoints/best").read_text().strip() == "step-000004", (
        "found by an evaluation that was owed"
    )
    train([*command, f"run.dir={whole}"])
    assert history(run) == history(whole)
    for file in ("samples/step-000004.jsonl", "model/model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_a_killed_rank_is_named_and_the_reference_is_that_of_all_starts(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Of three starts, the first is killed and the second stopped."""
    run = tmp_path / "run"
    evaluated = [f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=2", "sampling.prompts=2"]
    steps = ["trainer.epochs=4", "trainer.save_every=2", "optim.lr=1e-3"]
    command = overrides(*steps, *evaluated, "sampling.max_new_tokens=4")
    when = (run / "checkpoints/step-000004").is_dir
    brief = constants(**{"dpo_dist.distributed.processes.failures.FAREWELL_SECONDS": 1.0})
    codes, said = signalled(command, signal.SIGKILL, [0], when, brief)
    assert all(codes), said
    assert "rank 0 of 2 died" in said, said
    assert not list((run / "model").glob("*"))
    (folder,) = sorted(run.glob("checkpoints/step-*"))[-1:]
    saved = json.loads((folder / "state.json").read_text())
    first = saved["reference_report"]
    assert first["computed"] > 0
    assert first["seconds"] > 0.0
    assert first["drift"]["responses"] > 0
    assert run_verb("train", [*command, "trainer.stop_after_steps=2"], processes=2).code == 75
    stopped = summary(run)
    assert "resuming from" in train(command, processes=2).output
    ended = summary(run)
    assert ended["exit"] == "completed"
    assert stopped["reference"] == ended["reference"] == first


def test_a_stopped_run_ends_with_75_refuses_another_base_and_resumes_exactly(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Between two rows, with a loss that has running means."""
    model = Path(shutil.copytree(assets / "model", tmp_path / "model"))
    loss = ["loss=bco_pair", "loss.beta=0.5", "loss.options.delta=running_mean"]
    steps = ["trainer.epochs=2", "trainer.log_every=2", "optim.lr=1e-2"]
    steps += [f"data.eval=[{assets}/eval.jsonl]", f"model.path={model}", *loss]
    train(overrides(*steps, f"run.dir={tmp_path}/whole"))
    stopped = run_verb("train", overrides(*steps, "trainer.stop_after_steps=3"))
    assert stopped.code == 75, stopped.output
    assert summary(tmp_path / "run")["exit"] == "preempted"
    assert "verdict: stopped after step 3; so far: " in stopped.output
    model.rename(tmp_path / "former")
    write_model(model, seed=5)
    other = run_verb("train", overrides(*steps))
    assert other.code == 2, other.output
    assert "the model that the policy starts from of this run has changed" in other.output
    shutil.rmtree(model)
    (tmp_path / "former").rename(model)
    train(overrides(*steps))
    rows = history(tmp_path / "run")
    assert rows == history(tmp_path / "whole")
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, rows[-1]["step"]]
    values = [row[name] for row in rows for name in ("loss/beta", "loss/delta") if name in row]
    assert len(set(values)) > 3


def test_other_processes_and_parallelism_continue_a_run(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """One process with ZeRO-3, then two with ZeRO-2, then one with DDP, are one run of one process."""
    steps = ["trainer.max_steps=6", "optim.lr=1e-3", "loss=beta_dpo", f"data.eval=[{assets}/eval.jsonl]"]
    train(overrides(*steps, f"run.dir={tmp_path}/whole"))
    stop = "trainer.stop_after_steps=2"
    assert run_verb("train", overrides(*steps, stop)).code == 75
    run_verb("train", overrides(*steps, stop, "parallelism=zero2"), processes=2)
    assert run_state(tmp_path / "run")["step"] == 4
    train(overrides(*steps, "parallelism=ddp"))
    rows, wanted = history(tmp_path / "run"), history(tmp_path / "whole")
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
