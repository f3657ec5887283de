"""`plan` with data on the command line; the recipes train."""

import math
import re
from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.invented import write_pairs
from tests.support.launch import ROOT, history, run_verb, train
from tests.support.tiny_model import write_model

RECIPES = {
    "zephyr7b": "mistral",
    "tulu3_8b": "llama",
    "olmo3_7b": "olmo3",
    "smollm3": "smollm3",
    "qwen3_0_6b": "qwen3",
}


@pytest.mark.parametrize(("recipe", "family"), RECIPES.items())
def test_a_recipe_trains_a_tiny_model_of_its_architecture(recipe: str, family: str, tmp_path: Path) -> None:
    """With its own settings but for data, paths, batch and parallelism; README.md has a section about it."""
    tokenizer, model, pairs = tiny.qwen(), tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny_causal_lm(tiny_config(family, len(tokenizer), max_position_embeddings=32768)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    write_pairs(pairs, 16, seed=3)
    words = [
        f"+experiment=[{recipe},smoke]",
        f"model.path={model}",
        "model.revision=null",
        "model.dtype=fp32",
    ]
    words += [f"data.train=[{pairs}]", "data.eval=[]", "data.eval_share=0.2", "sampling.prompts=0"]
    words += [f"run.root={tmp_path}", f"run.dir={tmp_path}/run", "parallelism=ddp", "tracking=off"]
    train([*words, "trainer.max_steps=1"])
    [first] = [row["loss"] for row in history(tmp_path / "run") if "loss" in row]
    assert first == pytest.approx(1.0 if recipe == "smollm3" else math.log(2), abs=1e-6)
    shapes = yaml.safe_load((ROOT / "dpo_dist/tools/plan/shapes.yaml").read_text())
    experiment = yaml.safe_load((ROOT / f"conf/experiment/{recipe}.yaml").read_text())
    assert shapes[experiment["model"]["path"]]["model_type"] == family
    assert f"+experiment={recipe}" in (ROOT / "conf/experiment/README.md").read_text()


def test_local_data_give_pairs_and_tokens(tmp_path: Path) -> None:
    model, pairs = write_model(tmp_path / "model"), tmp_path / "pairs.jsonl"
    write_pairs(pairs, 12, seed=3)
    words = [
        f"model.path={model}",
        f"data.train=[{{path: {pairs}, weight: 0.5}}]",
        f"run.root={tmp_path}",
        "model.dtype=fp32",
        "trainer.global_batch_pairs=6",
    ]
    ended = run_verb("plan", [*words, "plan.gpus=1", "trainer.max_steps=7"])
    assert ended.code == 0, ended.output
    assert "an epoch of 6 pairs" in ended.output
    assert "(of data.train)" in ended.output
    assert re.search(r"  this run, trainer.max_steps=7 +under 1 s", ended.output)
