"""Check weight files by size and header, without torch: missing, incomplete and foreign files."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from dpo_dist.errors import ConfigError
from dpo_dist.number_text import size

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
"""Longest header that safetensors itself reads."""
_GIT_LFS = b"version https://git-lfs"


def check_weights(files: Iterable[Path], key: str) -> None:
    """Check that weight files exist, and that safetensors files have the size that their header states.

    Reads the headers only.

    Args:
        files: from `weight_files`.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: a file is missing, incomplete or no safetensors file.
    """
    files = list(files)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            "shards of the model's weights are missing",
            where=key,
            got=f"{missing[0].parent} without {', '.join(file.name for file in missing[:3])} "
            f"({len(missing)} in all)",
            expected="every file that the index of the weights names",
            remedy="download or copy the missing files",
        )
    for file in files:
        if file.suffix == ".safetensors" and (fault := _fault(file)):
            raise ConfigError(
                "a weight file of the model cannot be read",
                where=key,
                got=f"{file}: {fault}",
                expected="a whole safetensors file",
                remedy="download or copy the file again",
            )


def _fault(file: Path) -> str:
    """Return why a file is no whole safetensors file; empty if it is one."""
    try:
        with file.open("rb") as opened:
            start = opened.read(max(_LENGTH_BYTES, len(_GIT_LFS)))
            if start == _GIT_LFS:
                return "a pointer of git-lfs in place of the weights (git lfs pull downloads them)"
            length = struct.unpack("<Q", start[:_LENGTH_BYTES])[0] if len(start) >= _LENGTH_BYTES else 0
            if not 0 < length <= _MOST_HEADER_BYTES:
                return "no safetensors file"
            opened.seek(_LENGTH_BYTES)
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = _LENGTH_BYTES + length + max(ends, default=0)
    except OSError as error:
        return str(error.strerror)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "a header that cannot be read"
    found = file.stat().st_size
    return "" if found == expected else f"{size(found)} ({found:,} bytes) of {size(expected)} ({expected:,})"
