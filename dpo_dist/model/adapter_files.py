"""The files of the adapter that a policy starts from; imports no torch, so that errors appear at once."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_dist.config.schema import AdapterConfig, AdapterVariant, ModelConfig, Quantization, splits_base
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.model.folder import has_tokenizer, is_adapter, model_folder, read_model_json, weight_files

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


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""Of every name in the weights of an adapter folder."""
_KEY = "model.adapter.path"
_LORA_WEIGHTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# Initializations that have moved a part of the base's weights into the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of peft by which an adapter is more than low-rank matrices on linear layers.
_OTHER_FORMS = (
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "monteclora_config",
    "velora_config",
)


def start_folder(config: ModelConfig) -> Path | None:
    """Return the local folder of `model.adapter.path`, downloaded if needed; None if there is none.

    Raises:
        ConfigError: it does not exist, is not a LoRA adapter, or contradicts the other keys of the adapter.
    """
    adapter: AdapterConfig | None = config.adapter
    if adapter is None or adapter.path is None:
        return None
    folder = model_folder(adapter.path, adapter.revision, _KEY, accepts_adapter=True)
    check_start(adapter, folder)
    if (
        config.quantization is Quantization.int8
        and read_model_json(folder / ADAPTER_CONFIG).get("use_dora") is True
    ):
        raise ConfigError(
            "DoRA needs the norms of the base's weights, which peft cannot compute from 8-bit ones",
            where="model.adapter.path, model.quantization",
            got=f"{folder} with use_dora, int8",
            remedy="set model.quantization=nf4 or null",
        )
    return folder


def check_start(adapter: AdapterConfig, folder: Path) -> None:
    """Check that a policy can start from the adapter in `folder`, as `adapter` says.

    Raises:
        ConfigError: it cannot.
    """
    if not is_adapter(folder):
        raise ConfigError(
            "the adapter to start from is a whole model",
            where=_KEY,
            got=str(folder),
            expected="a folder with adapter_config.json and without config.json",
            remedy="set model.path to it, and remove model.adapter.path",
        )
    found = read_model_json(folder / ADAPTER_CONFIG)
    _check_form(found, folder)
    own = _as_config(found, folder)
    if adapter.on_top:
        if own.variant is AdapterVariant.dora:
            raise ConfigError(
                "a new adapter cannot be trained above DoRA, which scales the weights that it changes",
                where="model.adapter.on_top, model.adapter.path",
                got=f"true, {folder}",
                remedy="set model.adapter.on_top=false to continue it, or merge it into its base",
            )
        return
    given = {"r": adapter.r, "alpha": adapter.alpha, "variant": adapter.variant}
    read = {"r": own.r, "alpha": own.alpha, "variant": own.variant}
    if other := [name for name, value in given.items() if value not in (None, read[name])]:
        raise _contradiction(other, *(", ".join(str(of[name]) for name in other) for of in (given, read)))
    if isinstance(adapter.target_modules, list) and isinstance(own.target_modules, list):
        _check_same_names("target_modules", adapter.target_modules, own.target_modules)
    if adapter.modules_to_save is not None:
        _check_same_names("modules_to_save", adapter.modules_to_save, own.modules_to_save or [])


def check_all_linear(adapter: AdapterConfig, start: Path, layers: Collection[str]) -> None:
    """Check that the adapter in `start` is on all linear layers of its base, if `adapter` says so.

    Args:
        adapter: that continues the one in `start`.
        start: from `start_folder`.
        layers: all linear layers of the base.

    Raises:
        ConfigError: it is on others.
    """
    own = adapted_layers_on_disk(start)
    if adapter.target_modules == "all-linear" and set(own) != set(layers) - set(saved_on_disk(start)):
        raise _other_names("target_modules", ["all-linear"], own)


def _check_same_names(key: str, given: list[str], layers: list[str]) -> None:
    named = {layer for layer in layers for one in given if f".{layer}".endswith(f".{one}")}
    used = {one for one in given for layer in layers if f".{layer}".endswith(f".{one}")}
    if named != set(layers) or used != set(given):
        raise _other_names(key, given, layers)


def _other_names(key: str, given: list[str], layers: list[str]) -> ConfigError:
    names = sorted({layer.rpartition(".")[2] for layer in layers})
    return _contradiction([key], ", ".join(given) or "none", ", ".join(names) or "none")


def trained_adapter(config: ModelConfig, start: Path | None) -> AdapterConfig | None:
    """Return the adapter that is trained: that of the configuration, or the one of `start` that it continues.

    Args:
        config: of the model.
        start: from `start_folder`.
    """
    adapter: AdapterConfig | None = config.adapter
    if adapter is None or start is None or adapter.on_top:
        return adapter
    own = _as_config(read_model_json(start / ADAPTER_CONFIG), start)
    return replace(own, path=adapter.path, revision=adapter.revision)


def initial_values(adapter: AdapterConfig | None, folder: Path) -> Path | None:
    """Return the folder of the initial values of an adapter, if training subtracts them.

    Args:
        adapter: of the configuration.
        folder: `RunFolder.initial_adapter`.

    Raises:
        ConfigError: it is missing.
    """
    if adapter is None or not splits_base(adapter.init):
        return None
    if not folder.is_dir():
        raise ConfigError(
            "the initial values of the adapter are missing",
            where="model.adapter.init",
            got=str(folder),
            expected="the folder that the first start of the run wrote",
            remedy="use a checkpoint in the directory of its run",
        )
    return folder


def untrained_parts(
    adapter: AdapterConfig | None, start: Path | None, initial: Path
) -> list[tuple[float, Path]]:
    """Return the adapters that are part of a policy beside the trained one, with their coefficients.

    Args:
        adapter: of the configuration.
        start: from `start_folder`.
        initial: as in `initial_values`; the initial values are subtracted.

    Raises:
        ConfigError: as `initial_values`.
    """
    parts: list[tuple[float, Path]] = []
    if adapter is not None and adapter.on_top and start is not None:
        parts.append((1.0, start))
    if (subtracted := initial_values(adapter, initial)) is not None:
        parts.append((-1.0, subtracted))
    return parts


def adapted_layers_on_disk(folder: Path) -> list[str]:
    """Return the names of the layers for which an adapter folder has matrices.

    Raises:
        ConfigError: its weights cannot be read, or are not those of LoRA on linear layers and of
            `modules_to_save`.
    """
    layers, _ = _modules_on_disk(folder)
    return layers


def saved_on_disk(folder: Path) -> list[str]:
    """Return the names of the modules that an adapter folder has in full.

    Raises:
        ConfigError: as `adapted_layers_on_disk`.
    """
    _, saved = _modules_on_disk(folder)
    return saved


def _modules_on_disk(folder: Path) -> tuple[list[str], list[str]]:
    try:
        if (folder / ADAPTER_WEIGHTS).is_fifo():  # to open it would wait for a writer
            raise OSError("it is a pipe")
        with safe_open(folder / ADAPTER_WEIGHTS, "np") as weights:
            names = sorted(name for name in weights.keys() if not is_repeated(name))  # noqa: SIM118
            dimensions = {name: len(weights.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise unreadable(folder / ADAPTER_WEIGHTS, error) from error
    check_matrices(dimensions, PEFT_PREFIX, folder)
    found: Any = read_model_json(folder / ADAPTER_CONFIG)
    check_values(found, folder)
    declared = tuple(found.get("modules_to_save") or ())
    short = [name.removeprefix(PEFT_PREFIX) for name in names]
    layers = {name.rpartition(".lora_")[0] for name in short if name.endswith(_LORA_WEIGHTS)}
    others = {name: name.rpartition(".")[0] for name in short if not name.endswith(_LORA_WEIGHTS)}
    foreign = [name for name, module in others.items() if not module.endswith(declared)]
    if foreign or not layers:
        raise unsupported(folder, f"{len(foreign)} other weights, {foreign[0]}" if foreign else "no weights")
    return sorted(layers), sorted(set(others.values()))


def is_repeated(name: str) -> bool:
    """Return whether a weight in an adapter's file is not used.

    Of resized embeddings that it trains in full, peft writes the original and the copy a second time.
    """
    return ".original_module." in name or ".modules_to_save." in name


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """Return the folder whose tokenizer and chat template a policy has: the adapter's, if it has them."""
    return adapter if adapter is not None and has_tokenizer(adapter) else base


def _as_config(found: Mapping[str, Any], folder: Path) -> AdapterConfig:
    variant = (
        AdapterVariant.dora
        if found.get("use_dora")
        else AdapterVariant.rslora
        if found.get("use_rslora")
        else AdapterVariant.lora
    )
    layers: Any = adapted_layers_on_disk(folder)
    return AdapterConfig(
        r=found.get("r", 8),
        alpha=float(found.get("lora_alpha", 8)),
        target_modules=layers,
        variant=variant,
        modules_to_save=saved_on_disk(folder),
    )


def _check_form(found: Mapping[str, Any], folder: Path) -> None:
    init = str(found.get("init_lora_weights", True)).lower()
    if found.get("peft_type") != "LORA":
        raise unsupported(folder, f"peft_type {found.get('peft_type')}")
    if found.get("bias", "none") != "none":
        raise unsupported(folder, f"bias: {found['bias']}")
    if found.get("ensure_weight_tying") and found.get("modules_to_save"):
        raise unsupported(folder, "modules_to_save with ensure_weight_tying")
    if other := [name for name in _OTHER_FORMS if found.get(name)]:
        raise unsupported(folder, ", ".join(other))
    if init.startswith(_CHANGES_BASE):
        raise ConfigError(
            "the adapter belongs to a base whose weights its initialization has changed",
            where=_KEY,
            got=f"{folder} with init_lora_weights: {init}",
            expected="a LoRA adapter of the original base",
            remedy="convert it by peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _contradiction(names: Sequence[str], given: str, read: str) -> ConfigError:
    keys = [f"model.adapter.{name}" for name in names]
    return ConfigError(
        f"the adapter of model.adapter.path has another {', '.join(names)}",
        where=", ".join(keys),
        got=given,
        expected=read,
        remedy=f"set {' '.join(f'{key}=null' for key in keys)}, or model.adapter.on_top=true for a new one",
    )


def base_notes(config: ModelConfig, start: Path | None) -> list[str]:
    """Return a warning if the adapter to start from names another base than `model.path`.

    Args:
        config: of the model.
        start: from `adapter_files.start_folder`.
    """
    if start is None or not (named := other_base(start, config)):
        return []
    return [
        f"warning: the adapter of model.adapter.path was trained on {named}, model.path is {config.path}; on "
        "other weights than its own an adapter is noise"
    ]


def other_base(adapter: Path, config: ModelConfig) -> str:
    """Return the base that an adapter folder names, if it is another than `model.path`; else "".

    Only the last parts of both names are compared: folders are copied, and files have no other trace.
    """
    named, local = _named_base(adapter), Path(config.path).expanduser()
    own = local.resolve().name if local.is_dir() else local.name
    return "" if not named.strip() or Path(named).name.lower() == own.lower() else named


def check_sizes(base: Path, start: Path) -> None:
    """Check that the matrices of an adapter have the sizes of its base's weights; reads no weights.

    Weights of another name in the files of the base are compared when the model is loaded.

    Args:
        base: a local model folder.
        start: from `adapter_files.start_folder`.

    Raises:
        ConfigError: they have other sizes.
    """
    with safe_open(start / ADAPTER_WEIGHTS, "np") as content:
        names = list(content.keys())
        shapes = {name.removeprefix(PEFT_PREFIX): content.get_slice(name).get_shape() for name in names}
    for file in (file for file in weight_files(base) if file.suffix == ".safetensors"):
        with safe_open(file, "np") as content:
            for name in content.keys():  # noqa: SIM118  (the file is not iterable)
                layer = name.removesuffix(".weight")
                down, up = shapes.get(f"{layer}.lora_A.weight"), shapes.get(f"{layer}.lora_B.weight")
                own = content.get_slice(name).get_shape() if down and up else []
                if down and up and sorted(own) != sorted((up[0], down[1])):
                    raise _other_sizes(base, start, f"{name} of {own}", [up[0], down[1]])


def _other_sizes(base: Path, start: Path, own: str, wanted: list[int]) -> ConfigError:
    named = _named_base(start)
    return ConfigError(
        "the adapter belongs to a model of other sizes",
        where="model.path, model.adapter.path",
        got=f"{own} in {base}",
        expected=f"{wanted}, as in {start}",
        remedy=f"set model.path to the base of the adapter{f', {named}' if named else ''}",
    )


def _named_base(start: Path) -> str:
    named = read_model_json(start / ADAPTER_CONFIG).get("base_model_name_or_path")
    return named if isinstance(named, str) else ""
