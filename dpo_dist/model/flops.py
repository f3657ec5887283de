"""Floating-point operations that a training step needs, and how many of them a device does in a second."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Forward, gradient of the input, gradient of the weight: each a multiplication and an addition.
_FORWARD_AND_BACKWARD = 6
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


def count_flops(causal_lm: Any) -> StepFlops:
    """What the weights of a transformers model cost, whether they are here or sharded.

    Every weight with two dimensions or more is multiplied with each token, but for embeddings, which are
    looked up, and for experts (three dimensions, the first of them the experts), of which a token visits
    `num_experts_per_tok`. Norms, rotations and softmax are not counted.
    """
    config, output = causal_lm.config, causal_lm.get_output_embeddings()
    outside = {id(module.weight) for module in causal_lm.modules() if isinstance(module, nn.Embedding)}
    outside.add(id(output.weight))
    visited = 0.0
    for parameter in causal_lm.parameters():
        shape = _whole_shape(parameter)
        if id(parameter) not in outside and len(shape) > 1:
            share = config.num_experts_per_tok / shape[0] if len(shape) > 2 else 1.0
            visited += share * shape.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Scores and the weighted sum of values are two products over the width of all heads.
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return StepFlops(
        per_token=_FORWARD_AND_BACKWARD * visited,
        per_target=_FORWARD_AND_BACKWARD * _whole_shape(output.weight).numel(),
        per_attended=_FORWARD_AND_BACKWARD * attention,
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


def _whole_shape(parameter: Tensor) -> torch.Size:
    """Under ZeRO-3 only `ds_shape` knows it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
