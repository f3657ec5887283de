"""Modules that are trained in full beside an adapter: `modules_to_save` of peft.

The trained module is a copy beside the frozen original. Embeddings and an output layer that share their
weight in the base share it in the copies too, unless an adapter comes with two different ones.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from dpo_dist.config.spelling import suggestion
from dpo_dist.errors import ConfigError
from dpo_dist.model.adapter_weights import AdapterWeights

KEY = "model.adapter.modules_to_save"


def inject_adapter(causal_lm: Any, lora: LoraConfig, name: str) -> None:
    """Add an adapter to a transformers model and make it the one that its low-rank layers train.

    `add_adapter` of transformers fails if another adapter has modules in full that this one has not.
    """
    causal_lm._hf_peft_config_loaded = True
    with warnings.catch_warnings():
        # Of embeddings and output layer that share a weight, which `prepare_copies` sees to.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        inject_adapter_in_model(lora, causal_lm, name)
    for module in causal_lm.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(name)


def saved_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Return the modules of which there are copies, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    }


def find_modules(causal_lm: Any, wanted: list[str]) -> list[str]:
    """Return the whole names of the modules that `wanted` names by the last parts of their names.

    Args:
        causal_lm: without an adapter, sharded or not; its tensors are not used.
        wanted: as in `model.adapter.modules_to_save`.

    Raises:
        ConfigError: a name is of no module that can be trained in full, or of one of two that share a weight.
    """
    if not wanted:
        return []
    plain = {name: module for name, module in causal_lm.named_modules() if _has_plain_weights(module)}
    found: set[str] = set()
    for one in wanted:
        matching = {name for name in plain if name == one or name.endswith(f".{one}")}
        if not matching:
            short = sorted({name.rpartition(".")[2] for name in plain})
            raise ConfigError(
                "a module to train in full is not one of this model",
                where=KEY,
                got=one,
                expected=", ".join(short),
                remedy=f"{suggestion(one, short)}name modules that have unquantized weights of their own",
            )
        found |= matching
    if len(shared := _shared_pair(causal_lm)) == 2 and len(found & set(shared)) == 1:
        raise ConfigError(
            "two modules of this model share their weight, and only one of them is to be trained in full",
            where=KEY,
            got=", ".join(wanted),
            expected=" and ".join(shared),
            remedy=f"name both in {KEY}, or neither: they stay one weight",
        )
    return [name for name in plain if name in found]


def _has_plain_weights(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    is_leaf = next(module.children(), None) is None
    return is_leaf and bool(own) and all(weight.is_floating_point() for weight in own)


def _shared_pair(causal_lm: Any) -> tuple[str, ...]:
    """Return the names of embeddings and output layer if they are one weight in the base, else none."""
    pair = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    first, second = (getattr(_original(module), "weight", None) for module in pair)
    if first is None or first is not second:
        return ()
    names = {module: name for name, module in causal_lm.named_modules()}
    return tuple(names[module] for module in pair)


def shared_weights(causal_lm: Any) -> tuple[str, ...]:
    """Return the names of the weights of embeddings and output layer if they are one weight, else none."""
    return tuple(f"{name}.weight" for name in _shared_pair(causal_lm))


def _original(module: Any) -> Any:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


@torch.no_grad()
def prepare_copies(causal_lm: Any, trained: str, start: str, folder: Path | None) -> None:
    """Let the trained copies begin as those of the start, and share what the base shares.

    Args:
        causal_lm: with its adapters, before it is in an engine.
        trained: name of the trained adapter; only its copies require a gradient.
        start: name of the frozen adapter that is the policy's start.
        folder: of that adapter; None: the policy starts as the base.
    """
    wrappers = saved_modules(causal_lm)
    for wrapper in wrappers.values():
        copies = wrapper.modules_to_save
        if trained in copies and start in copies:
            copies[trained].load_state_dict(copies[start].state_dict())
        for name, module in copies.items():
            module.requires_grad_(name == trained)
    shared = _shared_pair(causal_lm) if wrappers else ()
    pair = [wrappers[name].modules_to_save for name in shared if name in wrappers]
    if all(trained in copies for copies in pair) and (folder is None or _are_equal(folder, shared)):
        for copies in pair[1:]:
            copies[trained].weight = pair[0][trained].weight


def _are_equal(folder: Path, modules: tuple[str, ...]) -> bool:
    """Return whether an adapter folder has no two different weights of these modules."""
    saved = AdapterWeights.of_folder(folder)
    tables = [saved.read(name) for module in modules if (name := f"{module}.weight") in saved.names]
    return all(torch.equal(tables[0], other) for other in tables[1:])


def trained_aliases(causal_lm: Any) -> dict[str, str]:
    """Return further names of trained weights that have several, with the first name of each."""
    first: dict[nn.Parameter, str] = {}
    aliases: dict[str, str] = {}
    for name, weight in causal_lm.named_parameters(remove_duplicate=False):
        if weight.requires_grad and first.setdefault(weight, name) != name:
            aliases[name] = first[weight]
    return aliases
