"""Checkpoints of a run that are kept by a metric, written as model folders, and continued to a longer run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_dist.distributed.checkpoint.saver import SavedSlices
from tests.e2e.conftest import small_run
from tests.support.launch import history, run_state, run_verb, summary, train

METRIC = "eval_distance/chosen"


def command(assets: Path, folder: Path, *options: str) -> list[str]:
    """A run in bf16 with an evaluation after every step, whose best checkpoint has the smallest margin."""
    data = [f"data.eval=[{assets}/eval.jsonl]", "model.dtype=bf16", f"reference.store={assets}/kept_store"]
    best = [f"trainer.keep_best={METRIC}", "trainer.eval_every=1"]
    rate = ["optim.lr=1e-3", "optim.schedule=constant", "optim.warmup=0"]
    kept = ["trainer.save_every=2", "trainer.keep_last=1", "trainer.ema_decay=0.5"]
    return [*small_run(assets, folder), *data, *best, *rate, *kept, *options]


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of six steps."""
    folder = tmp_path_factory.mktemp("kept")
    train(command(assets, folder, "trainer.max_steps=6"))
    return folder / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_best_checkpoint_is_kept_and_exported(run: Path) -> None:
    measured = {row["step"]: row[METRIC] for row in history(run) if METRIC in row and row["step"] > 0}
    best = min(measured, key=lambda step: (measured[step], step))
    assert best != 6, "the test needs a best step before the last"
    names = {f"step-{best:06d}", "step-000006"}
    assert {folder.name for folder in (run / "checkpoints").glob("step-*")} == names
    assert (run / "checkpoints/best").read_text() == f"step-{best:06d}\n"
    assert summary(run)["best_checkpoint"] == {"metric": METRIC, "step": best, "value": measured[best]}
    assert f"step-{best:06d} ({METRIC} " in (run / "report.html").read_text()

    for checkpoint in ("best", "latest"):
        ended = run_verb("export", [f"run.dir={run}", f"export.checkpoint={checkpoint}"])
        assert ended.code == 0, ended.output
    exported = run / f"exported/step-{best:06d}"
    name = "model.embed_tokens.weight"
    last, of_best, of_model = (
        load_file(folder / "model.safetensors")[name]
        for folder in (run / "exported/step-000006", exported, run / "model")
    )
    assert not torch.equal(last, of_best)
    assert torch.equal(of_model, of_best)
    card = (exported / "README.md").read_text()
    assert f"stopped after step {best}; so far: " in card
    assert "## Evaluation" not in card


def test_without_a_name_the_checkpoint_of_the_model_is_written(run: Path, tmp_path: Path) -> None:
    ended = run_verb("export", [f"run.dir={run}", f"export.output={tmp_path}/out"])
    assert ended.code == 0, ended.output
    written, of_model = files(tmp_path / "out"), files(run / "model")
    assert written.pop("README.md") != of_model.pop("README.md"), "which tells of the whole run"
    assert written == of_model
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_best_checkpoint_becomes_the_model_also_of_a_resumed_run(
    assets: Path, run: Path, tmp_path: Path
) -> None:
    """Also of one that was stopped after its best step and resumed, and keeps no checkpoint."""
    words = command(assets, tmp_path, "trainer.max_steps=6", "trainer.keep_last=0")
    words = [word for word in words if not word.startswith(("trainer.ema", "trainer.keep_last=1"))]
    best, resumed = summary(run)["best_checkpoint"]["step"], tmp_path / "run"
    assert run_verb("train", [*words, "trainer.stop_after_steps=5"]).code == 75
    output = train(words).output
    assert f"the weights of step {best} of 6 are the model, by {METRIC}" in output
    assert (summary(resumed)["model_step"], summary(resumed)["steps"]) == (best, 6)
    ended = run_verb("export", [f"run.dir={run}", "export.checkpoint=best", f"export.output={tmp_path}/out"])
    assert ended.code == 0, ended.output
    assert files(resumed / "model")["model.safetensors"] == files(tmp_path / "out")["model.safetensors"]
    card = (resumed / "model/README.md").read_text()
    assert f"in {best} step" in card
    assert f"The weights are from step {best}, whose evaluation had the best `{METRIC}`." in card
    assert "## Evaluation" not in card


def test_the_moving_average_is_a_model_folder_too(run: Path) -> None:
    ended = run_verb("export", [f"run.dir={run}", "export.checkpoint=latest", "export.weights=ema"])
    assert ended.code == 0, ended.output
    folder = run / "exported/step-000006-ema"
    found = load_file(folder / "model.safetensors")
    last = load_file(run / "model/model.safetensors")
    saved = SavedSlices.find(run / "checkpoints/step-000006", "engine")
    assert found.keys() == last.keys()
    for name, weight in found.items():
        assert torch.equal(weight, saved.whole_in(torch.bfloat16, name, "ema"))
    assert any(not torch.equal(weight, last[name]) for name, weight in found.items())
    card = (folder / "README.md").read_text()
    assert "moving average over the training steps, with a decay of 0.5" in card
    assert "## Evaluation" not in card


def test_a_complete_run_that_becomes_longer_is_the_longer_run(
    assets: Path, run: Path, tmp_path: Path
) -> None:
    train(command(assets, tmp_path, "trainer.max_steps=3"))
    short, shorter = tmp_path / "run", command(assets, tmp_path, "trainer.max_steps=2")
    written = files(short / "model")
    longer = train(command(assets, tmp_path, "trainer.max_steps=6"))
    assert "training longer: 6 steps in place of 3; " in longer.output
    assert history(short) == history(run)
    assert run_state(short)["outcome"] == "completed"
    assert summary(short)["best_checkpoint"] == summary(run)["best_checkpoint"]
    assert files(short / "model") == files(run / "model") != written

    before = (short / "config.yaml").read_bytes()
    refused = run_verb("train", shorter)
    assert refused.code == 2, refused.output
    assert "a run can only be continued to the same length or a greater one" in refused.output
    assert (short / "config.yaml").read_bytes() == before


def test_a_run_ends_by_patience_also_if_it_was_stopped_before(
    assets: Path, run: Path, tmp_path: Path
) -> None:
    """Its rows are those of the run without patience up to there; the last row of steps is not lost."""
    measured = {row["step"]: row[METRIC] for row in history(run) if METRIC in row and row["step"] > 0}
    best = min(range(1, 5), key=lambda step: (measured[step], step))
    assert measured[1] == measured[best], "the test needs a best step that two worse ones follow"
    words = command(assets, tmp_path, "trainer.max_steps=6", "trainer.patience=2", "trainer.log_every=4")
    stopped = run_verb("train", [*words, "trainer.stop_after_steps=2"])
    assert stopped.code == 75, stopped.output
    ended = train(words, processes=2)
    folder = tmp_path / "run"
    assert [row["step"] for row in history(folder)] == [0, 1, 2, 3, 3]
    assert f"ending after step 3: {METRIC} was best at step 1 " in ended.output
    assert "the model has the weights of step 1" in " ".join(ended.output.split())
    facts = summary(folder)
    assert [facts[key] for key in ("exit", "stopped_by", "steps")] == ["completed", "trainer.patience", 3]
    assert (folder / "checkpoints/best").read_text() == "step-000001\n"
    assert (folder / "evaluation/training/scores.jsonl").is_file()
    assert (folder / "model/model.safetensors").is_file()
    assert "is complete" in train(words).output
