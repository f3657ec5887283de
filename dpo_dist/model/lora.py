"""LoRA adapters on linear layers and stacked experts of a loaded model (arXiv:2106.09685), by peft.

peft is imported inside of functions: it imports bitsandbytes, which takes as long as torch, and most models
have no adapter.
"""

import sys
import warnings
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_dist.config.schema import AdapterConfig, AdapterVariant, ModelConfig
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.remedies import to_write
from dpo_dist.model.architectures import SCORE
from dpo_dist.model.experts import compute_adapted
from dpo_dist.model.files.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MERGE,
    PEFT_PREFIX,
    is_repeated,
    modules_on_disk,
)
from dpo_dist.model.flops import stacked_experts
from dpo_dist.model.layers import (
    gives_scores,
    image_modules,
    image_weights,
    outermost,
    output_layer,
    partly_used_blocks,
    text_part,
    without_gradient,
)
from dpo_dist.model.library_internals import (
    adapter_state,
    mark_as_adapted,
    set_adapter_state,
    shards_loading,
    whole_shape,
)
from dpo_dist.model.packed import PackedCausalLM

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

TRAINED = "default"
"""The name of the trained adapter in a model."""
_START = "start"
_KEY = "model.adapter.path"
_SAVED_KEY = "model.adapter.modules_to_save"
_ALL_LINEAR = "all-linear"
_EXPERT_PROJECTIONS = ("down_proj", "gate_proj", "up_proj")


def add_adapter(model: PackedCausalLM, config: ModelConfig, seed: int, start: Path | None = None) -> None:
    """Freeze `model` and add the adapter of `config`, which does not change log-probs before training.

    Call this before DeepSpeed wraps the model. The adapter has the same values on every rank and for every
    kind of parallelism. `start` is the folder of an adapter to continue: a frozen copy of it stays in the
    model, so that `adapter_off` can compute the policy's start.
    """
    adapter = config.adapter
    causal_lm = model.causal_lm
    assert adapter is not None
    if start is None:
        lora = _add_new(causal_lm, adapter, seed)
    else:
        add_saved(causal_lm, start, _START, _KEY)
        lora = add_saved(causal_lm, start, TRAINED, _KEY)
    lora.inference_mode = False
    _prepare_copies(causal_lm, start)
    _activate(model, TRAINED)
    if shards_loading() or partly_used_blocks(causal_lm):
        # ZeRO-3 reduces the gradients of a leaf once the leaf's input has a gradient; if the input needed
        # none, ZeRO-3 would reduce the gradients before they are computed.
        # Not transformers' own method: it would also make frozen towers keep their activations.
        causal_lm.get_input_embeddings().register_forward_hook(
            lambda _module, _, out: out.requires_grad_(True)
        )
    local = Path(config.path).expanduser()
    lora.base_model_name_or_path = str(local.resolve()) if local.is_dir() else config.path
    lora.revision = config.revision
    # Sets, whose order would differ between starts; a string is a pattern; for experts alone there are none.
    if lora.target_modules is not None and not isinstance(lora.target_modules, str):
        lora.target_modules = sorted(lora.target_modules)
    lora.target_parameters = sorted(lora.target_parameters or []) or None


def load_adapter(model: PackedCausalLM, folder: Path, key: str = "evaluation.model") -> None:
    """Add the LoRA adapter in `folder`, written by training or peft, to its base for scoring."""
    add_saved(model.causal_lm, folder, TRAINED, key)


def _add_new(causal_lm: Any, adapter: AdapterConfig, seed: int) -> "LoraConfig":
    from peft import LoraConfig  # noqa: PLC0415

    targets = target_layers(causal_lm, adapter)
    experts = target_experts(causal_lm, adapter)
    if experts and adapter.variant is AdapterVariant.dora:
        raise ConfigError(
            "peft has no DoRA for stacked experts",
            where="model.adapter.variant",
            got=f"dora, with {', '.join(_last_parts(experts))} in model.adapter.target_modules",
            remedy="set model.adapter.variant=lora, or name no experts",
        )
    has_scores = gives_scores(causal_lm)
    in_full = find_modules(causal_lm, adapter.modules_to_save or [])
    if has_scores and SCORE not in in_full:  # it starts at random
        in_full.append(SCORE)
    lora = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.variant is AdapterVariant.rslora,
        use_dora=adapter.variant is AdapterVariant.dora,
        target_modules=targets,
        target_parameters=experts or None,
        modules_to_save=in_full or None,
        init_lora_weights=True,
        task_type="SEQ_CLS" if has_scores else "CAUSAL_LM",
    )
    fault = ""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        try:
            _inject(causal_lm, lora, TRAINED)
        except ValueError as error:  # `out_proj` in state-space models: their kernels would skip an adapter
            fault = first_line(error)
    adapted = set(map(_unwrapped, _adapted_names(causal_lm)))
    # If experts were linear layers before transformers 5, peft reads `gate_proj` as a name of fused experts.
    differing = adapted ^ {*targets, *(name.rpartition(".")[0] for name in experts)}
    if fault or differing:
        refused = _last_parts(differing)
        if fault:  # peft stopped at the first layer, so that those behind it differ, too
            refused = ["out_proj"] if "out_proj" in fault else list(_EXPERT_PROJECTIONS)
        names = [name for name in _last_parts(targets) if name not in refused]
        names += [target for target in _targets(adapter) if _with_ending(experts, target)]
        remedy = "name other layers"
        if names:
            remedy = to_write(f"model.adapter.target_modules=[{','.join(names)}]", verb="set")
        raise ConfigError(
            "for this architecture, peft would adapt other layers than the named ones",
            where="model.adapter.target_modules",
            got=fault or ", ".join(_last_parts(differing)),
            expected="no fused experts, and no out_proj of a state-space model",
            remedy=remedy,
        )
    return lora


def _unwrapped(name: str) -> str:
    """Return the name without the wrappers that peft puts around a module, one for each adapted weight."""
    return name.replace(".base_layer", "")


def _adapted_names(causal_lm: Any) -> set[str]:
    adapted = set(adapted_layers(causal_lm))
    return {name for name, module in causal_lm.named_modules() if module in adapted}


def add_saved(causal_lm: Any, folder: Path, name: str, key: str) -> "LoraConfig":
    """Add the adapter in a folder to the model as `name`, and return its peft configuration."""
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict  # noqa: PLC0415

    with _any_fault_as_foreign(causal_lm, folder, key):
        lora = LoraConfig.from_pretrained(folder)
        lora.inference_mode = True
        lora.lora_dropout = 0.0
        lora.init_lora_weights = True
        on_disk, in_full = modules_on_disk(folder)
        if not saved_modules(causal_lm):  # else the first adapter from this folder was checked
            find_modules(causal_lm, in_full)
        if image_modules(causal_lm):  # a pattern for the text model's layers may also match a tower's
            stacks = {_unwrapped(weight.rpartition(".")[0]) for weight in stacked_experts(causal_lm)}
            lora.target_modules = {layer for layer in on_disk if _unwrapped(layer) not in stacks}
        _inject(causal_lm, lora, name)
    # Neither linear layers nor stacks: a router's weights, which peft's own `all-linear` adapts, too.
    on_weights = [layer for layer in adapted_layers(causal_lm) if hasattr(layer, "parameter_name")]
    matrices = [layer for layer in on_weights if not _adapts_stack(layer)]
    if matrices:
        got = f"matrices on the {matrices[0].parameter_name} of {type(matrices[0].get_base_layer()).__name__}"
        raise _foreign_adapter(causal_lm, folder, got, key, MERGE)
    if output_layer(causal_lm) in adapted_layers(causal_lm):
        raise _foreign_adapter(causal_lm, folder, "matrices on the output layer", key, MERGE)
    if next(causal_lm.parameters()).is_meta:  # only its shapes are used
        unknown = sorted(set(on_disk) - _adapted_names(causal_lm))
        if unknown:
            got = f"no linear layers {', '.join(unknown[:3])} ({len(unknown)} in all)"
            raise _foreign_adapter(causal_lm, folder, got, key)
        return lora
    with _any_fault_as_foreign(causal_lm, folder, key):
        # For modules trained in full, peft expects the names that they had before it wrapped them.
        weights = {}
        for entry, weight in load_peft_weights(str(folder), device="cpu").items():
            if not is_repeated(entry):
                expected = entry if ".lora_" in entry else entry.removeprefix(PEFT_PREFIX)
                weights[expected] = weight
        loaded = set_peft_model_state_dict(causal_lm, weights, adapter_name=name)
    unset = []
    for missing in loaded.missing_keys:
        is_of_adapters = ".lora_" in missing or ".modules_to_save." in missing
        if is_of_adapters and f".{name}" in missing:
            unset.append(missing)
    unread = [*loaded.unexpected_keys, *unset]
    if unread:
        raise _foreign_adapter(causal_lm, folder, f"{', '.join(unread[:3])} ({len(unread)} in all)", key)
    return lora


@contextmanager
def _any_fault_as_foreign(causal_lm: Any, folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # peft can raise anything
        reason = " ".join(str(error).split())[:200]  # torch's first line only announces the others
        raise _foreign_adapter(causal_lm, folder, f"{type(error).__name__}: {reason}", key) from error


def _adapts_stack(layer: Any) -> bool:
    return hasattr(layer, "parameter_name") and len(whole_shape(layer.get_param())) == 3


def _foreign_adapter(causal_lm: Any, folder: Path, got: str, key: str, merge: str = "") -> ConfigError:
    remedy = "name the model that the adapter was trained on as its base"
    if text_part(causal_lm) is not causal_lm:
        remedy += (
            "; if that was the text class, name a base whose config.json has this class in architectures; "
        )
        remedy += "if the adapter also has matrices on parts other than text, set model.images.train=none or "
        remedy += "merge it into its base"
    return ConfigError(
        "the adapter cannot be added to the model",
        where=key,
        got=f"{folder}: {got}",
        expected=f"a LoRA adapter of {type(causal_lm).__name__}, with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}",
        remedy=merge or remedy,
    )


def _inject(causal_lm: Any, lora: "LoraConfig", name: str) -> None:
    """Add an adapter to a transformers model and activate it in all low-rank layers.

    transformers' `add_adapter` fails if another adapter trains modules in full that this one does not.
    """
    from peft import inject_adapter_in_model  # noqa: PLC0415

    mark_as_adapted(causal_lm)
    with warnings.catch_warnings():
        # `_prepare_copies` handles tied embeddings and output layer, which peft warns about.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        inject_adapter_in_model(lora, causal_lm, name)
    for layer in adapted_layers(causal_lm):
        layer.set_adapter(name)
    compute_adapted(causal_lm)


def _short_name(weight: str) -> str:
    """Return the name of a weight of experts by which a target means no linear layer: `experts.down_proj`."""
    return ".".join(weight.split(".")[-2:])


def experts_note(causal_lm: Any, adapter: AdapterConfig | None) -> list[str]:
    """Return a line that says how experts get an adapter, if they could have one but have none."""
    experts = dict.fromkeys(map(_short_name, stacked_experts(causal_lm)))
    if adapter is None or not experts or any(map(_adapts_stack, adapted_layers(causal_lm))):
        return []
    targets = ",".join([*_targets(adapter), *experts])
    return [
        "experts of the mixture are frozen and have no adapter; they get one by "
        f"model.adapter.target_modules=[{targets}]"
    ]


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _targets(adapter: AdapterConfig) -> list[str]:
    return adapter.target_modules if isinstance(adapter.target_modules, list) else [_ALL_LINEAR]


def target_layers(causal_lm: Any, adapter: AdapterConfig) -> list[str]:
    """Return the names of the layers that get `adapter`.

    As in peft, a target is the last part of a layer's name or several parts: `q_proj`, `self_attn.q_proj`.
    Layers of parts for images get matrices only if a target means no other layer.
    """
    head = output_layer(causal_lm)
    for_images = image_modules(causal_lm)
    unmoved = without_gradient(causal_lm) - image_weights(causal_lm)
    in_full = find_modules(causal_lm, adapter.modules_to_save or [])
    layers = []
    for name, module in causal_lm.named_modules():
        if not _is_linear(module) or module is head:
            continue
        is_in_full = any(f"{name}.".startswith(f"{outer}.") for outer in in_full)
        if module.weight not in unmoved and not is_in_full:
            layers.append(name)
    targets = _targets(adapter)
    experts = stacked_experts(causal_lm)
    for target in targets:
        if target != _ALL_LINEAR and not _with_ending([*layers, *experts], target):
            names = [_ALL_LINEAR, *_last_parts(layers), *dict.fromkeys(map(_short_name, experts))]
            raise ConfigError(
                "an adapter's target is not a linear layer of this model, nor stacked experts",
                where="model.adapter.target_modules",
                got=target,
                expected=f"a list of {', '.join(names)}",
                remedy="name existing layers; modules_to_save trains embeddings and output layer in full",
            )
    selected: set[str] = set()
    for target in targets:
        selected |= {*_first_of_text(layers, target, for_images)}
    if _ALL_LINEAR in targets:
        selected |= {name for name in layers if name not in for_images}
    return [name for name in layers if name in selected]


def target_experts(causal_lm: Any, adapter: AdapterConfig) -> list[str]:
    """Return the names of the stacked experts' weights that get `adapter`: none by default.

    A target such as `down_proj` means linear layers, and experts if there are no such layers; more parts of a
    name, as in `experts.down_proj`, tell them apart.
    """
    linear = [name for name, module in causal_lm.named_modules() if _is_linear(module)]
    stacks = stacked_experts(causal_lm)
    selected: set[str] = set()
    for target in _targets(adapter):
        if not _with_ending(linear, target):
            selected.update(_with_ending(stacks, target))
    return [name for name in stacks if name in selected]


def _first_of_text(names: Iterable[str], ending: str, for_images: Container[str]) -> list[str]:
    """Return the names that end with `ending`: the text model's, else those of image parts."""
    matches = _with_ending(names, ending)
    return [name for name in matches if name not in for_images] or matches


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module computes as a linear layer; some routers derive from `nn.Linear`."""
    kind = type(module)
    derived = kind.forward.__module__.startswith("transformers.models.") and kind.__name__ != "FalconLinear"
    return isinstance(module, nn.Linear | Conv1D) and not derived


def _with_ending(names: Iterable[str], ending: str) -> list[str]:
    """Return the names whose last parts are `ending`."""
    return [name for name in names if f".{name}".endswith(f".{ending}")]


def find_modules(causal_lm: Any, endings: list[str]) -> list[str]:
    """Return the full names of the modules whose names end with one of `endings`.

    They have no modules inside, except those of parts for images, such as a projector.
    """
    if not endings:
        return []
    plain = []
    for_images = image_modules(causal_lm)
    for name, module in causal_lm.named_modules():
        is_whole = name in for_images and not isinstance(module, nn.ModuleList)
        weights = list(module.parameters(recurse=is_whole))
        is_leaf = is_whole or next(module.children(), None) is None
        if is_leaf and weights and all(weight.is_floating_point() for weight in weights):
            plain.append(name)
    for ending in endings:
        if not _with_ending(plain, ending):
            raise ConfigError(
                "this model has no such module to train in full",
                where=_SAVED_KEY,
                got=ending,
                expected=", ".join(_last_parts(plain)),
                remedy="name modules that have unquantized weights of their own",
            )
    selected: set[str] = set()
    for ending in endings:
        selected |= {*_first_of_text(plain, ending, for_images)}
    names = outermost([name for name in plain if name in selected])
    shared = tied_pair(causal_lm)
    if len(shared) == 2 and len(set(names) & set(shared)) == 1:
        raise ConfigError(
            "two modules of this model share a weight, and only one of them is named for training in full",
            where=_SAVED_KEY,
            got=", ".join(endings),
            expected=" and ".join(shared),
            remedy=f"name both in {_SAVED_KEY}, or neither, so that they stay one weight",
        )
    return names


def tied_pair(causal_lm: Any) -> tuple[str, ...]:
    """Return the names of embeddings and output layer if the base ties them, else an empty tuple."""
    pair = causal_lm.get_input_embeddings(), output_layer(causal_lm)
    wrappers = saved_modules(causal_lm).values()
    bases = (layer.original_module if layer in wrappers else layer for layer in pair)
    first, second = (getattr(base, "weight", None) for base in bases)
    if first is None or first is not second:
        return ()
    names = {module: name for name, module in causal_lm.named_modules()}
    return tuple(names[module] for module in pair)


def adapted_layers(model: nn.Module) -> "list[LoraLayer]":
    """Return the layers that have an adapter."""
    if "peft" not in sys.modules:  # then no layer is peft's
        return []
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def active_adapters(layers: "Iterable[LoraLayer]") -> frozenset[str]:
    """Return the names of the adapters that a forward uses in `layers` (see `adapted_layers`)."""
    names: set[str] = set()
    for layer in layers:
        if not layer.disable_adapters:
            names |= {*layer.active_adapters}
    return frozenset(names)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Make `model` compute the policy's start inside the block: the base, or a continued adapter."""
    former = [(layer, adapter_state(layer)) for layer, _ in _switchable(model)]
    _activate(model, _START)
    try:
        yield
    finally:
        for layer, state in former:
            set_adapter_state(layer, state)


def _activate(model: nn.Module, name: str) -> None:
    """Make every layer use the adapter `name`, or no adapter if the layer lacks this one."""
    for layer, adapters in _switchable(model):
        if name in adapters:
            set_adapter_state(layer, ([name], False))
        else:
            active, _ = adapter_state(layer)
            set_adapter_state(layer, (active, True))


def _switchable(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """Return the modules whose adapters can be switched, each with its adapters' names."""
    switchable: list[tuple[Any, list[str]]] = [(layer, list(layer.lora_A)) for layer in adapted_layers(model)]
    return switchable + [
        (wrapper, list(wrapper.modules_to_save)) for wrapper in saved_modules(model).values()
    ]


def saved_modules(model: nn.Module) -> "dict[str, ModulesToSaveWrapper]":
    """Return the modules that have trained copies, by name."""
    from peft.utils import ModulesToSaveWrapper  # noqa: PLC0415

    return {
        name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    }


@torch.no_grad()
def _prepare_copies(causal_lm: Any, start: Path | None) -> None:
    """Initialize the trained copies from the adapter in `start`, and tie the copies that the base ties."""
    wrappers = saved_modules(causal_lm)
    for wrapper in wrappers.values():
        copies = wrapper.modules_to_save
        if TRAINED in copies and _START in copies:
            copies[TRAINED].load_state_dict(copies[_START].state_dict())
        for name, module in copies.items():
            module.requires_grad_(name == TRAINED)
    shared = tied_pair(causal_lm) if wrappers else ()
    pair = [wrappers[name].modules_to_save for name in shared if name in wrappers]
    # Copies that differ in the start's file stay apart. The file is read, as the model's may be
    # sharded.
    weights = {} if start is None else load_file(start / ADAPTER_WEIGHTS)
    names = [f"{PEFT_PREFIX}{module}.weight" for module in shared]
    started = [weights[name] for name in names if name in weights]
    if all(TRAINED in copies for copies in pair) and all(torch.equal(started[0], other) for other in started):
        for copies in pair[1:]:
            copies[TRAINED].weight = pair[0][TRAINED].weight
