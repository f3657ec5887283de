"""Find the local folder of a model and check its files; imports no torch, so that errors appear at once."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.files import is_absent_offline

CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
"""Patterns of files that torch.save and pickle write."""
_FOREIGN_WEIGHTS = [*PICKLED, "*.h5", "*.msgpack", "*.gguf", "*.onnx"]
_TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AGAIN = "download or save the model again"


def model_folder(
    path: str, revision: str | None, key: str = "model.path", *, accepts_adapter: bool = False
) -> Path:
    """Return the local folder of a model: `path`, or its snapshot from the hub, downloaded if needed.

    Or of an adapter, if the caller accepts one.
    """
    folder = local_model_folder(path, revision, key, accepts_adapter=accepts_adapter)
    if folder is None:
        folder = _snapshot(path, revision, key, ignored=_FOREIGN_WEIGHTS)
        _check_files(folder, key, accepts_adapter=accepts_adapter)
    return folder


def description_folder(
    path: str, revision: str | None, key: str = "model.path", *, needs_weights: bool = True
) -> Path:
    """Return the same as `model_folder`, without downloading weights from the hub."""
    folder = local_model_folder(path, revision, key, needs_weights=needs_weights)
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
    """Return the `model_folder` of a local path; None for a hub name, without asking the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                "a revision has no effect on a local folder",
                where=key.replace("path", "revision"),
                got=f"{revision} with {path}",
                remedy="remove it, or name the model on the hub",
            )
        _check_files(folder, key, needs_weights=needs_weights, accepts_adapter=accepts_adapter)
        return folder
    if folder.is_file() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            "this model folder does not exist",
            where=key,
            got=path,
            expected="a folder with config.json and weights, or org/name on the hub",
            remedy="check the path, relative to the working directory",
        )
    return None


def hub_commit(folder: Path) -> str | None:
    """Return the commit of a snapshot in the cache of the Hugging Face Hub; None for another folder."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file()


def _snapshot(path: str, revision: str | None, key: str, ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import, and only needed here)
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        return Path(snapshot_download(path, revision=revision, ignore_patterns=ignored))
    except (OSError, HFValidationError, ValueError) as error:
        raise _not_found(path, key, first_line(error)) from None


def check_cached_offline(path: str, key: str) -> None:
    """Check that files of a model on the Hub are in its cache, if HF_HUB_OFFLINE allows no download."""
    if is_absent_offline("model", path):
        raise _not_found(path, key, "not in the cache of the Hub, and HF_HUB_OFFLINE=1")


def _not_found(path: str, key: str, reason: str) -> ConfigError:
    named, found = ("adapter", "an adapter") if key == "model.adapter.path" else ("model", "a model")
    return ConfigError(
        f"the {named} is neither a local folder nor {found} found on the Hugging Face Hub",
        where=key,
        got=f"{path} ({reason})",
        remedy="check the path or the hub name, and that the hub can be reached or the model is cached",
    )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder contains the files of a tokenizer."""
    return any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def check_tokenizer_files(folder: Path) -> None:
    """Check that the policy's folder contains the files of a tokenizer."""
    if not has_tokenizer(folder):
        raise ConfigError(
            "the model folder has no tokenizer",
            where="model.path",
            got=str(folder),
            expected="tokenizer.json, tokenizer.model or vocab.json beside config.json",
            remedy="put the tokenizer's files beside config.json",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads from a model folder, an index before its shards.

    The first is the one that `transformers_weights` of config.json names, or has the usual name. A shard may
    be missing; the list is empty if the folder has no weights in safetensors.
    """
    named = read_model_json(folder / CONFIG_FILE).get("transformers_weights")
    names = ("model.safetensors", "model.safetensors.index.json") if named is None else (str(named),)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None or not file.name.endswith(".index.json"):
        return [] if file is None else [file]
    weight_map = read_model_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        message = "the index of the model's weights has no weight_map"
        raise ConfigError(message, where=str(file), remedy=_AGAIN)
    return [file, *(folder / name for name in sorted(set(map(str, weight_map.values()))))]


def read_model_json(file: Path) -> dict[str, object]:
    """Return the object in a JSON file of a model folder."""
    got = "JSON that is not an object"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        content, got = None, first_line(error)
    if not isinstance(content, dict):
        raise ConfigError(
            "a file of the model cannot be read",
            where=str(file),
            got=got,
            expected="a readable file with a JSON object",
            remedy=_AGAIN,
        )
    return content


def _check_files(
    folder: Path, key: str, *, needs_weights: bool = True, accepts_adapter: bool = False
) -> None:
    """Check that a folder has config.json, weights in safetensors, and no adapter beside them."""
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    if accepts_adapter and is_adapter(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file() and any(folder.glob("adapter_model.*")):
            raise _no_safetensors(folder, key)
        return
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            "the model folder has no config.json",
            where=key,
            got=f"{folder}, an adapter" if has_adapter else str(folder),
            expected="a transformers model: config.json, weights, tokenizer",
            remedy="set model.path to its base and model.adapter.path to it, or merge it into its base"
            if has_adapter
            else "name the folder that save_pretrained wrote or that was downloaded from the hub",
        )
    if not needs_weights:
        return
    weights = weight_files(folder)
    if not weights or any(file.suffix not in (".json", ".safetensors") for file in weights):
        raise _no_safetensors(folder, key)
    if has_adapter:
        raise ConfigError(
            "the model folder contains an adapter beside full weights",
            where=key,
            got=str(folder / ADAPTER_CONFIG),
            expected="full weights only: transformers would apply the adapter to them",
            remedy="merge the adapter into the weights, or move its files to another folder",
        )


def _no_safetensors(folder: Path, key: str) -> ConfigError:
    found = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    names = [name for name in found if "model" in name or "consolidated" in name]  # not a trainer's states
    pickled = "the weights are pickled: reading such a file can run code that is in it"
    return ConfigError(
        pickled if names else "the model folder has no weights",
        where=key,
        got=f"{folder}: {', '.join(names[:3])}" if names else str(folder),
        expected="weights in safetensors",
        remedy="convert them once, where you trust them: save_pretrained writes safetensors"
        if names
        else f"set {key} to a complete model folder; save_pretrained writes safetensors",
    )


def check_weights(files: Iterable[Path], key: str) -> None:
    """Check that the files of `weight_files` exist, and that safetensors are whole, by their headers."""
    for file in files:
        if file.suffix == ".json":
            continue
        try:
            with safe_open(file, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                "a weight file of the model cannot be read",
                where=key,
                got=f"{file}: {first_line(error)}",
                expected="whole safetensors, every file that an index names",
                remedy="download or copy the file again (git lfs pull, if it is a pointer)",
            ) from error
