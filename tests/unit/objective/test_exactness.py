"""Every fast path gives the log-probs and gradients of the plain padded forward, on real lengths, in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.pack import Sequences
from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.model.load import load_packed
from dpo_dist.objective import token_logps as logps_module
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import preference_loss
from tests.support import tiny
from tests.support.packing import pack_unkeyed
from tests.support.padded import (
    BETA,
    assert_same_gradients,
    gradients_of,
    padded_logps,
    plain_loss,
    real_pairs,
)
from tests.support.tiny_model import write_model

PAIRS = real_pairs(8)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), hidden_size=64, tied=request.param)


@pytest.fixture(scope="module")
def reference() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(r), generator=generator) - 6 for pair in PAIRS for r in pair.responses]


@pytest.fixture(scope="module")
def plain(folder: Path, reference: list[Tensor]) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Log-probs, loss and gradients of the padded batch."""
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logps = padded_logps(causal_lm, PAIRS)
    loss = plain_loss(logps, reference)
    return [part.detach() for part in logps], loss.detach(), gradients_of(causal_lm, loss)


def micro_batches(several: bool) -> list[list[Sequences]]:
    return [PAIRS[:3], PAIRS[3:4], PAIRS[4:]] if several else [PAIRS]


@pytest.mark.parametrize(
    ("chunk_positions", "several", "model"),
    [
        pytest.param(10_000, False, {}, id="one chunk"),
        pytest.param(1, True, {}, id="a position a chunk"),
        pytest.param(37, False, {}, id="odd chunks"),
        pytest.param(101, True, {"gradient_checkpointing": "full"}, id="gradient checkpointing"),
    ],
)
def test_packed_is_padded(
    chunk_positions: int,
    several: bool,
    model: dict[str, Any],
    folder: Path,
    reference: list[Tensor],
    plain: tuple[list[Tensor], Tensor, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logps_module, "_CHUNK_BYTES", {"cpu": 4 * len(tiny.qwen()) * chunk_positions})
    packed = load_packed(folder, ModelConfig(dtype=Dtype.fp32, **model), 320, torch.device("cpu"))
    packed.train()
    expected_logps, expected_loss, expected_gradients = plain
    values, losses, first = [], [], 0
    for pairs in micro_batches(several):
        batch = pack_unkeyed(pairs)
        logps = packed(batch)
        theirs = torch.cat(reference[first : first + 2 * len(pairs)])
        first += 2 * len(pairs)
        sums = [sum_by_response(tokens, batch.response_tokens) for tokens in (logps, theirs)]
        losses.append(preference_loss(*sums, LossConfig(beta=BETA)))
        values.append(logps.detach())
    loss = torch.cat(losses).mean()
    torch.testing.assert_close(torch.cat(values), torch.cat(expected_logps), rtol=0, atol=1e-4)
    torch.testing.assert_close(loss.detach().float(), expected_loss, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients_of(packed.causal_lm, loss), expected_gradients)
