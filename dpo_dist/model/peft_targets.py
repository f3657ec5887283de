"""Linear layers of some architectures that peft does not adapt, or in whose place it adapts others."""

from collections.abc import Collection, Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from dpo_dist.errors import ConfigError

# Layers that are one in fused experts; peft fails if it finds only one of two.
_FUSED = ("gate_proj", "up_proj", "w1", "w3")


def check_adaptable(causal_lm: Any, targets: Collection[str]) -> None:
    """Check that peft adapts the layers that are named, and that it will when the adapter is loaded.

    In architectures whose experts were linear layers before transformers 5, peft takes `gate_proj` for a name
    of these, whatever module it is in: it would adapt the fused experts, and not the layer. The kernels of
    state-space models read the weight of `out_proj` past its adapter.

    Args:
        causal_lm: without an adapter; its tensors are not used.
        targets: names of its linear layers.

    Raises:
        ConfigError: it does not.
    """
    if passed := [name for name in targets if _is_refused(causal_lm, name)]:
        raise _not_adapted("peft adapts no such layer of state-space models", passed, targets)
    found = LoraConfig(target_modules={*targets, *_FUSED})
    convert_peft_config_for_transformers(found, causal_lm, None)
    if replaced := set(targets) - set(found.target_modules):
        why = "peft would adapt the experts in place of some layers of this architecture"
        raise _not_adapted(why, replaced, targets)


def _is_refused(causal_lm: Any, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(LoraConfig(), causal_lm, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _not_adapted(why: str, refused: Collection[str], targets: Collection[str]) -> ConfigError:
    kept = ",".join(_last_parts(set(targets) - set(refused)))
    return ConfigError(
        why,
        where="model.adapter.target_modules",
        got=", ".join(_last_parts(refused)),
        expected=f"others, such as {kept}" if kept else "other layers",
        remedy=f"set model.adapter.target_modules=[{kept}]" if kept else "name other layers",
    )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
