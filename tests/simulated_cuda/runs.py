"""Build the simulated device, give it to processes, and run modules on it.

The processes are forked from a warm parent of their own, which has the device, too.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests.support import launch, warm
from tests.support.launch import Finished

SOURCE = Path(__file__).with_name("device.cpp")
_FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DUSE_DISTRIBUTED")
_PRELOADED = [
    *("dpo_dist.training.run", "dpo_dist.tools.report.recorder", "transformers.models.qwen2.modeling_qwen2"),
    *("tests.support.kernels", "tests.support.preloaded"),
]
_parent = forkserver.ForkServer()
Prepare = Callable[[], None]


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
    paths = [str(SOURCE.with_name("start")), str(launch.ROOT), os.environ.get("PYTHONPATH", "")]
    wanted = {"": build(), "_DEVICES": devices, "_BYTES": memory_bytes, "_REPORT": report or ""}
    variables = launch.environment() | {f"SIMULATED_CUDA{name}": str(wanted[name]) for name in wanted}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        variables.pop(name, None)
    return variables


@contextlib.contextmanager
def _parent_with_device() -> Iterator[None]:
    """Fork processes from it."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        _parent.set_forkserver_preload(_PRELOADED)
        _parent.ensure_running()
    with mock.patch.object(forkserver, "connect_to_new_process", _parent.connect_to_new_process):
        yield


def _begin(prepare: Prepare | None) -> None:
    # Several files for each rank.
    mock.patch("dpo_dist.distributed.checkpoint.slices._FILE_BYTES", 2**16).start()
    if prepare is not None:
        prepare()


def run_module(
    module: str,
    arguments: list[str],
    processes: int = 1,
    prepare: Prepare | None = None,
    report: Path | None = None,
) -> Finished:
    """Run a module to its end, on processes with a device each; `prepare` is called in each before it."""
    variables, begin = environment(processes, report=report), partial(_begin, prepare)
    with tempfile.TemporaryDirectory() as temporary:
        screen = Path(temporary) / "screen"
        screen.touch()
        with _parent_with_device():
            started = warm.start_module(
                warm.context, module, arguments, variables, processes, launch.ROOT, screen, begin
            )
        code = warm.wait(started, 240)
        return Finished(code, screen.read_text(encoding="utf-8"))


run_train = partial(run_module, "dpo_dist.train")
