"""Experts of a mixture in 4 or 8 bits, or with an adapter: their weights are computed a layer at a time.

transformers joins the matrices of a layer's experts to weights of three dimensions, which the layers of
bitsandbytes do not know. These parameters keep their names but hold packed numbers, and their module's own
forward runs with the weights that they stand for, to which it adds those of an adapter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dpo_dist.config.schema import Quantization
from dpo_dist.model.flops import stacked_experts
from dpo_dist.model.layers import Block, decoder_layers
from dpo_dist.model.library_internals import describe_whole, whole_shape

if TYPE_CHECKING:
    from peft.tuners.lora import ParamWrapper

_MOST_WEIGHTS = 2**31 - 1  # bitsandbytes' kernels count in 32 bits


@dataclass(frozen=True)
class Packing:
    """How one stacked weight is packed: its shape, and whether inputs come before outputs in it.

    A block of numbers that share a scale is of one output, as in linear layers: in 4 bits 64 inputs, in 8
    bits all of them.
    """

    kind: Quantization
    dtype: torch.dtype
    shape: torch.Size
    has_inputs_first: bool

    def pack(self, weight: Tensor) -> nn.Parameter:
        """Return the frozen parameter that stands for `weight` [experts, ...], on the same device."""
        from bitsandbytes.functional import int8_vectorwise_quant  # noqa: PLC0415  (optional extra)
        from bitsandbytes.nn.modules import Int8Params, Params4bit  # noqa: PLC0415

        rows = (weight.mT if self.has_inputs_first else weight).contiguous()
        if self.kind is Quantization.nf4:
            # Flat: on CPUs bitsandbytes (0.50) unpacks rows wrongly that are no multiple of a block.
            unpacked: Any = Params4bit(rows.flatten(), quant_type="nf4")
            packed: nn.Parameter = unpacked.to(weight.device)
            return packed
        codes, scales, _ = int8_vectorwise_quant(rows.flatten(0, 1).half())
        return Int8Params(codes, requires_grad=False, SCB=scales)

    def unpack(self, packed: Any) -> Tensor:
        """Return the weight that a parameter of `pack` stands for."""
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant  # noqa: PLC0415

        if self.kind is Quantization.nf4:
            rows = dequantize_4bit(packed.data, packed.quant_state)
        else:
            rows = int8_vectorwise_dequant(packed.data, packed.SCB).to(self.dtype)
        if not self.has_inputs_first:
            return rows.view(self.shape)
        experts, inputs, outputs = self.shape
        return rows.view(experts, outputs, inputs).mT


def packings(causal_lm: Any, kind: Quantization, dtype: torch.dtype) -> dict[str, Packing]:
    """Return how the stacked weights of a model, which is not loaded yet, are packed; by name."""
    found, stacks = dict[str, Packing](), packable(causal_lm)
    for name, weight in stacks.items():
        module = name.rpartition(".")[0]
        has_inputs_first = getattr(causal_lm.get_submodule(module), "is_transposed", None)
        if has_inputs_first is None:  # Llama 4: what the first weight reads, the last one writes
            shapes = [one.shape for other, one in stacks.items() if other.startswith(f"{module}.")]
            first, last = shapes[0], shapes[-1]
            has_inputs_first = first[1] == last[2] and first[2] != last[1]
        found[name] = Packing(kind, dtype, weight.shape, has_inputs_first)
    return found


def packable(causal_lm: Any) -> dict[str, nn.Parameter]:
    """Return the experts' weights that can be packed, by name."""
    stacks = stacked_experts(causal_lm)
    return {name: weight for name, weight in stacks.items() if weight.numel() <= _MOST_WEIGHTS}


def unpackable(causal_lm: Any) -> list[nn.Parameter]:
    """Return the experts' matrices that are neither linear layers nor can be packed."""
    packed = packable(causal_lm)
    return [
        weight
        for name, module in causal_lm.named_modules()
        if ".experts" in name and not isinstance(module, nn.Linear)
        for own, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1 and "bias" not in own and f"{name}.{own}" not in packed
    ]


def compute_packed(causal_lm: Any, packed: Mapping[str, Packing]) -> None:
    """Make modules whose weights are packed compute with the weights that these stand for."""
    layers = {module: layer for layer in decoder_layers(causal_lm) for module in layer.modules()}
    for name, module in list(causal_lm.named_modules()):
        own = {
            weight: packed[full]
            for weight, _ in module.named_parameters(recurse=False)
            if (full := f"{name}.{weight}") in packed
        }
        if own:
            for weight, packing in own.items():
                describe_whole(getattr(module, weight), packing.shape)
            module.packings = own
            unpack = partial(_unpacked, module)
            module.forward = partial(_forward, Block(module, module.forward), unpack, layers.get(module))


def compute_adapted(causal_lm: Any) -> None:
    """Make modules whose stacked weights have adapters compute with the sums of both.

    peft's own forward makes every sum twice, keeps those of all layers for backward, and cannot add to packed
    numbers.
    """
    from peft.tuners.lora import ParamWrapper  # noqa: PLC0415  (slow, see lora.py)

    layers = {module: layer for layer in decoder_layers(causal_lm) for module in layer.modules()}
    inside = set[nn.Module]()
    for module in causal_lm.modules():
        if not isinstance(module, ParamWrapper) or module in inside:
            continue
        # A wrapper has one weight; those of further weights are around it.
        wrappers = [part for part in module.modules() if isinstance(part, ParamWrapper)]
        inside |= {*wrappers}
        experts = module.get_base_layer()
        if len(whole_shape(module.get_param())) != 3:  # a router's, which `add_saved` refuses
            continue
        block = Block(experts, MethodType(type(experts).forward, experts))
        module.forward = partial(_forward, block, partial(_summed, wrappers), layers.get(module))


def _unpacked(experts: Any) -> dict[str, Tensor]:
    packings: Mapping[str, Packing] = getattr(experts, "packings", {})
    return {name: packing.unpack(getattr(experts, name)) for name, packing in packings.items()}


def _summed(wrappers: "Sequence[ParamWrapper]") -> dict[str, Tensor]:
    """Return the weights of experts that are packed or have an active adapter."""
    experts: Any = wrappers[0].get_base_layer()
    weights = _unpacked(experts)
    for wrapper in wrappers:
        name = wrapper.parameter_name
        active = [] if wrapper.disable_adapters else wrapper.active_adapters
        for adapter in filter(wrapper.lora_A.__contains__, active):
            weight = weights.get(name, getattr(experts, name))
            weights[name] = weight + wrapper.get_delta_weight(adapter).to(weight.dtype)
    return weights


def _forward(
    block: Block, find: Callable[[], dict[str, Tensor]], layer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return what a module computes with the weights that `find` returns."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        weights = {f"block.{name}": weight for name, weight in find().items()}
        return functional_call(block, weights, args, kwargs)

    is_checkpointed = layer is not None and layer.gradient_checkpointing and layer.training
    if is_checkpointed or not torch.is_grad_enabled():
        return compute(*args, **kwargs)
    # A product keeps its weight for backward: all layers' weights would be whole at once.
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
