"""Floating-point operations that a training step needs, and how many of them a device does in a second."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from dpo_dist.data.plan import ComputeCosts

# Forward, gradient of the input, gradient of the weight: each a multiplication and an addition.
_FORWARD_AND_BACKWARD = 6
# Seconds of a FLOP in attention and in the output layer over those of one in the layers' matrices: 1.37 and
# 0.88 by `scripts/bench_schedule.py --costs` (40M Qwen2 shape, float32, one core of an AMD EPYC), which then
# tell the seconds of 10 micro-batches of very different shapes within 5 %.
_ATTENTION_SLOWNESS = 1.4
_HEAD_SLOWNESS = 0.9
_PEAK_TRIALS = 5
_PEAK_SIDE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class StepFlops:
    """Useful operations of a training step by what they grow with; nothing computed twice is counted.

    Attributes:
        per_token: of a packed token, for every matrix of the body that it is multiplied with.
        per_target: of a completion token, in the output layer.
        per_attended: of a pair of a token and one it attends to, itself included, in all layers.
    """

    per_token: float
    per_target: float
    per_attended: float

    def of(self, tokens: int, targets: int, attended: int) -> float:
        """Of a step with so many."""
        return self.per_token * tokens + self.per_target * targets + self.per_attended * attended


def count_flops(config: PretrainedConfig) -> StepFlops:
    """What a model of this configuration, one of `EXACT_MODEL_TYPES`, costs.

    Every weight with two dimensions or more is multiplied with each token, but for embeddings, which are
    looked up, and for experts (three dimensions, the first of them the experts), of which a token visits
    `num_experts_per_tok`. Norms, rotations and softmax are not counted.
    """
    with torch.device("meta"):
        causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[config.model_type]](config)
    output = causal_lm.get_output_embeddings().weight
    outside = {id(module.weight) for module in causal_lm.modules() if isinstance(module, nn.Embedding)}
    outside.add(id(output))
    visited = 0.0
    for parameter in causal_lm.parameters():
        if id(parameter) not in outside and parameter.dim() > 1:
            share = config.num_experts_per_tok / len(parameter) if parameter.dim() > 2 else 1.0
            visited += share * parameter.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Scores and the weighted sum of values are two products over the width of all heads.
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return StepFlops(
        per_token=_FORWARD_AND_BACKWARD * visited,
        per_target=_FORWARD_AND_BACKWARD * output.numel(),
        per_attended=_FORWARD_AND_BACKWARD * attention,
    )


def compute_costs(flops: StepFlops) -> ComputeCosts:
    """What one token that attends to one key, and one target, cost beside a token in the layers' matrices.

    The output layer computes most logits once more in backward. Costs decide how evenly ranks are loaded, and
    no result.
    """
    return ComputeCosts(
        key=_ATTENTION_SLOWNESS * flops.per_attended / flops.per_token,
        target=_HEAD_SLOWNESS * (4 / 3) * flops.per_target / flops.per_token,
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of a few products of large matrices in `dtype` on `device`.

    Takes hundredths of a second on a large GPU, tenths on a CPU. The matrices are random, as a GPU multiplies
    constant ones faster than it ever will in training; the state of the random numbers is left as it was.
    """
    side = _PEAK_SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    fastest = min(_seconds(left, right, product) for _ in range(_PEAK_TRIALS))
    return 2 * side**3 / fastest


def _seconds(left: Tensor, right: Tensor, product: Tensor) -> float:
    _wait(left.device)
    started = time.perf_counter()
    torch.mm(left, right, out=product)
    _wait(left.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
