"""The digits that stored log-probs have: when the scoring code changes them, its version must too.

Stored values of an older version are computed anew. Weights and ids come from a formula, so that the recorded
numbers do not depend on a generator of random numbers; the tolerance is above what processors differ by.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from dpo_dist.batching.pack import pack
from dpo_dist.config.schema import AttentionBackend
from dpo_dist.data.example import Example
from dpo_dist.model.attention.kernels import PACKED
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.objective.token_logps import token_logps
from dpo_dist.reference.store import LOGP_PATH_VERSION

VOCABULARY = 50
RECORDED_VERSION = 2
RECORDED = [-3.63215, -3.96298, -4.20343, -4.19104, -3.98899]
RECORDED += [-4.11346, -4.10385, -3.62556, -3.92409, -3.70316]
RECORDED_BF16_HEAD = [-9.51744, -6.85289, -1.17477, -2.30904, -3.67883, -14.98743]


def wave(*shape: int, phase: float) -> Tensor:
    """Return distinct numbers in [-1, 1]."""
    positions = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return torch.sin(positions * 1.7 + phase).reshape(shape).float()


def scored() -> list[float]:
    """Return the log-probs of two pairs by a tiny model in float32."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=PACKED,
    )
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for number, parameter in enumerate(causal_lm.parameters()):
            parameter.copy_(wave(*parameter.shape, phase=number))
    ids = np.arange(40, dtype=np.int32) * 7 % VOCABULARY
    pairs = [Example(ids[:5], (ids[5:8], ids[8:10])), Example(ids[10:11], (ids[11:13], ids[13:16]))]
    batch = pack(pairs, np.zeros((4, 2), dtype=np.uint64))
    with torch.no_grad():
        logps: Tensor = PackedCausalLM(causal_lm, AttentionBackend.sdpa)(batch)
    return logps.tolist()


def scored_by_bf16_head() -> list[float]:
    """Return the log-probs of 6 targets by an output layer in bf16, with logits up to about 20."""
    hidden = 6 * wave(6, 16, phase=0.3).bfloat16()
    weight = 3 * wave(VOCABULARY, 16, phase=0.7).bfloat16()
    targets = torch.arange(6) * 7
    return token_logps(hidden, weight, None, targets).tolist()


def test_digits_are_those_of_this_version() -> None:
    message = "scoring has changed: raise LOGP_PATH_VERSION and record it here with the new digits, "
    values = {"RECORDED": scored(), "RECORDED_BF16_HEAD": scored_by_bf16_head()}
    message += str({name: [round(value, 5) for value in of] for name, of in values.items()})
    assert RECORDED_VERSION == LOGP_PATH_VERSION, message
    assert values["RECORDED"] == pytest.approx(RECORDED, abs=3e-5), message
    assert values["RECORDED_BF16_HEAD"] == pytest.approx(RECORDED_BF16_HEAD, abs=3e-5), message
