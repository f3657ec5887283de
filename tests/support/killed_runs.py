"""Kill -9 of processes at a chosen file operation, which no clock decides; runs compared to the last bit."""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.support.launch import history, summary

_CHANGES = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OF_STARTS = frozenset({"train_seconds", "work", "window", "reference_report"})


@dataclass(frozen=True)
class KillPoint:
    """The file operation of a rank at which processes are killed.

    Attributes:
        folder: operations below it are counted.
        operation: the number of the fatal one; 0: none, they are only counted.
        rank: of the process whose operations are counted.
        delay: seconds between the operation and the kill; 0: the operation itself does not happen.
        everybody: all ranks are killed, not only this one.
    """

    folder: Path
    operation: int = 0
    rank: int = 0
    delay: float = 0.0
    everybody: bool = False

    def forget_former_start(self) -> None:
        """Remove what a former start in the folder has left; call it before each."""
        for file in (*self.folder.glob("process-*"), self.folder / "reached"):
            file.unlink(missing_ok=True)

    @property
    def is_reached(self) -> bool:
        """Whether the fatal operation of the last start was reached."""
        return (self.folder / "reached").exists()

    def counted(self, rank: int) -> int:
        """Return the operations of this rank in the last start."""
        return int((self.folder / f"operations-{rank}").read_text())

    def arm(self) -> None:
        """Count in this process from now on."""
        rank = int(os.environ.get("RANK", "0"))
        (self.folder / f"process-{rank}").write_text(str(os.getpid()))
        record = os.open(self.folder / f"operations-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        beginning, fatal, count = f"{self.folder}{os.sep}", self.operation if rank == self.rank else 0, 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            changes = event in _CHANGES or (event == "open" and arguments[2] & _WRITING)
            if not changes or isinstance(arguments[0], int):
                return
            if os.fsdecode(arguments[0]).startswith(beginning):
                count += 1
                os.pwrite(record, str(count).encode(), 0)
                if count == fatal:
                    self._fall()

        sys.addaudithook(hook)

    def _fall(self) -> None:
        (self.folder / "reached").touch()
        if self.delay:
            threading.Thread(target=self._kill, daemon=True).start()
        else:
            self._kill()

    def _kill(self) -> None:
        time.sleep(self.delay)
        if self.everybody:
            for file in self.folder.glob("process-*"):
                if file.name != f"process-{self.rank}":
                    with contextlib.suppress(ProcessLookupError):  # it has ended
                        os.kill(int(file.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def assert_same_run(killed: Path, whole: Path) -> None:
    """Equal rows, model, and optimizer states of the last checkpoint; no temporary file anywhere.

    Rows but for the peak of a device's memory, which is that of each start.
    """
    rows = [history(folder / "run") for folder in (killed, whole)]
    for row in itertools.chain(*rows):
        row.pop("memory/peak_allocated_bytes", None)
    assert rows[0] == rows[1]
    assert summary(killed / "run")["exit"] == "completed"
    saved = sorted((whole / "run" / "checkpoints").glob("step-*"))[-1]
    for part in (whole / "run" / "model", saved / "engine"):
        other = killed / part.relative_to(whole)
        names = sorted(file.name for file in part.iterdir())
        assert sorted(file.name for file in other.iterdir()) == names
        for name in names:
            assert _content(other / name) == _content(part / name), name
    for file in (saved / "state.json", *sorted(saved.glob("random_states_*.json"))):
        assert _untimed(killed / file.relative_to(whole)) == _untimed(file), file.name
    assert not [file for file in killed.rglob("*") if ".tmp-" in file.name]


def _untimed(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint without times, and what starts found in the store."""
    content = json.loads(file.read_text())
    return {name: value for name, value in content.items() if name not in _OF_STARTS}


def _content(file: Path) -> object:
    """Bytes, or of safetensors the values, because its header has no fixed order; of a model card nothing."""
    if file.name == "README.md":
        return None
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return content.metadata(), {
            name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
            for name, tensor in tensors.items()
        }
