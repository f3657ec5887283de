"""Names of a module that are imported when they are asked for: some import torch, which takes seconds."""

import ast
from collections.abc import Callable
from importlib import import_module  # noqa: TID251  (no code of the user)
from pathlib import Path
from typing import Any


def lazy_names(module: str, file: str) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and `__getattr__` of a module: the names that it imports `if TYPE_CHECKING`.

    `file` is its source; a name may have no alias.
    """
    homes = dict[str, str]()
    for block in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If):
            for line in block.body:
                assert isinstance(line, ast.ImportFrom)
                homes |= {alias.name: str(line.module) for alias in line.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return [*homes], get
