"""Log-probs of generated responses are those of a plain forward of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.comparison.responses import response_logps
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.model.load import load_packed
from tests.support.tiny_model import write_model


def row(prompt: list[int], *ids: list[int]) -> dict[str, Any]:
    return {"prompt_ids": prompt, "samples": [{"ids": own} for own in ids]}


ROWS = [
    row([5, 6, 7], [8, 9, 10]),
    row([11], [12]),
    row([20, 21], []),
    row([3, 4]),
    row([9] * 12, [7, 8] * 4),
]


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_sums_of_log_probs(tmp_path: Path, budget: int) -> None:
    folder = write_model(tmp_path / "model")
    device = torch.device("cpu")
    packed = load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, device).eval()
    found = response_logps(packed, ROWS, budget, device)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for logp, each in zip(found, ROWS, strict=True):
        if not each["samples"]:
            assert logp is None
            continue
        prompt, ids = each["prompt_ids"], each["samples"][0]["ids"]
        with torch.no_grad():
            logps = plain(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        expected = sum(logps[len(prompt) + at - 1, token].item() for at, token in enumerate(ids))
        assert logp == pytest.approx(expected, abs=1e-4)
