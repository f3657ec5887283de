"""The files of the adapter that a policy starts from; imports no torch, so that errors appear at once."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_dist.config.schema import AdapterConfig, AdapterVariant, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.model.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    has_tokenizer,
    is_adapter,
    model_folder,
    read_model_json,
)

PEFT_PREFIX = "base_model.model."
"""Of every name in the weights of an adapter folder."""
_KEY = "model.adapter.path"
LORA_WEIGHTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
"""Ends of the names of all other weights than those of `modules_to_save`."""
# Initializations that have moved a part of the base's weights into the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of peft by which an adapter is more than low-rank matrices on linear layers.
_OTHER_FORMS = (
    "alora_invocation_tokens layer_replication lora_bias target_parameters trainable_token_indices use_qalora"
)
# What an adapter is, which is read from the one that is continued.
_FORM = ("r", "alpha", "variant", "target_modules", "modules_to_save")


def start_folder(config: ModelConfig) -> Path | None:
    """Return the local folder of `model.adapter.path`, downloaded if needed; None if there is none."""
    adapter: AdapterConfig | None = config.adapter
    if adapter is None or adapter.path is None:
        return None
    folder = model_folder(adapter.path, None, _KEY, accepts_adapter=True)
    if not is_adapter(folder):
        raise ConfigError(
            "the adapter to start from is a whole model",
            where=_KEY,
            got=str(folder),
            expected="a folder with adapter_config.json and without config.json",
            remedy="set model.path to it, and remove model.adapter.path",
        )
    is_dora = _checked_config(folder).get("use_dora") is True
    modules_on_disk(folder)
    given = [f"model.adapter.{name}" for name in _FORM if getattr(adapter, name) is not None]
    if given:
        raise ConfigError(
            "an adapter that is continued stays what it is",
            where=", ".join(given),
            got=str(folder),
            remedy=f"set {' '.join(f'{key}=null' for key in given)}; for a new adapter merge the first into "
            "its base, and remove model.adapter.path",
        )
    if is_dora and config.quantization is Quantization.int8:
        raise ConfigError(
            "DoRA needs the norms of the base's weights, which peft cannot compute from 8-bit ones",
            where="model.adapter.path, model.quantization",
            got=f"{folder} with use_dora, int8",
            remedy="set model.quantization=nf4 or null",
        )
    return folder


def trained_adapter(config: ModelConfig, start: Path | None) -> AdapterConfig | None:
    """Return the adapter that is trained: that of the configuration, or that of `start`."""
    adapter: AdapterConfig | None = config.adapter
    if adapter is None or start is None:
        return adapter
    found: Any = read_model_json(start / ADAPTER_CONFIG)
    variant = AdapterVariant.rslora if found.get("use_rslora") else AdapterVariant.lora
    layers, saved = modules_on_disk(start)
    return AdapterConfig(
        path=adapter.path,
        r=found.get("r", 8),
        alpha=float(found.get("lora_alpha", 8)),
        target_modules=layers,
        variant=AdapterVariant.dora if found.get("use_dora") else variant,
        modules_to_save=saved,
    )


def modules_on_disk(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the layers for which an adapter folder has matrices, and of its modules in full."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "np") as weights:
            names = [name.removeprefix(PEFT_PREFIX) for name in weights.keys() if not is_repeated(name)]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder / ADAPTER_WEIGHTS, error) from error
    found: Any = read_model_json(folder / ADAPTER_CONFIG)
    layers = {name.rpartition(".lora_")[0] for name in names if name.endswith(LORA_WEIGHTS)}
    saved = {name.rpartition(".")[0] for name in names if not name.endswith(LORA_WEIGHTS)}
    foreign = [module for module in saved if not module.endswith(tuple(found.get("modules_to_save") or ()))]
    if foreign or not layers:
        raise _unsupported(folder, f"other weights, of {foreign[0]}" if foreign else "no weights")
    return sorted(layers), sorted(saved)


def is_repeated(name: str) -> bool:
    """Return whether a weight in an adapter's file is not used.

    Of resized embeddings that it trains in full, peft writes the original and the copy a second time.
    """
    return ".original_module." in name or ".modules_to_save." in name


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """Return the folder whose tokenizer and chat template a policy has: the adapter's, if it has them."""
    return adapter if adapter is not None and has_tokenizer(adapter) else base


def _checked_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter on linear layers, in which a base keeps its weights."""
    found: dict[str, Any] = read_model_json(folder / ADAPTER_CONFIG)
    other = [name for name in _OTHER_FORMS.split() if found.get(name)]
    if found.get("peft_type") != "LORA":
        other.append(f"peft_type {found.get('peft_type')}")
    if found.get("bias", "none") != "none":
        other.append(f"bias: {found['bias']}")
    if found.get("ensure_weight_tying") and found.get("modules_to_save"):
        other.append("modules_to_save with ensure_weight_tying")
    if (init := str(found.get("init_lora_weights", True)).lower()).startswith(_CHANGES_BASE):
        other.append(f"init_lora_weights: {init}, which has changed the weights of the base")
    if other:
        raise _unsupported(folder, ", ".join(other))
    return found


def _unreadable(file: Path, error: Exception) -> ConfigError:
    """Return the error of an adapter whose weights `file` is missing, incomplete or no safetensors file."""
    return ConfigError(
        "the weights of the adapter cannot be read",
        where=_KEY,
        got=f"{file}: {first_line(error)}",
        remedy="save or download the adapter again",
    )


def _unsupported(folder: Path, got: str) -> ConfigError:
    """Return the error of an adapter from which no training starts."""
    return ConfigError(
        "training cannot start from this kind of adapter",
        where=_KEY,
        got=f"{folder}: {got}",
        expected="LoRA, rsLoRA or DoRA on linear layers, without biases; modules_to_save",
        remedy="merge it into its base by peft's merge_and_unload, and set model.path to the result",
    )


def base_notes(config: ModelConfig, adapter: Path | None) -> list[str]:
    """Return a warning if an adapter names another base than `model.path`, by the last part of its name."""
    content = {} if adapter is None else read_model_json(adapter / ADAPTER_CONFIG)
    named = str(content.get("base_model_name_or_path") or "")
    last, own = (Path(path).expanduser().resolve().name.lower() for path in (named, config.path))
    if not named or last == own:
        return []
    return [
        f"warning: the adapter {adapter} was trained on {named}, model.path is {config.path}; on other "
        "weights than its own an adapter is noise"
    ]
