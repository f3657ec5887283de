"""Recipes of other trainers, converted, train without an edit."""

from pathlib import Path

import pytest

from tests.support.launch import run_verb, summary

FILES = Path(__file__).parents[1] / "assets" / "foreign"
# What the tiny model, a CPU and a test without the hub need.
HERE = {
    "llama_factory": [],
    "trl": ["data.eval_share=0.1", "data.eval=[]"],
    "axolotl": ["model.quantization=null", "optim.kind=adamw"],
}


@pytest.mark.parametrize("trainer", HERE)
def test_a_converted_recipe_trains(trainer: str, assets: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.yaml"
    written = run_verb("convert", [str(FILES / f"{trainer}.yaml"), str(ours)])
    assert (written.code, f"next: dpo-dist train {ours} --check" in written.output) == (0, True), (
        written.output
    )
    here = [f"model.path={assets}/model", f"data.train=[{assets}/train.jsonl]", "model.dtype=fp32"]
    folders = [f"run.root={tmp_path}", f"run.dir={tmp_path}/run", "parallelism=ddp", "tracking=off"]
    trained = run_verb("train", [str(ours), *here, *folders, *HERE[trainer]])
    assert trained.code == 0, trained.output
    assert summary(tmp_path / "run")["exit"] == "completed"
