"""The growth of wandb's file of a run: wandb reports no full disk, its file only stops to grow."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import torch

from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import first_line

_SECONDS = 20.0
_PROBE_BYTES = 2**16


class FileGrowth:
    """Whether wandb's file of a run grows after rows are sent.

    Args:
        folder: of the file.
        seconds: in which a row that was sent has to be in the file.
    """

    def __init__(self, folder: Path, seconds: float = _SECONDS):
        self._folder, self._seconds = folder, seconds
        self._size = self._bytes()
        self._sent_at: float | None = None
        self._is_reported = False

    def note_sent(self) -> None:
        """Remember that something was sent now."""
        if self._sent_at is None:
            self._sent_at = time.monotonic()

    def fault(self, *, is_closed: bool = False) -> str | None:
        """Return that the file has stopped to grow, and why, if it has; only once.

        Args:
            is_closed: wandb has closed the file, so that all that was sent has to be in it.
        """
        waited = None if self._sent_at is None else time.monotonic() - self._sent_at
        if self._is_reported or waited is None or (waited < self._seconds and not is_closed):
            return None
        before, self._size, self._sent_at = self._size, self._bytes(), None
        is_grown = self._size > before
        # A file that is closed may have grown before the disk was full.
        why = _error_of_writing(self._folder) if is_closed or not is_grown else None
        if is_grown and why is None:
            return None
        self._is_reported = True
        return f"wandb does not write to {self._folder}: {why or 'its file does not grow'}"

    def _bytes(self) -> int:
        with contextlib.suppress(OSError):
            return sum(file.stat().st_size for file in self._folder.glob("run-*.wandb"))
        return 0


def _error_of_writing(folder: Path) -> str | None:
    """Return the error of writing a small file to a folder; None if there is none."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


_SECONDS_OF_SYSTEM_METRICS = 15.0
_RANKS_IN_SECONDS = 128
_STOP_SECONDS = 1.0
_MIB = 2**20

_log = logging.getLogger(__name__)

Send = Callable[[Mapping[str, float]], None]


@contextlib.contextmanager
def system_metrics(
    folder: Path, world: World, send: Send | None, seconds: float | None = None
) -> Iterator[None]:
    """Sample this rank's system metrics until the block ends; not collective.

    Args:
        folder: of the samples, one file for each rank but 0.
        world: the ranks.
        send: on rank 0: takes the new values of all ranks by name and rank, as W&B names them
            (`proc.memory.rssMB/l:rank-1`). None on the other ranks.
        seconds: between two samples. None: 15, and more from 128 ranks on; the first ones come earlier, so
            that a short run has some.
    """
    period = (
        max(_SECONDS_OF_SYSTEM_METRICS, _SECONDS_OF_SYSTEM_METRICS * world.size / _RANKS_IN_SECONDS)
        if seconds is None
        else seconds
    )
    stop = threading.Event()
    sampler = _Sampler(folder, world, send)
    thread = threading.Thread(target=_sample, args=(sampler, stop, period), name="system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_STOP_SECONDS)


def _sample(sampler: "_Sampler", stop: threading.Event, period: float) -> None:
    wait, is_known = min(1.0, period), False
    while not stop.is_set():
        try:
            sampler.exchange()
        except Exception as error:
            # A folder that cannot be written now may be writable later.
            if not is_known:
                _log.warning("no system metrics of this rank: %s", first_line(error))
            is_known = True
        stop.wait(wait)
        wait = min(2 * wait, period)
    sampler.clear()


class _Sampler:
    """Takes samples of a rank, and passes those of all ranks on rank 0."""

    def __init__(self, folder: Path, world: World, send: Send | None):
        self._folder, self._world, self._send = folder, world, send
        self._process = psutil.Process()
        self._cpu_seconds: tuple[float, float] | None = None
        # Those of a start that was killed are not sent again.
        self._seen = {} if send is None else dict(self._files())

    def exchange(self) -> None:
        """Write a sample of this rank; on rank 0 send it, with the new ones of the others."""
        values = self._values()
        if self._send is None:
            self._write(values)
            return
        named = {_label(name, 0): value for name, value in values.items()}
        for rank, content in self._files():
            if self._seen.get(rank) != content:
                self._seen[rank] = content
                named |= {_label(name, rank): value for name, value in _parsed(content).items()}
        self._send(named)

    def clear(self) -> None:
        """Remove the folder, on rank 0."""
        if self._send is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, values: Mapping[str, float]) -> None:
        """Write the sample, whole or not at all; nobody needs it after a crash of the node."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".tmp-{self._world.rank}"
        temporary.write_text(json.dumps({"time": time.time(), "values": values}), encoding="utf-8")
        temporary.replace(self._file(self._world.rank))

    def _files(self) -> Iterator[tuple[int, str]]:
        for rank in range(1, self._world.size):
            with contextlib.suppress(OSError, ValueError):
                yield rank, self._file(rank).read_text(encoding="utf-8")

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _values(self) -> dict[str, float]:
        used, node = self._process.memory_info().rss, psutil.virtual_memory()
        return {
            **self._cpu(),
            "proc.cpu.threads": float(self._process.num_threads()),
            "proc.memory.rssMB": used / _MIB,
            "proc.memory.percent": 100 * used / node.total,
            "proc.memory.availableMB": node.available / _MIB,
            "memory_percent": node.percent,
            **_gpu(self._world.device),
        }

    def _cpu(self) -> dict[str, float]:
        """Return the percentage of the node's cores that the process has used since the last sample."""
        times, now = self._process.cpu_times(), time.monotonic()
        before, self._cpu_seconds = self._cpu_seconds, (times.user + times.system, now)
        if before is None or now <= before[1]:
            return {}
        cores = (times.user + times.system - before[0]) / (now - before[1])
        return {"cpu": 100 * cores / (psutil.cpu_count() or 1)}


def _gpu(device: torch.device) -> dict[str, float]:
    """Return the values of a GPU that its driver gives; without nvidia-ml-py only the process's memory."""
    if device.type != "cuda":
        return {}
    gpu = f"gpu.{device.index}"
    # Numbers of PyTorch's own: they wait for no kernel.
    values = {f"gpu.process.{device.index}.memoryAllocatedBytes": float(torch.cuda.memory_reserved(device))}
    reads: dict[str, Callable[[], float]] = {
        f"{gpu}.gpu": lambda: torch.cuda.utilization(device),
        f"{gpu}.memory": lambda: torch.cuda.memory_usage(device),
        f"{gpu}.memoryAllocatedBytes": lambda: torch.cuda.device_memory_used(device),
        f"{gpu}.temp": lambda: torch.cuda.temperature(device),
        f"{gpu}.powerWatts": lambda: torch.cuda.power_draw(device) / 1000,
    }
    for name, read in reads.items():
        # The driver of a virtual GPU may lack one of them; the classes of its errors are nvidia-ml-py's.
        with contextlib.suppress(Exception):
            values[name] = float(read())
    return values


def _label(name: str, rank: int) -> str:
    """Return the name of a rank's metric as in W&B's shared mode: its system panels have a line of each."""
    return f"{name}/l:rank-{rank}"


def _parsed(content: str) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in json.loads(content)["values"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
