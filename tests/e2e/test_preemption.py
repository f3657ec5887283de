"""A run that is asked to stop, by any signal at any rank, saves, ends with 75 and resumes exactly."""

import importlib
import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Overrides
from tests.support.invented import write_pairs
from tests.support.launch import history, run_state, run_verb, summary, train
from tests.support.signalled import signalled, signalled_launcher

# As GPUs train: in bf16, with deterministic kernels.
STEPS = ["trainer.epochs=12", "optim.lr=1e-3", "trainer.save_every=4", "parallelism=zero2"]
STEPS += ["model.dtype=bf16", "trainer.deterministic=true"]


def test_signals_save_and_the_same_command_resumes_exactly(overrides: Overrides, tmp_path: Path) -> None:
    """One run: a signal to one rank, then to the launcher."""
    run, whole, command = tmp_path / "run", tmp_path / "whole", overrides(*STEPS)
    latest = run / "checkpoints" / "latest"

    def reached(step: int) -> Callable[[], bool]:
        return lambda: latest.is_file() and latest.read_text() >= f"step-{step:06d}"

    stops = {
        "SIGUSR1": lambda: signalled("train", command, signal.SIGUSR1, [1], reached(4)),
        "SIGTERM": lambda: signalled_launcher(command, signal.SIGTERM, reached(12)),
    }
    for by, stop in stops.items():
        stopped = stop()
        assert stopped.codes == [75, 75], stopped.output
        assert "process lost" not in stopped.output
        assert "Traceback" not in stopped.output or by == "SIGTERM"  # of torch's launcher
        state = run_state(run)
        assert state["outcome"] == summary(run)["exit"] == "preempted"
        assert state["stopped_by"] == summary(run)["stopped_by"] == by
        assert latest.read_text() == f"step-{state['step']:06d}"
        log = (run / "logs/rank-0.log").read_text()
        assert f"stopping after step {state['step']}, with a checkpoint" in log
    train(command, processes=2)
    train([*command, f"run.dir={whole}"], processes=2)
    assert history(run) == history(whole)
    for file in ("model.safetensors", "README.md"):
        assert (run / "model" / file).read_bytes() == (whole / "model" / file).read_bytes(), file


def test_a_fill_stops_with_what_is_scored_and_the_next_start_scores_the_rest(
    overrides: Overrides, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "many.jsonl", 300, seed=3)
    command = overrides(f"data.train=[{tmp_path}/many.jsonl]", "reference.rows_per_shard=16")
    store = tmp_path / "store"
    stopped = signalled(
        "train", command, signal.SIGUSR2, [1], lambda: len(list(store.rglob("*.safetensors"))) >= 4
    )
    found = r"by SIGUSR2 after ([\d,]+) of the ([\d,]+) missing reference log-probs were stored"
    assert stopped.codes == [75, 75], stopped.output
    assert not re.search("Traceback|process lost", stopped.output)
    assert len(re.findall("^stopped: ", stopped.output, re.MULTILINE)) == 1, stopped.output
    said = re.search(found, stopped.output)
    assert said, stopped.output
    stored, wanted = (int(number.replace(",", "")) for number in said.groups())
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
