"""Kernels that DeepSpeed compiles at first use, and its asynchronous I/O on NVMe disks."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils.cpp_extension import _get_build_directory

from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import ConfigError, first_line

_LOADED_WITH = {"async_io": ("pin_memory",)}
"""Kernels that DeepSpeed loads with another one."""


def load_kernel(builder: OpBuilder, where: str, remedy: str, say: Callable[[str], None]) -> None:
    """Load a kernel of DeepSpeed, which compiles it once for all processes of this host.

    Errors name the key `where` that needs it, and the `remedy`, a value that needs no kernel.
    """
    for name in (builder.name, *_LOADED_WITH.get(builder.name, ())):
        lock = Path(_get_build_directory(name, False)) / "lock"
        if lock.exists():
            say(f"waiting for another process that compiles {name}; if that build was killed, delete {lock}")
    try:
        builder.load(verbose=False)
    except Exception as error:  # without nvcc, or with another one than of PyTorch, builders raise anything
        raise ConfigError(
            f"DeepSpeed's kernel {builder.name} cannot be compiled",
            where=where,
            got=first_line(error),
            expected=f"ninja, and a C++ compiler that PyTorch supports: {os.environ.get('CXX', 'c++')}",
            remedy=f"install them, or set CXX to another compiler (its output is in logs/); or {remedy}",
        ) from error


def check_async_io() -> None:
    """Check that DeepSpeed can build its asynchronous file access."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "offload to NVMe needs DeepSpeed's async_io, which cannot be built on this host",
            where="reference.offload",
            got="nvme",
            remedy="install libaio-dev (or libaio-devel) and a C++ compiler, or set reference.offload=cpu",
        )


def load_async_io(say: Callable[[str], None]) -> None:
    """Load DeepSpeed's asynchronous file access; `say` prints a line."""
    check_async_io()
    load_kernel(AsyncIOBuilder(), "reference.offload", "set reference.offload=cpu", say)


def own_folder(nvme_path: str, world: World) -> Path:
    """Create and return a folder below `nvme_path` for this process; remove those of dead processes.

    DeepSpeed deletes everything in its folder, so processes must not share one.
    """
    peer, root = world.peers[world.rank], Path(nvme_path)
    for folder in root.glob(f"dpo_dist-{peer.host}-*"):
        if not psutil.pid_exists(int(folder.name.rpartition("-")[2])):
            shutil.rmtree(folder, ignore_errors=True)
    own = root / f"dpo_dist-{peer.host}-{peer.pid}"
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
