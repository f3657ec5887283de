"""The device refuses, counts and limits what CUDA does, in processes that ask for it and in no other."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.simulated_cuda import runs

PROGRAM = """
import torch, torch.distributed as dist
from tests.simulated_cuda import device

assert torch.cuda.is_available() and torch.cuda.device_count() == 2
on_device = torch.arange(6.0, device="cuda").view(2, 3)
refused = {}
def refuse(name, function):
    try:
        function()
    except Exception as error:
        refused[name] = f"{type(error).__name__}: {error}"
refuse("mix", lambda: on_device + torch.ones(2, 3))
refuse("memory", lambda: torch.empty(2**30, device="cuda"))
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(on_device)
refuse("nccl", lambda: dist.all_reduce(torch.ones(1)))
assert on_device[:, 1:].mul_(2).flatten().cpu().tolist() == [2, 4, 8, 10], "views share their memory"
assert (torch.ones(1, device="cuda:1") * 2).device.index == 1

device.reset_waits()
device.enter_phase("copies")
pinned = torch.ones(4).pin_memory()
pinned.to("cuda", non_blocking=True)                            # the only one that does not wait
pinned.to("cuda")
torch.ones(4).to("cuda", non_blocking=True)
on_device.tolist()
device.enter_phase("indices")
on_device[torch.arange(2)] = 1.0
device.enter_phase("values")
on_device.sum().item()
on_device[on_device > 1]
on_device[torch.zeros(1, dtype=torch.int64, device="cuda")]     # indices do not wait
torch.cuda.synchronize()
event = torch.cuda.Event(enable_timing=True)
event.record()
event.synchronize()
leaf = torch.ones(3, device="cuda", requires_grad=True)
picked = leaf[torch.ones(3, dtype=torch.bool, device="cuda")].sum()
device.enter_phase("backward")
picked.backward()                                               # in a thread without a frame of Python
device.enter_phase("values")
torch.cuda.set_sync_debug_mode("error")
refuse("wait", lambda: on_device.sum().item())
dist.destroy_process_group()
import json
print(json.dumps(refused))
"""


def test_it_refuses_and_counts_what_cuda_does(tmp_path: Path) -> None:
    assert not torch.cuda.is_available(), "this process did not ask"
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=runs.environment(devices=2, memory_bytes=2**30, report=tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    refused = json.loads(ended.stdout.splitlines()[-1])
    expected = {
        "mix": "Expected all tensors to be on the same device",
        "memory": "CUDA out of memory",
        "nccl": "No backend type associated with device type cpu",
        "wait": "called a synchronizing CUDA operation",
    }
    assert all(text in refused[name] for name, text in expected.items()), refused
    assert refused["memory"].startswith("OutOfMemoryError")
    [report] = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert 0 < report["peak_bytes"] < 2**20
    assert sorted([phase, kind, count] for phase, kind, _line, _caller, count in report["waits"]) == [
        ["backward", "aten::_index_put_impl_", 1],
        ["copies", "copy to device", 1],
        ["copies", "copy to device, pageable", 1],
        ["copies", "copy to host, pageable", 1],
        ["indices", "copy to device, pageable", 1],
        ["values", "aten::_local_scalar_dense", 2],
        ["values", "aten::nonzero", 2],
        ["values", "device", 1],
        ["values", "event", 1],
    ]
