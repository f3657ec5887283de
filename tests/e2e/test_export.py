"""Checkpoints of a run as model folders."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import small_run
from tests.support.launch import run_verb, train


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two processes in bf16, with a checkpoint after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("exported")
    options = [f"data.eval=[{assets}/eval.jsonl]", "model.dtype=bf16", "optim.lr=1e-3"]
    steps = ["trainer.max_steps=4", "trainer.save_every=2", "parallelism=zero2"]
    train([*small_run(assets, folder), *options, *steps], processes=2)
    return folder / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_last_checkpoint_is_the_model_that_training_wrote(run: Path, tmp_path: Path) -> None:
    ended = run_verb("export", [f"run.dir={run}", f"export.output={tmp_path}/out"])
    assert ended.code == 0, ended.output
    assert f"written: {tmp_path}/out" in ended.output
    assert files(tmp_path / "out") == files(run / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    before = run_verb("export", [f"run.dir={run}", "export.checkpoint=step-000002"])
    assert before.code == 0, before.output
    earlier = load_file(run / "exported/step-000002/model.safetensors")
    last = load_file(run / "model/model.safetensors")
    assert not torch.equal(earlier["model.embed_tokens.weight"], last["model.embed_tokens.weight"])
    card = (run / "exported/step-000002/README.md").read_text()
    assert "stopped after step 2; so far: " in card
    assert "## Evaluation" not in card
