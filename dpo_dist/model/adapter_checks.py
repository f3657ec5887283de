"""Checks of the values in the files of an adapter folder, which peft takes as they are; imports no torch."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dpo_dist.errors import ConfigError, first_line

_A, _B = ".lora_A.weight", ".lora_B.weight"
_NUMBERS = ("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")
_DEFAULT = 8


def check_values(found: Mapping[str, Any], folder: Path) -> None:
    """Check the types of the values that decide about the matrices of an adapter, and modules in full.

    Args:
        found: content of adapter_config.json.
        folder: of the adapter.

    Raises:
        ConfigError: one has another type, or is no finite number.
    """
    ranks, alphas = (_with_pattern(found, *names) for names in _NUMBERS)
    saved = found.get("modules_to_save")
    faults = {
        "r, rank_pattern": not all(_is_rank(rank) for rank in ranks),
        "lora_alpha, alpha_pattern": not all(_is_finite(alpha) for alpha in alphas),
        "modules_to_save": saved is not None
        and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)),
    }
    for names in (names for names, is_wrong in faults.items() if is_wrong):
        raise unsupported(folder, ", ".join(f"{name}: {found.get(name)}"[:200] for name in names.split(", ")))


def _with_pattern(found: Mapping[str, Any], name: str, pattern: str) -> list[Any]:
    """Return a value of all layers and those of some; None in place of a pattern of another type."""
    of_some = found.get(pattern) or {}
    return [found.get(name, _DEFAULT), *(of_some.values() if isinstance(of_some, dict) else [None])]


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float is
        return False


def check_matrices(dimensions: Mapping[str, int], prefix: str, folder: Path) -> None:
    """Check that each A in the weights of an adapter has its B, that both are matrices, and their names.

    Args:
        dimensions: number of dimensions by name in the file.
        prefix: of every name.
        folder: of the adapter.

    Raises:
        ConfigError: one has not, is none, or has another name.
    """
    matrices = {name: number for name, number in dimensions.items() if name.endswith((_A, _B))}
    wrong = [name for name in dimensions if not name.startswith(prefix)]
    wrong += [name for name, number in matrices.items() if number != 2 or _partner(name) not in matrices]
    if wrong:
        raise unsupported(folder, f"{_first(wrong)}, which is no matrix of a pair A and B")


def _partner(name: str) -> str:
    return name.removesuffix(_A) + _B if name.endswith(_A) else name.removesuffix(_B) + _A


def _first(names: Collection[str]) -> str:
    return f"{min(names)} ({len(names)} in all)"


def unreadable(file: Path, error: Exception) -> ConfigError:
    """Return the error of an adapter whose weights `file` is missing, incomplete or no safetensors file."""
    return ConfigError(
        "the weights of the adapter cannot be read",
        where="model.adapter.path",
        got=f"{file}: {first_line(error)}",
        remedy="save or download the adapter again",
    )


def unsupported(folder: Path, got: str) -> ConfigError:
    """Return the error of an adapter from which no training starts."""
    return ConfigError(
        "training cannot start from this kind of adapter",
        where="model.adapter.path",
        got=f"{folder}: {got}",
        expected="LoRA, rsLoRA or DoRA on linear layers, without biases; modules_to_save",
        remedy="merge it into its base by peft's merge_and_unload, and set model.path to the result",
    )
