"""A CUDA device without a GPU, within a process: what torch asks of it, its waits and its memory.

`start/sitecustomize.py` calls `install()` in each process whose environment asks for the device (see
`parent.environment`). As torch is imported, device.cpp is loaded and functions of a CUDA build are put in
`torch._C`; torch's own Python above them runs unchanged. NCCL is gloo, and the kernels below
`torch.nn.attention.varlen` are products in float32.

A test that runs in such a process, or prepares one, calls `reset_waits`, `enter_phase` and `set_limit`. At
its end a process writes what it counted to the folder `SIMULATED_CUDA_REPORT`.
"""

import atexit
import ctypes
import importlib.abc
import importlib.util
import json
import os
import re
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NAME, CAPABILITY, NCCL_VERSION = "NVIDIA H100 80GB HBM3", (9, 0), (2, 29, 7)


class Wait(NamedTuple):
    """Where the host waited for the device, or for a copy of pageable memory."""

    phase: str
    kind: str
    line: str
    """The last of the project, as `dpo_dist/training/steps/step.py:115 f`; else the node of autograd."""
    caller: str
    """The last outside torch and DeepSpeed's layer over it: of the project, or of a library it called."""


_IS_BELOW = re.compile("/torch/|/deepspeed/accelerator/|^<")
_waits: Counter[Wait] = Counter()
_now: dict[str, Any] = {"phase": "", "user": None, "kernels": None}
_library: Any = SimpleNamespace()  # the functions of device.cpp
_Listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # result, arguments
    "listen": (None, _Listener),
    "wait": (None, ctypes.c_char_p),
    "set_sync_mode": (None, ctypes.c_int),
    "register": (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    "set_limit": (None, ctypes.c_int64),
    "allocated": (ctypes.c_int64,),
    "peak": (ctypes.c_int64,),
    "reset_peak": (None,),
    "device_count": (ctypes.c_int,),
    "exchange_device": (ctypes.c_int, ctypes.c_int),
    "exchange_stream": (ctypes.c_int64, ctypes.c_int64),
    "milliseconds": (ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p),
}


# ---- for tests


def reset_waits() -> None:
    """Forget the waits so far."""
    _waits.clear()


def enter_phase(name: str) -> None:
    """Count what follows as waits of this phase."""
    _now["phase"] = name


def set_limit(count: int) -> None:
    """Give the device this many bytes; an allocation beyond them is out of memory."""
    _library.set_limit(count)


def peak_bytes() -> int:
    """The most bytes that were allocated at once, since torch's peak was last reset."""
    return int(_library.peak())


@_Listener
def _note_wait(kind: bytes) -> None:
    """Called within an operator: it walks frames, and reads no file."""
    line = caller = ""
    frame = sys._getframe().f_back  # None in a thread of autograd
    while frame is not None and not line:
        path = frame.f_code.co_filename
        if path != __file__ and not _IS_BELOW.search(path):
            file = path.rpartition("/site-packages/")[2].removeprefix(f"{ROOT}/")
            short = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
            caller = caller or short
            line = short if short.startswith("dpo_dist/") else ""
        frame = frame.f_back
    node = None if line else sys.modules["torch"]._C._current_autograd_node()
    _waits[Wait(_now["phase"], kind.decode(), line if node is None else node.name(), caller)] += 1


def _write_report() -> None:
    folder = os.environ.get("SIMULATED_CUDA_REPORT")
    if folder and _now["user"] == os.getpid():
        counted = [[*wait, count] for wait, count in sorted(_waits.items())]
        content = {"rank": os.environ.get("RANK"), "peak_bytes": peak_bytes(), "waits": counted}
        (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(content))


# ---- start of a process


def install() -> None:
    """Give this process the device, as soon as it imports torch."""
    sys.meta_path.insert(0, _BeforeImports())


class _BeforeImports(importlib.abc.MetaPathFinder):
    """Finds no module: it acts before those are imported that look for CUDA."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "torch._C":
            _load()
        elif name == "torch.cuda":
            torch = sys.modules["torch"]
            torch.version.cuda = "13.0"
            vars(torch._C).update(_bindings(torch))
        elif name == "torch.distributed.constants":
            _add_nccl()


def _load() -> None:
    """Before torch._C, which asks once whether there is CUDA."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(str(Path(torch.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(os.environ["SIMULATED_CUDA"])
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(loaded, f"simulated_{name}")
        function.restype, function.argtypes = result, arguments
        # Dynamo needs hashable functions below torch.
        setattr(_library, name, lambda *given, function=function: function(*given))
    _library.listen(_note_wait)
    os.register_at_fork(after_in_child=_use_anew)
    atexit.register(_write_report)
    leave = os._exit

    def report_and_leave(code: int) -> None:  # as forked processes and the verbs end
        _write_report()
        leave(code)

    os._exit = report_and_leave  # type: ignore[assignment]


def _init() -> None:
    """The first use of CUDA in a process."""
    torch, devices = sys.modules["torch"], range(_library.device_count())
    if not devices:
        raise RuntimeError("No CUDA GPUs are available")
    _now["user"] = os.getpid()
    set_limit(_memory_bytes())
    torch.cuda.default_generators = tuple(torch.Generator(f"cuda:{index}") for index in devices)
    for generator in torch.cuda.default_generators:
        torch.ops.simulated_cuda.set_default_generator(generator)
    torch.cuda._get_device_properties = _properties
    if _now["kernels"] is None:
        _now["kernels"] = _flash_attention(torch), _convolutions(torch)


def _use_anew() -> None:
    """In a fork whose parent has only asked for the device's name, as an import of bitsandbytes does."""
    if not _library.allocated():
        cuda = sys.modules["torch"].cuda
        _now["user"], cuda._initialized, cuda._cached_device_count = None, False, None


# ---- what a CUDA build of torch has in torch._C


def _memory_bytes() -> int:
    return int(os.environ["SIMULATED_CUDA_BYTES"])


def _properties(_device: int) -> SimpleNamespace:
    major, minor = CAPABILITY
    rest = {"multi_processor_count": 132, "warp_size": 32, "L2_cache_size": 50 * 2**20, "gcnArchName": ""}
    return SimpleNamespace(name=NAME, major=major, minor=minor, total_memory=_memory_bytes(), **rest)


def _memory_stats(_device: int) -> dict[str, Any]:
    count = {"current": _library.allocated(), "peak": peak_bytes(), "allocated": 0, "freed": 0}
    kinds = ("allocated_bytes", "reserved_bytes", "active_bytes")
    return {**{kind: {"all": count} for kind in kinds}, "num_alloc_retries": 0, "num_ooms": 0}


def _nothing(*_: Any, **__: Any) -> None: ...


def _bindings(torch: Any) -> dict[str, Any]:
    """What a CUDA build adds, as far as torch itself, the project and its libraries ask for it."""

    class StreamBase(torch.Stream):
        def __new__(cls, priority: int = 0, stream_id: int | None = None, **place: int) -> Any:
            if stream_id is None:
                return super().__new__(cls, device=f"cuda:{_library.exchange_device(-1)}", priority=priority)
            return super().__new__(cls, stream_id=stream_id, **place)

        cuda_stream = property(lambda self: self.stream_id)

    class EventBase(torch.Event):
        def __new__(cls, external: bool = False, **options: bool) -> Any:
            event = super().__new__(cls, device="cuda", **options)
            event.is_timed = options.get("enable_timing", False)
            return event

        def elapsed_time(self, end: Any) -> float:  # that of torch.Event refuses subclasses
            if not (self.is_timed and end.is_timed):
                raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
            if not (self.event_id and end.event_id):
                raise RuntimeError("Both events must be recorded before calculating elapsed time.")
            return float(_library.milliseconds(self.event_id, end.event_id))

        cuda_event = property(lambda self: self.event_id)

    functions = {
        "init": _init,
        "isInBadFork": lambda: _now["user"] not in (None, os.getpid()),
        "getDeviceCount": _library.device_count,
        "getDevice": lambda: _library.exchange_device(-1),
        "setDevice": _library.exchange_device,
        "exchangeDevice": _library.exchange_device,
        "maybeExchangeDevice": _library.exchange_device,
        "canDeviceAccessPeer": lambda _one, _other: True,
        "getArchFlags": lambda: "sm_90",
        "synchronize": lambda: _library.wait(b"device"),
        "sleep": lambda cycles: time.sleep(cycles / 1.755e9),
        "getCurrentStream": lambda index: (_library.exchange_stream(-1), index, 1),
        "getCurrentRawStream": lambda _index: _library.exchange_stream(-1),
        "getDefaultStream": lambda index: (0, index, 1),
        "setStream": lambda stream_id, **_place: _library.exchange_stream(stream_id),
        "isCurrentStreamCapturing": lambda: False,
        "set_sync_debug_mode": _library.set_sync_mode,
        "memoryStats": _memory_stats,
        "resetPeakMemoryStats": lambda _index: _library.reset_peak(),
        "resetAccumulatedMemoryStats": _nothing,
        "emptyCache": _nothing,
        "ipc_collect": _nothing,
    }
    runtime, nvtx = ModuleType("_cudart"), ModuleType("_nvtx")
    vars(runtime).update(
        cudaHostRegister=lambda data, count, _flags: _library.register(data, count),
        cudaHostUnregister=lambda data: _library.register(data, 0),
        cudaMemGetInfo=lambda _index: (_memory_bytes() - _library.allocated(), _memory_bytes()),
        cudaError=type("cudaError", (int,), {"success": 0}),
        cudaGetErrorString=str,
    )
    vars(nvtx).update(rangePushA=_nothing, rangePop=_nothing, markA=_nothing)
    major, minor, patch = NCCL_VERSION
    return {
        **{f"_cuda_{name}": function for name, function in functions.items()},
        **{name: type(name, (), {}) for name in ("_CUDAGraph", "_CudaDeviceProperties")},
        **{"_CudaStreamBase": StreamBase, "_CudaEventBase": EventBase, "_has_cuda": True},
        **{"_cudart": runtime, "_nvtx": nvtx, "_graph_pool_handle": _nothing},
        **{
            "_nccl_version": lambda: (major << 32) + (minor << 16) + patch,
            "_nccl_version_suffix": lambda: b"",
        },
    }


# ---- libraries of a CUDA build


def _add_nccl() -> None:
    """Process groups for tensors of the device alone, as NCCL's are, by gloo."""
    c10d = sys.modules["torch._C._distributed_c10d"]

    class ProcessGroupNCCL(c10d.ProcessGroupGloo):
        Options = SimpleNamespace

        def __init__(self, store: Any, rank: int, size: int, options: SimpleNamespace):
            super().__init__(store, rank, size, timeout=options._timeout)

    vars(c10d).update(ProcessGroupNCCL=ProcessGroupNCCL, _DEFAULT_PG_NCCL_TIMEOUT=timedelta(minutes=10))


def _flash_attention(torch: Any) -> Any:
    """The kernels of variable-length attention, which demand what those of CUDA demand."""
    from tests.support.kernels import checked_by_segment  # imports torch

    host, device = torch.ops.simulated_cuda.on_host, torch.ops.simulated_cuda.on_device

    def on_host(tensors: tuple[Any, ...], is_causal: bool, **options: Any) -> tuple[Any, Any, Any, Any]:
        *heads, cu_query, cu_key = tensors
        dtypes = {tensor.dtype for tensor in heads}
        if not all(tensor.is_cuda for tensor in tensors) or dtypes not in ({torch.float16}, {torch.bfloat16}):
            raise RuntimeError(f"flash attention takes 16 bits on CUDA, not {dtypes} (simulated device)")
        sides = [options.get(f"window_size_{side}") for side in ("left", "right")]
        left, right = (-1 if side is None else side for side in sides)
        window = left, 0 if is_causal else right
        floats = [host(tensor).float() for tensor in heads]
        return floats, (host(cu_query), host(cu_key)), options.get("scale"), window

    def forward(*given: Any, **options: Any) -> tuple[Any, ...]:
        query, longest, is_causal = given[0], given[5:7], given[8]
        heads, bounds, *rest = on_host(given[:5], is_causal, **options)
        attended = checked_by_segment(heads, bounds, longest, *rest).to(query.dtype)
        sums = query.new_full((query.shape[1], len(query)), torch.nan, dtype=torch.float32)  # not used again
        nothing = query.new_empty(0)
        return device(attended), sums, query.new_empty(2, dtype=torch.uint64), nothing, nothing

    def backward(slope: Any, *given: Any, **options: Any) -> tuple[Any, ...]:
        tensors, longest, is_causal = (*given[:3], *given[5:7]), given[7:9], given[10]
        heads, bounds, *rest = on_host(tensors, is_causal, **options)
        autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with autograd, torch.enable_grad():  # a kernel is called below it
            attended = checked_by_segment([head.requires_grad_() for head in heads], bounds, longest, *rest)
            gradients = torch.autograd.grad(attended, heads, host(slope).float())
        return tuple(device(gradient.to(slope.dtype)) for gradient in gradients)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CUDA")
    library.impl("_flash_attention_backward", backward, "CUDA")
    return library


def _convolutions(torch: Any) -> Any:
    """Those of the host, in place of cuDNN's."""
    host, device, aten = torch.ops.simulated_cuda.on_host, torch.ops.simulated_cuda.on_device, torch.ops.aten

    def on_host(*given: Any) -> list[Any]:
        return [host(value) if isinstance(value, torch.Tensor) else value for value in given]

    def forward(*given: Any) -> Any:
        return device(aten.convolution(*on_host(*given)))

    def backward(*given: Any) -> tuple[Any, ...]:
        gradients = aten.convolution_backward(*on_host(*given))
        return tuple(gradient if gradient is None else device(gradient) for gradient in gradients)

    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", forward, "CUDA")
    library.impl("convolution_backward", backward, "CUDA")
    return library
