"""A run that is asked to stop, by any signal at any rank, saves, ends with 75 and resumes exactly."""

import importlib
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.foundation.process import exit_codes
from tests.e2e.conftest import Overrides, small_run
from tests.support.invented import write_pairs
from tests.support.launch import history, run_state, run_verb, signal_run, summary, train
from tests.support.signalled import Signalled, signalled

STEPS = ["trainer.epochs=8", "optim.lr=1e-3", "trainer.save_every=4"]


@pytest.fixture(scope="module")
def uninterrupted(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train([*small_run(assets, folder), *STEPS], processes=2)
    return history(folder / "run")


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        pytest.param(signal.SIGUSR1, [1], id="SIGUSR1 to rank 1"),
        pytest.param(signal.SIGTERM, [], id="SIGTERM to the launcher"),
        pytest.param(signal.SIGKILL, [], id="SIGKILL to the launcher"),
    ],
)
def test_a_signal_saves_and_the_same_command_resumes_exactly(
    number: signal.Signals,
    ranks: list[int],
    overrides: Overrides,
    tmp_path: Path,
    uninterrupted: list[dict[str, float]],
) -> None:
    run, command = tmp_path / "run", overrides(*STEPS)
    saved = (run / "checkpoints" / "step-000004").is_dir
    if ranks:
        stopped = signalled("train", command, number, ranks, saved)
        assert stopped.codes == [75, 75], stopped.output
        assert "Traceback" not in stopped.output
        output = stopped.output
    else:
        output = signal_run(command, number, ranks, saved, codes=tmp_path / "codes").output
        assert exit_codes(tmp_path / "codes") == [75, 75], output
    assert "process lost" not in output
    state = run_state(run)
    assert state["outcome"] == "preempted"
    assert summary(run)["exit"] == "preempted"
    by = "SIGTERM" if number == signal.SIGKILL else number.name  # of the system, when a launcher has died
    assert state["stopped_by"] == summary(run)["stopped_by"] == by
    assert 0 < state["step"] < uninterrupted[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{state['step']:06d}"
    assert f"stopping after step {state['step']}, with a checkpoint" in (run / "logs/rank-0.log").read_text()
    train(command, processes=2)
    assert history(run) == uninterrupted


def assert_stopped(stopped: Signalled, text: str) -> None:
    """Assert that both ranks ended with 75, and the screen has one error, with `text`."""
    assert stopped.codes == [75, 75], stopped.output
    assert len(re.findall("^stopped: ", stopped.output, re.MULTILINE)) == 1, stopped.output
    assert re.search(text, stopped.output), stopped.output
    assert "Traceback" not in stopped.output
    assert "process lost" not in stopped.output


def test_a_fill_stops_with_what_is_scored_and_the_next_start_scores_the_rest(
    overrides: Overrides, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "many.jsonl", 600, seed=3)
    command = overrides(f"data.train=[{tmp_path}/many.jsonl]", "reference.rows_per_shard=16")
    store = tmp_path / "store"
    stopped = signalled(
        "train", command, signal.SIGUSR2, [1], lambda: len(list(store.rglob("*.safetensors"))) >= 4
    )
    found = r"by SIGUSR2 after ([\d,]+) of the ([\d,]+) missing reference log-probs were stored"
    assert_stopped(stopped, found)
    stored, wanted = (
        int(number.replace(",", ""))
        for number in re.search(found, stopped.output).groups()  # type: ignore[union-attr]
    )
    assert 0 < stored < wanted
    state = run_state(tmp_path / "run")
    assert (state["outcome"], state["step"], state["stopped_by"]) == ("preempted", 0, "SIGUSR2")
    again = run_verb("precompute", [*command, "reference.rows_per_shard=4096"])
    assert again.code == 0, again.output
    assert f"{wanted - stored:,} log-probs computed, {stored:,} reused" in again.output


def _stopped_at(module: str, name: str) -> None:
    """Send this process a SIGTERM when it first calls a function."""
    room = importlib.import_module(module)
    function = getattr(room, name)

    def call(*arguments: Any, **options: Any) -> Any:
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
    samples = ["samples.prompts=2", "samples.max_new_tokens=4", "samples.temperature=0"]
    command = overrides(*usual, *samples, f"data.cache={cache}")
    places = [
        ("dpo_dist.data.build", "share_read", "before the first step"),
        ("dpo_dist.distributed.checkpoint", "commit_folder", "stopping after step [1-3]"),
        ("dpo_dist.training.loop", "evaluate", "stopping after step 4"),
        ("dpo_dist.training.samples", "generate_together", "stopping after step 4"),
        ("dpo_dist.training.finish", "export_checkpoint", "after the model was written"),
    ]
    for module, name, words in places:
        stopped = run_verb("train", command, prepare=partial(_stopped_at, module, name))
        assert stopped.code == 75, stopped.output
        assert "Traceback" not in stopped.output
        assert re.search(words, stopped.output), stopped.output
        if name == "share_read":
            assert [path.name for path in cache.iterdir()] == ["file_digests"], "half-encoded data are left"
    assert run_state(run)["outcome"] == "exported"
    last = run_verb(
        "train", command, prepare=partial(_stopped_at, "dpo_dist.training.finish", "closing_table")
    )
    assert last.code == 0, last.output
    assert run_state(run)["outcome"] == summary(run)["exit"] == "completed"
    train([*command, f"run.dir={whole}"])
    assert history(run) == history(whole)
    for file in ("samples/step-000004.jsonl", "model/model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
