"""A step whose loss is not finite on one rank is skipped on all, counted and named; too many end the run."""

import json
import math
from pathlib import Path

from safetensors.torch import load_file

from tests.e2e.conftest import Overrides
from tests.support.launch import history, run_state, run_verb, summary, train
from tests.support.records import TEXT

SPOILT_LINE = 9
LOSS = """
import torch
from torch.nn.functional import relu


def spoilt(policy, reference, config):
    losses = relu(1 - config.beta * (policy.margin - reference.margin))
    is_spoilt = (policy.chosen_tokens > 60) & (policy.margin != reference.margin)
    return torch.where(is_spoilt, torch.inf, losses)
"""


def prepare(folder: Path, overrides: Overrides, *extra: str) -> list[str]:
    """The command line of a run whose loss is infinite for one record."""
    (folder / "spoilt_loss.py").write_text(LOSS)
    records = [TEXT | {"prompt": f"question {number}"} for number in range(12)]
    records[SPOILT_LINE - 1] |= {"chosen": "a long response " * 20}
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return overrides(
        f"data.train=[{data}]", "loss=custom", "loss.function=spoilt_loss:spoilt", "trainer.epochs=3", *extra
    )


def test_bad_steps_are_skipped_named_and_the_run_completes_and_resumes(
    overrides: Overrides, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    ended = run_verb("train", prepare(tmp_path, overrides, f"run.dir={whole}"), processes=2, cwd=tmp_path)
    assert ended.code == 0, ended.output
    rows = history(whole)
    files = sorted((whole / "logs").glob("bad-step-*.json"))
    bad = [json.loads(file.read_text()) for file in files]
    # One in each epoch, but not in the first step, where the policy is the reference.
    assert len(bad) >= 2
    assert rows[-1]["bad_steps"] == sum(one["step"] < rows[-1]["step"] for one in bad)
    assert {one["grad_norm"] for one in bad} == {"inf"}
    assert [row["step"] for row in rows] == sorted({*range(1, 7)} - {one["step"] for one in bad})
    for one in bad:
        assert len(one["pairs"]) == 6
        assert SPOILT_LINE in [pair["line"] for pair in one["pairs"]]
        assert {Path(pair["source"]).name for pair in one["pairs"]} == {"pairs.jsonl"}
        assert f"step {one['step']} was skipped" in ended.output
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(weight.isfinite().all() for weight in load_file(whole / "model/model.safetensors").values())

    command = prepare(tmp_path, overrides)
    run_verb("train", [*command, "trainer.stop_after_steps=3"], processes=2, cwd=tmp_path)
    assert run_state(run)["outcome"] == "preempted"
    assert run_verb("train", command, processes=2, cwd=tmp_path).code == 0
    assert history(run) == rows


def test_too_many_bad_steps_end_the_run_with_3(overrides: Overrides, tmp_path: Path) -> None:
    command = prepare(tmp_path, overrides, "trainer.max_bad_steps=1")
    ended = run_verb("train", command, cwd=tmp_path)
    assert ended.code == 3, ended.output
    assert "bad steps of this run: 2" in ended.output
    assert "bad-step-0000" in ended.output
    assert summary(tmp_path / "run")["exit"] == "diverged"
    assert history(tmp_path / "run")[-1]["bad_steps"] == 2


def test_a_run_without_bad_steps_has_no_such_column(overrides: Overrides, tmp_path: Path) -> None:
    train(overrides("trainer.max_steps=2"))
    assert all("bad_steps" not in row for row in history(tmp_path / "run"))
