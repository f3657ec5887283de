"""`plan` on the command line: what fits, without a network, weights or a GPU; and with data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.invented import write_pairs
from tests.support.launch import run_verb
from tests.support.tiny_model import write_model


def plan(*words: str, code: int = 0) -> dict[str, Any]:
    ended = run_verb("plan", [*words, "console.style=json"])
    assert ended.code == code, ended.output
    [line] = [line for line in ended.output.splitlines() if '"plan"' in line]
    content: dict[str, Any] = json.loads(line)
    return content


@pytest.mark.parametrize(
    ("experiment", "weights", "gpus", "code"),
    [
        ("qwen7b", 7.616e9, 8, 0),
        ("qwen7b", 7.616e9, 2, 1),  # no room for 16,384 tokens
        ("zephyr7b", 7.242e9, 8, 0),
        ("olmo3_7b", 7.298e9, 16, 0),
    ],
)
def test_a_shipped_experiment_is_planned_offline(
    experiment: str, weights: float, gpus: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 bytes a weight, sharded over all GPUs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = plan(f"+experiment={experiment}", f"plan.gpus={gpus}", code=code)
    sharded = sum(found["bytes"][name] for name in ("weights", "gradients", "optimizer states"))
    assert sharded == pytest.approx(18 * weights / gpus, rel=1e-3)
    assert found["fits"] is (code == 0)
    fast, slow = found["epoch_seconds"]
    assert 0 < fast < slow


def test_what_is_suggested_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    machine = ["+experiment=qwen7b", "plan.gpus=8", "plan.gpu=a100-40g"]
    words = plan(*machine, "model.gradient_checkpointing=none", "plan.suggest=true", code=1)["suggested"]
    assert plan(*machine, *words.split(), "trainer.micro_batch_tokens=auto")["fits"]


def test_a_quantized_base_is_suggested_what_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = ["parallelism=ddp", "model.quantization=nf4", "model.adapter={r: 16}", "plan.gpus=1"]
    lengths = ["data.max_length=40000", "plan.pairs=100", "plan.tokens_per_pair=500"]
    found = plan("+experiment=qwen3_0_6b", *base, *lengths, "plan.suggest=true")
    assert found["fits"], "also above the largest micro-batch that `auto` chooses"
    assert found["suggested"].startswith("parallelism=ddp")


def test_local_data_give_pairs_and_tokens(tmp_path: Path) -> None:
    model, pairs = write_model(tmp_path / "model"), tmp_path / "pairs.jsonl"
    write_pairs(pairs, 12, seed=3)
    words = [
        f"model.path={model}",
        f"data.train=[{{path: {pairs}, weight: 0.5}}]",
        f"run.root={tmp_path}",
        "model.dtype=fp32",
    ]
    ended = run_verb("plan", [*words, "plan.gpus=1", "plan.price=2"])
    assert ended.code == 0, ended.output
    assert "an epoch of 6 pairs" in ended.output
    assert "(of data.train)" in ended.output
    assert "price" in ended.output
    checked = run_verb("train", [*words, "plan.gpus=1", "--check"])
    assert checked.code == 0, checked.output
    [verdict] = re.findall("fits: there is room for .* tokens", ended.output)
    assert f"plan:          {verdict} (1 GPU, h100-80g)" in checked.output
    [tokens] = re.findall(r"pairs of (\d+) tokens \(of data", ended.output)
    assert f" for 10,000 pairs of {tokens} tokens" in checked.output
