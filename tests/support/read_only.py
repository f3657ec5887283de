"""A folder that nobody can write to, whoever runs the tests."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Mount `folder` on itself, read-only; permissions would not stop root. Only root can."""
    mounts = [["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)]]
    try:
        for options in mounts:
            if subprocess.run(["mount", *options], check=False, capture_output=True).returncode != 0:
                pytest.skip("cannot mount a folder read-only")
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
