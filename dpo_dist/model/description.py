"""The files that describe a written model beside its weights: those of its base, but for what must differ.

Training switches dropout and noise off in the configuration of a loaded model (`model.load`), and
transformers writes configurations in its newest form. Users train and evaluate with what the authors wrote.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import GENERATION_CONFIG_NAME

from dpo_dist.model.folder import CONFIG_FILE
from dpo_dist.model.supported import is_noise
from dpo_dist.small_files import read_small

_NAMES_OF_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_DTYPE_KEYS = ("dtype", "torch_dtype")
# How a model reads images and sounds.
_PROCESSORS = "*processor_config.json"
_OF_ALL_PARTS = ("tie_word_embeddings",)


def read_description(base: Path) -> dict[str, bytes]:
    """Return files of a model folder by name, as far as there are such.

    They are config.json, generation_config.json, and those that say how it reads images and sounds.
    """
    files = [base / name for name in (CONFIG_FILE, GENERATION_CONFIG_NAME)]
    files += sorted(base.glob(_PROCESSORS))
    return {file.name: read_small(file) for file in files if file.is_file()}


def restore_description(folder: Path, files: Mapping[str, bytes], dtype: torch.dtype) -> None:
    """Give a model folder that transformers wrote the description of its base.

    config.json differs from the base's in `dtype`, in `architectures` if they named no model of language, and
    in `transformers_weights`. Of a base that also reads images or sounds, and of which transformers wrote the
    text model only, it is the one of transformers with the base's dropout and noise; the files about images
    are not written.

    Args:
        folder: with config.json.
        files: from `read_description` of the base.
        dtype: of the written weights.
    """
    file = folder / CONFIG_FILE
    written, base = json.loads(file.read_bytes()), json.loads(files[CONFIG_FILE])
    # Code of the model's own may give it a type that config.json does not name.
    if base.get("model_type", written["model_type"]) == written["model_type"]:
        content = base | {"architectures": written["architectures"]}
        for name in files.keys() - {CONFIG_FILE, GENERATION_CONFIG_NAME}:
            (folder / name).write_bytes(files[name])
    else:
        content = _with_noise_of(base.get("text_config") or {}, written)
    _write(file, content, dtype)
    if GENERATION_CONFIG_NAME in files:
        (folder / GENERATION_CONFIG_NAME).write_bytes(files[GENERATION_CONFIG_NAME])
    else:  # transformers made one of config.json
        (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)


def copy_description(base: Path, folder: Path, dtype: torch.dtype | None, changes: dict[str, object]) -> None:
    """Copy the description of a base, beside other weights, with the code in its folder.

    Args:
        base: its folder.
        folder: of the result.
        dtype: of the result's weights, if it is another one.
        changes: values of keys of config.json, and of its part about text if it has one.
    """
    content = json.loads((base / CONFIG_FILE).read_bytes())
    if isinstance(text := content.get("text_config"), dict):
        content["text_config"] = text | changes
        changes = {key: value for key, value in changes.items() if key in content or key in _OF_ALL_PARTS}
    _write(folder / CONFIG_FILE, content | changes, dtype)
    for file in (
        file for pattern in (GENERATION_CONFIG_NAME, _PROCESSORS, "*.py") for file in base.glob(pattern)
    ):
        shutil.copyfile(file, folder / file.name)


def _with_noise_of(base: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Return `written` with the base's dropout and noise; options that the base lacks keep their defaults."""
    kind = str(written.get("model_type"))
    kept = {name: value for name, value in written.items() if not is_noise(name, value, kind)}
    return kept | {name: base[name] for name in written if name not in kept and name in base}


def _write(file: Path, content: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Write config.json; of the configurations of parts, the ones that name a precision get `dtype`, too."""
    content.pop("transformers_weights", None)  # names a file of the base
    if dtype is not None:
        name = _NAMES_OF_DTYPES[dtype]
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            if part is content or any(key in part for key in _DTYPE_KEYS):
                _set_dtype(part, name)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_dtype(part: dict[str, Any], name: str) -> None:
    if all(part.get(key, name) == name for key in _DTYPE_KEYS) and any(key in part for key in _DTYPE_KEYS):
        return
    part.pop("torch_dtype", None)
    part["dtype"] = name
