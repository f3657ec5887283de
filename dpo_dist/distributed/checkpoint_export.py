"""Write a checkpoint as the model folder that training would have written at its step; in one process."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from dpo_dist.atomic import collect_abandoned, temporary_folder
from dpo_dist.config.export_schema import ExportedWeights
from dpo_dist.config.schema import AttentionBackend, RunConfig
from dpo_dist.data.arrangement import Arrangement
from dpo_dist.data.tokenization.chat_template import with_chosen_template
from dpo_dist.distributed.checkpoint_manifest import damaged_checkpoint, find_faults
from dpo_dist.distributed.checkpoint_weights import check_shapes, read_weights
from dpo_dist.distributed.slice_files import SavedSlices
from dpo_dist.distributed.slices import EMA, WEIGHT
from dpo_dist.model.adapter_files import start_folder, tokenizer_folder
from dpo_dist.model.adapters import add_adapter
from dpo_dist.model.folder import description_folder
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import TORCH_DTYPES, load_config, load_tokenizer
from dpo_dist.model.save import write_model_folder, writing_errors

_PARTS = {ExportedWeights.last: WEIGHT, ExportedWeights.ema: EMA}


def export_checkpoint(
    checkpoint: Path, folder: Path, config: RunConfig, card: Callable[[], str] | None = None
) -> None:
    """Write the weights of a checkpoint, or their average, as a model or adapter folder, whole or not at all.

    Needs no GPU, no other process and no weights of the base. Memory is that of one float32 weight and of one
    file of the model (5 GB); `folder`'s disk needs room for the weights twice for a while.

    Args:
        checkpoint: of any number of processes and kind of parallelism.
        folder: its final name.
        config: of the run.
        card: returns the content of README.md; None or "": there is none.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, or the folder cannot be written.
        ConfigError: the description of the base model cannot be read.
    """
    if faults := find_faults(checkpoint, 0, 1):
        raise damaged_checkpoint(checkpoint, faults)
    base = description_folder(config.model.path, config.model.revision, needs_weights=False)
    start = start_folder(config.model)
    causal_lm = _without_weights(base, start, config)
    saved = read_weights(checkpoint)
    trained = {name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    check_shapes(trained, saved.shapes, checkpoint)
    below = start if start is not None and config.model.adapter.on_top else None
    tokenizer = load_tokenizer(tokenizer_folder(base, start), config.model)
    if config.data.chat_template is not None:
        tokenizer = with_chosen_template(tokenizer, config.data.chat_template)
    part, dtype = _PARTS[config.export.weights], TORCH_DTYPES[config.model.dtype]
    with writing_errors(folder), _on_disk(saved, part, dtype, folder) as weights:
        write_model_folder(folder, causal_lm, weights, tokenizer, card, below=below)


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
    if (base / GENERATION_CONFIG_NAME).is_file():
        packed.causal_lm.generation_config = GenerationConfig.from_pretrained(base)
    return packed.causal_lm


@contextlib.contextmanager
def _on_disk(saved: SavedSlices, part: str, dtype: torch.dtype, folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yield a part of the saved slices in `dtype`, mapped from temporary files beside `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    collect_abandoned(folder.parent)  # of exports that were killed
    with temporary_folder(folder) as temporary:
        weights = {}
        for number, name in enumerate(saved.shapes):
            file = temporary / str(number)
            weights[name] = _mapped(saved.whole(name, part).to(dtype), file)
        yield weights
        weights.clear()  # some file systems keep the files of mapped tensors


def _mapped(tensor: Tensor, file: Path) -> Tensor:
    """Write `tensor` to `file` and return it mapped from there: its memory can be taken back at any time."""
    tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)
    return torch.from_file(str(file), shared=False, size=tensor.numel(), dtype=tensor.dtype).view(
        tensor.shape
    )
