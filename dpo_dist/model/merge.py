"""Write whole models from others: an adapter merged into its base, the mean of several."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.folder import CONFIG_FILE, check_weights, local_model_folder, weight_files
from dpo_dist.model.save import write_description, write_weights

_KEY = "export.average"


def write_merged(
    folder: Path, base: Path, adapter: Path, dtype: torch.dtype | None, *, trust_remote_code: bool
) -> None:
    """Write the model in `base` with the LoRA adapter in `adapter` merged, by default in its own dtype.

    The whole model is in host memory in float32, so that sums are rounded once.
    """
    described = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    causal_lm = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    was_tied = causal_lm.config.tie_word_embeddings
    merged = PeftModel.from_pretrained(causal_lm, adapter).merge_and_unload()
    inner, outer = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    if was_tied and inner is not outer and torch.equal(inner, outer):  # peft keeps two copies
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    written = dtype or described.get_text_config().dtype or described.dtype or torch.float32
    for weight in merged.parameters():  # not buffers, such as the biases of DeepSeek's routers
        weight.data = weight.data.to(written)
    is_split = was_tied and not merged.config.tie_word_embeddings
    changes = {"tie_word_embeddings": False} if is_split else {}
    write_weights(folder, merged, dict(merged.state_dict()), base, changes)


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = [file for file in weight_files(folder) if file.suffix != ".json"]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def write_mean(folder: Path, members: Sequence[tuple[float, Path]], dtype: torch.dtype | None) -> None:
    """Write the float32 mean of whole models of one kind, with the other files of the first.

    The coefficients of `members` have the sum 1. Without a dtype, weights have that of the first model.
    """
    (share, first), *others = members
    for member in (path for _, path in members):
        local_model_folder(str(member), None, _KEY)
        check_weights(weight_files(member), _KEY)
    kind = _kind(first)
    own = _tensors(first)
    mean = {name: share * weight.float() for name, weight in own.items()}
    for coefficient, member in others:
        other = _tensors(member)
        differing = list(own.keys() ^ other.keys())
        differing += [name for name in own.keys() & other.keys() if own[name].shape != other[name].shape]
        if differing or _kind(member) != kind:
            raise ConfigError(
                "a member of the average is a model of another kind or of other sizes",
                where=_KEY,
                got=f"{member}: {min(differing, default=_kind(member))}",
                expected=f"a model as in {first}",
                remedy="name models that were trained from one model",
            )
        for name in mean:
            mean[name] += coefficient * other[name].float()
    mean = {name: weight.to(dtype or own[name].dtype) for name, weight in mean.items()}
    ignored = shutil.ignore_patterns("*.safetensors*", "README.md")
    shutil.copytree(first, folder, ignore=ignored, dirs_exist_ok=True)
    save_torch_state_dict(mean, folder, max_shard_size="5GB")
    if dtype is not None:
        write_description(folder / CONFIG_FILE, json.loads((first / CONFIG_FILE).read_bytes()), dtype)


def _kind(folder: Path) -> str:
    return str(json.loads((folder / CONFIG_FILE).read_bytes()).get("model_type"))
