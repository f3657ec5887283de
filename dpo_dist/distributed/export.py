"""Write checkpoints as the model folder that training would have written at their step; in one process."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.run_folder import RunFolder, is_checkpoint
from dpo_dist.config.schema import AttentionBackend, RunConfig
from dpo_dist.config.verb_options import ExportedWeights
from dpo_dist.data.template import with_chosen_template
from dpo_dist.distributed.checkpoint_files import check_shapes, read_weights
from dpo_dist.distributed.manifest import check_sealed, damaged_checkpoint, find_faults
from dpo_dist.distributed.slices import EMA, WEIGHT
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import collect_abandoned, final_name, staged_folder, temporary_folder
from dpo_dist.model.adapter_files import (
    adapted_layers_on_disk,
    other_base,
    start_folder,
    tokenizer_folder,
    untrained_parts,
)
from dpo_dist.model.adapter_weights import AdapterWeights, shared_weights, stack, write_adapter
from dpo_dist.model.folder import (
    check_adapter,
    check_weights,
    description_folder,
    is_adapter,
    local_model_folder,
    model_folder,
    weight_files,
)
from dpo_dist.model.load import TORCH_DTYPES, load_config, load_tokenizer
from dpo_dist.model.lora import add_adapter
from dpo_dist.model.merge import average_saved, names_in_model, read_named, write_merged
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.save import (
    read_description,
    read_tokenizer,
    trained_update,
    write_card,
    write_tokenizer,
    write_weights,
    writing_errors,
)

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


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Members = Sequence[tuple[float, AdapterWeights]]


@dataclass(frozen=True)
class Exported:
    """A written folder before it gets its name.

    Attributes:
        folder: as it is on disk.
        base: folder of the model that training started from.
        adapters: the written adapters with their coefficients; empty: all weights were trained.
        read: returns a trained weight by transformers name in float32, before it was rounded.
    """

    folder: Path
    base: Path
    adapters: Members
    read: Callable[[str], Tensor]


def export_checkpoint(checkpoint: Path, folder: Path, config: RunConfig) -> None:
    """Write a checkpoint as `export_models` does, by itself."""
    export_models([checkpoint], folder, config)


def export_models(
    sources: Sequence[Path],
    folder: Path,
    config: RunConfig,
    card: Callable[[], str] | None = None,
    check: Callable[[Exported], None] | None = None,
    *,
    replaces: bool = True,
) -> None:
    """Write the trained weights of a checkpoint, or an average, as a model or adapter folder, whole or not.

    Needs no GPU, no other process, and weights of the base only if an adapter is merged or the architecture
    has tensors that are not trained. Memory is that of
    a few float32 weights and of one file of the model (5 GB); `folder`'s disk needs room for the weights
    twice for a while.

    Args:
        sources: a checkpoint of any number of processes and kind of parallelism; or the members of an
            average, also folders of models or adapters.
        folder: its final name.
        config: of the run; `config.export` says how.
        card: returns the content of README.md; None or "": there is none.
        check: called with the folder before it gets its name; an error removes it.
        replaces: whether a folder of this name, which another process has made meanwhile, is replaced.

    Raises:
        CheckpointError: a checkpoint is damaged or of another model, or the folder cannot be written.
        ConfigError: the base model cannot be read, or sources do not go together.
    """
    base = description_folder(config.model.path, config.model.revision, needs_weights=False)
    start = start_folder(config.model)
    causal_lm = _without_weights(base, start, config)
    files, tokenizer = trained_tokenizer(base, start, config)
    trained = _open_trained(sources, causal_lm, start, config)
    with writing_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        collect_abandoned(folder.parent)  # of exports that were killed
    with writing_errors(folder), staged_folder(folder, replaces=replaces) as temporary:
        _write_trained(temporary, trained, causal_lm, base, config)
        is_chosen = config.data.chat_template is not None
        write_tokenizer(temporary, tokenizer, None if is_chosen else read_tokenizer(files))
        write_card(temporary, card)
        if check is not None:
            check(Exported(temporary, base, trained.adapters, trained.read))


def trained_tokenizer(
    base: Path, start: Path | None, config: RunConfig
) -> tuple[Path, PreTrainedTokenizerBase]:
    """Return the folder of the tokenizer of a run, and the tokenizer with the run's chat template.

    Args:
        base: of the model.
        start: from `start_folder`.
        config: of the run.
    """
    files = tokenizer_folder(base, start)
    tokenizer = load_tokenizer(files, config.model)
    if config.data.chat_template is not None:
        tokenizer = with_chosen_template(tokenizer, config.data.chat_template)
    return files, tokenizer


@dataclass(frozen=True)
class _Trained:
    """Trained weights of the sources: adapters with their coefficients, or whole weights, averaged."""

    adapters: Members
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def _open_trained(sources: Sequence[Path], causal_lm: Any, start: Path | None, config: RunConfig) -> _Trained:
    opened = [open_source(source, causal_lm, config) for source in sources]
    given = config.export.average_weights or [1.0] * len(sources)
    coefficients = [weight / sum(given) for weight in given]
    if config.model.adapter is None:
        shapes, members = weight_shapes(opened, causal_lm), list(zip(coefficients, opened, strict=True))
        return _Trained((), shapes, partial(average_weight, members))
    adapter, adapters = config.model.adapter, []
    for folder, source in zip(sources, opened, strict=True):
        initial = RunFolder(folder.resolve().parents[1]).initial_adapter
        check_sealed(initial)
        parts = [] if source.is_adapter else untrained_parts(adapter, start, initial)
        others = [(share, AdapterWeights.of_folder(part)) for share, part in parts]
        adapters.append(member_adapter(source, causal_lm, others))
    return _Trained(list(zip(coefficients, adapters, strict=True)), {}, _no_weight)


def _write_trained(folder: Path, trained: _Trained, causal_lm: Any, base: Path, config: RunConfig) -> None:
    """Write weights and configuration as `config.export` says."""
    named = None if config.export.dtype is None else _DTYPES[config.export.dtype]
    dtype = named or TORCH_DTYPES[config.model.dtype]
    if not trained.adapters:
        with _on_disk(trained.shapes, trained.read, dtype, folder) as weights:
            others = _untrained(causal_lm, config)
            write_weights(folder, causal_lm, weights | others, read_description(base))
    elif config.export.merge:
        whole = model_folder(config.model.path, config.model.revision)
        plain, has_modules = _plain(base, config), any(member.saved for _, member in trained.adapters)
        write_merged(
            folder,
            whole,
            trained.adapters,
            names_in_model(plain),
            named,
            shared_weights(plain) if has_modules else (),
            {name for name, _ in plain.named_buffers()},  # such as the biases of DeepSeek's routers
        )
    else:
        _write_update(folder, trained.adapters, dtype)


def _untrained(causal_lm: Any, config: RunConfig) -> dict[str, Tensor]:
    """Return buffers and weights that the architecture does not train, which are as in the base's files."""
    frozen = {name for name, weight in causal_lm.named_parameters() if not weight.requires_grad}
    buffers = dict(causal_lm.named_buffers()).keys() & causal_lm.state_dict().keys()
    if not (wanted := frozen | buffers):
        return {}
    base = model_folder(config.model.path, config.model.revision)
    return read_named(base, wanted, names_in_model(causal_lm))


def _no_weight(name: str) -> Tensor:
    raise KeyError(name)


def _write_update(folder: Path, members: Members, dtype: torch.dtype) -> None:
    """Write an adapter, or several as one, without their base."""
    if len(members) == 1:
        (_, only), *_ = members
        config, weights = only.config, {name: only.read(name) for name in sorted(only.names)}
    elif any(member.config.use_dora for _, member in members):
        raise ConfigError(
            "an average of DoRA adapters is no adapter: each scales the weights that it changes",
            where="export.average, export.merge",
            got=f"{len(members)} adapters, false",
            remedy="set export.merge=true: the merged models are averaged",
        )
    else:
        config, weights = stack(members)
        weights |= average_saved(members)
    write_adapter(folder, config, {name: weight.to(dtype) for name, weight in weights.items()})


def _without_weights(base: Path, start: Path | None, config: RunConfig) -> Any:
    """Return the transformers model of the run, with its adapter if it has one, on the meta device."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            load_config(base, config.model),
            dtype=TORCH_DTYPES[config.model.dtype],
            trust_remote_code=config.model.trust_remote_code,
        )
        packed = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
        if config.model.adapter is not None:
            add_adapter(packed, config.model, config.trainer.seed, start)
    return packed.causal_lm


def _plain(base: Path, config: RunConfig) -> Any:
    """Return the transformers model of the run without its adapter, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            load_config(base, config.model), trust_remote_code=config.model.trust_remote_code
        )


@contextlib.contextmanager
def _on_disk(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], dtype: torch.dtype, folder: Path
) -> Iterator[dict[str, Tensor]]:
    """Yield the named weights in `dtype`, mapped from temporary files beside `folder`, which is temporary."""
    with temporary_folder(final_name(folder)) as temporary:  # `collect_abandoned` knows this form of name
        weights = {}
        for number, name in enumerate(shapes):
            file = temporary / str(number)
            weights[name] = _mapped(read(name).to(dtype), file)
        yield weights
        weights.clear()  # some file systems keep the files of mapped tensors


def _mapped(tensor: Tensor, file: Path) -> Tensor:
    """Write `tensor` to `file` and return it mapped from there: its memory can be taken back at any time."""
    file.write_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)  # tofile hides a full disk
    return torch.from_file(str(file), shared=False, size=tensor.numel(), dtype=tensor.dtype).view(
        tensor.shape
    )
