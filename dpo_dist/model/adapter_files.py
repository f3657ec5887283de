"""The files of the adapter that a policy starts from; imports no torch, so that errors appear at once."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_dist.config.adapter_schema import AdapterConfig, AdapterVariant, splits_base
from dpo_dist.config.schema import ModelConfig, Quantization
from dpo_dist.errors import ConfigError
from dpo_dist.model.adapter_checks import check_matrices, check_values, unreadable, unsupported
from dpo_dist.model.folder import has_tokenizer, is_adapter, model_folder, read_model_json

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
    if isinstance(adapter.target_modules, list):
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
