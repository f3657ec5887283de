"""Bases as published, in FP8 and MXFP4, from the command line: trained, resumed, merged, and opened again."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import assert_last_log_probs, small_run
from tests.support import tiny
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.launch import assert_same_history, history, run_verb, summary, train
from tests.support.stored import quantize_fp8, quantize_mxfp4

LORA = "model.adapter={r: 4, alpha: 8, target_modules: [o_proj]}"
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
    "deepseek_v3": {"first_k_dense_replace": 1, "moe_intermediate_size": 32, "qk_rope_head_dim": 8},
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(family: str, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp(family) / "base", tiny.qwen()
    options = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    options["max_position_embeddings"] = 2048
    tiny_causal_lm(tiny_config(family, **(FAMILIES[family] | options))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantize = quantize_mxfp4 if family == "gpt_oss" else quantize_fp8
    quantize(folder)
    return folder


@pytest.fixture(scope="module")
def plain(base: Path, family: str) -> Path:
    """The same model in float32, by transformers."""
    folder = base.parent / "plain"
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    copy = tiny_causal_lm(causal_lm.config)
    copy.load_state_dict({name: weight.float() for name, weight in causal_lm.state_dict().items()})
    copy.save_pretrained(folder)
    tiny.qwen().save_pretrained(folder)
    return folder


def run_of(base: Path, assets: Path, folder: Path, *extra: str) -> list[str]:
    return [
        *(word for word in small_run(assets, folder) if not word.startswith("model.path")),
        f"model.path={base}",
        f"data.eval=[{assets}/eval.jsonl]",
        "trainer.max_steps=2",
        "trainer.save_every=1",
        "optim.lr=1e-3",
        *extra,
    ]


def opened(folder: Path, family: str) -> Any:
    """The written model, by transformers: of the base's class, and not quantized."""
    config = json.loads((folder / "config.json").read_bytes())
    assert not {"quantization_config", "stored_as"} & config.keys()
    assert config["model_type"] == family
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert {weight.dtype for weight in causal_lm.parameters()} == {torch.float32}
    return causal_lm


def test_all_weights_train_as_those_of_the_plain_model(
    base: Path, plain: Path, family: str, assets: Path, tmp_path: Path
) -> None:
    """With ZeRO-3 on two processes, resumed, with a live reference."""
    options = ("reference.mode=live", "parallelism=zero3")
    words = run_of(base, assets, tmp_path, *options)
    assert run_verb("train", [*words, "trainer.stop_after_steps=1"], processes=2).code == 75
    said = train(words, processes=2).output
    assert "resuming from" in said
    stored = {"gpt_oss": "MXFP4", "deepseek_v3": "FP8"}[family]
    assert f"the weight files are in {stored}, and the weights fp32 here: " in said.replace("\n", " ")
    train([*run_of(plain, assets, tmp_path), f"run.dir={tmp_path}/plain", "parallelism=ddp"])
    assert_same_history(history(tmp_path / "run"), history(tmp_path / "plain"), 2e-4)
    assert_last_log_probs(opened(tmp_path / "run/model", family), assets, tmp_path / "run")


@pytest.mark.parametrize("parallelism", ["ddp", "zero3"])
def test_an_adapter_trains_and_merges(
    parallelism: str, base: Path, family: str, assets: Path, tmp_path: Path
) -> None:
    train(run_of(base, assets, tmp_path, LORA, f"parallelism={parallelism}"), processes=2)
    run = tmp_path / "run"
    ended = run_verb("export", [f"run.dir={run}", "export.merge=true"])
    assert ended.code == 0, ended.output
    assert_last_log_probs(opened(run / "exported/step-000002-merged", family), assets, run)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_check_and_plan_say_the_bytes(base: Path, family: str, assets: Path, tmp_path: Path) -> None:
    words = run_of(base, assets, tmp_path, LORA, "parallelism=ddp")
    for verb, more in (("train", "--check"), ("plan", "plan.gpus=1")):
        said = run_verb(verb, [*words, more])
        assert "the weight files are in" in said.output, said.output
    if family == "gpt_oss":
        said = run_verb("train", [*words, "model.quantization=nf4", "--check"])
        assert "the experts stay in the MXFP4 of the weight files, exactly: " in said.output


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("family", ["gpt_oss"], indirect=True, scope="module")
def test_an_adapter_on_nf4_with_experts_in_mxfp4(
    base: Path, family: str, assets: Path, tmp_path: Path
) -> None:
    words = run_of(base, assets, tmp_path, LORA, "model.quantization=nf4", "parallelism=ddp")
    assert run_verb("train", [*words, "trainer.stop_after_steps=1"], processes=2).code == 75
    assert "resuming from" in train(words, processes=2).output
    assert summary(tmp_path / "run")["reference"]["mode"] == "adapter"
    train([*words, f"run.dir={tmp_path}/one"])
    assert_same_history(history(tmp_path / "run"), history(tmp_path / "one"), 2e-4)
    trained = load_file(tmp_path / "run/model/adapter_model.safetensors")
    assert any("o_proj.lora_B" in name and weight.any() for name, weight in trained.items())
    plain_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(plain_base, tmp_path / "run/model")
