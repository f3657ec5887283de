"""From an adapter of supervised fine-tuning over training to one merged model, by the command line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import small_run
from tests.e2e.test_start_adapter import mean_logp, on_base, responses
from tests.support.launch import history, run_verb, train
from tests.support.sft_adapter import write_sft_adapter


def run_of(assets: Path, folder: Path, adapter: str, *extra: str) -> list[str]:
    """The command line of a short run of an adapter in `folder`/run, evaluated at its end."""
    return [
        *small_run(assets, folder),
        f"model.adapter={{{adapter}}}",
        f"data.eval=[{assets}/eval.jsonl]",
        "optim.lr=1e-2",
        *extra,
    ]


def assert_last_log_probs(model: Any, assets: Path, run: Path) -> None:
    """A model has the log-probs of the last evaluation of a run, whose first loss is ln 2."""
    rows = history(run)
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluated = [row for row in rows if "eval_loss" in row][-1]
    for which, name in enumerate(("chosen", "rejected")):
        logp = mean_logp(model, responses(assets, which))
        assert logp == pytest.approx(evaluated[f"eval_logps/{name}"], rel=1e-4)


@pytest.fixture(scope="module")
def trained(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks that shard all weights."""
    folder = tmp_path_factory.mktemp("trained")
    sft = write_sft_adapter(assets / "model", folder / "sft")
    steps = ["trainer.max_steps=4", "trainer.save_every=2", "trainer.keep_last=2"]
    train(run_of(assets, folder, f"path: {sft}", *steps), processes=2)
    return folder / "run"


def test_the_merged_model_has_the_last_log_probs_of_training(assets: Path, trained: Path) -> None:
    told = run_verb("export", [f"run.dir={trained}", "export.merge=true"])
    assert told.code == 0, told.output
    merged = trained / "exported/step-000004-merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    assert model.dtype is torch.float32
    assert_last_log_probs(model, assets, trained)
    for file in (assets / "model").glob("tokenizer*"):
        assert (merged / file.name).read_bytes() == file.read_bytes()


def test_the_mean_of_exported_models(trained: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for step, folder in zip((2, 4), folders, strict=True):
        chosen = [f"export.checkpoint=step-{step}", "export.merge=true", f"export.output={folder}"]
        assert run_verb("export", [f"run.dir={trained}", *chosen]).code == 0
    told = run_verb("export", [f"run.dir={trained}", f"export.average=[{folders[0]},{folders[1]}]"])
    assert told.code == 0, told.output
    found, first, second = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (trained / "exported/average", *folders)
    )
    for name, weight in found.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)


def test_an_adapter_with_modules_in_full_from_start_to_end(assets: Path, tmp_path: Path) -> None:
    """Embeddings and output layer are one in the base and two in the adapter, and so in the merged model."""
    whole = ["embed_tokens", "lm_head"]
    sft = write_sft_adapter(assets / "model", tmp_path / "sft", modules_to_save=whole, scale=0.02)
    options = ["reference.mode=live", "trainer.save_every=1", "trainer.ema_decay=0.5", "trainer.keep_last=3"]
    command = run_of(assets, tmp_path, f"path: {sft}", *options)
    train([*command, "trainer.max_steps=2"], processes=2)
    told = train([*command, "trainer.max_steps=3", "parallelism=ddp"])
    assert "resuming from" in told.output
    evaluated = [row for row in history(tmp_path / "run") if "eval_loss" in row][-1]
    run = tmp_path / "run"
    exported = run_verb("export", [f"run.dir={run}", "export.merge=true"])
    assert exported.code == 0, exported.output
    merged = AutoModelForCausalLM.from_pretrained(run / "exported/step-000003-merged").eval()
    assert not merged.config.tie_word_embeddings
    for model in (on_base(assets, run / "model"), merged):
        assert_last_log_probs(model, assets, run)
    told = run_verb("export", [f"run.dir={run}", "export.weights=ema", "export.merge=true"])
    assert told.code == 0, told.output
    assert (run / "exported/step-000003-ema-merged/model.safetensors").is_file()
    models = f"evaluation.model=[{run}/checkpoints/step-000003,{run}/model]"
    told = run_verb("evaluate", [f"run.dir={run}", models])
    assert told.code == 0, told.output
    results = list((run / "evaluation").glob("[ms]*-*/evaluation.json"))
    assert len(results) == 2
    for file in results:
        found = json.loads(file.read_text())["all"]
        for name in ("eval_rewards/margins", "eval_logps/chosen"):
            assert found[name] == pytest.approx(evaluated[name], rel=1e-3)
