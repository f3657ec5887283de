"""Whole runs of models whose responses cannot share a prompt, with code of transformers or their own."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides
from tests.support import tiny
from tests.support.families import tiny_family
from tests.support.launch import assert_same_history, history, run_verb, summary, train
from tests.support.own_code import ship_code
from tests.support.tiny_model import write_model


def without_ties(run: Path) -> list[dict[str, float]]:
    """The history without shares of margins above 0: before the first update margins are rounding."""
    return [{key: value for key, value in row.items() if "accurac" not in key} for row in history(run)]


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    if request.param == "own":
        return ship_code(write_model(folder), "rows")
    tokenizer = tiny.qwen()
    causal_lm = tiny_family(request.param, len(tokenizer))
    causal_lm.config.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("jamba", "one response per row, padded to the longest of the micro-batch"),
        ("own", "one response per forward"),
    ],
    indirect=["model"],
)
def test_a_run_is_the_same_on_one_and_two_processes(
    model: Path, told: str, overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Store filled on two ranks, evaluation, steps of several micro-batches, step-0 check, export."""
    command = overrides(
        f"model.path={model}",
        "model.trust_remote_code=true",
        f"data.eval=[{assets}/eval.jsonl]",
        "trainer.max_steps=3",
        "trainer.eval_every=3",
        "trainer.micro_batch_tokens=200",
    )
    output = train(command, processes=2).output
    assert f"unpacked: responses of this model cannot share a prompt in one forward: {told}, " in output
    assert "step-0 check passed" in output
    one = tmp_path / "one"
    train([*command, f"run.dir={one}", f"reference.store={tmp_path}/other"], processes=1)
    assert_same_history(without_ties(tmp_path / "run"), without_ties(one), 1e-3)
    assert summary(tmp_path / "run")["reference"]["computed"] > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    evaluated = run_verb("evaluate", [f"run.dir={tmp_path}/run", "model.trust_remote_code=true"])
    assert evaluated.code == 0, evaluated.output


RULE = "def score(prompt, responses):\n    return [float(len(text)) for text in responses]\n"


@pytest.mark.parametrize("model", ["bloom"], indirect=True)
def test_the_other_verbs_take_a_model_in_rows(
    model: Path, overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """A store of `precompute` is complete; a run has samples; `compare` scores its responses."""
    command = overrides(
        f"model.path={model}",
        f"data.eval=[{assets}/eval.jsonl]",
        "trainer.max_steps=2",
        "trainer.eval_every=2",
        "samples.prompts=2",
        "samples.max_new_tokens=4",
        "samples.temperature=0",
    )
    filled = run_verb("precompute", command)
    assert filled.code == 0, filled.output
    train(command, processes=1)
    assert summary(tmp_path / "run")["reference"]["computed"] == 0
    assert (tmp_path / "run/samples/step-000002.jsonl").read_text().count("\n") == 2
    (tmp_path / "rule.py").write_text(RULE)
    compared = run_verb(
        "compare",
        [
            f"compare.models=[before={model},after={tmp_path}/run/model]",
            f"data.eval=[{assets}/eval.jsonl]",
            "model.dtype=fp32",
            "compare.max_new_tokens=4",
            "pairs.function=rule:score",
            f"run.dir={tmp_path}/compared",
        ],
        cwd=tmp_path,
    )
    assert compared.code == 0, compared.output
    answers = (tmp_path / "compared/comparison/answers.jsonl").read_text().splitlines()
    assert all(json.loads(line)["responses"]["after"]["logp"] < 0 for line in answers)
