"""Optional packages that a configuration asks for; imports no torch."""

import importlib.util

from dpo_dist.config.schema import Quantization
from dpo_dist.errors import ConfigError


def check_bitsandbytes(quantization: Quantization, key: str) -> None:
    """Raise where weights cannot be quantized.

    Raises:
        ConfigError: bitsandbytes, which `key` asks for, is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "bitsandbytes is not installed",
            where=key,
            got=quantization,
            remedy=f"install dpo-dist[quantization], or set {key}=null",
        )


def check_liger_kernel() -> None:
    """Raise where `model.liger` asks for a package that is not there.

    Raises:
        ConfigError: liger-kernel is not installed.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "liger-kernel is not installed",
            where="model.liger",
            got="true",
            remedy="install dpo-dist[liger], or set model.liger=false",
        )
