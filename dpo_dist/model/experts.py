"""Experts of a mixture: which kernel multiplies them; in 4 or 8 bits, or with an adapter, a layer at a time.

transformers joins the matrices of a layer's experts to weights of three dimensions, which the layers of
bitsandbytes do not know. Packed, these parameters keep their names but hold packed numbers, and their
module's own forward runs with the weights that they stand for, to which it adds those of an adapter.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dpo_dist.config.schema import Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.flops import stacked_experts
from dpo_dist.model.kernel_check import kernel_fault
from dpo_dist.model.layers import Block, decoder_layers
from dpo_dist.model.library_internals import (
    describe_whole,
    dispatched,
    expert_updates,
    unpack_mxfp4,
    whole_shape,
)

if TYPE_CHECKING:
    from peft.tuners.lora import ParamWrapper

log = logging.getLogger(__name__)

GROUPED = "grouped_mm"  # one product of all experts of a layer; `eager` is a loop over them

_MOST_WEIGHTS = 2**31 - 1  # bitsandbytes' kernels count in 32 bits

# Tokens of each expert in the check of a kernel: none, few, and several blocks with a rest.
_TRIAL_GROUPS = [0, 1, 7, 0, 200]
_TRIAL_WIDTH = 1024


def experts_kernel(causal_lm: Any) -> str | None:
    """Return transformers' name for how stacked experts are multiplied; None without such experts."""
    if not any(hasattr(module, "is_transposed") for module in causal_lm.modules()):
        return None
    return GROUPED if GROUPED in causal_lm.get_experts_implementation().values() else "eager"


def choose_products(causal_lm: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Make experts that transformers multiplies at once do it in a loop, if the kernel is wrong here."""
    if experts_kernel(causal_lm) != GROUPED:
        return
    layouts = {module.is_transposed for module in causal_lm.modules() if hasattr(module, "is_transposed")}
    width = min(_TRIAL_WIDTH, causal_lm.config.get_text_config().hidden_size)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden": torch.randn(sum(_TRIAL_GROUPS), width, generator=generator).to(device),
        "weight": torch.randn(len(_TRIAL_GROUPS), width, width, generator=generator).to(device),
    }
    ends = torch.tensor(_TRIAL_GROUPS, device=device).cumsum(0, dtype=torch.int32)
    for has_inputs_first in layouts:

        def in_loop(hidden: Tensor, weight: Tensor, has_inputs_first: bool = has_inputs_first) -> Tensor:
            parts = zip(torch.split(hidden, _TRIAL_GROUPS), weight, strict=True)
            return torch.cat([part @ (expert if has_inputs_first else expert.mT) for part, expert in parts])

        def at_once(hidden: Tensor, weight: Tensor, has_inputs_first: bool = has_inputs_first) -> Tensor:
            weight = weight if has_inputs_first else weight.mT
            return torch.nn.functional.grouped_mm(hidden, weight, offs=ends)

        fault = kernel_fault(in_loop, at_once, inputs, dtype)
        if fault:
            log.warning(
                "experts are computed in a loop: PyTorch's grouped_mm fails on this device: %s", fault
            )
            causal_lm.set_experts_implementation("eager")
            return


@dataclass(frozen=True)
class ExpertShare:
    """The share of each layer's experts that one process has: the slice `rank` of `ranks` equal ones."""

    rank: int
    ranks: int

    def of(self, number: int) -> slice:
        """Return the experts of this process, of so many in a layer."""
        count = number // self.ranks
        return slice(self.rank * count, (self.rank + 1) * count)


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


@dataclass(frozen=True)
class Mxfp4:
    """A stacked weight that stays in the MXFP4 of its file: exactly, 17 bytes for 32 numbers."""

    dtype: torch.dtype
    shape: torch.Size

    def pack(self, read: Tensor) -> nn.Parameter:
        """Return the frozen parameter of the bytes of `join_mxfp4`, which transformers cast to a float."""
        return nn.Parameter(read.to(torch.uint8), requires_grad=False)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the weight [experts, inputs, outputs] that a parameter of `pack` stands for."""
        return unpack_mxfp4(packed[..., :16], packed[..., 16], self.dtype)


def packings(
    causal_lm: Any, kind: Quantization, dtype: torch.dtype, mxfp4: Collection[str]
) -> dict[str, Packing | Mxfp4]:
    """Return how the stacked weights of a model, which is not loaded yet, are packed; by name.

    In 4 bits, those of the names in `mxfp4` stay as they are in their files: NF4 has other numbers.
    """
    by_name = dict[str, Packing | Mxfp4]()
    stacks = packable(causal_lm)
    for name, weight in stacks.items():
        if name in mxfp4 and kind is Quantization.nf4:
            by_name[name] = Mxfp4(dtype, weight.shape)
            continue
        module = name.rpartition(".")[0]
        has_inputs_first = getattr(causal_lm.get_submodule(module), "is_transposed", None)
        if has_inputs_first is None:  # Llama 4: what the first weight reads, the last one writes
            shapes = [one.shape for other, one in stacks.items() if other.startswith(f"{module}.")]
            first, last = shapes[0], shapes[-1]
            has_inputs_first = first[1] == last[2] and first[2] != last[1]
        by_name[name] = Packing(kind, dtype, weight.shape, has_inputs_first)
    return by_name


def packable(causal_lm: Any) -> dict[str, nn.Parameter]:
    """Return the experts' weights that can be packed, by name."""
    stacks = stacked_experts(causal_lm)
    return {name: weight for name, weight in stacks.items() if weight.numel() <= _MOST_WEIGHTS}


def unpackable(causal_lm: Any) -> list[nn.Parameter]:
    """Return the experts' matrices that are neither linear layers nor can be packed."""
    packed = packable(causal_lm)
    others = []
    for module_name, module in causal_lm.named_modules():
        if ".experts" not in module_name or isinstance(module, nn.Linear):
            continue
        for name, weight in module.named_parameters(prefix=module_name, recurse=False):
            is_matrix = weight.dim() > 1 and "bias" not in name.rpartition(".")[2]
            if is_matrix and name not in packed:
                others.append(weight)
    return others


def expert_modules(causal_lm: Any) -> list[Any]:
    """Return the modules that hold the stacked experts of a layer each, in transformers' own layout."""
    return [module for module in causal_lm.modules() if hasattr(module, "is_transposed")]


def expert_weights(causal_lm: Any) -> set[str]:
    """Return the names of the weights of `expert_modules`."""
    return {
        f"{module_name}.{name}"
        for module_name, module in causal_lm.named_modules()
        if hasattr(module, "is_transposed")
        for name, _ in module.named_parameters(recurse=False)
    }


def shares_equally(causal_lm: Any, ranks: int) -> bool:
    """Return whether a model has experts, and so many ranks get equally many of each layer's."""
    stacks = [weight for module in expert_modules(causal_lm) for weight in module.parameters(recurse=False)]
    return bool(stacks) and all(whole_shape(weight)[0] % ranks == 0 for weight in stacks)


def set_reader(weight: Any, read: Callable[[], Tensor] | None) -> None:
    """Say how this process's experts are read of a sharded weight that has no values; None: it has values."""
    weight.read_own_experts = read


def own_reader(weight: Any) -> Callable[[], Tensor] | None:
    """Return the function of `set_reader`; None if the weight has its values."""
    read: Callable[[], Tensor] | None = getattr(weight, "read_own_experts", None)
    return read


def check_shared_experts(causal_lm: Any, ranks: int) -> None:
    """Raise ConfigError if `ranks` processes cannot share the experts of the policy."""
    if ranks == 1 or shares_equally(causal_lm, ranks):
        return
    weights = [weight for module in expert_modules(causal_lm) for weight in module.parameters(recurse=False)]
    numbers = sorted({whole_shape(weight)[0] for weight in weights})
    kind = causal_lm.config.model_type
    raise ConfigError(
        "the experts of this model cannot be shared by so many processes",
        where="parallelism.experts",
        got=f"{ranks}, and {kind} with "
        + (f"{' or '.join(map(str, numbers))} experts in a layer" if numbers else "no stacked experts"),
        expected="a divisor of the number of experts, which transformers keeps as one weight of a layer",
        remedy="choose such a divisor, or remove parallelism.experts",
    )


def keep_experts(module: Any, own: slice) -> None:
    """Make a module, whose weights are of these experts of its layer, compute with them."""
    count = own.stop - own.start
    module.num_experts = count
    module.own_experts = own
    packings: dict[str, Packing | Mxfp4] = getattr(module, "packings", {})
    for name, packing in packings.items():
        packings[name] = replace(packing, shape=torch.Size((count, *packing.shape[1:])))


def exchange_tokens(causal_lm: Any, group: Any, alone: Any) -> None:
    """Make modules that hold some of a layer's experts compute them for tokens of all ranks of `group`."""
    outermost: dict[Any, Any] = {}  # an adapter's wrappers compute in place of the module
    for module in causal_lm.modules():
        if hasattr(module, "parameter_name"):
            outermost.setdefault(module.get_base_layer(), module)
    for experts in expert_modules(causal_lm):
        module = outermost.get(experts, experts)
        device = next(experts.parameters()).device.type
        module.forward = dispatched(experts, module.forward, group, alone, device)


def _layers_by_module(causal_lm: Any) -> dict[nn.Module, nn.Module]:
    """Return the decoder layer of each module in one."""
    layers: dict[nn.Module, nn.Module] = {}
    for layer in decoder_layers(causal_lm):
        layers |= dict.fromkeys(layer.modules(), layer)
    return layers


def compute_packed(causal_lm: Any, packed: Mapping[str, Packing | Mxfp4]) -> None:
    """Make modules whose weights are packed compute with the weights that these stand for."""
    layers = _layers_by_module(causal_lm)
    for module_name, module in list(causal_lm.named_modules()):
        packings_here = {}
        for weight, _ in module.named_parameters(recurse=False):
            packing = packed.get(f"{module_name}.{weight}")
            if packing is not None:
                packings_here[weight] = packing
                describe_whole(getattr(module, weight), packing.shape)
        if packings_here:
            module.packings = packings_here
            unpack = partial(_unpacked, module)
            module.forward = partial(_forward, Block(module, module.forward), unpack, layers.get(module))


def compute_adapted(causal_lm: Any) -> None:
    """Make modules whose stacked weights have adapters compute with the sums of both.

    peft's own forward makes every sum twice, keeps those of all layers for backward, and cannot add to packed
    numbers.
    """
    from peft.tuners.lora import ParamWrapper  # noqa: PLC0415  (slow, see lora.py)

    layers = _layers_by_module(causal_lm)
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
    packings: Mapping[str, Packing | Mxfp4] = getattr(experts, "packings", {})
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
            weights[name] = weight + _delta(wrapper, adapter, experts).to(weight.dtype)
    return weights


def _delta(wrapper: "ParamWrapper", adapter: str, experts: Any) -> Tensor:
    """Return an adapter's update of the weights of experts, or of those that this rank has."""
    own = getattr(experts, "own_experts", None)
    if own is None:
        whole: Tensor = wrapper.get_delta_weight(adapter)
        return whole
    return expert_updates(wrapper, adapter, own)


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
