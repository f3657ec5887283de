"""A recipe of another trainer, converted, trains without an edit."""

from pathlib import Path

from tests.support.launch import run_verb, summary

FILES = Path(__file__).parents[1] / "assets" / "foreign"


def test_a_converted_recipe_trains(assets: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.yaml"
    written = run_verb("convert", [str(FILES / "llama_factory.yaml"), str(ours)])
    assert (written.code, f"next: dpo-dist train {ours} --check" in written.output) == (0, True), (
        written.output
    )
    here = [f"model.path={assets}/model", f"data.train=[{assets}/train.jsonl]", "model.dtype=fp32"]
    folders = [f"run.root={tmp_path}", f"run.dir={tmp_path}/run", "parallelism=ddp", "tracking=off"]
    trained = run_verb("train", [str(ours), *here, *folders])
    assert trained.code == 0, trained.output
    assert summary(tmp_path / "run")["exit"] == "completed"
