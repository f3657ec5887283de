"""FLOPs of a training step, compute costs of micro-batches, and peak FLOP/s of a device."""

import itertools
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.config.schema import AttentionBackend, ModelConfig
from dpo_dist.model.architectures import WITH_STATES
from dpo_dist.model.attention.kernels import layer_heads
from dpo_dist.model.layers import (
    attention_layers,
    image_weights,
    layer_values,
    other_weights,
    output_layer,
    projector_weights,
    text_part,
)
from dpo_dist.model.library_internals import whole_shape

# FLOPs per weight and token: forward, input gradient and weight gradient are one multiply-add each.
_FORWARD = 2
_FORWARD_AND_BACKWARD = 6
# A frozen weight has no weight gradient.
_FORWARD_AND_INPUT_GRADIENT = 4
# Time of a FLOP in attention and in the output layer, relative to a FLOP in the layers' matrices. Least
# squares over timed micro-batches gave 1.37 and 0.88 (40M Qwen2 shape, float32, one core of an AMD EPYC);
# these predict the times of 10 micro-batches of very different shapes within 5 %.
_ATTENTION_SLOWNESS = 1.4
_HEAD_SLOWNESS = 0.9
# Time to copy a number, and to add its gradient in backward, as FLOPs in the layers' matrices. One core of an
# AMD EPYC takes 50 to 100; 12 bytes at 3 TB/s are 1,600 on an H100 at 400 TFLOP/s, 1 % of a 7B's token.
_GATHER_FLOPS = 400
# What a layer keeps of a token for backward, in multiples of its hidden state (arXiv:2205.05198, section 4.1:
# 34 bytes in 16 bits).
_KEPT_NUMBERS = 17
# Recurrent layers compute chunks of 64 tokens, of which a segment leaves half of one empty, and wait for the
# level before. 12 HH pairs in Qwen3.5's layers take 2 % less time on a CPU core than with a cost of 4.
_RECURRENT_SEGMENT = 32.0
REACHED_SHARES = 0.5, 0.35
"""Shares of the matrix-product peak that training reached on an H100: the best, and the usual."""
_UNUSED_WEIGHTS = (".lora_", ".original_module.", ".modules_to_save.")
_PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d)
_PATCHES_ON_A_SIDE = ("spatial_merge_size", "pooling_kernel_size", "scale_factor", "downsample_factor")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True)
class StepFlops:
    """Useful FLOPs of a training step, without recomputation.

    `per_token` counts all layers' matrices, `per_target` the output layer, `per_attended` each query-key pair
    in all layers, also a token with itself. Sliding windows count as full attention. `per_image_token` counts
    what the parts for images compute for a placeholder in a prompt, once for each example, without their
    attention. `forward_per_...` count a forward alone. `key_numbers` are those in keys and values of a token
    in all layers, `hidden_numbers` those in its hidden states. `is_recurrent`: whether some layers are.
    """

    per_token: float
    per_target: float
    per_attended: float
    forward_per_token: float = 0.0
    forward_per_target: float = 0.0
    per_image_token: float = 0.0
    forward_per_image_token: float = 0.0
    key_numbers: int = 0
    hidden_numbers: int = 0
    is_recurrent: bool = False

    def step(self, tokens: int, targets: int, attended: int, image_tokens: int = 0) -> float:
        """Return the FLOPs of a training step with these counts."""
        text = self.per_token * tokens + self.per_target * targets + self.per_attended * attended
        return text + self.per_image_token * image_tokens

    def forward(self, tokens: int, targets: int, attended: int, image_tokens: int = 0) -> float:
        """Return the FLOPs of a forward alone with these counts."""
        in_weights = self.forward_per_token * tokens + self.forward_per_target * targets
        in_weights += self.forward_per_image_token * image_tokens
        return in_weights + self.per_attended * attended * _FORWARD / _FORWARD_AND_BACKWARD


def step_flops(causal_lm: Any) -> StepFlops:
    """Return the FLOPs of a model's training step, from its weights' shapes alone.

    Each token is multiplied by all weights of two or more dimensions, except embeddings, which are looked up.
    Of stacked experts (three dimensions, experts first) it visits as many as config.json says. Frozen weights
    have no gradient; modules that an adapter trains in full replace the original ones. Norms, rotations,
    softmax and the states of recurrent layers are not counted.
    """
    text = causal_lm.config.get_text_config()
    output = output_layer(causal_lm).weight
    outside = {id(module.weight) for module in causal_lm.modules() if isinstance(module, nn.Embedding)}
    outside |= {id(output), *map(id, other_weights(causal_lm))}
    experts = numbers_of_experts(causal_lm)
    visited = visited_experts(text)
    per_token = 0.0
    forward = 0.0
    for name, weight in causal_lm.named_parameters():
        # A continued adapter also has a frozen copy.
        is_unused = not weight.requires_grad and any(part in name for part in _UNUSED_WEIGHTS)
        is_bias = weight.dim() < 2 or name.endswith("bias")  # biases of stacked experts
        if id(weight) in outside or is_unused or is_bias:
            continue
        share = min(1.0, visited / experts[id(weight)]) if id(weight) in experts else 1.0
        per_token += _per_weight(weight) * share * weight.numel()
        forward += _FORWARD * share * weight.numel()
    every = layer_heads(text)
    attending = attention_layers(text)
    widths = [heads.query * (heads.dim + heads.value_dim) for heads in every]
    attention = attending * fmean(widths) if widths else 0.0
    keys = [heads.key * (heads.dim + heads.value_dim) for heads in every]
    return StepFlops(
        per_token,
        _per_weight(output) * output.numel(),
        _FORWARD_AND_BACKWARD * attention,
        forward,
        _FORWARD * output.numel(),
        *_per_image_token(causal_lm),
        key_numbers=round(attending * fmean(keys)) if keys else 0,
        hidden_numbers=text.num_hidden_layers * output.shape[-1],
        is_recurrent=text.model_type in WITH_STATES,
    )


def _per_image_token(causal_lm: Any) -> tuple[float, float]:
    """Return the FLOPs of the parts for images per placeholder: of a training step, and of a forward alone.

    A tower computes several patches for each placeholder, a projector one token. Frozen weights with no
    trained ones before them have a forward only.
    """
    in_projectors = projector_weights(causal_lm)
    of_images = image_weights(causal_lm)
    patches = patches_per_token(causal_lm.config) if of_images else 0.0
    multiplied = {module.weight for module in causal_lm.modules() if isinstance(module, _PRODUCTS)}
    step = 0.0
    forward = 0.0
    is_reached = False
    for weights, times in ((of_images - in_projectors, patches), (in_projectors, 1.0)):
        is_reached = is_reached or any(weight.requires_grad for weight in weights)
        for weight in weights & multiplied:
            step += (_per_weight(weight) if is_reached else _FORWARD) * times * weight.numel()
            forward += _FORWARD * times * weight.numel()
    return step, forward


def patches_per_token(model_config: Any) -> float:
    """Return how many patches of an image its tower computes for each placeholder in a prompt."""
    vision = model_config.vision_config
    tokens = getattr(model_config, "mm_tokens_per_image", None)
    if tokens is not None:  # Gemma 3 pools the patches of an image of one size
        return float((vision.image_size // vision.patch_size) ** 2 / tokens)
    parts = itertools.product((model_config, vision), _PATCHES_ON_A_SIDE)
    sides = [getattr(part, name, None) for part, name in parts]
    ratio = getattr(model_config, "downsample_ratio", None)  # InternVL's is 0.5 for two patches on a side
    if ratio:
        sides.append(1 / ratio)
    return float(next(filter(None, sides), 1)) ** 2


def recomputed_share(model: ModelConfig) -> float:
    """Return the FLOPs that gradient checkpointing computes again, as a share of a step's useful FLOPs."""
    checkpointing = model.gradient_checkpointing
    layers = (
        {"none": 0.0, "full": 1.0}[checkpointing] if isinstance(checkpointing, str) else 1 / checkpointing
    )
    return layers / (3 if model.adapter is None else 2)


def visited_experts(text: Any) -> int:
    """Return how many experts a token visits, the most of any layer; 0 without experts."""
    counts = [layer_values(text, name) for name in _EXPERTS_PER_TOKEN]
    return max(filter(None, itertools.chain(*counts)), default=0)


def stacked_experts(causal_lm: Any) -> dict[str, nn.Parameter]:
    """Return the matrices of experts that transformers joins to weights of three dimensions, by name."""
    if not visited_experts(causal_lm.config.get_text_config()):
        return {}
    of_text = set(text_part(causal_lm).modules())
    stacks = {}
    for module_name, module in causal_lm.named_modules():
        if module in of_text and not isinstance(module, nn.Conv1d):
            for name, weight in module.named_parameters(prefix=module_name, recurse=False):
                if len(whole_shape(weight)) == 3:
                    stacks[name] = weight
    return stacks


def numbers_of_experts(causal_lm: Any) -> dict[int, int]:
    """Return of how many experts each weight is, also of an adapter's matrices on stacks, by its id."""
    numbers = {id(weight): whole_shape(weight)[0] for weight in stacked_experts(causal_lm).values()}
    for module in causal_lm.modules():
        if hasattr(module, "parameter_name"):  # peft's wrapper of a stack
            matrices = (*module.lora_A.parameters(), *module.lora_B.parameters())
            numbers |= {id(matrix): module.num_experts for matrix in matrices}
    return numbers


def _per_weight(weight: Tensor) -> int:
    return _FORWARD_AND_BACKWARD if weight.requires_grad else _FORWARD_AND_INPUT_GRADIENT


def compute_costs(
    flops: StepFlops,
    *,
    prefixes: bool,
    backend: AttentionBackend | None = None,
    device: torch.device | None = None,
) -> ComputeCosts:
    """Return the costs of a key, a target and an image's token, relative to a token in the layers' matrices.

    The output layer recomputes most logits in backward. Costs balance the ranks' load and change no result.
    With `prefixes`, tokens with which several responses begin are computed once where that saves time by this
    `backend` of attention on this `device`; None: not known.
    """
    kept_numbers = _KEPT_NUMBERS * flops.hidden_numbers
    copied = float(flops.key_numbers)
    is_masked = backend is AttentionBackend.sdpa
    # On CUDA masked SDPA repeats keys and values for each query head. This counts as memory only: in float32
    # a row that shares nothing repeats them, too, and in 16 bits it takes about 11 / hidden size of a token
    # in the matrices.
    if is_masked and device is not None and device.type == "cuda":
        copied = max(copied, flops.per_attended / _FORWARD_AND_BACKWARD)
    return ComputeCosts(
        key=_ATTENTION_SLOWNESS * flops.per_attended / flops.per_token,
        target=_HEAD_SLOWNESS * (4 / 3) * flops.per_target / flops.per_token,
        image=flops.per_image_token / flops.per_token,
        beyond_prompts=prefixes,
        copy=_GATHER_FLOPS * flops.key_numbers / flops.per_token,
        copy_memory=copied / kept_numbers if kept_numbers else 0.0,
        is_masked=is_masked,
        per_segment=_RECURRENT_SEGMENT if flops.is_recurrent else ComputeCosts.per_segment,
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of a few products of large matrices in `dtype` on `device`.

    This takes hundredths of a second on a large GPU, tenths on a CPU. The matrices are random, because a GPU
    multiplies constant matrices faster than those of training. The global random state does not change.
    """
    # On a busy CPU, one of many short trials runs uninterrupted.
    side, trials = (8192, 5) if device.type == "cuda" else (512, 20)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    fastest = float("inf")
    for _ in range(trials):
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        _wait(device)
        fastest = min(fastest, time.perf_counter() - started)
    return float(2 * side**3 / fastest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
