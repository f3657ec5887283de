"""A step whose loss is not finite on one rank is skipped on all, counted and named; too many end the run."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import Overrides
from tests.support.launch import constants, history, run_verb, summary
from tests.support.records import TEXT

SPOILT_LINE = 9
LOSS = """
import torch
from torch.nn.functional import relu


def spoilt(policy, reference, config):
    losses = relu(1 - config.beta * (policy.margin - reference.margin))
    is_spoilt = (policy.chosen_tokens > 60) & (policy.margin != reference.margin)
    return torch.where(is_spoilt, torch.inf, losses)


def constant(policy, reference, config):
    return config.beta + 0 * (policy.margin - reference.margin)


def zero(policy, reference, config):
    return 0 * (policy.margin - reference.margin)
"""


def prepare(folder: Path, overrides: Overrides, spoilt: range, *extra: str) -> list[str]:
    """The command line of a run whose loss is infinite for these lines, except in its first step."""
    (folder / "spoilt_loss.py").write_text(LOSS)
    records = [TEXT | {"prompt": f"question {number}"} for number in range(12)]
    for line in spoilt:
        records[line - 1] |= {"chosen": "a long response " * 20}
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    loss = "loss=custom", "loss.function=spoilt_loss:spoilt"
    return overrides(f"data.train=[{data}]", "data.text_as_messages=true", *loss, "trainer.epochs=3", *extra)


def bad_steps(most: int) -> Callable[[], None]:
    return constants(**{"dpo_dist.training.steps.health.MOST_BAD_STEPS": most})


def test_bad_steps_are_skipped_named_and_the_run_completes_and_resumes(
    overrides: Overrides, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = prepare(tmp_path, overrides, range(SPOILT_LINE, SPOILT_LINE + 1))
    start = partial(run_verb, "train", processes=2, cwd=tmp_path, prepare=bad_steps(1))
    ended = start([*command, f"run.dir={whole}"])
    assert ended.code == 0, ended.output
    rows = history(whole)
    bad = [json.loads(file.read_text()) for file in sorted((whole / "logs").glob("bad-step-*.json"))]
    # One in each epoch, but not in the first step, where the policy is the reference.
    assert len(bad) >= 2
    assert summary(whole)["bad_steps"] == len(bad)
    assert [finding["rule"] for finding in summary(whole)["verdict"]["findings"]] == ["diverged"]
    assert {one["grad_norm"] for one in bad} == {"inf"}
    assert [row["step"] for row in rows] == sorted({*range(1, 7)} - {one["step"] for one in bad})
    for row in rows:
        assert row["bad_steps"] == sum(one["step"] < row["step"] for one in bad)
    for one in bad:
        assert len(one["pairs"]) == 6
        assert {Path(pair["source"]).name for pair in one["pairs"]} == {"pairs.jsonl"}
        assert [pair["line"] for pair in one["pairs"] if pair["loss"] == "inf"] == [SPOILT_LINE]
        assert f"step {one['step']} was skipped" in ended.output
    assert f"pairs.jsonl:{SPOILT_LINE};" in ended.output
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(weight.isfinite().all() for weight in load_file(whole / "model/model.safetensors").values())

    assert start([*command, f"trainer.stop_after_steps={bad[0]['step']}"]).code == 75
    assert start(command).code == 0
    assert history(run) == rows
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_too_many_bad_steps_in_a_row_end_the_run_with_3_also_over_a_resume(
    overrides: Overrides, tmp_path: Path
) -> None:
    command = prepare(tmp_path, overrides, range(1, 13))
    start = partial(run_verb, "train", cwd=tmp_path, prepare=bad_steps(2))
    assert start([*command, "trainer.stop_after_steps=3"]).code == 75
    ended = start(command)
    assert ended.code == 3, ended.output
    assert "at step 4; this update was not applied" in ended.output
    assert "bad steps in a row: 3, of this run: 3" in ended.output
    assert "bad-step-000004.json" in ended.output
    assert (summary(tmp_path / "run")["exit"], summary(tmp_path / "run")["bad_steps"]) == ("diverged", 3)
    assert [row["step"] for row in history(tmp_path / "run")] == [1, 4]


@pytest.mark.parametrize(("loss", "step"), [("constant", 4), ("zero", 6)])
def test_a_run_without_a_gradient_ends_with_3(
    overrides: Overrides, tmp_path: Path, loss: str, step: int
) -> None:
    command = prepare(tmp_path, overrides, range(0), f"loss.function=spoilt_loss:{loss}")
    ended = run_verb("train", command, cwd=tmp_path)
    assert ended.code == 3, ended.output
    assert f"the gradient is exactly 0 at step {step}" in ended.output
    told = summary(tmp_path / "run")
    assert (told["exit"], told["steps"]) == ("diverged", step)
    assert [finding["rule"] for finding in told["verdict"]["findings"]] == ["nothing_trained"]
