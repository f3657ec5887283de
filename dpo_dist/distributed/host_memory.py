"""Memory of this host that its processes may still take, of their container or job if that has less."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_KEPT_FREE = 0.1
"""Share of the memory that is not given away."""
_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_memory(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Return bytes, without a margin of a tenth of the memory.

    Args:
        root: of the cgroup file systems, version 1 or 2.
        own: the file with the cgroups of this process.
    """
    memory = psutil.virtual_memory()
    free = [memory.available - _KEPT_FREE * memory.total]
    for limit, used in _limits(root, own):
        free.append(limit - used - _KEPT_FREE * limit)
    return max(0, int(min(free)))


def _limits(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of every cgroup that this process is in; the file cache is no use."""
    names = {
        "": (root, "memory.max", "memory.current", "inactive_file"),
        "memory": (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controller, path = line.split(":", 2)
        if controller not in names:
            continue
        folder, limit, use, cache = names[controller]
        inner = folder / path.lstrip("/")
        # In a container, the path may be that outside of it, which does not exist inside.
        for group in (inner, *(parent for parent in inner.parents if parent.is_relative_to(folder))):
            try:
                most = int((group / limit).read_text())
                statistics = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                yield most, int((group / use).read_text()) - int(statistics[cache])
            except (OSError, ValueError, KeyError):  # "max": without a limit
                continue
