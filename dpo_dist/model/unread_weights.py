"""Find tensors in the weight files of a model that its architecture does not read."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import weight_files

log = logging.getLogger(__name__)


def unread_when_sharded(causal_lm: Any, folder: Path) -> set[str]:
    """Return the names of tensors in the weight files that were not loaded; reads only names.

    Under ZeRO-3 transformers does not report them.

    Args:
        causal_lm: the loaded model; its weights may be sharded.
        folder: of the model.
    """
    loaded = causal_lm.state_dict()
    mapping = getattr(causal_lm, "_weight_conversions", None) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = causal_lm.base_model_prefix
    unread = set()
    for file in weight_files(folder):
        for name in _tensor_names(file):
            renamed, _ = rename_source_key(
                name, renamings, converters, base_model_prefix=prefix, meta_state_dict=loaded
            )
            if renamed not in loaded and f"{prefix}.{renamed}" not in loaded:
                unread.add(name)
    info = LoadStateDictInfo(set(), unread, set(), [], {}, set())
    causal_lm._adjust_missing_and_unexpected_keys(info)  # names that the architecture ignores
    found: set[str] = info.unexpected_keys
    return found


def _tensor_names(file: Path) -> list[str]:
    if file.suffix == ".json":  # an index
        return []
    with safe_open(file, "pt") as content:
        return list(content.keys())


def check_all_weights_read(causal_lm: Any, unread: list[str], folder: Path, key: str = "model.path") -> None:
    """Check that the architecture reads all tensors that the files contain for its modules.

    Tensors of modules that the model does not have (a value head, layers that predict further tokens) are
    only logged: log-probs do not depend on them. Layers beyond those that config.json counts are an error.

    Args:
        causal_lm: the loaded model.
        unread: names of tensors in the files that were not loaded.
        folder: of the model, for the error.
        key: the configuration key to name in the error.

    Raises:
        ConfigError: a module of the model has further tensors in the files: the model is another function.
    """
    if not unread:
        return
    modules = dict(causal_lm.named_modules())
    # Layers that predict further tokens follow the others in the same list (DeepSeek-V3, GLM-4.5).
    predicting = getattr(causal_lm.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    foreign: list[str] = []
    own: list[str] = []
    for name in unread:
        parts = name.split(".")
        depth = next(n for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules)
        owner = ".".join(parts[:depth])
        is_foreign = owner in ("", causal_lm.base_model_prefix)
        if isinstance(modules[owner], torch.nn.ModuleList) and parts[depth].isdecimal():
            is_foreign = int(parts[depth]) < len(modules[owner]) + predicting
        (foreign if is_foreign else own).append(name)
    if own:
        raise ConfigError(
            f"the weight files have tensors that {type(causal_lm).__name__} does not read",
            where=key,
            got=f"{folder} with {', '.join(own[:5])} ({len(own)} in all)",
            expected="weights and config.json of one architecture",
            remedy="check model_type and the options in config.json, such as num_hidden_layers",
        )
    log.warning(
        "%s: not used by %s: %s (%d tensors in all)",
        folder,
        type(causal_lm).__name__,
        ", ".join(foreign[:5]),
        len(foreign),
    )
