"""Names of files in the descriptions that datasets bring along: they stay in the folder of the dataset."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dpo_dist.errors import DataError

_STANDALONE = ".huggingface.yaml"


def check_inside(names: Iterable[str], where: str) -> None:
    """Check that names and patterns of files, relative to a folder, stay in it.

    Raises:
        DataError: one is absolute, an address, or has `..`.
    """
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or name.startswith("~") or ".." in path.parts or "://" in name or "::" in name:
            raise DataError(
                "the description of a dataset names a file outside its folder",
                where=where,
                got=name,
                expected="names of files below the folder of the description",
                remedy="set path of the source to this file, if you want it to be read",
            )


def check_card(folder: Path) -> None:
    """Check the names of data files in the dataset card (README.md) of a folder.

    Raises:
        DataError: as `check_inside`.
    """
    from huggingface_hub import DatasetCard  # noqa: PLC0415  # slow to import

    card, standalone = folder / "README.md", folder / _STANDALONE
    if card.is_file():
        content = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict()
        check_inside(_named(content.get("configs")), str(card))
    if standalone.is_file():
        check_inside(_named(yaml.safe_load(standalone.read_bytes())), str(standalone))


def check_saved(folder: Path) -> None:
    """Check the names of files in a folder written by `Dataset.save_to_disk`.

    Raises:
        DataError: as `check_inside`.
        OSError, ValueError, KeyError: a description cannot be read.
    """
    splits = folder / "dataset_dict.json"
    parts = [folder]
    if splits.is_file():
        names = [str(name) for name in json.loads(splits.read_bytes())["splits"]]
        check_inside(names, str(splits))
        parts = [folder / name for name in names]
    for state in (part / "state.json" for part in parts):
        if state.is_file():
            files = json.loads(state.read_bytes())["_data_files"]
            check_inside([str(file["filename"]) for file in files], str(state))


def _named(value: Any, key: str = "", seen: set[tuple[int, str]] | None = None) -> Iterator[str]:
    """Yield the texts under `data_files` and `data_dir`; an object that YAML names several times once."""
    seen = set() if seen is None else seen
    if isinstance(value, dict | list):
        if (id(value), key) in seen:
            return
        seen.add((id(value), key))
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _named(inner, key or (name if name in ("data_files", "data_dir") else ""), seen)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, key, seen)
    elif key and isinstance(value, str):
        yield value
