"""Layers of a model: options by layer, the text part, checkpointing, Liger, blocks of experts."""

import inspect
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_dist.config.keys import to_unset
from dpo_dist.config.schema import FusedLayers, ImagesConfig, ModelConfig, TrainedImageParts
from dpo_dist.foundation.errors import ConfigError, raise_all
from dpo_dist.model.architectures import EXACT_WITH_LIGER, SCORE, is_reward_model
from dpo_dist.model.library_internals import apply_liger, wrap_checkpointing
from dpo_dist.model.numerics import check_precision

# Module classes inside a text decoder that run only with images or sounds.
_NON_TEXT_CLASSES = {
    "MllamaCrossAttentionDecoderLayer",
    "Phi4MultimodalAudioEmbedding",
    "Phi4MultimodalImageEmbedding",
}
# Names of modules between a vision tower and the text model, such as Qwen3-VL's mergers of several layers.
_PROJECTORS = {"multi_modal_projector", "merger", "deepstack_merger_list", "embed_vision", "connector"}
_PROJECTORS |= {"visual_embeddings_table"}


def layer_configs(text: Any) -> Sequence[Any]:
    """Return the configuration of each layer of a text model; a single one if all are equal.

    If a configuration's layers differ (Gemma 4, or `per_layer_config` in config.json), transformers
    refuses to read an option that they do not share.
    """
    layers: Sequence[Any] = text.per_layer_config if text.is_heterogeneous else [text]
    return layers


def layer_values(text: Any, option: str) -> list[Any]:
    """Return the distinct values of an option over a text model's layers, None for layers without it."""
    values = [getattr(layer, option, None) for layer in layer_configs(text)]
    lists = (value if isinstance(value, list) else [value] for value in values)
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def attention_layers(text: Any) -> int:
    """Return how many layers of a text model have attention, whose cost grows with the tokens of a row."""
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return int(text.num_hidden_layers)
    return sum(
        kind == "hybrid" or (kind.endswith("attention") and kind != "linear_attention") for kind in kinds
    )


def text_part(causal_lm: Any) -> Any:
    """Return a transformers model's text decoder; the model itself if it reads only text."""
    config = causal_lm.config
    return causal_lm if config.get_text_config() is config else causal_lm.get_decoder()


def gives_scores(model: Any) -> bool:
    """Return whether a transformers model is a reward model."""
    return is_reward_model([type(model).__name__])


def output_layer(model: Any) -> Any:
    """Return a model's output layer, of a reward model the one of its scores; None if it has none."""
    return getattr(model, SCORE, None) if gives_scores(model) else model.get_output_embeddings()


def weights_of(modules: Iterable[nn.Module], *, recurse: bool = True) -> set[nn.Parameter]:
    """Return the weights of several modules, without `recurse` not those of modules inside them."""
    return set(itertools.chain.from_iterable(module.parameters(recurse) for module in modules))


def other_weights(causal_lm: Any) -> set[nn.Parameter]:
    """Return the weights that text does not use, such as a vision tower's; they get no gradient."""
    unreached = [module for module in causal_lm.modules() if type(module).__name__ in _NON_TEXT_CLASSES]
    text = text_part(causal_lm)
    if text is causal_lm:
        return weights_of(unreached)
    of_text = (text, causal_lm.get_input_embeddings(), output_layer(causal_lm))
    return weights_of(unreached) | (set(causal_lm.parameters()) - weights_of(of_text))


def check_reads_images(causal_lm: Any, key: str) -> None:
    """Check that features of images take the place of tokens of the text model, and can be passed to it."""
    has_token = isinstance(getattr(causal_lm.config, "image_token_id", None), int)
    if has_token and "mm_encoder_outputs" in inspect.signature(causal_lm.forward).parameters:
        return
    reason = "it reads only text"
    others = other_weights(causal_lm)
    if others:
        reason = f"its text model attends to images in layers of its own ({len(others)} weights), or has "
        reason += "no part for them"
    raise ConfigError(
        "this model does not read images in the place of tokens",
        where=f"{key}, model.images",
        got=f"{causal_lm.config.model_type} ({type(causal_lm).__name__}): {reason}",
        expected="a model such as Qwen2.5-VL, Qwen3-VL, Gemma 3, InternVL, LLaVA or Mistral 3",
        remedy=to_unset("model.images") + " to train the model on text, or choose such a model",
    )


# What a model has for images, by these functions:
#   image_parts        whole towers and projectors, which `keep_text` keeps or drops
#   image_modules      these and all modules inside them
#   image_weights      the weights on which features depend: fewer than those of the modules, and a few beside
#   projector_weights  those of `image_weights` that are in no tower
# `other_weights` are all that text does not use, such as those for sounds, too.


def image_parts(causal_lm: Any) -> dict[str, nn.Module]:
    """Return the vision towers and projectors that a model has in memory, by name."""
    if text_part(causal_lm) is causal_lm:
        return {}
    others = other_weights(causal_lm)
    depth = int(causal_lm.base_model is not causal_lm)
    parts = {}
    for name, module in causal_lm.named_modules():
        if name.count(".") <= depth and "audio" not in name:
            weights = set(module.parameters())
            if weights and weights <= others:
                parts[name] = module
    return parts


def image_modules(causal_lm: Any) -> dict[str, nn.Module]:
    """Return `image_parts` and all modules inside them, by name."""
    modules: dict[str, nn.Module] = {}
    for name, part in image_parts(causal_lm).items():
        modules |= part.named_modules(prefix=name)
    return modules


def image_weights(causal_lm: Any) -> set[nn.Parameter]:
    """Return the weights on which features of images depend; not a tower's pooling head, for example.

    They are in `image_parts` or beside them, such as what LLaVA puts between lines.
    """
    modules = image_modules(causal_lm)
    if not modules:
        return set()
    beside = weights_of([causal_lm.base_model], recurse=False) & other_weights(causal_lm)
    inside = weights_of(modules.values(), recurse=False)
    for name, module in modules.items():
        inside.difference_update(_unread(causal_lm.config, name, module))
    return beside | inside


def projector_weights(causal_lm: Any) -> set[nn.Parameter]:
    """Return the weights between towers and the text model; empty if they have no known name."""
    modules = image_modules(causal_lm)
    projectors = [module for name, module in modules.items() if name.rpartition(".")[2] in _PROJECTORS]
    if not projectors:
        return set()
    in_parts = weights_of(modules.values(), recurse=False)
    return image_weights(causal_lm) - in_parts | weights_of(projectors)


def _trained_for_images(causal_lm: Any, train: TrainedImageParts) -> set[nn.Parameter]:
    """Return the weights that `model.images.train` names."""
    if train is not TrainedImageParts.projector:
        return image_weights(causal_lm) if train is TrainedImageParts.tower else set()
    weights = projector_weights(causal_lm)
    if not weights:
        raise ConfigError(
            "this model has no projector of a known name",
            where="model.images.train",
            got=f"projector, of a model with {', '.join(image_parts(causal_lm))}",
            expected=", ".join(sorted(_PROJECTORS)),
            remedy="set model.images.train=none or tower",
        )
    return weights


def _unread(config: Any, name: str, module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of a tower's module if features come from before it: pooling heads, last layers."""
    last = name.rpartition(".")[2]
    layer = getattr(config, "vision_feature_layer", None)  # an index; hidden state 0 is before layer 0
    is_after = last == "head" or (last == "post_layernorm" and layer is not None)
    if is_after:
        yield from module.parameters()
    elif isinstance(module, nn.ModuleList) and last in ("layer", "layers") and layer is not None:
        states = len(module) + 1
        chosen = layer if isinstance(layer, list) else [layer]
        for unused in module[max(index % states for index in chosen) :]:
            yield from unused.parameters()


def keep_text(causal_lm: Any, images: ImagesConfig | None = None, *, drops: bool = True) -> None:
    """Freeze the weights that text does not use; drop modules with only such weights, such as towers.

    With `images`, the parts for images stay, and those that it names are trained.
    """
    others = other_weights(causal_lm)
    trained = set() if images is None else _trained_for_images(causal_lm, images.train)
    for weight in others - trained:
        weight.requires_grad_(False)
    if not drops or text_part(causal_lm) is causal_lm:
        return
    parts_to_keep = set() if images is None else {*image_parts(causal_lm).values()}
    for parent in (causal_lm, causal_lm.base_model):
        for name, child in list(parent.named_children()):
            weights = set(child.parameters())
            if weights and weights <= others and child not in parts_to_keep:
                setattr(parent, name, None)


def text_notes(causal_lm: Any) -> list[str]:
    """Return lines that name the parts that `keep_text` dropped, and those for images that it kept."""
    parts = {causal_lm, causal_lm.base_model}
    notes = list[str]()
    dropped = []
    for part in parts:
        dropped += [name for name, child in part._modules.items() if child is None]
    of_images = image_parts(causal_lm)
    if of_images:
        weights = image_weights(causal_lm)
        number = sum(w.numel() for w in weights if w.requires_grad)
        total = sum(map(torch.numel, weights))
        names = ", ".join(sorted(name.rpartition(".")[2] for name in of_images))
        notes.append(f"images are read by {names}: {number:,} of {total:,} weights are trained")
    if dropped:
        note = "the model also reads images or sounds: only its text part is scored or trained; "
        if of_images:
            note = "the model also reads sounds, which the data do not have; "
        note += "the other parts are not in memory, and the result has them as in the model's files"
        notes.append(f"{note}: {', '.join(sorted(dropped))}")
    return notes


def without_gradient(causal_lm: Any) -> set[nn.Parameter]:
    """Return the weights that get no gradient: those of indexers, and of parts for images that are frozen.

    Weights for images that an adapter trains count as frozen, too.
    """
    trained = {weight for weight in image_weights(causal_lm) if weight.requires_grad}
    # These choose which keys a query attends to (DeepSeek-V3.2, arXiv 2512.02556).
    indexers = [module for name, module in causal_lm.named_modules() if name.rpartition(".")[2] == "indexer"]
    return weights_of(indexers) | (other_weights(causal_lm) - trained)


def decoder_layers(causal_lm: Any) -> list[nn.Module]:
    """Return the text decoder's layers in order: the modules that transformers can checkpoint."""
    modules = text_part(causal_lm).modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(causal_lm: Any, every: int | str) -> None:
    """Make decoder layers keep only their input and recompute their activations in backward.

    `every` is `none`, `full` (every layer), or n: layers n, 2n, and so on, counted from 1.
    """
    if every == "none":
        return
    layers: list[Any] = decoder_layers(causal_lm)
    distance = 1 if every == "full" else int(every)
    if distance > len(layers):
        raise ConfigError(
            "no layer would be checkpointed",
            where="model.gradient_checkpointing",
            got=f"every {distance} layers of a model with {len(layers)} that transformers can checkpoint",
            remedy="set model.gradient_checkpointing=none",
        )
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, layer in enumerate(layers, start=1):
        layer.gradient_checkpointing = number % distance == 0
    for module in image_modules(causal_lm).values():
        if isinstance(module, GradientCheckpointingLayer):  # a frozen layer keeps nothing
            module.gradient_checkpointing = any(weight.requires_grad for weight in module.parameters())


def _suits_liger(config: ModelConfig, text: Any, device: torch.device) -> bool:
    has_own_code = config.trust_remote_code and getattr(text, "auto_map", None)
    if device.type != "cuda" or has_own_code or text.model_type not in EXACT_WITH_LIGER:
        return False
    activations = {getattr(text, name, None) for name in ("hidden_act", "hidden_activation")} - {None}
    return activations == {EXACT_WITH_LIGER[text.model_type]}


def check_device(config: ModelConfig, text: Any, device: torch.device) -> None:
    """Check that the model's options can run on `device`; `text` is the configuration of its text part."""
    check_precision(config.dtype, device)
    on_cuda = device.type == "cuda"
    faults = list[tuple[str, str, str]]()
    if config.fused is FusedLayers.liger and not _suits_liger(config, text, device):
        names = ", ".join(sorted(EXACT_WITH_LIGER))
        where = f"for transformers' own {names}, with their usual activation"
        faults.append(("fused", "none", f"Liger's kernels are exact only on CUDA, {where}"))
    compiler = find_spec("triton") if on_cuda else shutil.which(os.environ.get("CXX", "g++"))
    if config.fused is FusedLayers.compile and compiler is None:
        needed = "Triton" if on_cuda else "a C++ compiler"
        faults.append(("fused", "none", f"torch.compile needs {needed}"))
    if config.activation_offload and not on_cuda:
        faults.append(("activation_offload", "false", "activations are already in host memory"))
    raise_all(
        [
            ConfigError(
                message,
                where=f"model.{key}",
                got=f"{getattr(config, key)} for {text.model_type} on {device.type}",
                remedy=f"set model.{key}={value}",
            )
            for key, value, message in faults
        ]
    )


def choose_fused(config: ModelConfig, text: Any, device: torch.device) -> FusedLayers:
    """Return the fused layers to use on `device`: `model.fused`, or for `auto` Liger's where they are exact.

    `auto` never compiles: compiling takes half a minute at each start and gains no more than Liger.
    """
    if config.fused is not FusedLayers.auto:
        return config.fused
    is_free = not torch.are_deterministic_algorithms_enabled() and find_spec("liger_kernel") is not None
    return FusedLayers.liger if is_free and _suits_liger(config, text, device) else FusedLayers.none


def offload_inputs(causal_lm: nn.Module) -> None:
    """Make checkpointed layers keep their input in host memory; after `checkpoint_layers`."""

    def offloaded(checkpoint: Callable[..., Any], *arguments: Any) -> Any:
        # These hooks see only the arguments that `checkpoint` saves; tensors inside the layer have other
        # hooks.
        with save_on_cpu(pin_memory=True):
            return checkpoint(*arguments)

    for layer in decoder_layers(causal_lm):  # a layer without checkpointing never calls `offloaded`
        wrap_checkpointing(layer, offloaded)


def use_liger(causal_lm: nn.Module) -> None:
    """Replace this model's norms, rotary embedding and gated MLP by Liger's kernels.

    Liger's losses are not used: the log-prob head never computes all logits. The rotary embedding is a
    function that models of one architecture share, so it is replaced for all of them in this process.
    Stacked experts stay transformers' own: for them Liger tries out kernels at every start.
    """
    text = text_part(causal_lm)
    others = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    if text.config.model_type in ("mixtral", "qwen3_moe"):
        others["swiglu"] = False
    apply_liger(text, **others)


def partly_used_blocks(causal_lm: nn.Module) -> list[nn.Module]:
    """Return the modules in which tokens may use only some weights, so that ranks may use different ones.

    Such a module has a list of equal parts inside a layer, such as one module per expert (experts stacked in
    one tensor, as in transformers' own models, are one part), or compresses several tokens into one key, as
    in DeepSeek-V4, where a shorter sequence has no such key. A module that always uses all its parts does no
    harm here: ZeRO-3 gathers its weights at once.
    """
    inside: set[nn.Module] = set()
    for stack in causal_lm.modules():
        if isinstance(stack, nn.ModuleList):
            inside.update(*(layer.modules() for layer in stack))
    inside -= set(decoder_layers(causal_lm))
    names = []
    for name, module in causal_lm.named_modules():
        has_equal_parts = any(map(_is_list_of_equals, module.children()))
        if hasattr(module, "compress_rate") or (has_equal_parts and module in inside):
            names.append(name)
    return list(map(causal_lm.get_submodule, outermost(names)))


def outermost(names: Collection[str]) -> list[str]:
    """Return the names of modules that are not inside another one of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def shared_weights(causal_lm: nn.Module) -> set[nn.Parameter]:
    """Return the weights that several modules have, such as the blocks of Zamba2's layers."""
    places = Counter(weight for _, weight in causal_lm.named_parameters(remove_duplicate=False))
    return {weight for weight, number in places.items() if number > 1}


def _is_list_of_equals(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    is_one_kind = len(set(map(type, module))) == 1
    return is_one_kind and next(module.parameters(), None) is not None


def join_gradients(block: nn.Module) -> None:
    """Make the gradients of all weights in `block` ready at once, with zeros for parts without tokens.

    ZeRO-1 and ZeRO-2 reduce gradients in the order in which they become ready: ranks that use different parts
    would add up gradients of different weights.
    """
    block.forward = partial(_joined, Block(block, block.forward))


class Block(nn.Module):
    """A module that only calls its child, a block."""

    def __init__(self, block: nn.Module, compute: Callable[..., Any]):
        super().__init__()
        self.block = block
        self._compute = compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block's own forward returns."""
        return self._compute(*args, **kwargs)


def _joined(block: Block, *args: Any, **kwargs: Any) -> Any:
    trained = {name: weight for name, weight in block.named_parameters() if weight.requires_grad}
    if not trained or not torch.is_grad_enabled():
        return block(*args, **kwargs)
    aliases = _Aliases.apply(*trained.values())  # type: ignore[no-untyped-call]
    output = functional_call(block, dict(zip(trained, aliases, strict=True)), args, kwargs)
    # So all weights get zeros even if none is used, and inputs a gradient, for which backward hooks wait.
    inputs = [arg for arg in args if isinstance(arg, Tensor)]
    touched = [aliases[0], *(tensor for tensor in inputs if tensor.requires_grad)]
    touch = torch.stack([0.0 * tensor.flatten()[0].float() for tensor in touched]).sum()
    if isinstance(output, tuple):  # with the router's output
        return (output[0] + touch.to(output[0].dtype), *output[1:])
    return output + touch.to(output.dtype)


class _Aliases(torch.autograd.Function):
    """Aliases of weights: backward returns all their gradients at once, zeros for unused weights."""

    @staticmethod
    def forward(_ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        return slopes
