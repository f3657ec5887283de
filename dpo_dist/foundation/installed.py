"""What lies beside the package, in a wheel and in a checkout: its pages, and the packages of its extras."""

import contextlib
import re
import shlex
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PAGE = re.compile(r"(?<![\w/])docs/(\w+\.md)\b")


@cache
def pages() -> Path:
    """Return the folder of the pages: a wheel has its own copy."""
    inside = _PACKAGE / "docs"
    return inside if inside.is_dir() else _PACKAGE.parent / "docs"


def with_pages(text: str) -> str:
    """Return the program's own `text` with the path of each page that it names as `docs/data.md`.

    The text may also name a file of the user's.
    """
    folder = pages()
    with contextlib.suppress(OSError, ValueError):  # no working directory, or another one
        folder = folder.relative_to(Path.cwd())

    def with_path(match: re.Match[str]) -> str:
        return f"{folder}/{match[1]}" if (pages() / match[1]).is_file() else match[0]

    return _PAGE.sub(with_path, text)


def is_installed(package: str) -> bool:
    """Return whether a package of an index is installed.

    Its modules do not say: flash-attn-4 has one with the name of flash-attn's.
    """
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def install_extra(extra: str, only: str = "") -> str:
    """Return the command that installs the packages of an extra of pyproject.toml, or only one of them.

    It names the packages: no index has this one.
    """
    try:
        every = metadata.requires("dpo-dist") or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return f"install the extra {extra!r} of dpo_dist's pyproject.toml"
    parts = [requirement.partition(";") for requirement in every]
    packages = [name.strip() for name, _, extras in parts if re.search(rf"extra == .{extra}\W", extras)]
    packages = [name for name in packages if name.startswith(only)]
    return f"pip install {shlex.join(packages)}"
