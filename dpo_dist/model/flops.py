"""FLOPs of a training step, compute costs of micro-batches, and peak FLOP/s of a device."""

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from dpo_dist.batching.plan import ComputeCosts
from dpo_dist.config.schema import AdapterConfig
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.model.attention import heads_of_layers
from dpo_dist.model.layers import layer_values, other_weights
from dpo_dist.model.lora import find_modules, target_layers

# Forward, gradient of the input, gradient of the weight: each a multiplication and an addition.
_FORWARD_AND_BACKWARD = 6
# A frozen weight has no gradient.
_FORWARD_AND_INPUT_GRADIENT = 4
# Time of a FLOP in attention and in the output layer relative to one in the layers' matrices: 1.37 and 0.88
# by least squares over timed micro-batches (40M Qwen2 shape, float32, one core of an AMD EPYC). With them,
# the times of 10 micro-batches of very different shapes are predicted within 5 %.
_ATTENTION_SLOWNESS = 1.4
_HEAD_SLOWNESS = 0.9
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True)
class StepFlops:
    """Useful FLOPs of a training step, without recomputation.

    Of a packed token in the matrices of all layers, of a completion token in the output layer, and in all
    layers of a token for one that it attends to, itself included. Windows count as full attention.
    """

    per_token: float
    per_target: float
    per_attended: float

    def of(self, tokens: int, targets: int, attended: int) -> float:
        """Return the FLOPs of a step with these counts."""
        return self.per_token * tokens + self.per_target * targets + self.per_attended * attended


def without_weights(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Return the causal language model of a configuration on the meta device."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # an architecture's constructor can raise anything
        raise ConfigError(
            "transformers cannot make a causal language model of this config.json",
            where="model.path",
            got=f"{config.model_type}: {first_line(error)}",
            remedy="check config.json against that of the original model, or choose another model",
        ) from error


def step_flops(causal_lm: Any, adapter: AdapterConfig | None = None) -> StepFlops:
    """Return the FLOPs of a training step of a model, of which no tensor is used.

    With an adapter, its matrices and the gradients of modules that it trains in full are counted, and no
    gradients of frozen weights. Every weight with two dimensions or more is multiplied with each token but
    embeddings, which are looked up, and experts (three dimensions, the first of them the experts), of which a
    token visits its configuration's number. Norms, rotations and softmax are not counted.
    """
    text, output = causal_lm.config.get_text_config(), causal_lm.get_output_embeddings().weight
    outside = {id(module.weight) for module in causal_lm.modules() if isinstance(module, nn.Embedding)}
    outside |= {id(output), *map(id, other_weights(causal_lm))}
    visited_experts = _visited_experts(text)
    convolutions = {id(module.weight) for module in causal_lm.modules() if isinstance(module, nn.Conv1d)}
    visited = 0.0
    for name, parameter in causal_lm.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith("bias")  # of experts, stacked
        if id(parameter) not in outside and is_matrix:
            is_of_experts = parameter.dim() > 2 and visited_experts and id(parameter) not in convolutions
            share = min(1.0, visited_experts / len(parameter)) if is_of_experts else 1.0
            visited += share * parameter.numel()
    per_weight, added, saved = _FORWARD_AND_BACKWARD, 0, []
    if adapter is not None:
        assert adapter.r is not None  # `trained_adapter` has read that of a continued one
        layers = [causal_lm.get_submodule(name) for name in target_layers(causal_lm, adapter)]
        modules = [causal_lm.get_submodule(n) for n in find_modules(causal_lm, adapter.modules_to_save or [])]
        per_weight = _FORWARD_AND_INPUT_GRADIENT
        added = adapter.r * sum(sum(layer.weight.shape) for layer in layers)
        saved = [weight for module in modules for weight in module.parameters() if weight.dim() > 1]
    visited_saved = sum(weight.numel() for weight in saved if id(weight) not in outside)
    trains_output = adapter is None or any(weight is output for weight in saved)
    widths = [heads.query * (heads.dim + heads.value_dim) for heads in heads_of_layers(text)]
    attention = text.num_hidden_layers * fmean(widths) if widths else 0.0
    return StepFlops(
        per_token=per_weight * visited
        + _FORWARD_AND_BACKWARD * added
        + (_FORWARD_AND_BACKWARD - per_weight) * visited_saved,
        per_target=(_FORWARD_AND_BACKWARD if trains_output else per_weight) * output.numel(),
        per_attended=_FORWARD_AND_BACKWARD * attention,
    )


def _visited_experts(text: PretrainedConfig) -> int:
    """Return the experts of a layer that a token visits, the most of any layer; 0 without experts."""
    values = [value for name in _EXPERTS_OF_A_TOKEN for value in layer_values(text, name)]
    of_layers = [value if isinstance(value, list) else [value] for value in values]  # Hunyuan has a list
    return max((value for layers in of_layers for value in layers if value), default=0)


def compute_costs(flops: StepFlops) -> ComputeCosts:
    """Return the cost of an attended key and of a target, relative to a token in the layers' matrices.

    The output layer recomputes most logits in backward. Costs balance the load of ranks and change no result.
    """
    return ComputeCosts(
        key=_ATTENTION_SLOWNESS * flops.per_attended / flops.per_token,
        target=_HEAD_SLOWNESS * (4 / 3) * flops.per_target / flops.per_token,
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of a few products of large matrices in `dtype` on `device`.

    Takes hundredths of a second on a large GPU, tenths on a CPU. The matrices are random, as a GPU multiplies
    constant matrices faster than those of training. The global random state does not change.
    """
    side, trials = (8192, 5) if device.type == "cuda" else (512, 20)  # on a busy CPU one runs uninterrupted
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
