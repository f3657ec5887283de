"""From `model.path` to a local folder of model files; imports no torch, so that mistakes are told at once."""

import difflib
from pathlib import Path

from dpo_dist.errors import ConfigError
from dpo_dist.model.files import ADAPTER_FILE, CONFIG_FILE, check_no_adapter, weight_files

_TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model")
_NO_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx"]


def model_folder(path: str, revision: str | None, key: str = "model.path") -> Path:
    """The local folder of a model: `path` itself, or the hub's snapshot of it, which may be downloaded.

    Args:
        path: a folder or a hub name.
        revision: of the hub name.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: there is no such model, it holds no weights, or an adapter beside them.
    """
    folder = local_model_folder(path, revision, key)
    if folder is None:
        folder = _snapshot(path, revision, key)
        _check_files(folder, key)
    return folder


def description_folder(path: str, revision: str | None, key: str = "model.path") -> Path:
    """As `model_folder`, but weights of a model on the hub are not downloaded."""
    folder = local_model_folder(path, revision, key)
    return _snapshot(path, revision, key, ignored=_NO_WEIGHTS) if folder is None else folder


def local_model_folder(path: str, revision: str | None, key: str = "model.path") -> Path | None:
    """`model_folder` of a local path; None for a name on the hub, which is not asked.

    Raises:
        ConfigError: there is no such folder, or it is no model.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise ConfigError(
                "the model is a file",
                where=key,
                got=path,
                expected="the folder that has config.json and the weights",
                remedy=f"name its folder: {folder.parent}",
            )
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise _missing(folder, key, path)
        return None
    if revision is not None:
        raise ConfigError(
            "a revision has no effect on a local folder",
            where=key.replace("path", "revision"),
            got=f"{revision} with {path}",
            remedy="remove it, or name the model on the hub",
        )
    _check_files(folder, key)
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer's files."""
    return any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a policy's folder without a tokenizer's files.

    Raises:
        ConfigError: there are none.
    """
    if not has_tokenizer(folder):
        raise ConfigError(
            "the model folder has no tokenizer",
            where="model.path",
            got=str(folder),
            expected="tokenizer.json, tokenizer.model or vocab.json beside config.json",
            remedy="put the tokenizer's files beside config.json",
        )


def _check_files(folder: Path, key: str) -> None:
    if not (folder / CONFIG_FILE).is_file():
        is_adapter = (folder / ADAPTER_FILE).is_file()
        raise ConfigError(
            "the model folder has no config.json",
            where=key,
            got=f"{folder}, an adapter" if is_adapter else str(folder),
            expected="a transformers model: config.json, weights, tokenizer",
            remedy="merge the adapter into its base and name the result"
            if is_adapter
            else "name the folder that save_pretrained wrote or that was downloaded from the hub",
        )
    if not weight_files(folder):
        raise ConfigError(
            "the model folder has no weights",
            where=key,
            got=str(folder),
            expected="model.safetensors or pytorch_model.bin, or the index of one, beside config.json",
            remedy="point the key at a complete model folder",
        )
    check_no_adapter(folder, key)


def _missing(folder: Path, key: str, path: str) -> ConfigError:
    names = [below.name for below in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=3)
    return ConfigError(
        "there is no such model folder",
        where=key,
        got=path,
        remedy=f"did you mean {' or '.join(str(folder.parent / name) for name in near)}?"
        if near
        else "check the path, relative to where you are; a model on the hub is named organisation/name",
    )


def _snapshot(path: str, revision: str | None, key: str, ignored: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import, and only needed here)
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        return Path(snapshot_download(path, revision=revision, ignore_patterns=ignored))
    except (OSError, HFValidationError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            "there is no such model folder, and the hub did not give it",
            where=key,
            got=f"{path} ({reason})",
            remedy="check the path or the hub name, and that the hub can be reached or is cached",
        ) from None
