"""Read weights from safetensors only: other formats are pickles, which can run code."""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from dpo_dist.errors import ConfigError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
"""Patterns of files that torch.save and pickle write."""
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_CLASS = re.compile(r"[A-Za-z0-9]{1,80}For[A-Za-z]{1,40}")


def check_safetensors(folder: Path, files: Iterable[Path], key: str) -> None:
    """Check that the weights of a model are in safetensors inside its folder, or are not there.

    Args:
        folder: of the model.
        files: that transformers would load: weights, with the index before its shards.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: they are pickles, or an index names a file outside the folder.
    """
    files = list(files)
    weights = [file for file in files if file.suffix != ".json"]
    for file in weights:
        _check_inside(file, folder, key)
    pickled = [file for file in weights if file.suffix != ".safetensors"]
    if not files:
        pickled = _pickled_weights(folder)
    if pickled:
        raise _refused(folder, pickled, key, _conversion(folder))


def check_adapter(folder: Path, key: str) -> None:
    """Check that the weights of an adapter, if it has any, are in safetensors.

    Raises:
        ConfigError: they are a pickle.
    """
    if not (folder / _ADAPTER_WEIGHTS).is_file() and (pickled := _pickled_weights(folder)):
        command = (
            "from peft import load_peft_weights as read; from safetensors.torch import save_file; "
            f"save_file(read({str(folder)!r}, device='cpu'), {str(folder / _ADAPTER_WEIGHTS)!r})"
        )
        raise _refused(folder, pickled, key, f"python -c {shlex.quote(command)}")


def _pickled_weights(folder: Path) -> list[Path]:
    """Return pickles that can be weights: not the states of a trainer beside them."""
    found = sorted(file for pattern in PICKLED for file in folder.glob(pattern))
    return [file for file in found if "model" in file.name or file.name.startswith("consolidated")]


def _check_inside(file: Path, folder: Path, key: str) -> None:
    """Check that an index names a file of its folder; the cache of the Hub has links to other folders."""
    relative = file.relative_to(folder) if file.is_relative_to(folder) else None
    if relative is None or ".." in relative.parts:
        raise ConfigError(
            "the model's index names a file outside its folder",
            where=key,
            got=f"{folder}: {file}",
            expected="files beside the index",
            remedy="download or save the model again",
        )


def _refused(folder: Path, pickled: list[Path], key: str, command: str) -> ConfigError:
    names = ", ".join(str(file.relative_to(folder)) for file in pickled[:3])
    more = f" ({len(pickled)} in all)" if len(pickled) > 3 else ""
    return ConfigError(
        "the weights are pickled: reading such a file can run code that is in it",
        where=key,
        got=f"{folder}: {names}{more}",
        expected="weights in safetensors",
        remedy=f"convert them once, where you trust them: {command}",
    )


def _conversion(folder: Path) -> str:
    """Return the command that writes a copy of a model in safetensors beside its folder."""
    try:
        named = json.loads((folder / "config.json").read_bytes())["architectures"][0]
        kind = named if _CLASS.fullmatch(named) else "AutoModelForCausalLM"
    except (OSError, ValueError, LookupError, TypeError):
        kind = "AutoModelForCausalLM"
    target = f"{folder.name}-safetensors"
    command = (
        f"import transformers as t; source, target = {str(folder)!r}, {target!r}; "
        f"t.{kind}.from_pretrained(source, dtype='auto').save_pretrained(target); "
        "t.AutoTokenizer.from_pretrained(source).save_pretrained(target)"
    )
    return f"python -c {shlex.quote(command)}"
