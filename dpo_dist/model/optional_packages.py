"""Check that the optional packages of a configuration are installed; imports no torch."""

import importlib.metadata
import importlib.util

from dpo_dist.foundation.errors import ConfigError

_EXTRAS = {"bitsandbytes": "quantization", "liger-kernel": "liger"}


def check_installed(package: str, key: str, value: str, instead: str = "null") -> None:
    """Check that the package is installed that `key` with this value needs; else name another value."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ConfigError(
            f"{package} is not installed",
            where=key,
            got=value,
            remedy=f"pip install 'dpo-dist[{_EXTRAS.get(package, package)}]', or set {key}={instead}",
        )


def has_flash_attn() -> bool:
    """Return whether flash-attn 2 is installed; the module of flash-attn-4 has the same name."""
    try:
        importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
