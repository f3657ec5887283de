"""Open the sources of an export: checkpoints, and folders of models or adapters; read weights one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.config.checkpoint_folders import is_checkpoint
from dpo_dist.config.export_schema import ExportedWeights
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint_manifest import damaged_checkpoint, find_faults
from dpo_dist.distributed.checkpoint_weights import check_shapes, read_weights
from dpo_dist.distributed.slices import EMA, WEIGHT
from dpo_dist.errors import ConfigError
from dpo_dist.model.adapter_base import other_base
from dpo_dist.model.adapter_files import adapted_layers_on_disk
from dpo_dist.model.adapter_weights import AdapterWeights
from dpo_dist.model.folder import is_adapter, local_model_folder, weight_files
from dpo_dist.model.load import load_config
from dpo_dist.model.safe_weights import check_adapter
from dpo_dist.model.save import trained_update
from dpo_dist.model.saved_modules import shared_weights
from dpo_dist.model.weights_on_disk import check_weights

_KEY = "export.average"
_PARTS = {ExportedWeights.last: WEIGHT, ExportedWeights.ema: EMA}


@dataclass(frozen=True)
class Source:
    """A checkpoint or a folder.

    Attributes:
        folder: its place.
        is_adapter: whether it is the folder of an adapter.
        shapes: of the weights, by transformers name; of an adapter folder: empty.
        read: returns a weight in host memory.
    """

    folder: Path
    is_adapter: bool
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def open_source(folder: Path, causal_lm: Any, config: RunConfig) -> Source:
    """Return a source, whose files are checked.

    Args:
        folder: a checkpoint, or the folder of a model or an adapter.
        causal_lm: the model of the run, without weights.
        config: of the run.

    Raises:
        CheckpointError: it is a damaged checkpoint.
        ConfigError: it is a whole model beside adapters, an adapter beside whole models, or of another model.
    """
    if is_adapter(folder):
        check_adapter(folder, _KEY)
        adapted_layers_on_disk(folder)
        _check_base(folder, config)
        source = Source(folder, True, {}, _unread)
    elif is_checkpoint(folder) or not (folder / "config.json").is_file():
        if faults := find_faults(folder, 0, 1):
            raise damaged_checkpoint(folder, faults)
        saved = read_weights(folder)
        if _PARTS[config.export.weights] not in saved.parts:
            raise _without_average(folder)
        return Source(folder, False, saved.shapes, partial(saved.whole, part=_PARTS[config.export.weights]))
    elif config.model.adapter is None:
        source = _whole_model(folder, causal_lm, config)
    else:
        source = Source(folder, False, {}, _unread)
    if source.is_adapter is (config.model.adapter is None):
        raise ConfigError(
            "the members of an average are not of one kind",
            where=_KEY,
            got=f"{folder}, {'an adapter' if source.is_adapter else 'a whole model'}",
            expected="adapters on model.path" if config.model.adapter is not None else "whole models",
            remedy="name checkpoints and folders of runs that train the same weights",
        )
    if config.export.weights is ExportedWeights.ema:
        raise _without_average(folder)
    return source


def _without_average(folder: Path) -> ConfigError:
    return ConfigError(
        "only checkpoints of runs with trainer.ema_decay have a moving average of the weights",
        where="export.weights, export.average",
        got=f"ema, {folder}",
        remedy="name such checkpoints, or set export.weights=last",
    )


def _unread(name: str) -> Tensor:
    raise KeyError(name)


def _check_base(folder: Path, config: RunConfig) -> None:
    if other := other_base(folder, config.model):
        raise ConfigError(
            "a member of the average is an adapter of another model",
            where=_KEY,
            got=f"{folder}, trained on {other}",
            expected=f"adapters on {config.model.path}",
            remedy="name adapters on model.path; if both are one model, correct base_model_name_or_path in "
            "adapter_config.json",
        )


def _whole_model(folder: Path, causal_lm: Any, config: RunConfig) -> Source:
    """Return the model in a folder, which must be of the kind and sizes of `causal_lm`."""
    local_model_folder(str(folder), None, _KEY)  # checks that it has weights, in safetensors
    files = weight_files(folder)
    check_weights(files, _KEY)
    kinds = [
        text.get_text_config().model_type for text in (load_config(folder, config.model), causal_lm.config)
    ]
    if kinds[0] != kinds[1]:
        raise _other_model(folder, *kinds)
    source = _files_of(folder, files)
    trained = {name: tuple(weight.shape) for name, weight in causal_lm.named_parameters()}
    if not trained.keys() <= source.shapes.keys():
        source = _loaded(folder, config)
    if other := [name for name, shape in trained.items() if source.shapes.get(name) != shape]:
        raise _other_model(
            folder, f"{other[0]} of {source.shapes.get(other[0])}", f"{other[0]} of {trained[other[0]]}"
        )
    shared = shared_weights(causal_lm)
    for name in shared[1:]:
        if name in source.shapes and not torch.equal(source.read(name), source.read(shared[0])):
            raise _other_model(
                folder, f"{name} of its own", "embeddings and output layer that are one weight"
            )
    return source


def _other_model(folder: Path, got: str, expected: str) -> ConfigError:
    return ConfigError(
        "a member of the average is a model of another kind or of other sizes",
        where=_KEY,
        got=f"{folder}: {got}",
        expected=expected,
        remedy="name models that were trained from the same model as this run's",
    )


def _loaded(folder: Path, config: RunConfig) -> Source:
    """Return a model whose files have other names or parts of weights; it is whole in memory."""
    load = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype="auto", trust_remote_code=config.model.trust_remote_code)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Source(folder, False, shapes, weights.__getitem__)


def _files_of(folder: Path, files: Sequence[Path]) -> Source:
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in files:
        if file.suffix != ".json":
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  (the file is not iterable)
                    shapes[name] = tuple(content.get_slice(name).get_shape())
                    places[name] = file

    def read(name: str) -> Tensor:
        with safe_open(places[name], "pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor

    return Source(folder, False, shapes, read)


def member_adapter(
    source: Source, causal_lm: Any, parts: Sequence[tuple[float, AdapterWeights]]
) -> AdapterWeights:
    """Return the adapter of a source.

    Args:
        source: a checkpoint, or an adapter folder.
        causal_lm: the model of the run with its adapter, without weights.
        parts: of the model beside the trained adapter; an adapter folder contains them already.

    Raises:
        CheckpointError: the checkpoint is of another adapter.
        ConfigError: the adapter folder is of another model.
    """
    if source.is_adapter:
        found = AdapterWeights.of_folder(source.folder)
        _check_layers(found, causal_lm, source.folder)
        return found
    trained = {name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    check_shapes(trained, source.shapes, source.folder)
    config, weights = trained_update(causal_lm, source.shapes, source.read, parts)
    return AdapterWeights(config, frozenset(weights), weights.__getitem__)


def _check_layers(adapter: AdapterWeights, causal_lm: Any, folder: Path) -> None:
    """Check that a model has the layers of an adapter, in their sizes.

    Raises:
        ConfigError: it has not.
    """
    modules = dict(causal_lm.named_modules())
    for layer in adapter.layers:
        module, sizes = modules.get(layer), adapter.sizes(layer)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if weight is None or sorted(weight.shape) != sorted(sizes):
            own = "no such layer" if weight is None else f"a layer of {list(weight.shape)}"
            raise ConfigError(
                "a member of the average is an adapter of another model",
                where=_KEY,
                got=f"{folder} with {layer} of {list(sizes)}",
                expected=f"adapters on model.path, which has {own}",
                remedy="name checkpoints and folders of runs that train the same model",
            )


def weight_shapes(sources: Sequence[Source], causal_lm: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the trained weights, which all sources have.

    Raises:
        CheckpointError: a source lacks one, or has another shape of it.
    """
    trained = {name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    for source in sources:
        check_shapes(trained, source.shapes, source.folder)
    return {name: tuple(weight.shape) for name, weight in trained.items()}


def average_weight(members: Sequence[tuple[float, Source]], name: str) -> Tensor:
    """Return the float32 average of one weight over the sources, which is the weight of an only one."""
    (coefficient, first), *others = members
    weight = first.read(name).float()
    if others:
        weight = coefficient * weight
    for coefficient, source in others:
        weight += coefficient * source.read(name).float()
    return weight
