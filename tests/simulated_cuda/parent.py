"""The simulated device for processes: it is built once, and a warm parent of its own has it, too.

The parent is started by the first test that needs it; for the workers of xdist once, by the process that
starts them.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests.support.parent import ROOT, OfOtherProcess, start_quietly
from tests.support.parent import environment as process_environment

SOURCE = Path(__file__).with_name("device.cpp")
_FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DUSE_DISTRIBUTED")
_PRELOADED = [
    *("dpo_dist.training.run", "dpo_dist.tools.report.recorder", "transformers.models.qwen2.modeling_qwen2"),
    *("tests.support.kernels", "tests.support.preloaded"),
]
_parent = forkserver.ForkServer()


def lacking() -> str | None:
    """What this machine lacks for the device; None if it can have it."""
    if "+cpu" not in importlib.metadata.version("torch"):
        return "needs a CPU build of torch"
    return None if shutil.which("g++") else "needs g++"


@cache
def build() -> Path:
    """The library of the device: compiled once for each source and version of torch, whoever asks first."""
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(repr((SOURCE.read_bytes(), version, _FLAGS)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_dist" / "simulated_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest}.so"
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    headers = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    linked = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", "-ltorch"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            built = library.with_suffix(".new")
            subprocess.run(["g++", *_FLAGS, str(SOURCE), "-o", str(built), *headers, *linked], check=True)
            built.replace(library)
        library.touch()
        for other in folder.glob("*.so"):  # of other sources or versions, not used for a day
            if other.stat().st_mtime < library.stat().st_mtime - 86_400:
                other.unlink()
    return library


def environment(
    devices: int = 1, memory_bytes: int = 80 * 2**30, report: Path | None = None
) -> dict[str, str]:
    """The whole environment of a process that asks for the device; into `report` it writes what it counts."""
    paths = [str(SOURCE.with_name("start")), str(ROOT), os.environ.get("PYTHONPATH", "")]
    wanted = {"": build(), "_DEVICES": devices, "_BYTES": memory_bytes, "_REPORT": report or ""}
    variables = process_environment() | {f"SIMULATED_CUDA{name}": str(wanted[name]) for name in wanted}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        variables.pop(name, None)
    return variables


def start_parent() -> forkserver.ForkServer:
    """The warm parent with the device, which is started if it does not run yet."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        _parent.set_forkserver_preload(_PRELOADED)
        _parent.ensure_running()
    return _parent


def started_parent() -> str:
    """Start the parent for other processes; its address. Empty where there cannot be a device."""
    if lacking():
        return ""
    start_quietly(start_parent)
    return _parent._forkserver_address


def use_parent(address: str) -> None:
    """From now on fork from the parent that another process has started."""
    global _parent  # noqa: PLW0603
    _parent = OfOtherProcess(address)
