"""Find the local folder of a model and check its files; imports no torch, so that errors appear at once."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dpo_dist.config.run_folder import BEST, best_checkpoints
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.files import is_absent_offline

CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
"""Patterns of files that torch.save and pickle write."""
_FOREIGN_WEIGHTS = [*PICKLED, "*.h5", "*.msgpack", "*.gguf", "*.onnx"]
_TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DISTRIBUTED_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_folder(
    path: str, revision: str | None, key: str = "model.path", *, accepts_adapter: bool = False
) -> Path:
    """Return the local folder of a model: `path` itself, or its snapshot from the hub, downloaded if needed.

    Raises:
        ConfigError: the model does not exist, has no weights or pickled ones, or has an adapter beside them.
    """
    if accepts_adapter and is_adapter(local := Path(path).expanduser()):
        _check_no_revision(path, revision, key)
        check_adapter(local, key)
        return local
    folder = local_model_folder(path, revision, key)
    if folder is None:
        folder = _snapshot(path, revision, key, ignored=_FOREIGN_WEIGHTS)
        if accepts_adapter and is_adapter(folder):
            check_adapter(folder, key)
        else:
            _check_files(folder, key)
    return folder


def description_folder(
    path: str, revision: str | None, key: str = "model.path", *, needs_weights: bool = True
) -> Path:
    """Return the same as `model_folder`, without downloading weights from the hub."""
    folder = local_model_folder(path, revision, key, needs_weights=needs_weights)
    ignored = ["*.safetensors", *_FOREIGN_WEIGHTS]
    return _snapshot(path, revision, key, ignored) if folder is None else folder


def local_model_folder(
    path: str, revision: str | None, key: str = "model.path", *, needs_weights: bool = True
) -> Path | None:
    """Return the `model_folder` of a local path; None for a hub name, without asking the hub.

    Raises:
        ConfigError: the folder does not exist, or is not a model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_no_revision(path, revision, key)
        _check_files(folder, key, needs_weights)
        return folder
    if folder.is_file():
        raise ConfigError(
            "the model is a file",
            where=key,
            got=path,
            expected="the folder that contains config.json and the weights",
            remedy=_in_place_of(folder),
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        elsewhere = "check the path, relative to the working directory; a model on the hub is org/name"
        raise ConfigError(
            "this model folder does not exist", where=key, got=path, remedy=_near(folder) or elsewhere
        )
    return None


def _in_place_of(file: Path) -> str:
    """Return what to name in place of a file."""
    names = best_checkpoints(file.parent) if file.name == BEST else []
    if not names:
        return f"name its folder: {file.parent}"
    exported = f"python -m dpo_dist.export run.dir={file.parent.parent} export.checkpoint=best"
    return f"evaluate and compare read {file.parent / names[0]}; {exported} writes a model folder"


def _check_no_revision(path: str, revision: str | None, key: str) -> None:
    if revision is not None:
        raise ConfigError(
            "a revision has no effect on a local folder",
            where=key.replace("path", "revision"),
            got=f"{revision} with {path}",
            remedy="remove it, or name the model on the hub",
        )


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check the path or the hub name, and that the hub can be reached or the model is cached"
        raise _not_found(path, key, f"{path} ({reason})", remedy) from None


def check_cached_offline(path: str, key: str) -> None:
    """Check that files of a model on the Hub are in its cache, if HF_HUB_OFFLINE allows no download."""
    if is_absent_offline("model", path):
        got = f"{path}, which is not in the cache of the Hub, and HF_HUB_OFFLINE=1"
        remedy = "check the path or the hub name, download the model, or unset HF_HUB_OFFLINE"
        raise _not_found(path, key, got, remedy, "a folder, or a model that was downloaded before")


def _not_found(path: str, key: str, got: str, remedy: str, expected: str = "") -> ConfigError:
    named, found = ("adapter", "an adapter") if key == "model.adapter.path" else ("model", "a model")
    message = f"the {named} is neither a local folder nor {found} found on the Hugging Face Hub"
    return ConfigError(message, where=key, got=got, expected=expected, remedy=_near(Path(path)) or remedy)


def _near(folder: Path) -> str:
    """Return a question after names beside a missing folder; empty if none is like its name."""
    names = [below.name for below in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=3)
    return f"did you mean {' or '.join(str(folder.parent / name) for name in near)}?" if near else ""


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

    Transformers loads the file that `transformers_weights` of config.json names, otherwise the first of
    `_WEIGHT_FILES`, with all files that an index names; a folder of distributed shards as a whole.

    Returns:
        The files, of which a shard may be missing; empty if the folder has no weights.

    Raises:
        ConfigError: config.json or an index cannot be read.
    """
    if any(_DISTRIBUTED_SHARD.fullmatch(file.name) for file in folder.glob("*.safetensors")):
        return sorted(folder.glob("*.safetensors"))
    named = read_model_json(folder / CONFIG_FILE).get("transformers_weights")
    for name in _WEIGHT_FILES if named is None else (str(named),):
        file = folder / name
        if file.is_file():
            return [file, *(_shards(file) if name.endswith(".index.json") else [])]
    return []


def _shards(index: Path) -> list[Path]:
    weight_map = read_model_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            "the index of the model's weights has no weight_map",
            where=str(index),
            remedy="download or save the model again",
        )
    return [index.parent / name for name in sorted(set(map(str, weight_map.values())))]


def read_model_json(file: Path) -> dict[str, object]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ConfigError: the file cannot be read, or is not a JSON object.
    """
    got = "JSON that is not an object"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        content, got = None, str(error)
    if not isinstance(content, dict):
        raise ConfigError(
            "a file of the model cannot be read",
            where=str(file),
            got=got,
            expected="a readable file with a JSON object",
            remedy="download or save the model again",
        )
    return content


def _check_files(folder: Path, key: str, needs_weights: bool = True) -> None:
    """Check that a folder has config.json, weights in safetensors inside it, and no adapter beside them."""
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            "the model folder has no config.json",
            where=key,
            got=f"{folder}, an adapter" if has_adapter else str(folder),
            expected="a transformers model: config.json, weights, tokenizer",
            remedy=_to_start_from(folder) if has_adapter else _below(folder),
        )
    weights = weight_files(folder) if needs_weights else []
    for file in weights:
        # An index may name any path; the cache of the Hub has links to other folders.
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts:
            raise ConfigError(
                "the model's index names a file outside its folder",
                where=key,
                got=f"{folder}: {file}",
                expected="files beside the index",
                remedy="download or save the model again",
            )
    pickled = [file for file in weights if file.suffix not in (".json", ".safetensors")]
    if pickled or (needs_weights and not weights and (pickled := _pickled_weights(folder))):
        raise _refused(folder, pickled, key)
    if needs_weights and not weights:
        raise ConfigError(
            "the model folder has no weights",
            where=key,
            got=str(folder),
            expected="model.safetensors or its index beside config.json; only safetensors are downloaded",
            remedy=f"set {key} to a complete model folder; save_pretrained writes safetensors",
        )
    if has_adapter:
        raise ConfigError(
            "the model folder contains an adapter beside full weights",
            where=key,
            got=str(folder / ADAPTER_CONFIG),
            expected="full weights only: transformers would apply the adapter to them",
            remedy="merge the adapter into the weights, or move its files to another folder",
        )


def _to_start_from(adapter: Path) -> str:
    """Return the keys by which training starts from an adapter."""
    base = read_model_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
    return (
        f"to train it further: model.path={base} 'model.adapter={{path: {adapter}}}'; "
        "or merge it into its base and name the result"
    )


def _below(folder: Path) -> str:
    """Return a question after the models in a folder such as a run directory."""
    found = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_FILE}"))[:3]
    if found:
        return f"did you mean {' or '.join(found)}?"
    return "name the folder that save_pretrained wrote or that was downloaded from the hub"


def check_adapter(folder: Path, key: str) -> None:
    """Check that the weights of an adapter, if it has any, are in safetensors."""
    if not (folder / ADAPTER_WEIGHTS).is_file() and (pickled := _pickled_weights(folder)):
        raise _refused(folder, pickled, key)


def _pickled_weights(folder: Path) -> list[Path]:
    """Return pickles that can be weights: not the states of a trainer beside them."""
    found = sorted(file for pattern in PICKLED for file in folder.glob(pattern))
    return [file for file in found if "model" in file.name or file.name.startswith("consolidated")]


def _refused(folder: Path, pickled: list[Path], key: str) -> ConfigError:
    names = ", ".join(str(file.relative_to(folder)) for file in pickled[:3])
    return ConfigError(
        "the weights are pickled: reading such a file can run code that is in it",
        where=key,
        got=f"{folder}: {names} ({len(pickled)} in all)",
        expected="weights in safetensors",
        remedy="convert them once, where you trust them: save_pretrained writes safetensors",
    )


def check_weights(files: Iterable[Path], key: str) -> None:
    """Check that the files of `weight_files` exist, and that safetensors are whole, by their headers.

    Raises:
        ConfigError: a file is missing, incomplete or no safetensors file.
    """
    files = list(files)
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(
            "shards of the model's weights are missing",
            where=key,
            got=f"{missing[0].parent} without {', '.join(file.name for file in missing[:3])} "
            f"({len(missing)} in all)",
            expected="every file that the index of the weights names",
            remedy="download or copy the missing files",
        )
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                "a weight file of the model cannot be read",
                where=key,
                got=f"{file}: {first_line(error)}",
                expected="a whole safetensors file",
                remedy="download or copy the file again (git lfs pull, if it is a pointer)",
            ) from error
