"""A run that was killed or stopped resumes bit for bit (law L4)."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides
from tests.support.launch import constants, history, run_state, run_verb, summary, train
from tests.support.signalled import signalled
from tests.support.tiny_model import write_model

STEPS = ["trainer.epochs=4", "trainer.save_every=2", "trainer.keep_last=2", "optim.lr=1e-3"]


def test_a_killed_rank_is_named_and_reference_and_time_are_those_of_all_starts(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Of three starts, the first is killed and the second stopped."""
    run = tmp_path / "run"
    evaluated = [f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=2", "samples.prompts=2"]
    command = overrides(*STEPS, *evaluated, "samples.max_new_tokens=4")
    when = (run / "checkpoints/step-000004").is_dir
    brief = constants(**{"dpo_dist.distributed.processes.FAREWELL_SECONDS": 1.0})
    killed = signalled("train", command, signal.SIGKILL, [0], when, brief)
    assert all(killed.codes), killed.output
    assert "rank 0 of 2 died" in killed.output, killed.output
    assert not list((run / "model").glob("*"))
    (folder,) = sorted(run.glob("checkpoints/step-*"))[-1:]
    saved = json.loads((folder / "state.json").read_text())
    first, before = saved["reference_report"], saved["work"]
    assert first["computed"] > 0
    assert first["seconds"] > 0.0
    assert first["drift"]["responses"] > 0
    assert run_verb("train", [*command, "trainer.stop_after_steps=2"], processes=2).code == 75
    stopped = summary(run)
    assert "resuming from" in train(command, processes=2).output
    ended = summary(run)
    assert ended["exit"] == "completed"
    assert stopped["reference"] == ended["reference"] == first
    works = ("starting", "reference", "training", "evaluation", "samples", "saving")
    for work in works:
        assert ended["work"]["seconds"][work] > before["seconds"][work] > 0.0, work
    total = sum(ended["work"]["seconds"].values())
    assert math.isclose(ended["work"]["device_seconds"], 2 * total, abs_tol=0.1)
    assert math.isclose(ended["work"]["seconds"]["training"], ended["train_seconds"], rel_tol=0.2)


def test_a_stopped_run_ends_with_75_and_resumes_exactly(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Between two rows, with a loss that has running means."""
    loss = ["loss=bco_pair", "loss.beta=0.5", "loss.bco_delta=running_mean"]
    steps = ["trainer.epochs=2", "trainer.log_every=2", "optim.lr=1e-2"]
    steps += [f"data.eval=[{assets}/eval.jsonl]", *loss]
    train(overrides(*steps, f"run.dir={tmp_path}/whole"))
    stopped = run_verb("train", overrides(*steps, "trainer.stop_after_steps=3"))
    assert stopped.code == 75, stopped.output
    assert summary(tmp_path / "run")["exit"] == "preempted"
    assert "verdict: stopped after step 3; so far: " in stopped.output
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


def test_another_base_is_an_error_and_loses_nothing(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Also without a reference: an adapter's base model is not in its checkpoints."""
    model = tmp_path / "model"
    shutil.copytree(assets / "model", model)
    options = (f"model.path={model}", "model.adapter={r: 4}", "loss=simpo", "trainer.epochs=1")
    assert run_verb("train", overrides(*options, "trainer.stop_after_steps=2")).code == 75
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(
        (write_model(tmp_path / "other", seed=5) / "model.safetensors").read_bytes()
    )
    other = run_verb("train", overrides(*options))
    assert other.code == 2, other.output
    assert "the model that the policy starts from of this run changed" in other.output
    (model / "model.safetensors").write_bytes(whole)
    train(overrides(*options))
    assert summary(tmp_path / "run")["exit"] == "completed"
