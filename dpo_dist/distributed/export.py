"""Write a checkpoint as the model folder that training would have written at its step; in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AttentionBackend, RunConfig
from dpo_dist.config.verb_options import ExportedWeights
from dpo_dist.data.template import with_chosen_template
from dpo_dist.distributed.checkpoint import damaged_checkpoint, find_faults, read_weights
from dpo_dist.distributed.slices import EMA, WEIGHT
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import collect_abandoned, final_name, staged_folder, temporary_folder
from dpo_dist.model.adapter_files import start_folder, tokenizer_folder
from dpo_dist.model.adapter_weights import AdapterWeights, read_adapter, write_adapter
from dpo_dist.model.folder import description_folder, model_folder
from dpo_dist.model.load import TORCH_DTYPES, load_config, load_tokenizer
from dpo_dist.model.lora import add_adapter
from dpo_dist.model.merge import write_merged
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

_PARTS = {ExportedWeights.last: WEIGHT, ExportedWeights.ema: EMA}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the values of `export.dtype`."""


@dataclass(frozen=True)
class Exported:
    """A written folder before it gets its name, with those of the base and of the adapter at the start.

    `read` returns a trained weight by transformers name in float32, before it was rounded.
    """

    folder: Path
    base: Path
    start: Path | None
    read: Callable[[str], Tensor]


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    config: RunConfig,
    card: Callable[[], str] | None = None,
    check: Callable[[Exported], None] | None = None,
    *,
    replaces: bool = True,
) -> None:
    """Write the trained weights of a checkpoint, of any number of processes, as a model or adapter folder.

    Needs no GPU, no other process, and weights of the base only if an adapter is merged or the architecture
    has tensors that are not trained. The model is in host memory once, a merged one in float32. `card`
    returns the content of README.md; `check` is called with the folder before it gets its name, and an
    error removes it. A folder that another process has made meanwhile is kept unless this one `replaces`
    it.
    """
    base = description_folder(config.model.path, config.model.revision, needs_weights=False)
    start = start_folder(config.model)
    causal_lm = _without_weights(base, start, config)
    files, tokenizer = trained_tokenizer(base, start, config)
    if faults := find_faults(checkpoint, 0, 1):
        raise damaged_checkpoint(checkpoint, faults)
    trained = {name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    saved, part = read_weights(checkpoint, trained), _PARTS[config.export.weights]
    if part not in saved.parts:
        raise ConfigError(
            "only checkpoints of runs with trainer.ema_decay have a moving average of the weights",
            where="export.weights",
            got=f"ema, {checkpoint}",
            remedy="name such a checkpoint, or set export.weights=last",
        )
    read = partial(saved.whole, part=part)
    with writing_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        collect_abandoned(folder.parent)  # of exports that were killed
    with writing_errors(folder), staged_folder(folder, replaces=replaces) as temporary:
        _write_trained(temporary, {name: read(name) for name in saved.shapes}, causal_lm, base, start, config)
        is_chosen = config.data.chat_template is not None
        write_tokenizer(temporary, tokenizer, None if is_chosen else read_tokenizer(files))
        write_card(temporary, card)
        if check is not None:
            check(Exported(temporary, base, start, read))


def trained_tokenizer(
    base: Path, start: Path | None, config: RunConfig
) -> tuple[Path, PreTrainedTokenizerBase]:
    """Return the folder of the tokenizer of a run, and the tokenizer with the run's chat template."""
    files = tokenizer_folder(base, start)
    tokenizer = load_tokenizer(files, config.model)
    if config.data.chat_template is not None:
        tokenizer = with_chosen_template(tokenizer, config.data.chat_template)
    return files, tokenizer


def _write_trained(
    folder: Path,
    weights: dict[str, Tensor],
    causal_lm: Any,
    base: Path,
    start: Path | None,
    config: RunConfig,
) -> None:
    """Write weights and configuration as `config.export` says."""
    named = None if config.export.dtype is None else DTYPES[config.export.dtype]
    dtype = named or TORCH_DTYPES[config.model.dtype]
    if config.model.adapter is None:
        weights = {name: weights.pop(name).to(dtype) for name in list(weights)}
        write_weights(folder, causal_lm, weights | _untrained(causal_lm, config), read_description(base))
        return
    update = trained_update(causal_lm, weights, adapter_below(config, start))
    if not config.export.merge:
        write_adapter(folder, update, dtype)
        return
    whole = model_folder(config.model.path, config.model.revision)
    with temporary_folder(final_name(folder)) as adapter:  # `collect_abandoned` knows this form of name
        write_adapter(adapter, update, torch.float32)
        write_merged(folder, whole, adapter, named, trust_remote_code=config.model.trust_remote_code)


def adapter_below(config: RunConfig, start: Path | None) -> AdapterWeights | None:
    """Return the adapter that stays below the trained one, if there is one."""
    adapter = config.model.adapter
    return read_adapter(start) if adapter is not None and adapter.on_top and start is not None else None


def _untrained(causal_lm: Any, config: RunConfig) -> dict[str, Tensor]:
    """Return buffers and weights that the architecture does not train, which are as in the base's files."""
    frozen = {name for name, weight in causal_lm.named_parameters() if not weight.requires_grad}
    wanted = frozen | (dict(causal_lm.named_buffers()).keys() & causal_lm.state_dict().keys())
    if not wanted:
        return {}
    base = model_folder(config.model.path, config.model.revision)
    code = config.model.trust_remote_code
    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", trust_remote_code=code, use_safetensors=True
    ).state_dict()
    return {name: loaded[name] for name in wanted}


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
