"""Checks of the devices: versions, GPUs, collective calls and attention kernels."""

import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.foundation.errors import DpoDistError, ExitCode, first_line
from dpo_dist.foundation.text import size
from dpo_dist.tools.selftest.runs import (
    HANGS_SECONDS,
    Check,
    check_without_faults,
    failed_check,
    run_python,
)

_GATHERED = (1, 33, 512)  # MB of a message; 33 is a 4096 x 4096 matrix of a 7B model


def list_versions(gpus: int) -> Iterator[Check]:
    """Yield the versions of all packages, of Python, CUDA, NCCL and the driver."""
    import torch  # noqa: PLC0415  (slow)
    from torch.utils import collect_env  # noqa: PLC0415

    from dpo_dist.training.start.environment import PACKAGES, package_versions  # noqa: PLC0415

    versions: dict[str, str | None] = {"python": sys.version.split()[0], "CUDA": torch.version.cuda}
    if gpus:
        nccl: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        driver = collect_env.get_nvidia_driver_version(collect_env.run)  # type: ignore[no-untyped-call]
        versions |= {"NCCL": ".".join(map(str, nccl)), "driver": driver}
    versions |= dict.fromkeys(PACKAGES) | package_versions()
    installed = (f"{name} {found}" if found else f"no {name}" for name, found in versions.items())
    yield Check("versions", "measured", ", ".join(installed), versions)


def describe_gpus(gpus: int, is_quick: bool) -> Iterator[Check]:
    """Describe each GPU, and time matrix products on each alone, which shows a slow one."""
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.model.flops import matmul_peak  # noqa: PLC0415

    if not gpus:
        yield Check("GPU", "measured", "there is none")
    for number in range(gpus):
        gpu = torch.cuda.get_device_properties(number)
        values = {"memory_bytes": gpu.total_memory, "capability": gpu.major + gpu.minor / 10}
        seen = f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        if not is_quick:
            values["matmul_flops"] = peak = matmul_peak(torch.device("cuda", number), torch.bfloat16)
            seen += f", {peak / 1e12:.0f} TFLOP/s in bf16 matrix products"
        yield Check(f"GPU {number}", "measured", seen, {"name": gpu.name, **values})


def check_collective_calls(folder: Path, gpus: int) -> Iterator[Check]:
    """Measure all-gathers over all GPUs, and the error of an all-reduce against float64."""
    out = folder / "exchanged.json"
    if error := run_python(
        "collective calls", ["-m", "dpo_dist.tools.selftest", "--exchange", str(out)], gpus
    ):
        yield failed_check("collective calls", error)
        return
    gathered, error_of_sum = json.loads(out.read_text())
    speeds = ", ".join(f"{size} MB: {speed:.3g} GB/s" for size, speed in gathered.items())
    yield Check("all-gather of bf16", "measured", speeds, gathered)
    seen, values = f"within {error_of_sum:.1e} of float64", {"difference": error_of_sum}
    yield Check("sums over GPUs in float32", "passed" if error_of_sum < 1e-6 else "failed", seen, values)


def exchange(out: Path) -> int:
    """Run as one of the processes of `check_collective_calls`; rank 0 writes the results."""
    import torch  # noqa: PLC0415  (slow)
    import torch.distributed as dist  # noqa: PLC0415

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=HANGS_SECONDS))
    rank, ranks, gathered = dist.get_rank(), dist.get_world_size(), {}
    for megabytes in _GATHERED:
        part = torch.ones(megabytes * 10**6 // 2 // ranks, dtype=torch.bfloat16, device=device)
        whole, began = part.new_empty(len(part) * ranks), 0.0
        for repetition in range(-2, 10):  # the first ones connect the processes, and are not timed
            if repetition == 0:
                torch.cuda.synchronize()
                began = time.monotonic()
            dist.all_gather_into_tensor(whole, part)
        torch.cuda.synchronize()
        gathered[megabytes] = 10 * (whole.nbytes - part.nbytes) / (time.monotonic() - began) / 1e9
    parts = [torch.randn(10**6, generator=torch.Generator().manual_seed(seed)) for seed in range(ranks)]
    total, exact = parts[rank].to(device), torch.stack(parts).double().sum(0)
    dist.all_reduce(total)
    if rank == 0:
        out.write_text(json.dumps([gathered, float((total.cpu() - exact).norm() / exact.norm())]))
    dist.destroy_process_group()
    return ExitCode.completed


def check_attention(device: Any) -> Iterator[Check]:
    """Check the outputs and gradients of each attention kernel against float32."""
    import torch  # noqa: PLC0415  (slow)
    from transformers import Gemma2Config, MistralConfig  # noqa: PLC0415

    from dpo_dist.model.attention.kernels import check_kernel, choose_backend  # noqa: PLC0415

    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    texts = [MistralConfig(**heads, head_dim=dim, sliding_window=4096) for dim in (64, 128, 256)]
    texts += [Gemma2Config(**heads, head_dim=256, attn_logit_softcapping=50.0)]
    chosen = choose_backend(AttentionBackend.auto, Dtype.bf16, device)
    yield Check("attention chosen by auto", "measured", chosen)
    for backend in list(AttentionBackend)[1:-1]:  # not SDPA, with which the others are compared
        name, faults = f"attention by {backend}", list[str]()
        try:
            choose_backend(backend, Dtype.bf16, device)
        except DpoDistError as error:
            yield Check(name, "skipped", error.message)
            continue
        for text in texts:
            try:
                check_kernel(backend, device, text, torch.bfloat16)
            except Exception as error:  # a kernel can raise anything
                faults.append(error.got if isinstance(error, DpoDistError) else first_line(error))
        seen = "outputs and gradients equal those in float32, for heads of 64, 128 and 256"
        yield check_without_faults(name, faults, seen)
