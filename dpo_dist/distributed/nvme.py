"""Weights on a local disk: whether DeepSpeed can put them there, and in whose folder."""

import shutil
from pathlib import Path

import psutil
from deepspeed.ops.op_builder import AsyncIOBuilder

from dpo_dist.distributed.world import World
from dpo_dist.errors import ConfigError

_PREFIX = "dpo_dist"


def check_async_io() -> None:
    """Raise where DeepSpeed cannot read and write beside computing.

    Raises:
        ConfigError: libaio is not installed, or there is no compiler.
    """
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "offload to NVMe needs DeepSpeed's async_io, which cannot be built here",
            where="reference.offload",
            got="nvme",
            expected="libaio with its headers, and a C++ compiler",
            remedy="install libaio-dev (or libaio-devel), or set reference.offload=cpu",
        )


def own_folder(nvme_path: str, world: World) -> Path:
    """A new folder below `nvme_path` for this process alone; those of dead processes of this host go.

    DeepSpeed empties what it finds at the place that it is given, so no two processes may share one.

    Raises:
        ConfigError: it cannot be made.
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
            "the folder for weights on NVMe cannot be made",
            where="reference.nvme_path",
            got=f"{own}: {error.strerror}",
            remedy="set reference.nvme_path to a folder that can be written on every node",
        ) from error
    return own
