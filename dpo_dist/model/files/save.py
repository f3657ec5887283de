"""Write model folders: trained weights, an adapter merged into its base."""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dpo_dist.config.keys import to_unset
from dpo_dist.foundation.errors import CheckpointError, ConfigError
from dpo_dist.model.architectures import auto_class, describe_reward_model, is_noise
from dpo_dist.model.files.folder import (
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    GENERATION_CONFIG,
    PEFT_PREFIX,
    TOKENIZER_FILES,
    modules_on_disk,
    read_model_json,
    weight_files,
)
from dpo_dist.model.files.stops import set_padding
from dpo_dist.model.files.stored import open_plain, plain_config, plain_weights
from dpo_dist.model.layers import gives_scores, output_layer
from dpo_dist.model.library_internals import ignored_patterns
from dpo_dist.model.lora import TRAINED, saved_modules

# The files that describe how a model reads images and sounds.
_PROCESSORS = "*processor_config.json"
_ADAPTER_NAME = re.compile(r"(\.modules_to_save)?\.default(?=\.|$)")
_REMEDY = "free disk space or name another folder, and run the same command again"


def write_weights(
    folder: Path,
    causal_lm: Any,
    weights: dict[str, Tensor],
    base: Path | None = None,
    changes: Mapping[str, object] | None = None,
) -> None:
    """Write weights, named as in transformers, in files of at most 5 GB, and a config.json.

    With `base`, the config.json is the base's, updated by `changes`.
    """
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    causal_lm.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    if base is not None:
        if gives_scores(causal_lm):
            changes = {**(changes or {}), **_score_options(causal_lm.config)}
        _restore_description(folder, base, dtype, changes or {})


def _score_options(model_config: Any) -> dict[str, Any]:
    """Return the options of config.json by which a reward model's class has one output and finds the end."""
    names = ("pad_token_id", "id2label", "label2id")
    return {name: model_config.to_dict()[name] for name in names}


def _restore_description(folder: Path, base: Path, dtype: torch.dtype, changes: Mapping[str, object]) -> None:
    """Replace transformers' config.json and generation_config.json in a model folder by the base's.

    If transformers wrote only the text model of a base that also reads images or sounds, config.json stays
    the one that transformers wrote, with the base's dropout and noise, and no files about images are copied.
    """
    file = folder / CONFIG_FILE
    generation = folder / GENERATION_CONFIG
    content_here = json.loads(file.read_bytes())
    original = json.loads((base / CONFIG_FILE).read_bytes())
    kind = content_here["model_type"]
    # The model's remote code may set a type that config.json does not name.
    if original.get("model_type", kind) == kind:
        content = original | {"architectures": content_here["architectures"]}
        _copy_files(base, folder, _PROCESSORS)
    else:  # noise was set to 0 when loading: take the base's, or the default
        text = original.get("text_config") or {}
        content = {name: value for name, value in content_here.items() if not is_noise(name, value, kind)}
        for name in filter(text.__contains__, content_here):
            content.setdefault(name, text[name])
    if "pad_token_id" in changes and "text_config" in content:  # the class reads it there
        content["text_config"]["pad_token_id"] = changes["pad_token_id"]
    write_description(file, content | changes, dtype)
    generation.unlink(missing_ok=True)  # transformers made it from config.json
    _copy_files(base, folder, GENERATION_CONFIG)


def write_description(file: Path, content: dict[str, Any], dtype: torch.dtype) -> None:
    """Write config.json with `dtype`, also in the model's parts that name a precision."""
    content.pop("transformers_weights", None)  # names a file of the base
    name = str(dtype).removeprefix("torch.")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for of_files in ("quantization_config", "stored_as"):  # the written weights are plain
            part.pop(of_files, None)
        former = part.pop("torch_dtype", None)
        if part is content or former is not None or "dtype" in part:
            part["dtype"] = name
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer with its chat template from the model folder `source`."""
    _copy_files(source, folder, *TOKENIZER_FILES, "tokenization_*.py")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer to a model folder, and remove any other chat template from the folder."""
    tokenizer.save_pretrained(folder)
    file = folder / "processor_config.json"
    name = "chat_template"
    content = json.loads(file.read_bytes()) if file.is_file() else {}
    if name in content:
        del content[name]  # transformers would prefer this template
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_files(source: Path, folder: Path, *patterns: str) -> None:
    for file in filter(Path.is_file, {*itertools.chain.from_iterable(map(source.glob, patterns))}):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_adapter(folder: Path, causal_lm: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a model's trained adapter in peft's format, from `weights` by name.

    A weight with several names is in `weights` under the first name, and in the file under every name.
    """
    first: dict[nn.Parameter, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, weight in causal_lm.named_parameters(remove_duplicate=False):
        if weight.requires_grad:
            first_name = first.setdefault(weight, name)
            values = weights[first_name].to(dtype, copy=name != first_name)
            tensors[_name_in_file(name)] = values.contiguous()
    saved = sorted(
        name for name, copies in saved_modules(causal_lm).items() if TRAINED in copies.modules_to_save
    )
    config = copy(causal_lm.peft_config[TRAINED])
    config.inference_mode = True
    config.modules_to_save = saved or None
    config.save_pretrained(folder)
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def _name_in_file(name: str) -> str:
    """Return a weight's name in peft's files, which lacks the adapter's name."""
    short = PEFT_PREFIX + _ADAPTER_NAME.sub("", name)
    return short.removesuffix(".weight") if ".lora_magnitude_vector" in short else short


@contextlib.contextmanager
def writing_errors(folder: Path) -> Iterator[None]:
    """Raise a `CheckpointError` for a file of `folder` that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the trained model cannot be written",
            where=str(folder),
            got=str(error),
            remedy=_REMEDY,
        ) from error


def write_merged(
    folder: Path,
    base: Path,
    adapter: Path,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
    padding: int | None = None,
) -> None:
    """Merge the LoRA adapter in `adapter` into the model in `base`, and write it.

    The whole model is in host memory in float32, so that sums are rounded once. `padding` is the id of a
    reward model's padding token; None: the adapter is of a language model.
    """
    from peft import PeftModel  # noqa: PLC0415  (slow, see model/lora.py)

    described = plain_config(base, trust_remote_code=trust_remote_code)
    if padding is not None:
        describe_reward_model(described, "model.path")
        set_padding(described, padding)
    with plain_weights(base, torch.float32):
        causal_lm = auto_class(described, trust_remote_code).from_pretrained(
            base,
            config=described,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    _check_unshared(causal_lm, modules_on_disk(adapter)[0])
    was_tied = _is_tied(causal_lm)
    merged = PeftModel.from_pretrained(causal_lm, adapter).merge_and_unload()
    inner = merged.get_input_embeddings().weight
    outer = output_layer(merged).weight
    if was_tied and inner is not outer and torch.equal(inner, outer):  # peft keeps two copies
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    for weight in merged.parameters():  # buffers, as the biases of DeepSeek's routers, stay float32
        weight.data = weight.data.to(dtype)
    changes = {"tie_word_embeddings": False} if was_tied and not _is_tied(merged) else {}
    write_weights(folder, merged, merged.state_dict() | ignored_tensors(merged, base, dtype), base, changes)


def _check_unshared(causal_lm: Any, adapted: Sequence[str]) -> None:
    """Check that no adapted layer shares its weight with another, as in Zamba2: it would get both updates."""
    owners: dict[Tensor, list[str]] = {}
    for name, weight in causal_lm.named_parameters(remove_duplicate=False):
        owners.setdefault(weight, []).append(name.rpartition(".")[0])
    of_several = (names for names in owners.values() if len(names) > 1)
    shared = [names for names in of_several if not set(adapted).isdisjoint(names)]
    if shared:
        raise ConfigError(
            "layers share a weight in this model, and the adapter changes it for each layer in another way",
            where="export.merge",
            got=f"{causal_lm.config.model_type}, {' and '.join(shared[0][:2])} ({len(shared)} in all)",
            remedy=to_unset("export.merge") + ": the adapter can be used without merging",
        )


def _is_tied(causal_lm: Any) -> bool:  # config.json does not always say it
    return causal_lm.get_input_embeddings().weight is output_layer(causal_lm).weight


def ignored_tensors(causal_lm: Any, base: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of `base` that its class in transformers ignores, such as `mtp` layers."""
    patterns = ignored_patterns(causal_lm)
    if not patterns or causal_lm.config.model_type != read_model_json(base / CONFIG_FILE).get("model_type"):
        return {}
    unread: dict[str, Tensor] = {}
    prefix = f"{causal_lm.base_model_prefix}."
    modules = {name.removeprefix(prefix) for name, _ in causal_lm.named_modules()}

    def is_ignored(name: str) -> bool:
        # The patterns also match weights that are read: `attn.bias` in c_attn.bias, layer 46 of 92.
        layer = re.match(r".*?\.\d+(?=\.)", name.removeprefix(prefix))
        return any(re.search(each, name) for each in patterns) and not (layer and layer[0] in modules)

    open_file = open_plain(base, dtype)
    for file in weight_files(base):
        if file.suffix != ".json":
            with open_file(file) as tensors:
                unread |= {name: tensors.get_tensor(name) for name in filter(is_ignored, tensors.keys())}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in unread.items()}
