"""`evaluate` gives the numbers of the run's own last evaluation, on any number of processes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.metrics import MARGIN_PERCENTILES
from tests.e2e.conftest import Overrides, last_evaluation
from tests.support.invented import write_pairs
from tests.support.launch import run_state, run_verb, train

ROWS = ("trainer.max_steps=3", "trainer.save_every=2", "optim.lr=1e-2")


def evaluated(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "evaluation" / "evaluation.json").read_text())
    return content


def scores(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation" / "scores.jsonl").read_text().splitlines()]


def evaluate(overrides: list[str], processes: int = 1) -> str:
    ended = run_verb("evaluate", overrides, processes=processes)
    assert ended.code == 0, ended.output
    return ended.output


def assert_equals_the_run(run: Path) -> None:
    row, found = last_evaluation(run), evaluated(run)["all"]
    compared = [
        key for key in row if key.startswith("eval_") and not key.endswith(("/all", "/more", "_tokens"))
    ]
    wanted = {"rewards/accuracies", "rewards/margins", "distance/chosen", *MARGIN_PERCENTILES}
    assert {f"eval_{name}" for name in wanted} <= set(compared)
    for key in compared:
        assert found[key] == pytest.approx(row[key], abs=1e-5, rel=1e-5), key


def assert_same_evaluation(got: Any, expected: Any) -> None:
    """Equal keys at all depths, and nearly equal numbers."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same_evaluation(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same_evaluation(one, other)
    else:
        assert got == pytest.approx(expected, abs=1e-4)


def test_a_run_killed_before_the_checkpoint_of_its_last_step_evaluates_again(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    command = overrides(*ROWS, f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=2")
    run = tmp_path / "run"
    train(command)
    expected, pairs = evaluated(run), scores(run)
    for lost in ("model", "evaluation", "checkpoints/step-000003"):
        shutil.rmtree(run / lost)
    state = run_state(run)
    (run / "run_state.json").write_text(json.dumps({**state, "outcome": "started", "summary": None}))
    train(command)
    assert (evaluated(run), scores(run)) == (expected, pairs)


def test_a_model_and_a_checkpoint_score_as_in_the_run(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Also if the label of a source is the name of the results of all pairs."""
    write_pairs(tmp_path / "more.jsonl", 6, seed=5)
    sources = f"{{path: {assets}/eval.jsonl, label: all}}, {{path: {tmp_path}/more.jsonl, label: more}}"
    names = {"all": "all (source)", "more": "more"}
    command = overrides(*ROWS, f"data.eval=[{sources}]")
    run = tmp_path / "run"
    train(command, processes=2)
    assert_equals_the_run(run)
    of_training, scores_of_training = evaluated(run), scores(run)
    output = evaluate(command)
    assert_same_evaluation(evaluated(run), of_training)
    for got, expected in zip(scores(run), scores_of_training, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    assert "log-probs computed" in output
    assert "reference: 0 log-probs computed, 22 reused" in output
    assert "accuracy" in output
    alone, pairs = evaluated(run), scores(run)
    assert list(alone) == ["all", *names.values()]
    row = last_evaluation(run)
    for label, name in names.items():
        for metric in ("loss", "rewards/accuracies", "distance/rejected"):
            key = f"eval_{metric}"
            assert alone[name][key] == pytest.approx(row[f"{key}/{label}"], abs=1e-5), key
    for label in ("all", "more"):
        low, high = alone[label]["intervals"]["eval_rewards/margins"]
        assert low <= alone[label]["eval_rewards/margins"] <= high
    assert alone["all (source)"]["intervals"] == {}, "of five prompts"
    assert [(pair["source"], pair["line"]) for pair in pairs] == [
        *(("all", line) for line in range(1, 6)),
        *(("more", line) for line in range(1, 7)),
    ]
    for pair in pairs:
        difference = pair["logp_chosen"] - pair["reference_logp_chosen"]
        assert pair["reward_chosen"] == pytest.approx(0.1 * difference, abs=1e-5)
        assert pair["margin"] == pytest.approx(pair["reward_chosen"] - pair["reward_rejected"], abs=1e-5)
        assert pair["tokens_chosen"] > 0
    margins = [pair["margin"] for pair in pairs]
    assert alone["all"]["eval_rewards/margins"] == pytest.approx(math.fsum(margins) / 11, abs=1e-6)

    last = f"evaluation.model={run}/checkpoints/step-000003"
    for processes in (1, 2):
        assert "evaluating" in evaluate([*command, last], processes)
        assert_equals_the_run(run)
    for got, expected in zip(scores(run), pairs, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)

    models = f"evaluation.model=[{run}/model,{assets}/model,{run}/checkpoints/step-000002]"
    seen = f"{{path: {assets}/train.jsonl, limit: 3, label: seen}}"
    others = [f"run.dir={run}", f"evaluation.data=[{tmp_path}/more.jsonl,{seen}]"]
    output = evaluate([*others, models])
    assert output.count("warning: 3 of 9 pairs are not held out") == 2, "the base has no run"
    assert evaluated(run)["all"]["eval_pairs"] == 9
    folders = sorted(path for path in (run / "evaluation").iterdir() if path.is_dir())
    names = [path.name.rpartition("-")[0] or path.name for path in folders]
    assert names == ["model", "model", "model", "step-000002", "step-000003", "training"]
    assert_same_evaluation(json.loads((folders[-1] / "evaluation.json").read_text()), of_training)
    described = {path: json.loads((path / "evaluated.json").read_text())["model"] for path in folders}
    base = next(path for path, model in described.items() if model == f"{assets}/model")
    assert json.loads((base / "evaluation.json").read_text())["all"]["eval_rewards/margins"] == 0

    output = evaluate([*others, models, "--check", "console.style=json"])
    checked = json.loads(output.splitlines()[-1])
    assert checked["kind"] == "check"
    for text in ("check passed", "step-000002\n", "more.jsonl, 6 of 6 records kept"):
        assert text in checked["text"], text
