"""Undocumented parts of transformers, peft and Liger that models need; no other file uses them.

tests/unit/model/test_library_internals.py calls the functions below on the real libraries, and fails if a new
version changes one of these parts.
"""

import contextlib
import copy
import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import modeling_utils
from transformers.core_model_loading import (
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations import deepspeed
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

# ---- transformers: loading ----


def shards_loading() -> bool:
    """Return whether transformers shards the weights that it makes or loads, by ZeRO-3."""
    return bool(deepspeed.is_deepspeed_zero3_enabled())


@contextlib.contextmanager
def sharded_by(inside: Mapping[str, Any], after: Any) -> Iterator[None]:
    """Make transformers shard weights by DeepSpeed's configuration `inside` in the block.

    `after`: the `HfDeepSpeedConfig` that decides after the block.
    """
    bound = deepspeed.HfDeepSpeedConfig(inside)  # transformers has only a weak reference to it
    try:
        yield
    finally:
        del bound
        deepspeed.set_hf_deepspeed_config(after)


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Make transformers load without ZeRO-3's sharding inside the block."""
    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


@contextlib.contextmanager
def transposed_by(shapes: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, make transformers (5.23) transpose experts by `shapes`.

    These are the shapes of the whole weights, by name. transformers would take the shape from the model's
    weight, which is empty under ZeRO-3.
    """
    convert = Transpose.convert

    def convert_whole(self: Transpose, *tensors: Any, model: Any = None, **options: Any) -> Any:
        def find(name: str) -> Any:
            return SimpleNamespace(shape=shapes[name]) if name in shapes else model.get_parameter(name)

        return convert(self, *tensors, model=SimpleNamespace(get_parameter=find), **options)

    Transpose.convert = convert_whole
    try:
        yield
    finally:
        Transpose.convert = convert


@contextlib.contextmanager
def packed_by(pack: Mapping[str, Callable[[Tensor], nn.Parameter]]) -> Iterator[None]:
    """Inside the block, make transformers' quantizers for bitsandbytes also replace other weights, by name.

    Each is replaced as soon as it is read, so that it never is whole on the device together with the others.
    """
    originals = {name: AUTO_QUANTIZER_MAPPING[name] for name in ("bitsandbytes_4bit", "bitsandbytes_8bit")}
    AUTO_QUANTIZER_MAPPING.update({name: _packing(kind, pack) for name, kind in originals.items()})
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(originals)


def _packing(quantizer: Any, pack: Mapping[str, Callable[[Tensor], nn.Parameter]]) -> Any:
    class Operation(ConversionOps):  # type: ignore[misc]
        def __init__(self, own: ConversionOps):
            self._own = own

        def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
            if not input_dict.keys() <= pack.keys():
                return dict(self._own.convert(input_dict, **options))
            tensors = {
                name: tensor_or_list[0] if isinstance(tensor_or_list, list) else tensor_or_list
                for name, tensor_or_list in input_dict.items()
            }
            return {name: pack[name](tensor) for name, tensor in tensors.items()}

    class Quantizer(quantizer):  # type: ignore[misc]
        def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
            return param_name in pack or super().param_needs_quantization(model, param_name, **options)

        def get_quantize_ops(self) -> ConversionOps:
            return Operation(super().get_quantize_ops())

    return Quantizer


@contextlib.contextmanager
def opening_files_by(open_file: Callable[[str], Any]) -> Iterator[None]:
    """Inside the block, make transformers open weight files by `open_file` in place of `safe_open`."""
    original = modeling_utils.safe_open
    modeling_utils.safe_open = lambda file, *_, **__: open_file(file)
    try:
        yield
    finally:
        modeling_utils.safe_open = original


def unpack_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [experts, inputs, outputs] of MXFP4 blocks [experts, outputs, inputs / 32, 16].

    Exact: two numbers of 4 bits in a byte, times a power of two for each block. By default transformers takes
    so many numbers at once that their indices are larger than the weight.
    """
    unpacked: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype, rows_per_chunk=2**20)
    return unpacked


def place_in_model(causal_lm: Any) -> Callable[[str], tuple[str, str | None]]:
    """Return a function of a tensor's name in a file, for this loaded model.

    It returns the name of the weight in the model and, if several tensors are joined to it, the pattern of
    the names that are of one part.
    """
    renamings = [entry for entry in causal_lm._weight_conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in causal_lm._weight_conversions if isinstance(entry, WeightConverter)]
    prefix = causal_lm.base_model_prefix
    expected = causal_lm.state_dict()

    def find_place(name: str) -> tuple[str, str | None]:
        weight, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        return str(weight), pattern

    return find_place


def join_tensors(
    causal_lm: Any, name: str, tensors: Mapping[str | None, Sequence[Callable[[], Tensor]]]
) -> Tensor:
    """Return a weight as transformers makes it of these tensors, by the patterns of `place_in_model`."""
    if None in tensors:  # only renamed
        return tensors[None][0]()
    converter = next(
        copy.deepcopy(entry)
        for entry in causal_lm._weight_conversions
        if isinstance(entry, WeightConverter) and tensors.keys() <= {*entry.source_patterns}
    )
    for pattern, parts in tensors.items():
        for part in parts:
            converter.add_tensor(name, name, pattern, part)
    joined = converter.convert(name, model=causal_lm, config=causal_lm.config)[name]
    weight: Tensor = joined[0] if isinstance(joined, list) else joined
    return weight


@contextlib.contextmanager
def loading_without(names: Collection[str]) -> Iterator[None]:
    """Inside the block, make transformers leave these weights, which ZeRO-3 shards, as they are made.

    Their tensors are not in the files that it opens: it would gather all of them to initialize them.
    """
    original = modeling_utils._load_state_dict_into_zero3_model

    def load(causal_lm: Any, *arguments: Any) -> tuple[Any, set[str]]:
        errors, missing = original(causal_lm, *arguments)
        for name in names:
            causal_lm.get_parameter(name)._is_hf_initialized = True
        return errors, missing - {*names}

    modeling_utils._load_state_dict_into_zero3_model = load
    try:
        yield
    finally:
        modeling_utils._load_state_dict_into_zero3_model = original


def ignored_patterns(causal_lm: Any) -> Sequence[str]:
    """Return the patterns of names in weight files that a model's class ignores on purpose."""
    return tuple(type(causal_lm)._keys_to_ignore_on_load_unexpected or ())


# ---- transformers: attention and checkpointing ----


def attention_name(causal_lm: Any) -> str:
    """Return the name of the attention function that a model calls."""
    return str(causal_lm.config._attn_implementation)


def attention_function(causal_lm: Any) -> Any:
    """Return the attention function that a model calls; None for the one of its own file."""
    return ALL_ATTENTION_FUNCTIONS.get(attention_name(causal_lm))


def plain_attention(causal_lm: Any) -> str:
    """Return the name of the attention function that a model has without third-party kernels."""
    return "sdpa" if causal_lm._supports_sdpa else "eager"


def text_attention(causal_lm: Any, name: str) -> dict[str, str]:
    """Return the argument of `set_attn_implementation` that sets the attention of the text part only."""
    config = causal_lm.config
    text = causal_lm.config.get_text_config()
    return {part: name for part in config.sub_configs if getattr(config, part, None) is text}


def can_choose_attention(causal_lm: Any) -> bool:
    """Return whether a model calls the attention function that its configuration names."""
    return bool(causal_lm._can_set_attn_implementation())


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    *,
    is_causal: bool = True,
    **options: Any,
) -> Tensor:
    """Return attention [tokens, heads, dim] by a kernel of FlashAttention.

    `lengths` are the segments' cumulative query lengths and key lengths, and the longest of each.
    """
    cu_query, cu_key, longest_query, longest_key = lengths
    attended: Tensor = _flash_attention_forward(
        query[None],
        key[None],
        value[None],
        None,
        query_length=len(query),
        is_causal=is_causal,
        cu_seq_lens_q=cu_query,
        cu_seq_lens_k=cu_key,
        max_length_q=longest_query,
        max_length_k=longest_key,
        **options,
    )[0]
    return attended


def compute_beside(name: str, other: str, is_other: Callable[[], bool]) -> None:
    """Make the attention function `name` compute as `other` in layers whose keyword `packed` `is_beside`.

    Masks are those of `other` where `is_other`. The function decides by its arguments: gradient checkpointing
    calls a layer again after other forwards of the model. Without that mark it computes as before.
    """
    original = ALL_ATTENTION_FUNCTIONS.get(name)  # None for eager: each model file has its own
    own_mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
    if hasattr(own_mask, "is_beside"):
        return

    def attention(module: Any, *arguments: Any, **options: Any) -> Any:
        if hasattr(options.get("packed"), "is_beside"):
            return ALL_ATTENTION_FUNCTIONS[other](module, *arguments, **options)
        if original is not None:
            return original(module, *arguments, **options)
        file = inspect.unwrap(type(module).forward).__globals__
        return file["eager_attention_forward"](module, *arguments, **options)

    def mask(*arguments: Any, **options: Any) -> Any:
        return (ALL_MASK_ATTENTION_FUNCTIONS[other] if is_other() else own_mask)(*arguments, **options)

    mask.is_beside = True  # type: ignore[attr-defined]
    modeling_utils.AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def wrap_checkpointing(layer: Any, wrapper: Callable[..., Any]) -> None:
    """Make a checkpointed layer call `wrapper(checkpoint, *arguments)` where it calls `checkpoint`."""
    layer._gradient_checkpointing_func = partial(wrapper, layer._gradient_checkpointing_func)


def dispatched(
    experts: Any, forward: Callable[..., Tensor], group: Any, alone: Any, device: str
) -> Callable[..., Tensor]:
    """Return the `forward` of a module with some experts for the tokens of all ranks of a process group.

    `group` has the ranks that share the experts, in their order, and `alone` this rank.
    """
    from transformers.distributed.expert_parallel import AllToAllEP  # noqa: PLC0415  (slow)

    own = SimpleNamespace(forward=forward, num_experts=experts.num_experts)
    dispatch = AllToAllEP(own, DeviceMesh.from_group(group, device), DeviceMesh.from_group(alone, device))

    def compute(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Some routers give weights in float32, which decide the precision of the sum.
        mixed: Tensor = dispatch(hidden_states, top_k_index, top_k_weights)
        return mixed.to(hidden_states.dtype)

    return compute


# ---- transformers: recurrent layers ----

KIMI_RULE = "chunk_kimi_delta_attention"
# Functions of modeling files that recurrent layers call with all keywords of the model's forward, by the
# method of `packed_states` that computes them on a tree.
_RECURRENT = {
    "causal_conv1d_fn": "convolve",
    "torch_chunk_gated_delta_rule": "delta_rule",
    KIMI_RULE: "delta_rule",
    "mamba2_chunk_scan": "scan",
    "mamba2_split_conv1d_scan_combined": "no_fused_kernel",
}
# The function that looks for padding in a mask, for which the host would wait for the device.
_PADDING = "create_recurrent_attention_mask"
# A function of Mamba-1's layers, which takes no initial state.
_WITHOUT_STATE = "mamba_selective_scan"


def fork_states(causal_lm: nn.Module) -> bool:
    """Make recurrent layers of these model files compute by the keyword `packed_states`, where it is given.

    Returns whether the model has such layers, and none that cannot start in a given state.
    """
    recurrent = [file for file in _model_files(causal_lm) if hasattr(file, "causal_conv1d_fn")]
    if not recurrent or any(hasattr(file, _WITHOUT_STATE) for file in recurrent):
        return False
    for file in recurrent:
        for name in {*_RECURRENT, _PADDING} & vars(file).keys():
            original = getattr(file, name)
            if not hasattr(original, "original"):
                forked = _none_if_whole(original) if name == _PADDING else _forked(original, _RECURRENT[name])
                forked.original = original
                setattr(file, name, forked)
    return True


def whole_mask(input_ids: Tensor) -> Tensor:
    """Return the mask of rows without padding, in which no recurrent layer of a forked model looks for it."""
    mask = torch.ones_like(input_ids)
    mask.is_whole = True  # type: ignore[attr-defined]
    return mask


def _none_if_whole(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def function(*arguments: Any, attention_mask: Any, **options: Any) -> Any:
        is_whole = hasattr(attention_mask, "is_whole")
        return None if is_whole else original(*arguments, attention_mask=attention_mask, **options)

    return function


def recurrent_functions(
    causal_lm: nn.Module,
) -> list[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Return torch's own function and the one called in its place, for each one of a forked model's files.

    Before them, the method of `packed_states` that computes them on a tree.
    """
    functions = []
    for file in _model_files(causal_lm):
        for name, method in _RECURRENT.items():
            if name in vars(file):
                function = vars(file)[name].original
                functions.append((method, inspect.unwrap(function), function))
    return functions


def is_kernel(function: Callable[..., Any]) -> bool:
    """Return whether a function of a modeling file calls a kernel of another package.

    transformers' dispatcher decides that when it loads the file: by whether its import succeeds.
    """
    return bool(inspect.getclosurevars(function).nonlocals.get("is_new_implementation"))


def takes_kernel(query: Tensor) -> bool:
    """Return whether flash-linear-attention computes the delta rule of these inputs.

    Its kernels run on GPUs, and compute float32 in TF32.
    """
    return query.is_cuda and query.dtype is not torch.float32


def _model_files(causal_lm: nn.Module) -> list[Any]:
    names = {type(module).__module__ for module in causal_lm.modules()}
    return [sys.modules[name] for name in names if name.startswith("transformers.models.")]


def _forked(original: Callable[..., Any], method: str) -> Any:
    plain = inspect.unwrap(original)

    # Every batch has another tree: torch.compile would compile the function again for each.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(original)
    def function(*arguments: Any, packed_states: Any = None, **options: Any) -> Any:
        called = plain if method == "delta_rule" and not takes_kernel(arguments[0]) else original
        if packed_states is None:
            return called(*arguments, **options)
        return getattr(packed_states, method)(called, *arguments, **options)

    return function


# ---- peft ----


def describe_whole(weight: Any, shape: torch.Size) -> None:
    """Say what shape the weight has that a packed one stands for, where peft looks for it under ZeRO-3."""
    weight.ds_shape = shape


def describe_slice(piece: Any, shape: tuple[int, ...], first: int) -> None:
    """Say that a weight is a part of one of `shape`, from row `first`."""
    piece.shape_of_whole = shape
    piece.first_element = first * math.prod(shape[1:])


def whole_shape(weight: Any) -> tuple[int, ...]:
    """Return the whole shape of a weight, also of one that is packed, a slice, or that ZeRO-3 shards."""
    return tuple(getattr(weight, "shape_of_whole", getattr(weight, "ds_shape", weight.shape)))


def first_element(weight: Any) -> int:
    """Return the index in the whole weight of a weight's first element: 0 if it is no slice."""
    return int(getattr(weight, "first_element", 0))


def expert_updates(wrapper: Any, adapter: str, experts: slice) -> Tensor:
    """Return what an adapter adds to the stacked weights of some experts; peft computes it for all only."""
    # By the field's names A [experts * rank, inputs] and B [outputs, rank * experts].
    down = wrapper.lora_A[adapter].weight
    up = wrapper.lora_B[adapter].weight
    down = down.reshape(wrapper.num_experts, -1, down.shape[-1])[experts]
    up = up.reshape(up.shape[0], -1, wrapper.num_experts)[..., experts]
    order = "e o i" if wrapper._did_swap_in_out_features else "e i o"
    update: Tensor = wrapper.scaling[adapter] * torch.einsum(f"o r e, e r i -> {order}", up, down)
    return update


def mark_as_adapted(causal_lm: Any) -> None:
    """Tell a transformers model that it has an adapter, as its own `add_adapter` does."""
    causal_lm._hf_peft_config_loaded = True


AdapterState = tuple[Any, bool]
"""The active adapters of a layer, and whether the layer computes without any."""


def adapter_state(layer: Any) -> AdapterState:
    """Return which adapter a peft layer uses."""
    return layer._active_adapter, layer._disable_adapters


def set_adapter_state(layer: Any, state: AdapterState) -> None:
    """Make a peft layer use the adapter of `state`.

    peft's own switches also change requires_grad, which breaks DeepSpeed's hooks.
    """
    layer._active_adapter, layer._disable_adapters = state


def switches_adapters(layer: Any) -> bool:
    """Return whether a layer computes with adapters, or without them."""
    return hasattr(layer, "_disable_adapters")


def adapters_in_use(causal_lm: nn.Module) -> frozenset[str] | None:
    """Return the adapters by which a model computes, none if they are off; None: it has no adapter."""
    for module in causal_lm.modules():
        if switches_adapters(module):
            names, is_off = adapter_state(module)
            if is_off:
                return frozenset()
            return frozenset([names] if isinstance(names, str) else names)
    return None


# ---- Liger ----


def apply_liger(text: nn.Module, **options: bool) -> None:
    """Replace this model's layers by Liger's kernels, except those that `options` switch off."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # noqa: PLC0415  (optional extra)

    _apply_liger_kernel_to_instance(text, **options)
