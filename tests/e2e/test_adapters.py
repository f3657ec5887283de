"""An adapter from the command line: killed, resumed, written, and loaded by peft on the plain base."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data.build import prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import open_dataset
from tests.e2e.conftest import Overrides
from tests.support.launch import assert_same_history, history, summary, train
from tests.support.packing import plain_logps

STEPS = [
    "model.adapter={r: 4, alpha: 8}",
    "reference.mode=adapter",
    "trainer.epochs=4",
    "trainer.save_every=2",
    "optim.lr=1e-2",
]


@pytest.fixture(scope="module")
def uninterrupted(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(
        [
            f"model.path={assets}/model",
            "model.dtype=fp32",
            f"data.train=[{assets}/train.jsonl]",
            f"data.eval=[{assets}/eval.jsonl]",
            f"data.cache={assets}/encoded",
            f"run.dir={folder}/run",
            "trainer.global_batch_pairs=6",
            "tracking.wandb=off",
            *STEPS,
        ],
        processes=2,
    )
    return folder / "run"


def test_the_written_adapter_gives_the_log_probs_that_training_saw(assets: Path, uninterrupted: Path) -> None:
    assert not (uninterrupted / "model/model.safetensors").exists()
    evaluated = [row for row in history(uninterrupted) if "eval_loss" in row][-1]
    base = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, uninterrupted / "model")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "model")
    data = DataConfig(cache=str(assets / "encoded"))
    sources = [SourceConfig(str(assets / "eval.jsonl"))]
    encoded = prepare_dataset(sources, data, tokenizer, tokenizer_digest(assets / "model"))
    dataset = open_dataset(encoded, data)
    for which, name in enumerate(("chosen", "rejected")):
        responses = [dataset.sequences(row, (which,)) for row in range(len(dataset))]
        with torch.no_grad():
            logps = [plain_logps(adapted, [response]).sum() for response in responses]
            with adapted.disable_adapter():
                margins = [
                    after - plain_logps(adapted, [response]).sum()
                    for after, response in zip(logps, responses, strict=True)
                ]
        assert torch.stack(logps).mean().item() == pytest.approx(evaluated[f"eval_logps/{name}"], rel=1e-4)
        reward = 0.1 * torch.stack(margins).mean().item()
        assert reward == pytest.approx(evaluated[f"eval_rewards/{name}"], rel=1e-3, abs=1e-5)


def test_a_live_reference_is_the_base_that_the_adapter_leaves(
    overrides: Overrides, assets: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    options = ["reference.mode=live", "parallelism=ddp", f"data.eval=[{assets}/eval.jsonl]"]
    told = train(overrides(*STEPS, *options)).output
    assert "step-0 check passed" in told
    assert_same_history(history(tmp_path / "run"), history(uninterrupted), 2e-4)
    assert summary(tmp_path / "run")["reference"]["mode"] == "live"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantized_base_is_its_own_reference_switched_off_and_stored(
    overrides: Overrides, tmp_path: Path
) -> None:
    quantized = [*STEPS, "model.quantization=nf4", "parallelism=ddp", "trainer.max_steps=3"]
    train(overrides(*quantized, f"run.dir={tmp_path}/off"))
    stored = train(overrides(*quantized, "reference.mode=cached", "reference.quantization=nf4"))
    assert "step-0 check passed" in stored.output
    assert history(tmp_path / "off")[0]["rewards/margins"] == 0
    assert_same_history(history(tmp_path / "run"), history(tmp_path / "off"), 2e-4)
