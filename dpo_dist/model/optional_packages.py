"""Check that the optional packages of a configuration are installed; imports no torch."""

import importlib.metadata
import importlib.util

from dpo_dist.config.schema import OtherTracker
from dpo_dist.foundation.errors import ConfigError


def check_bitsandbytes(value: str, key: str, instead: str = "null") -> None:
    """Check that bitsandbytes, which quantizes weights and optimizer states, is installed.

    Raises:
        ConfigError: it is not; the error names `key`.
    """
    _check_installed("bitsandbytes", "quantization", key, value, instead=instead)


def check_liger_kernel() -> None:
    """Check that liger-kernel is installed.

    Raises:
        ConfigError: it is not.
    """
    _check_installed("liger-kernel", "liger", "model.liger", "true", instead="false")


def has_flash_attn() -> bool:
    """Return whether flash-attn 2 is installed; the module of flash-attn-4 has the same name."""
    try:
        importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_flash_attn() -> None:
    """Check that flash-attn 2 is installed.

    Raises:
        ConfigError: it is not.
    """
    if not has_flash_attn():
        raise ConfigError(
            "flash-attn 2 is not installed",
            where="model.attention",
            got="flash_attention_2",
            remedy="set model.attention=auto, or pip install --no-build-isolation 'dpo-dist[flash-attn]', "
            "which compiles it for the torch that is installed",
        )


def check_tracker(tracker: OtherTracker) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        ConfigError: it is not.
    """
    _check_installed(tracker.value, tracker.value, "tracking.also", tracker.value, instead="[]")


def _check_installed(package: str, extra: str, key: str, value: str, instead: str) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ConfigError(
            f"{package} is not installed",
            where=key,
            got=value,
            remedy=f"pip install 'dpo-dist[{extra}]', or set {key}={instead}",
        )
