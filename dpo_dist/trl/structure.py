"""Compares a model in memory with the one that its class makes from its config, as which it is loaded."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from dpo_dist.distributed.blueprint import blueprint
from dpo_dist.distributed.deepspeed_internals import is_sharded

# What these packages change belongs to how a model is loaded, as the hook of `enable_input_require_grads`.
_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "liger_kernel",
    "peft",
    "torch",
    "transformers",
    "transformers_modules",
)
_QUANTIZED = "bitsandbytes"
# Values without an effect on a forward here: of training, of dropout, which is always off, of padding, of
# caches, of sizes that weights have too, of the loss that a model computes itself; and notes of transformers.
_WITHOUT_EFFECT = (
    *("training", "gradient_checkpointing", "p", "padding_idx", "layer_idx", "name_or_path", "vocab_size"),
    *("max_seq_len_cached", "original_max_seq_len", "loss_type", "router_aux_loss_coef"),
)
_PLAIN = (bool, int, float, str, tuple, type(None))
# RoPE of these kinds has other frequencies after a long sequence.
_CHANGING = ("dynamic", "longrope")


def is_library(thing: Any) -> bool:
    """Return whether a class, function or object is of a library, not of a script."""
    function = thing.func if isinstance(thing, partial) else getattr(thing, "__func__", thing)
    # `functools.wraps` gives a function of the script the `__module__` of another.
    modules = {getattr(function, "__globals__", {}).get("__name__"), getattr(function, "__module__", None)}
    return all(name.split(".")[0] in _LIBRARIES for name in modules if name)


def difference(model: Any) -> str | None:
    """Return the first difference of a model from what its class makes of its config; its weights aside."""
    if any(map(is_sharded, model.parameters())):
        return None  # which is an error of its own
    built = dict(blueprint(type(model), model.config).named_modules(remove_duplicate=False))
    found, wrappers = _without_adapters(model)
    for name, module in built.items():
        if name not in found:
            return f"a model without {name}"
        is_quantized = type(found[name]).__module__.startswith(_QUANTIZED)
        if not is_quantized and (got := _difference(found[name], module, name)):
            return got
    inside = tuple(f"{name}." for name in wrappers)
    added = (name for name in found if name not in built and not name.startswith(inside))
    return next((f"a model with {name}" for name in added), None)


def _without_adapters(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Return modules by the names that they have without adapters, and the names of those that have one."""
    wrappers = list[str]()
    found = dict[str, nn.Module]()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrappers.append(name)
        found[name.replace(".base_layer", "").replace(".original_module", "")] = module
    return found, wrappers


def _difference(module: nn.Module, built: nn.Module, name: str) -> str | None:
    if type(module) is not type(built):
        return f"a {type(module).__name__} as {name or 'the model'}"
    for key, value, made in _values(module, built):
        place = f"{name}.{key}".removeprefix(".")
        if isinstance(value, Tensor):
            # Rounded to its type, also where it was computed in half precision.
            got, own = (part.cpu().to(value.dtype).to(torch.complex64) for part in (value, made))
            if got.shape == own.shape and not torch.allclose(got, own, rtol=0.02):
                return f"another {place}"
        elif value != made:
            return f"{place} of {value}, where its config makes {made}"
    return None


def _values(module: nn.Module, built: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield names, values and those of `built` that decide a forward, beside the values of weights."""
    for name in {**module._parameters, **built._parameters}:
        weights = (part._parameters.get(name) for part in (module, built))
        shape, own = (None if weight is None else tuple(weight.shape) for weight in weights)
        yield f"{name}.shape", shape, own
    for name, value in vars(module).items():
        is_compared = isinstance(value, _PLAIN) and not name.startswith("_") and "dropout" not in name
        if is_compared and name not in _WITHOUT_EFFECT:
            yield name, value, getattr(built, name, value)
    kinds = str(getattr(module, "rope_type", ""))
    is_changing = any(kind in kinds for kind in _CHANGING)
    for name in module._non_persistent_buffers_set:
        value, made = module._buffers.get(name), built._buffers.get(name)
        is_known = isinstance(value, Tensor) and isinstance(made, Tensor) and not value.is_meta
        if is_known and not (is_changing and name.endswith("inv_freq")):
            yield name, value, made
