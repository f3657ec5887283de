"""Samples of a run: the same on any number of processes, over restarts, and without effect on training."""

import json
import re
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Overrides
from tests.support.image_model import QUESTION, write_image_model, write_pictures
from tests.support.launch import TIMINGS, history, log, run_verb, train
from tests.support.tiny_model import write_model

SAMPLES = ["sampling.prompts=3", "sampling.max_new_tokens=8", "sampling.temperature=0"]


def rows(run: Path, step: int) -> list[dict[str, Any]]:
    text = (run / "samples" / f"step-{step:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """Return the metrics rows without those of samples and of time."""
    return [
        {
            key: value
            for key, value in row.items()
            if "samples/" not in key and key.removeprefix("eval_") not in TIMINGS
        }
        for row in history(run)
    ]


def test_samples_are_those_of_one_process_also_after_a_restart(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    usual = overrides(
        f"data.eval=[{assets}/eval.jsonl]",
        "trainer.max_steps=2",
        "trainer.eval_every=1",
        "optim.lr=5e-2",
        "parallelism.offload_parameters=cpu",
        "model.adapter={r: 4}",
    )
    whole, quiet, run = tmp_path / "whole", tmp_path / "quiet", tmp_path / "run"
    train([*usual, *SAMPLES, f"run.dir={whole}"])
    stopped = run_verb("train", [*usual, *SAMPLES, "trainer.stop_after_steps=1"], processes=2)
    assert "stopped after step 1" in stopped.output, stopped.output
    assert not (run / "evaluation").exists(), "only of the last evaluation"
    of_lost_steps = (run / "samples/step-000000.jsonl").read_text()
    (run / "samples/step-000002.jsonl").write_text(of_lost_steps)
    train([*usual, *SAMPLES], processes=2)
    train([*usual, f"run.dir={quiet}"], processes=2)

    names = ["reference.jsonl", *(f"step-{step:06d}.jsonl" for step in (0, 1, 2))]
    assert sorted(file.name for file in (run / "samples").iterdir()) == names
    for name in names:
        assert (run / "samples" / name).read_text() == (whole / "samples" / name).read_text()
    assert untimed(run) == untimed(quiet)
    assert not (quiet / "samples").exists()

    start, end = rows(run, 0), rows(run, 2)
    assert any(row["responses"]["policy"]["text"] != row["responses"]["reference"]["text"] for row in end)
    assert len({row["prompt_id"] for row in end}) == 3
    held_out = [json.loads(line) for line in (assets / "eval.jsonl").read_text().splitlines()]
    for first, last in zip(start, end, strict=True):
        assert (
            first["responses"]["policy"]["text"]
            == first["responses"]["reference"]["text"]
            == last["responses"]["reference"]["text"]
        )
        assert (last["step"], last["source"]) == (2, f"{assets.name}-eval")
        (record,) = [found for found in held_out if found["chosen"][0]["content"] == last["chosen"]]
        assert all(turn["content"] in last["prompt"] for turn in record["prompt"])
        assert 0 < last["responses"]["policy"]["tokens"] <= 8
    evaluations = [row for row in history(run) if "eval_loss" in row]
    assert [row["step"] for row in evaluations if "eval_samples/length" in row] == [0, 1, 2]
    assert (
        evaluations[-1]["eval_samples/length"] == sum(row["responses"]["policy"]["tokens"] for row in end) / 3
    )
    assert (
        evaluations[-1]["eval_samples/finished"]
        == sum(row["responses"]["policy"]["finished"] for row in end) / 3
    )


def test_without_the_key_8_prompts_are_sampled_before_the_first_step_and_after_the_last(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """The last step is that of `trainer.patience`, as the distance only grows."""
    data = f"data.eval=[{assets}/eval.jsonl,{assets}/train.jsonl]"
    ends = ["trainer.max_steps=6", "trainer.keep_best=eval_distance/rejected", "trainer.patience=1"]
    usual = overrides(data, "trainer.eval_every=1", *ends, "sampling.prompts=null")
    train([*usual, "sampling.max_new_tokens=2", "optim.lr=5e-3"])
    last = int(history(tmp_path / "run")[-1]["step"])
    assert last < 6
    names = ["reference.jsonl", "step-000000.jsonl", f"step-{last:06d}.jsonl"]
    assert sorted(file.name for file in (tmp_path / "run/samples").iterdir()) == names
    assert len(rows(tmp_path / "run", last)) == 8
    assert "samples: responses to 8 held-out prompts, " in log(tmp_path / "run")
    assert "about as long after the last step; sampling.prompts=0 turns them off" in log(tmp_path / "run")


def test_the_reference_responds_also_if_the_policy_cannot(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """The policy starts as another model, and has been trained when samples begin."""
    other = tmp_path / "other"
    write_model(other, seed=1)
    steps = ("trainer.max_steps=2", "trainer.eval_every=1", "optim.lr=1e-2")
    usual = overrides(f"data.eval=[{assets}/eval.jsonl]", *steps, f"reference.path={other}")
    whole, run = tmp_path / "whole", tmp_path / "run"
    train([*usual, *SAMPLES, f"run.dir={whole}"])
    assert run_verb("train", [*usual, "trainer.stop_after_steps=1"]).code == 75
    train([*usual, *SAMPLES], processes=2)
    assert "samples: loading the reference to generate its responses" in log(run)
    for name in ("reference.jsonl", "step-000002.jsonl"):
        assert (run / "samples" / name).read_text() == (whole / "samples" / name).read_text()
    start = rows(whole, 0)
    assert all(row["responses"]["policy"]["text"] != row["responses"]["reference"]["text"] for row in start)
    assert "eval_samples/reference_length" in history(run)[-1]


def test_samples_of_prompts_with_images_are_those_of_one_process_and_the_report_shows_the_images(
    overrides: Overrides, tmp_path: Path
) -> None:
    folder, data = write_image_model(tmp_path / "model"), write_pictures(tmp_path)
    usual = [
        *(f"model.path={folder}", "model.images.train=none", "trainer.max_steps=1", "trainer.eval_every=1"),
        *(f"data.train=[{data}]", f"data.eval=[{data}]", "data.drop_eval_prompts=false", "optim.lr=1e-2"),
        *("trainer.global_batch_pairs=3", *SAMPLES),
    ]
    train(overrides(*usual, f"run.dir={tmp_path / 'alone'}"))
    train(overrides(*usual), processes=2)
    found = rows(tmp_path / "run", 1)
    assert found == rows(tmp_path / "alone", 1)
    assert len({row["responses"]["policy"]["text"] for row in found}) == 3
    for row in found:
        assert row["prompt"].count("<|image_pad|>") == 1
        assert QUESTION in row["prompt"]
    page = (tmp_path / "run/report.html").read_text()
    assert sorted(set(re.findall('<img src="([^"]*)"', page))) == sorted(
        image for row in found for image in row["images"]
    )
