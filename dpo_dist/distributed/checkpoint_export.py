"""Write checkpoints as the model folder that training would have written at their step; in one process."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dpo_dist.atomic import collect_abandoned, final_name, staged_folder, temporary_folder
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import AttentionBackend, RunConfig
from dpo_dist.data.arrangement import Arrangement
from dpo_dist.data.tokenization.chat_template import with_chosen_template
from dpo_dist.distributed.checkpoint_manifest import check_sealed
from dpo_dist.distributed.export_sources import (
    average_weight,
    member_adapter,
    open_source,
    weight_shapes,
)
from dpo_dist.errors import ConfigError
from dpo_dist.model.adapter_files import start_folder, tokenizer_folder, untrained_parts
from dpo_dist.model.adapter_weights import AdapterWeights, stack, write_adapter
from dpo_dist.model.adapters import add_adapter
from dpo_dist.model.description import read_description
from dpo_dist.model.folder import description_folder, model_folder
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import TORCH_DTYPES, load_config, load_tokenizer
from dpo_dist.model.merge import average_saved, names_in_model, read_named, write_merged
from dpo_dist.model.save import read_tokenizer, write_card, write_tokenizer, write_weights, writing_errors
from dpo_dist.model.saved_modules import shared_weights

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
