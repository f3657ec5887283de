"""An adapter from the command line: from supervised fine-tuning over training to one merged model."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import Overrides, assert_last_log_probs, last_evaluation, mean_logp, small_run
from tests.e2e.test_evaluate import assert_equals_the_run, evaluate
from tests.support.launch import assert_same_history, history, log, run_verb, summary, train
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model

STEPS = ("trainer.max_steps=4", "trainer.save_every=2", "trainer.keep_last=2", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def sft(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft_adapter(assets / "model", tmp_path_factory.mktemp("sft"))


def run_of(assets: Path, folder: Path, adapter: Path, *extra: str) -> list[str]:
    """The command line of a run in `folder`/run that starts from an adapter, evaluated at its end."""
    data = f"data.eval=[{assets}/eval.jsonl]"
    return [*small_run(assets, folder), f"model.adapter={{path: {adapter}}}", data, *STEPS, *extra]


@pytest.fixture(scope="module")
def trained(assets: Path, sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks that shard all weights."""
    folder = tmp_path_factory.mktemp("trained")
    train(run_of(assets, folder, sft), processes=2)
    return folder / "run"


def on_base(assets: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


def assert_starts_at_its_reference(run: Path) -> None:
    first = next(row for row in history(run) if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0


def exported(run: Path, *options: str) -> None:
    ended = run_verb("export", [f"run.dir={run}", *options])
    assert ended.code == 0, ended.output


def test_the_adapter_is_start_and_reference_and_peft_loads_the_trained_one(
    assets: Path, sft: Path, trained: Path
) -> None:
    assert summary(trained)["reference"]["mode"] == "adapter"
    assert not (trained / "model/model.safetensors").exists()
    assert_starts_at_its_reference(trained)
    after, before = on_base(assets, trained / "model"), on_base(assets, sft)
    assert_last_log_probs(after, assets, trained)
    for which, name in enumerate(("chosen", "rejected")):
        reward = 0.1 * (mean_logp(after, assets, which) - mean_logp(before, assets, which))
        assert abs(reward) > 1e-3
        wanted = last_evaluation(trained)[f"eval_rewards/{name}"]
        assert reward == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_a_reference_beside_the_policy_is_that_of_the_adapter_switched_off(
    mode: str, assets: Path, sft: Path, trained: Path, tmp_path: Path
) -> None:
    train(run_of(assets, tmp_path, sft, f"reference.mode={mode}", "parallelism=ddp"))
    assert "step-0 check passed" in log(tmp_path / "run")
    assert summary(tmp_path / "run")["reference"]["mode"] == mode
    assert_same_history(history(tmp_path / "run"), history(trained), 2e-4)


def test_an_adapter_of_a_run_is_continued_by_the_next(
    overrides: Overrides, trained: Path, tmp_path: Path
) -> None:
    train(overrides(f"model.adapter={{path: {trained}/model}}", "trainer.max_steps=1"))
    assert_starts_at_its_reference(tmp_path / "run")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of layers that bitsandbytes (0.50) computes rightly in 4 bits on CPUs."""
    return write_model(tmp_path_factory.mktemp("wide") / "base", hidden_size=64)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_an_adapter_on_a_quantized_base_is_its_own_reference_switched_off_and_stored(
    assets: Path, wide: Path, tmp_path: Path
) -> None:
    options = (f"model.path={wide}", "model.quantization=nf4", "parallelism=ddp", "trainer.max_steps=3")
    quantized = run_of(assets, tmp_path, write_sft_adapter(wide, tmp_path / "sft"), *options)
    train([*quantized, f"run.dir={tmp_path}/off"])
    train([*quantized, "reference.mode=cached", "reference.quantization=nf4"])
    assert "step-0 check passed" in log(tmp_path / "run")
    assert_starts_at_its_reference(tmp_path / "off")
    assert last_evaluation(tmp_path / "off")["eval_rewards/margins"] != 0
    assert_same_history(history(tmp_path / "run"), history(tmp_path / "off"), 2e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantized_reference_has_entries_of_its_own_and_is_not_the_policys_start(
    overrides: Overrides, wide: Path, tmp_path: Path
) -> None:
    for kind in ("nf4", "null"):
        options = (
            f"model.path={wide}",
            "trainer.max_steps=1",
            f"reference.quantization={kind}",
            f"run.dir={tmp_path}/{kind}",
        )
        train(overrides(*options))
        assert ("step-0 check passed" in log(tmp_path / kind)) is (kind == "null")
        assert summary(tmp_path / kind)["reference"]["computed"] == 12


def test_the_adapter_and_its_checkpoint_score_as_in_the_run(trained: Path) -> None:
    assert "evaluating" in evaluate([f"run.dir={trained}"], processes=2)
    assert_equals_the_run(trained)
    evaluate([f"run.dir={trained}", f"evaluation.model={trained}/checkpoints/step-000004"])
    assert_equals_the_run(trained)


def test_merged_models_have_the_log_probs_of_training(assets: Path, trained: Path) -> None:
    exported(trained, "export.merge=true")
    merged = trained / "exported/step-000004-merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    assert model.dtype is torch.float32
    assert_last_log_probs(model, assets, trained)
    for file in (assets / "model").glob("tokenizer*"):
        assert (merged / file.name).read_bytes() == file.read_bytes()


def test_an_adapter_with_modules_in_full_from_start_to_end(assets: Path, tmp_path: Path) -> None:
    """Embeddings and output layer are one in the base and two in the adapter, and so in the merged model."""
    whole = ["embed_tokens", "lm_head"]
    sft = write_sft_adapter(assets / "model", tmp_path / "sft", modules_to_save=whole, scale=0.02)
    options = ["reference.mode=live", "trainer.save_every=1", "trainer.ema_decay=0.5", "trainer.keep_last=3"]
    command, run = run_of(assets, tmp_path, sft, *options), tmp_path / "run"
    train([*command, "trainer.max_steps=2"], processes=2)
    told = train([*command, "trainer.max_steps=3", "parallelism=ddp"])
    assert "resuming from" in told.output
    assert_starts_at_its_reference(run)
    exported(run, "export.merge=true")
    merged = AutoModelForCausalLM.from_pretrained(run / "exported/step-000003-merged").eval()
    assert not merged.config.tie_word_embeddings
    for model in (on_base(assets, run / "model"), merged):
        assert_last_log_probs(model, assets, run)
    exported(run, "export.weights=ema", "export.merge=true")
    assert (run / "exported/step-000003-ema-merged/model.safetensors").is_file()
    evaluate([f"run.dir={run}", f"evaluation.model=[{run}/checkpoints/step-000003,{run}/model]"])
    results = list((run / "evaluation").glob("[ms]*-*/evaluation.json"))
    assert len(results) == 2
    for file in results:
        found = json.loads(file.read_text())["all"]
        for name in ("eval_rewards/margins", "eval_logps/chosen"):
            assert found[name] == pytest.approx(last_evaluation(run)[name], rel=1e-3)
