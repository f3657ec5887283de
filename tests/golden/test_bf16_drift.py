"""In bf16 the packed forward is as close to float32 as the plain padded forward is.

The drift of a single batch is random: means over many batches and models are compared.
"""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.data.example import Example
from dpo_dist.model.attention.kernels import PACKED
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.objective import token_logps as logps_module
from tests.support import tiny
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.padded import gradients_of, padded_logps, rows_of
from tests.support.tiny_model import write_model

BATCHES = 24
ALLOWED = 1.1
BETA = 0.1


def pairs_like_hh(count: int, seed: int) -> list[Example]:
    """Random tokens, as many as pairs of HH-RLHF have."""
    lengths = np.exp(np.random.default_rng(seed).normal(4.3, 0.9, (count, 3)))
    return random_pairs([tuple(map(int, of_pair)) for of_pair in np.clip(lengths, 2, 128)], seed)


def plain_loss(logps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Mean DPO loss (arXiv 2305.18290, equation 7) of pairs, from the tokens' values."""
    ratios = [ours.sum() - theirs.sum() for ours, theirs in zip(logps, reference, strict=True)]
    margins = torch.stack(ratios[::2]) - torch.stack(ratios[1::2])
    return -logsigmoid(BETA * margins).mean()


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def drift(
    logps: list[Tensor], gradients: dict[str, Tensor], truth: tuple[list[Tensor], dict[str, Tensor]]
) -> Tensor:
    """Drift of log-probs in nats per token, and relative drift of the gradient, its norm and the head's."""
    exact_logps, exact = truth
    head = "lm_head.weight" if "lm_head.weight" in exact else "model.embed_tokens.weight"
    return torch.tensor(
        [
            (torch.cat(logps) - torch.cat(exact_logps)).abs().mean().item(),
            norm({name: gradients[name] - exact[name] for name in exact}) / norm(exact),
            abs(norm(gradients) / norm(exact) - 1),
            float((gradients[head] - exact[head]).norm() / exact[head].norm()),
        ]
    )


def test_packed_bf16_drifts_no_more_than_padded_bf16(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps_module, "_CHUNK_BYTES", {"cpu": 4 * len(tiny.qwen()) * 37})
    padded_drifts, packed_drifts = [], []
    for seed in range(BATCHES):
        folder = write_model(tmp_path_factory.mktemp("model"), seed=seed, hidden_size=64, tied=seed % 2 == 0)
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        exact = copy.deepcopy(rounded).float()
        pairs = pairs_like_hh(4, seed)
        exact_logps = padded_logps(exact, rows_of(pairs))
        reference = [part.detach() for part in exact_logps]
        truth = exact_logps, gradients_of(exact, plain_loss(exact_logps, reference))

        padded = padded_logps(rounded, rows_of(pairs))
        of_padded = gradients_of(rounded, plain_loss(padded, reference))
        padded_drifts.append(drift(padded, of_padded, truth))

        rounded.config._attn_implementation = PACKED
        batch = pack_unkeyed(pairs)
        values = PackedCausalLM(rounded, AttentionBackend.sdpa)(batch)
        packed = list(torch.split(values, batch.response_tokens.tolist()))
        of_packed = gradients_of(rounded, plain_loss(packed, reference))
        packed_drifts.append(drift(packed, of_packed, truth))
    padded_mean, packed_mean = (torch.stack(of).mean(0) for of in (padded_drifts, packed_drifts))
    assert (padded_mean > 0).all()
    assert (packed_mean <= ALLOWED * padded_mean).all(), (packed_mean / padded_mean).tolist()
