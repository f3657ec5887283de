"""Join the processes of a run, and leave at its end.

A process has one process group for its life, the script's own or one that is made here: what DeepSpeed keeps
of an engine would keep the threads of each further group.
"""

import atexit
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous
from torch.utils.cpp_extension import _get_build_directory

from dpo_dist.distributed.deepspeed_internals import (
    forget_process_group,
    own_accelerate_state,
    restore_linear,
    timeout_of,
    use_gloo_all_reduce,
)
from dpo_dist.distributed.processes.failures import Reports, is_communication_error, watch_world
from dpo_dist.distributed.processes.world import Peer, World
from dpo_dist.foundation.errors import ConfigError, PeerLostError, first_line
from dpo_dist.foundation.process import is_on, kept_environment
from dpo_dist.foundation.signals import exit_on_signal
from dpo_dist.foundation.text import first_few, pluralize

_ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # any free port, chosen when it is opened
}
"""Environment for a world of one process that no launcher started."""
_STARTS = itertools.count()
"""Numbers the process groups that this process makes in a world of several."""
_LEAST_PATIENCE = timedelta(seconds=90)
_TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")
"""torch's variables for the groups that DeepSpeed and torch create without a timeout."""


def _load_cpu_adam(say: Callable[[str], None]) -> None:
    """Load DeepSpeed's optimizer for the CPU, which is compiled once for all processes of this host."""
    builder = CPUAdamBuilder()
    key = "parallelism.offload_optimizer"
    lock = Path(_get_build_directory(builder.name, False)) / "lock"
    if lock.exists():
        say(f"waiting for a process that compiles {builder.name}; if that build was killed, delete {lock}")
    try:
        builder.load(verbose=False)
    # Without nvcc, or with another version than PyTorch's, builders raise anything.
    except Exception as error:
        raise ConfigError(
            f"DeepSpeed's kernel {builder.name} cannot be compiled",
            where=key,
            got=first_line(error),
            expected=f"ninja, and a C++ compiler that PyTorch supports: {os.environ.get('CXX', 'c++')}",
            remedy="install them, or set CXX to another compiler (its output is in logs/), or "
            + f"set {key}=none",
        ) from error


@contextlib.contextmanager
def join_world(deepspeed_config: dict[str, Any], timeout_seconds: int, reports: Reports) -> Iterator[World]:
    """Yield the processes that the launcher started, and watch them until the end of the block.

    `deepspeed_config` is a `policy_config`, on which loading weights depends; a collective call waits
    `timeout_seconds`; `reports` are used also if the main thread is blocked.
    """
    hook = sys.excepthook
    with kept_environment(), own_accelerate_state(), _kept_timeouts():
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            # Without expandable segments, micro-batches of many sizes fragment GPU memory.
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        if reports.stacks is not None:  # NCCL's last calls of each rank, written when one times out
            os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault(
                "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(reports.stacks.with_name("nccl-rank-"))
            )
        try:
            with exit_on_signal():
                world = start_world(deepspeed_config, timeout_seconds)
            with watch_world(world, reports):
                if "offload_optimizer" in deepspeed_config["zero_optimization"]:
                    # Now: nodes may compile for longer than ranks wait for each other to arrive.
                    world.together(lambda: _load_cpu_adam(reports.say))
                yield world
        except BaseException:
            if dist.is_initialized() and dist.get_world_size() > 1:
                atexit.unregister(leave_world)  # leaving may wait for a rank that still works
            raise
        finally:
            restore_linear()
            sys.excepthook = hook  # torch's adds "[rank0]: " to each line


def start_world(deepspeed_config: dict[str, Any], timeout_seconds: int) -> World:
    """Join the processes that the launcher started; without a launcher, return a world of one process.

    Reads nothing of what the launcher says about precision and sharding, which are the configuration's.
    """
    _check_devices()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    if "RANK" not in os.environ:
        os.environ.update(_ALONE)
    use_gloo_all_reduce()
    timeout = timedelta(seconds=timeout_seconds)
    for name in _TIMEOUTS:
        setattr(distributed_c10d, name, timeout)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        if not dist.is_initialized():  # the process group of this process's life
            forget_process_group()  # one that the script has destroyed
            place, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            if size == 1:
                store: Any = HashStore()  # torch's own store would listen on all interfaces
            else:
                store = _meet(place, size, timeout)
            dist.init_process_group(backend, store=store, rank=place, world_size=size, timeout=timeout)
            atexit.register(leave_world)
        for group in distributed_c10d._world.pg_map:  # those of an earlier run, or of the script
            distributed_c10d._set_pg_timeout(timeout, group)
        accelerator = Accelerator(
            mixed_precision="no",  # model.dtype decides, through DeepSpeed
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config),
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
        )
        control = _control_group(dist.group.WORLD)
        rank, size = accelerator.process_index, accelerator.num_processes
        peers: list[Any] = [None] * size
        dist.all_gather_object(peers, Peer.here(rank), group=control)
    except RuntimeError as failure:
        is_taken = "EADDRINUSE" in str(failure)  # the port, which torchrun and accelerate choose themselves
        if not (is_taken or is_communication_error(str(failure))):
            raise
        raise _not_joined([], timeout, failure) from failure
    return World(accelerator, rank, size, accelerator.device, tuple(peers), control, timeout_seconds)


def _meet(rank: int, size: int, timeout: timedelta) -> Any:
    """Return the store of all ranks when they have arrived, with `timeout` for its calls.

    A rank that was refused before, or that cannot import, never arrives; the others name it. They wait for
    less time than in a collective call: none has begun to work, and their imports take about as long.
    """
    patience = min(timeout, max(_LEAST_PATIENCE, timeout / 10))
    try:
        # With the size of one process: torch would wait for the others without saying which are missing.
        store, _, _ = next(iter(rendezvous("env://", rank, 1, timeout=patience)))
    except RuntimeError as failure:
        if rank == 0 or not is_communication_error(str(failure)):
            raise
        raise _not_joined([0], patience, failure) from failure
    # The launcher's store still has the keys of a destroyed group.
    store = PrefixStore(f"start-{next(_STARTS)}", store)
    places = [f"arrived/{each}" for each in range(size)]
    store.set(places[rank], "")
    try:
        store.wait(places, patience)
    except RuntimeError as failure:
        missing = [each for each, place in enumerate(places) if not store.check([place])]
        raise _not_joined(missing, patience, failure) from failure
    store.set_timeout(timeout)
    return store


def _not_joined(missing: Sequence[int], waited: timedelta, failure: Exception) -> PeerLostError:
    """Return the error of a rank that has waited for the others, of which `missing` never arrived."""
    names = first_few([f"rank {rank}" for rank in missing], "other rank")
    error = PeerLostError(
        f"not all {os.environ.get('WORLD_SIZE')} processes of the run have joined"
        + (f": {names} did not arrive" if missing else ""),
        where=f"rank {os.environ.get('RANK')}, which waited at "
        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
        got=first_line(failure),
        expected=f"every process within {waited.total_seconds():.0f} s",
        remedy="see logs/rank-N.log and the screen of every node; check that each node reaches this "
        "address, and its port is free (MASTER_PORT, --main_process_port); then run the command again, with "
        "a larger parallelism.timeout_seconds if nodes start a minute apart",
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        error.is_printed_here = True  # rank 0 may be on another node, whose launcher ends nothing here
    return error


@functools.cache
def _control_group(_: Any) -> Any:
    """Return the CPU process group beside a default group; collective at the first call."""
    return dist.new_group(backend="gloo", timeout=distributed_c10d.default_pg_timeout)


@contextlib.contextmanager
def _kept_timeouts() -> Iterator[None]:
    """Restore torch's timeouts, and those of the script's own groups, at the end of the block."""
    defaults = {name: getattr(distributed_c10d, name) for name in _TIMEOUTS}
    groups = {group: timeout_of(group) for group in distributed_c10d._world.pg_map}
    try:
        yield
    finally:
        for name, timeout in defaults.items():
            setattr(distributed_c10d, name, timeout)
        for group in groups.keys() & distributed_c10d._world.pg_map.keys():
            distributed_c10d._set_pg_timeout(groups[group], group)


def _check_devices() -> None:
    if is_on(os.environ, "ACCELERATE_USE_CPU") and torch.cuda.is_available():
        raise ConfigError(
            "accelerate launch --cpu does not hide the GPUs",
            where="accelerate launch",
            remedy="to train on CPUs, start with CUDA_VISIBLE_DEVICES= in the environment",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        if visible in ("", "-1", "NoDevFiles"):
            return
        raise ConfigError(
            "CUDA_VISIBLE_DEVICES names GPUs, but PyTorch finds none",
            where="environment",
            got=f"CUDA_VISIBLE_DEVICES={visible}",
            remedy="check that nvidia-smi lists the GPUs; to train on CPUs, unset CUDA_VISIBLE_DEVICES",
        )
    if processes > gpus:
        raise ConfigError(
            "there are more processes than GPUs on this host",
            where="accelerate launch",
            got=f"{processes} processes, {pluralize(gpus, 'GPU')}"
            + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""),
            remedy=f"start with --num_processes {gpus}, or make more GPUs visible",
        )


def leave_world() -> None:
    """Leave the process group at the end of the process."""
    atexit.unregister(leave_world)
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_process_group()
