"""Find a model's or adapter's folder and check its files. Imports no torch, so that errors appear at once."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_dist.config.keys import to_unset
from dpo_dist.config.schema import ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError, first_line, in_one_line
from dpo_dist.foundation.files import check_readable, similar_path
from dpo_dist.foundation.remedies import to_write

CONFIG_FILE = "config.json"
GENERATION_CONFIG = "generation_config.json"
DESCRIPTIONS = "*config.json"
"""The files beside weights and tokenizer that transformers reads: of the model, generation, processors."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FOREIGN_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx"]
VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.model.v*", "*.tiktoken", "tekken*.json")
"""Files of which a tokenizer has one: with any of them transformers makes a tokenizer."""
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "*.model", "*.model.v*", "*.tiktoken", "tekken*"),
    *("special_tokens*", "added_tokens*", "chat_template*", "additional_chat_templates/*.jinja"),
    # Of single families, as GPT-NeoX-Japanese, Marian and Whisper.
    *("*.spm", "*_vocab.json", "*.codes", "*.tokenizer", "emoji.json", "normalizer.json", "byte_maps.json"),
    *("dict.txt", "word_shape.json", "word_pronunciation.json"),
)
"""The files that transformers reads for a tokenizer; a test compares them with the names in its classes."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
PEFT_PREFIX = "base_model.model."
"""The prefix of every weight's name in an adapter folder."""
_ADAPTER_KEY = "model.adapter.path"
LORA_WEIGHTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
"""Suffixes of an adapter's low-rank weights; its other weights belong to `modules_to_save`."""
# Initializations that move a part of the base's weights into the adapter: it does not fit the original base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of peft that make an adapter more than low-rank matrices; it cannot merge them into a base.
_OTHER_FORMS = ("alora_invocation_tokens", "layer_replication", "use_qalora")
# Kinds of adapters that peft cannot merge, either.
_UNMERGED_TYPES = (
    "ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING PREFIX_TUNING PROMPT_TUNING P_TUNING XLORA"
)
MERGE = (
    "merge the adapter into its base, whose output layer first gets a weight of its own, by the lines of "
    "docs/models.md (an adapter of supervised fine-tuning), and set model.path to the result"
)
"""The remedy for an adapter that peft can merge."""
# Keys of an adapter's kind and size: a continued adapter has them in its own files, so none may be set.
_FORM = ("r", "alpha", "variant", "target_modules", "modules_to_save")
_WHOLE = "a transformers model: config.json, weights in safetensors (no GGUF), tokenizer"
_NAME_FOLDER = "name the folder that save_pretrained wrote or that was downloaded from the hub"
_COMMITS: dict[tuple[str, str | None], str] = {}
"""Commits of the snapshots that this process read: a branch that moves must not change a run's model."""


def model_folder(
    path: str, revision: str | None, key: str = "model.path", *, accepts_adapter: bool = False
) -> Path:
    """Return a model's local folder: `path`, or its snapshot from the hub, downloaded if needed.

    With `accepts_adapter`, the folder may be an adapter's.
    """
    folder = local_model_folder(path, revision, key, accepts_adapter=accepts_adapter)
    if folder is None:
        folder = _snapshot(path, revision, key, ignored=_FOREIGN_WEIGHTS)
        _check_files(folder, key, accepts_adapter=accepts_adapter)
    return folder


def description_folder(path: str, revision: str | None, key: str = "model.path", **checks: bool) -> Path:
    """Return `model_folder` without downloading weights; `checks` are options of `local_model_folder`."""
    folder = local_model_folder(path, revision, key, **checks)
    ignored = ["*.safetensors", *_FOREIGN_WEIGHTS]
    return _snapshot(path, revision, key, ignored) if folder is None else folder


def local_model_folder(
    path: str,
    revision: str | None,
    key: str = "model.path",
    *,
    needs_weights: bool = True,
    accepts_adapter: bool = False,
) -> Path | None:
    """Return the folder of a local path; None for a hub name, which is not looked up."""
    folder = Path(path).expanduser()
    check_readable(folder, key)
    if folder.is_dir():
        if revision is not None:
            of_revision = key.replace("path", "revision")
            raise ConfigError(
                "a revision has no effect on a local folder",
                where=of_revision,
                got=f"{revision} with {path}",
                remedy=to_unset(of_revision) + ", or name the model on the hub",
            )
        _check_files(folder, key, needs_weights=needs_weights, accepts_adapter=accepts_adapter)
        return folder
    if folder.is_file():
        raise ConfigError(
            "the model is a file, not a folder", where=key, got=path, expected=_WHOLE, remedy=_NAME_FOLDER
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise _not_found(path, key, "there is no such folder")
    return None


def hub_commit(folder: Path) -> str | None:
    """Return the commit of a snapshot folder in the Hugging Face cache; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file()


def _snapshot(path: str, revision: str | None, key: str, ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import, and only needed here)
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        commit = _COMMITS.get((path, revision), revision)
        folder = Path(snapshot_download(path, revision=commit, ignore_patterns=ignored))
    except (OSError, HFValidationError, ValueError) as error:
        raise _not_found(path, key, in_one_line(error)) from None
    _COMMITS[path, revision] = folder.name
    return folder


def _not_found(path: str, key: str, reason: str) -> ConfigError:
    similar = similar_path(Path(path).expanduser())
    remedy = "check the path or the hub name, and that the hub can be reached or the model is cached"
    if similar:
        remedy = f"did you mean {similar}?"
    return ConfigError(
        "the model is neither a local folder nor found on the Hugging Face Hub",
        where=key,
        got=f"{path} ({reason})",
        remedy=remedy,
    )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder contains the files of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES)


def check_tokenizer_files(folder: Path) -> None:
    """Check that the policy's folder contains the files of a tokenizer."""
    for pattern in VOCABULARY_FILES:
        for file in folder.glob(pattern):
            check_readable(file, "model.path")
    if not has_tokenizer(folder):
        raise ConfigError(
            "the model folder has no tokenizer",
            where="model.path",
            got=str(folder),
            expected="tokenizer.json, tokenizer.model, vocab.json or tekken.json beside config.json",
            remedy="put the tokenizer's files beside config.json",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads from a model folder: an index comes before its shards.

    `transformers_weights` in config.json may name the first file. A shard may be missing; the list is empty
    if the folder has no weights in safetensors.
    """
    first = read_model_json(folder / CONFIG_FILE).get("transformers_weights")
    names = ("model.safetensors", "model.safetensors.index.json") if first is None else (str(first),)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return []
    if not file.name.endswith(".index.json"):
        return [file]
    weight_map: Any = read_model_json(file)["weight_map"]
    return [file, *(folder / name for name in sorted(set(weight_map.values())))]


def stored_quantization(folder: Path) -> dict[str, Any] | None:
    """Return what config.json says about how a folder's weight files are quantized; None if they are not."""
    content: Any = read_model_json(folder / CONFIG_FILE)
    parts = (content, *(part for part in content.values() if isinstance(part, dict)))
    settings = (part.get("quantization_config") for part in parts)
    return next(filter(None, settings), None)


def read_model_json(file: Path) -> dict[str, object]:
    """Return the object in a JSON file of a model folder."""
    got = "JSON that is not an object"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        check_readable(file, str(file))
        content = None
        got = first_line(error)
    if not isinstance(content, dict):
        raise ConfigError(
            "a file of the model cannot be read",
            where=str(file),
            got=got,
            expected="a readable file with a JSON object",
            remedy="download or save the model again",
        )
    return content


def _check_files(
    folder: Path, key: str, *, needs_weights: bool = True, accepts_adapter: bool = False
) -> None:
    """Check that a folder has config.json, weights in safetensors, and no adapter beside them."""
    if accepts_adapter and is_adapter(folder):
        weights = [folder / ADAPTER_WEIGHTS]
    elif (folder / ADAPTER_CONFIG).is_file():
        remedy = f"name the folder that dpo-dist export run.dir=RUN export.merge=true writes, or {MERGE}"
        if key == "model.path":
            remedy = (
                f"set model.path to the adapter's base and model.adapter.path to this folder, or {remedy}"
            )
        raise ConfigError(
            "the model folder contains an adapter",
            where=key,
            got=str(folder / ADAPTER_CONFIG),
            expected="full weights alone: transformers would apply the adapter to them",
            remedy=remedy,
        )
    elif not (folder / CONFIG_FILE).is_file():
        inner = folder / "model"  # `folder` may be a run directory
        remedy = _NAME_FOLDER
        if (inner / CONFIG_FILE).is_file() or is_adapter(inner):
            remedy = f"write {inner}"
        raise ConfigError(
            "the model folder has no config.json",
            where=key,
            got=str(folder),
            expected=_WHOLE,
            remedy=remedy,
        )
    else:
        weights = weight_files(folder)
    is_readable = all(file.suffix in (".json", ".safetensors") for file in weights)
    if needs_weights and not (weights and weights[0].is_file() and is_readable):
        raise ConfigError(
            "the model folder has no weights in safetensors",
            where=key,
            got=str(folder),
            expected="no pickled weights (.bin, .pt): reading them can run the code inside",
            remedy=f"set {key} to a complete model folder; convert pickled weights that you trust with "
            "save_pretrained",
        )


def check_weights(files: Iterable[Path], key: str) -> None:
    """Check that weight files exist, and by their headers that safetensors files are complete."""
    for file in files:
        if file.suffix == ".json":
            continue
        try:
            with safe_open(file, "np"):
                pass
        except (OSError, SafetensorError) as error:
            check_readable(file, key)
            raise ConfigError(
                "a weight file of the model cannot be read",
                where=key,
                got=f"{file}: {first_line(error)}",
                expected="complete safetensors files, all that the index names",
                remedy="download or copy the file again (git lfs pull, if it is a pointer)",
            ) from error


def start_folder(config: ModelConfig) -> Path | None:
    """Return the local folder of `model.adapter.path`, downloaded if needed; None if there is none."""
    adapter = config.adapter
    if adapter is None or adapter.path is None:
        return None
    folder = model_folder(adapter.path, None, _ADAPTER_KEY, accepts_adapter=True)
    _check_form(folder, config)
    modules_on_disk(folder)
    keys = [f"model.adapter.{name}" for name in _FORM if getattr(adapter, name) is not None]
    if keys:
        raise ConfigError(
            "a continued adapter keeps its kind and size",
            where=", ".join(keys),
            got=str(folder),
            remedy=f"set {' '.join(f'{key}=null' for key in keys)};"
            " to train a new adapter, merge this one into its base and remove model.adapter.path",
        )
    return folder


def modules_on_disk(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of an adapter's low-rank layers and of its modules trained in full, from its files."""
    check_weights([folder / ADAPTER_WEIGHTS], _ADAPTER_KEY)
    with safe_open(folder / ADAPTER_WEIGHTS, "np") as weights:
        names = [name.removeprefix(PEFT_PREFIX) for name in weights.keys() if not is_repeated(name)]  # noqa: SIM118
    adapter: Any = read_model_json(folder / ADAPTER_CONFIG)
    layers = {name.rpartition(".lora_")[0] for name in names if name.endswith(LORA_WEIGHTS)}
    wholes = "|".join(map(re.escape, adapter.get("modules_to_save") or ()))
    others = [name for name in names if not name.endswith(LORA_WEIGHTS)]
    modules: set[str] = set()
    for name in others:
        module = wholes and re.match(rf".*?(?:{wholes})(?=\.)", name)
        if not module:
            raise _unsupported(folder, f"other weights, of {name.rpartition('.')[0]}")
        modules.add(module[0])
    if not layers:
        raise _unsupported(folder, "no weights")
    return sorted(layers), sorted(modules)


def is_repeated(name: str) -> bool:
    """Return whether a tensor in an adapter's file is a duplicate.

    peft writes embeddings that are resized and trained in full twice: the original and the copy.
    """
    return ".original_module." in name or ".modules_to_save." in name


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """Return the folder with the policy's tokenizer and chat template: the adapter's if it has one."""
    return adapter if adapter is not None and has_tokenizer(adapter) else base


def _check_form(folder: Path, config: ModelConfig) -> None:
    """Check that an adapter has only low-rank matrices that fit this base, and did not change the base."""
    if (folder / CONFIG_FILE).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            "the folder contains a whole model, not an adapter",
            where=_ADAPTER_KEY,
            got=str(folder),
            remedy=to_write(f"model.path={folder}", verb="set")
            + ", and for a new adapter 'model.adapter={r: 16, alpha: 32}'",
        )
    adapter = read_model_json(folder / ADAPTER_CONFIG)
    other = list(filter(adapter.get, _OTHER_FORMS))
    if adapter.get("peft_type") != "LORA":
        other.append(f"peft_type {adapter.get('peft_type')}")
    if adapter.get("ensure_weight_tying") and adapter.get("modules_to_save"):
        other.append("modules_to_save with ensure_weight_tying")
    if adapter.get("use_dora") and config.quantization is Quantization.int8:
        other.append("DoRA on an 8-bit base, whose norms peft cannot compute")
    init = str(adapter.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        other.append(f"init_lora_weights: {init}, which changed the base's weights")
    if other:
        can_be_merged = adapter.get("peft_type") not in _UNMERGED_TYPES.split() and not any(
            map(adapter.get, _OTHER_FORMS)
        )
        raise _unsupported(folder, ", ".join(other), can_be_merged=can_be_merged)


def _unsupported(folder: Path, got: str, *, can_be_merged: bool = True) -> ConfigError:
    """Return the error for an adapter that training cannot start from."""
    return ConfigError(
        "training cannot start from this kind of adapter",
        where=_ADAPTER_KEY,
        got=f"{folder}: {got}",
        expected="LoRA, rsLoRA or DoRA on linear layers, without biases; modules_to_save",
        remedy=MERGE if can_be_merged else "name another adapter: peft cannot merge this kind into its base",
    )


def base_warnings(config: ModelConfig, adapter: Path | None) -> list[str]:
    """Return a warning if an adapter names another base than `model.path`, by the last part of the paths."""
    content = {} if adapter is None else read_model_json(adapter / ADAPTER_CONFIG)
    base_path = str(content.get("base_model_name_or_path") or "")
    base, current = (Path(path).expanduser().resolve().name.lower() for path in (base_path, config.path))
    if not base_path or base == current:
        return []
    return [
        f"the adapter {adapter} was trained on {base_path}, but model.path is {config.path}: on another "
        "base's weights an adapter is noise"
    ]
