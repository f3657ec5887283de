"""DeepSpeed's CPU Adam, which is compiled for a minute at its first use."""

from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import _get_build_directory


def is_built() -> bool:
    """Return whether a process of this environment loads CPU Adam without compiling it."""
    try:
        folder = Path(_get_build_directory("cpu_adam", False))
    except OSError:
        return False
    if not (folder / "cpu_adam.so").is_file() or (folder / "lock").exists():
        return False
    return f"{Path(torch.__file__).parent}/include" in (folder / "build.ninja").read_text()


needs_cpu_adam = pytest.mark.skipif(not is_built(), reason="DeepSpeed's CPU Adam is not compiled here")
