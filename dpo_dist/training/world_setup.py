"""Join the processes of a launch, set up as the configuration says, and measure their devices."""

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from dpo_dist.config.optim_schema import OptimizerKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Offload, RunConfig
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.joined import joined
from dpo_dist.distributed.monitor import Reports
from dpo_dist.distributed.nvme import load_async_io
from dpo_dist.distributed.sequence_parallel import with_sequence_groups
from dpo_dist.distributed.world import World
from dpo_dist.model.flops import PeakFlops, datasheet_peak, matmul_peak
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.model.numerics import deterministic_kernels
from dpo_dist.model.optional_packages import check_bitsandbytes
from dpo_dist.report.terminal.console import Console


@contextlib.contextmanager
def open_world(config: RunConfig, console: Console, *, trains: bool = False) -> Iterator[World]:
    """Yield the world of this process's launch, set up as `config` says; collective.

    Args:
        config: of the run.
        console: of this rank.
        trains: whether there is an optimizer; without one, no kernel for it is compiled.
    """
    if config.reference.offload is Offload.nvme:
        load_async_io(console.say)
    if config.reference.quantization is not None:
        check_bitsandbytes(config.reference.quantization, "reference.quantization")
    if trains and config.optim.kind is OptimizerKind.adamw_8bit:
        check_bitsandbytes(config.optim.kind, "optim.kind", instead=OptimizerKind.adamw)
    parallelism = (
        config.parallelism if trains else replace(config.parallelism, offload_optimizer=Offload.none)
    )
    deepspeed_config = policy_config(parallelism, config.optim, config.model.dtype)
    stacks = RunFolder.of(config).rank_stacks(os.environ.get("RANK", "0"))
    reports = Reports(console.alarm, console.say, stacks)
    with (
        deterministic_kernels(config.trainer.deterministic),
        joined(deepspeed_config, config.parallelism.timeout_seconds, reports) as world,
    ):
        _seed(config.trainer.seed)
        yield with_sequence_groups(world, config.parallelism.sequence_parallel)


def _seed(seed: int) -> None:
    """Seed every generator whose state a checkpoint has; a user's loss may draw from any."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_flops(config: RunConfig, world: World) -> PeakFlops:
    """Return the peak of all devices, measured while all of them are busy; collective."""
    dtype = TORCH_DTYPES[config.model.dtype]
    is_cuda = world.device.type == "cuda"
    datasheet = datasheet_peak(torch.cuda.get_device_name(world.device), dtype) if is_cuda else None
    world.barrier()
    peaks = world.gather((matmul_peak(world.device, dtype), datasheet))
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()  # without those matrices
    sheets = [sheet for _, sheet in peaks if sheet is not None]
    return PeakFlops(sum(peak for peak, _ in peaks), sum(sheets) if len(sheets) == world.size else None)
