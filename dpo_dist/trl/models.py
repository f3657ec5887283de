"""Models in memory: what a script has changed in them, and their place in files, from which a run loads."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open

from dpo_dist.distributed.deepspeed_internals import is_sharded
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import locked, staged_folder
from dpo_dist.foundation.process import this_rank
from dpo_dist.model.files.folder import model_folder, weight_files
from dpo_dist.tools.convert.arguments import refused
from dpo_dist.trl.unseen import frozen_weights, hooks


def uncompiled(model: Any) -> Any:
    """Return the model inside one of `torch.compile`, which has its weights: a run compiles its own."""
    parts = dict(model.named_children()) if isinstance(model, torch.nn.Module) else {}
    return parts.get("_orig_mod", model)


def unseen(model: Any, ref_model: Any, *, has_adapter: bool) -> list[ConfigError]:
    """Return errors for what a script has changed in models in memory, which are saved and loaded again."""
    found = hooks(model, "model") + hooks(ref_model, "ref_model")
    # Below an adapter all weights are frozen, and quantized ones always.
    if isinstance(model, PeftModel) or not (has_adapter or hasattr(model, "quantization_method")):
        found += frozen_weights(model, "model")
    if model is ref_model and not isinstance(model, str):
        remedy = "leave ref_model out: the reference is a copy of model"
        found.append(refused("ref_model", "`model` and `ref_model` cannot be the same object", remedy))
    return found


def base_of(model: Any, revision: str | None) -> str:
    """Return the name by which a `PeftModel`'s base is trained; check that its weights are the same."""
    if [*model.peft_config] != ["default"]:
        remedy = "pass a PeftModel whose only adapter has the name 'default'"
        raise refused("model", f"a PeftModel with {', '.join(model.peft_config)}", remedy)
    base = str(model.peft_config["default"].base_model_name_or_path)
    if hasattr(model.config, "quantization_config"):
        return base
    weights = {
        re.sub(r"^base_model\.model\.|\.(base_layer|original_module)(?=\.)", "", name): weight
        for name, weight in model.state_dict().items()
    }
    for file in weight_files(model_folder(base, revision)):
        if file.suffix == ".json":
            continue
        with safe_open(file, "pt") as stored:
            for name in weights.keys() & set(stored.keys()):
                weight = weights[name].cpu()
                if not torch.equal(stored.get_tensor(name).to(weight.dtype), weight):
                    remedy = "save the base by save_pretrained, and load it from there before its adapter"
                    raise refused("model", f"a PeftModel whose {name} is not that of {base}", remedy)
    return base


def tokenization(tokenizer: Any) -> Any:
    """Return what decides the ids of a text: the tokenizer's parts, without its padding."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    return {**parts, "padding": None, "truncation": None, "eos": tokenizer.eos_token_id}


def saved(model: Any, tokenizer: Any, root: Path) -> str:
    """Save a model to a folder below `root` that its content names, unless it is there; return the folder.

    Collective where a script has joined the processes: transformers then saves on rank 0 only.
    """
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=8)
    if tokenizer is not None:
        digest.update(repr((tokenization(tokenizer), tokenizer.chat_template)).encode())
    if any(map(is_sharded, model.parameters())):
        remedy = "pass its name or folder: under this launcher transformers loads only a part in a process"
        raise refused("model", f"a {type(model).__name__} whose weights ZeRO-3 shards", remedy)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    folder, is_joined = root / digest.hexdigest(), dist.is_initialized()
    if not is_joined or this_rank() == 0:
        with locked(folder.with_suffix(".lock"), "saves this model", waits=True):
            if not folder.exists():
                with staged_folder(folder) as temporary:
                    for part in filter(None, (model, tokenizer)):
                        part.save_pretrained(temporary)
    written = [str(folder)]
    if is_joined:
        dist.broadcast_object_list(written)
    return written[0]
