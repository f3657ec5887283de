"""A run in fp16: overflows are skipped, counted and reported, and a resumed run is the uninterrupted one."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Overrides
from tests.support.launch import history, run_state, run_verb, summary
from tests.support.precision import NEEDS_FP16
from tests.support.records import TEXT

pytestmark = NEEDS_FP16
LOSS = """
from torch.nn.functional import logsigmoid


def steep(policy, reference, config):
    return -STEEPNESS * logsigmoid(config.beta * (policy.margin - reference.margin))
"""


def prepare(folder: Path, overrides: Overrides, steepness: float) -> list[str]:
    """The command line of a run of 8 steps in fp16 whose loss is that many times the usual one."""
    (folder / "steep_loss.py").write_text(LOSS.replace("STEEPNESS", str(steepness)))
    records = [TEXT | {"prompt": f"question {number}"} for number in range(12)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return overrides(
        f"data.train=[{data}]",
        "loss=custom",
        "loss.function=steep_loss:steep",
        "trainer.epochs=4",
        "model.dtype=fp16",
    )


def test_overflows_are_skipped_and_reported_and_a_resumed_run_is_the_same(
    overrides: Overrides, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = prepare(tmp_path, overrides, 30)
    ended = run_verb("train", [*command, f"run.dir={whole}"], processes=2, cwd=tmp_path)
    assert ended.code == 0, ended.output
    rows, found = history(whole), summary(whole)
    skipped = sorted({*range(1, 9)} - {row["step"] for row in rows})
    assert 2 <= len(skipped) < 8
    assert (found["overflows"], found["bad_steps"]) == (len(skipped), 0)
    for row in rows:
        before = sum(step < row["step"] for step in skipped)
        assert (row["overflows"], row["loss_scale"]) == (before, 2.0 ** (16 - before))
    assert "step 1 was skipped: gradients overflow in fp16; the loss scale falls to 32768" in ended.output
    assert all(math.isfinite(value) for row in rows for value in row.values())
    weights = load_file(whole / "model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}

    run_verb("train", [*command, "trainer.stop_after_steps=1"], processes=2, cwd=tmp_path)
    assert run_state(run)["outcome"] == "preempted"
    assert run_verb("train", command, processes=2, cwd=tmp_path).code == 0
    assert history(run) == rows
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
