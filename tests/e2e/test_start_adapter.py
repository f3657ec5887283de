"""A run that starts from an adapter of supervised fine-tuning: its reference, its steps, its result."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.batching.pack import Sequences
from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data.build import prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import open_dataset
from tests.e2e.conftest import Overrides
from tests.support.launch import assert_same_history, history, summary, train
from tests.support.packing import plain_logps
from tests.support.sft_adapter import write_sft_adapter


@pytest.fixture(scope="module")
def sft(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft_adapter(assets / "model", tmp_path_factory.mktemp("sft"))


@pytest.fixture
def start(overrides: Overrides, assets: Path, sft: Path) -> Callable[..., list[str]]:
    def command(*extra: str) -> list[str]:
        fixed = [f"data.eval=[{assets}/eval.jsonl]", "trainer.max_steps=4", "optim.lr=1e-2"]
        return overrides(f"model.adapter={{path: {sft}}}", *fixed, *extra)

    return command


def on_base(assets: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


def responses(assets: Path, which: int) -> list[Sequences]:
    """Chosen (0) or rejected (1) responses of the evaluation data."""
    data, tokenizer = (
        DataConfig(cache=str(assets / "encoded")),
        AutoTokenizer.from_pretrained(assets / "model"),
    )
    sources = [SourceConfig(str(assets / "eval.jsonl"))]
    encoded = prepare_dataset(sources, data, tokenizer, tokenizer_digest(assets / "model"))
    dataset = open_dataset(encoded, data)
    return [dataset.sequences(row, (which,)) for row in range(len(dataset))]


@torch.no_grad()
def mean_logp(model: Any, chosen: list[Sequences]) -> float:
    return torch.stack([plain_logps(model, [one]).sum() for one in chosen]).mean().item()


def test_the_adapter_is_start_and_reference(
    start: Callable[..., list[str]], assets: Path, sft: Path, tmp_path: Path
) -> None:
    told = train(start(), processes=2).output
    run = tmp_path / "run"
    first, evaluated = history(run)[1], [row for row in history(run) if "eval_loss" in row][-1]
    assert summary(run)["reference"]["mode"] == "adapter"
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0
    assert "resuming" not in told
    trained, started = on_base(assets, run / "model"), on_base(assets, sft)
    for which, name in enumerate(("chosen", "rejected")):
        pairs = responses(assets, which)
        logp = mean_logp(trained, pairs)
        assert logp == pytest.approx(evaluated[f"eval_logps/{name}"], rel=1e-4)
        reward = 0.1 * (logp - mean_logp(started, pairs))
        assert reward == pytest.approx(evaluated[f"eval_rewards/{name}"], rel=1e-3, abs=1e-5)
        assert abs(reward) > 1e-3


def test_a_stored_reference_is_that_of_the_adapter_switched_off(
    start: Callable[..., list[str]], tmp_path: Path
) -> None:
    train(start(f"run.dir={tmp_path}/off"))
    other = train(start("reference.mode=cached", "parallelism=ddp"), processes=2)
    assert "step-0 check passed" in other.output
    assert_same_history(history(tmp_path / "run"), history(tmp_path / "off"), 2e-4)


def test_an_adapter_of_a_run_is_continued_by_the_next(
    start: Callable[..., list[str]], overrides: Overrides, tmp_path: Path
) -> None:
    train(start(f"run.dir={tmp_path}/first", "trainer.max_steps=2"))
    command = overrides(f"model.adapter={{path: {tmp_path}/first/model}}", "trainer.max_steps=2")
    train(command)
    assert history(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_an_adapter_is_continued_on_a_quantized_base(start: Callable[..., list[str]], tmp_path: Path) -> None:
    train(start("model.quantization=nf4", "parallelism=ddp", "trainer.max_steps=2"))
    first, last = history(tmp_path / "run")[1], history(tmp_path / "run")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0
    assert last["eval_rewards/margins"] != 0
