"""Folder for weights on a local NVMe disk, and a check that DeepSpeed can use it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
from deepspeed.ops.op_builder import AsyncIOBuilder

from dpo_dist.distributed.kernel_builds import load_kernel
from dpo_dist.distributed.world import World
from dpo_dist.errors import ConfigError

_PREFIX = "dpo_dist"


def check_async_io() -> None:
    """Check that DeepSpeed can build its asynchronous file access.

    Raises:
        ConfigError: libaio or a compiler is not installed.
    """
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "offload to NVMe needs DeepSpeed's async_io, which cannot be built on this host",
            where="reference.offload",
            got="nvme",
            expected="libaio with its headers, and a C++ compiler",
            remedy="install libaio-dev (or libaio-devel), or set reference.offload=cpu",
        )


def load_async_io(say: Callable[[str], None]) -> None:
    """Load DeepSpeed's asynchronous file access; `say` prints a line.

    Raises:
        ConfigError: it cannot be compiled.
    """
    check_async_io()
    load_kernel(AsyncIOBuilder(), "reference.offload", "set reference.offload=cpu", say)


def own_folder(nvme_path: str, world: World) -> Path:
    """Create and return a folder below `nvme_path` for this process; remove those of dead processes.

    DeepSpeed deletes everything in its folder, so processes must not share one.

    Raises:
        ConfigError: the folder cannot be created.
    """
    peer, root = world.peers[world.rank], Path(nvme_path)
    for folder in root.glob(f"{_PREFIX}-{peer.host}-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    own = root / f"{_PREFIX}-{peer.host}-{peer.pid}"
    try:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            "the folder for weights on NVMe cannot be created",
            where="reference.nvme_path",
            got=f"{own}: {error.strerror}",
            remedy="set reference.nvme_path to a folder that is writable on every node",
        ) from error
    return own
