"""LLaMA-Factory's `dataset_info.json`: an entry as a source with `fields`."""

import contextlib
from dataclasses import replace
from pathlib import Path

from dpo_dist.data.config import SourceConfig
from dpo_dist.data.read.messages import ROLES
from dpo_dist.data.read.plain import parse_json
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import check_readable, own_table
from dpo_dist.foundation.types import Fields

_FILE = "dataset_info.json"
_TABLE = own_table(Path(__file__).with_suffix(".yaml"))


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def resolve_source(source: SourceConfig) -> SourceConfig:
    """Return the source that an entry of a `dataset_info.json` describes; any other source unchanged.

    `path` is the folder with a dataset_info.json, or this file, and `name` the entry. Raises ConfigError: the
    file or the entry cannot be read, or asks for something that is not supported; DataError: this user may
    not read the source.
    """
    local = Path(source.path).expanduser()
    file = local if local.name == _FILE else local / _FILE
    if "://" not in source.path:
        check_readable(local, source.path, DataError)
    is_described = "://" not in source.path and file.is_file() and not is_saved(file.parent)
    if not is_described or (source.name is None and file != local):
        return source
    try:
        content = parse_json(file.read_bytes())
    except ValueError:
        content = None
    entries = content if isinstance(content, dict) else {}
    if not isinstance(entries.get(source.name), dict):
        raise ConfigError(
            f"{_FILE} has no such entry",
            where=f"name of {source.path}",
            got=str(source.name),
            expected=", ".join(sorted(entries)) or "a JSON object of entries",
            remedy=f"write {{path: {source.path}, name: ENTRY}}, or set path to a data file and its fields",
        )
    try:
        return _read_entry(source, file.parent, entries[source.name])
    except (TypeError, ValueError) as fault:
        raise ConfigError(
            f"the entry of {_FILE} cannot be read",
            where=f"{source.name} in {file}",
            got=" ".join(str(fault).split()),
            expected="the keys and values that docs/data.md lists",
            remedy="correct the entry, or set the source's path to the file, and its fields or reader",
        ) from fault


def _read_entry(source: SourceConfig, folder: Path, entry: Fields) -> SourceConfig:
    """Return the source that an entry describes, with the weight and limit of `source`."""
    entry = {key: value for key, value in entry.items() if value is not None}
    formatting = entry.get("formatting", "alpaca")
    usual = _TABLE["columns"].get(formatting, {})
    named = {name: column for name, column in dict(entry.get("columns", {})).items() if column}
    faults = [
        f"{key} of the source" for key in ("fields", "split", "data_dir", "revision") if getattr(source, key)
    ]
    faults += [] if usual else [f"formatting {formatting}"]
    faults += [key for key in entry if key not in _TABLE["keys"]]
    faults += [f"column {name}" for name in named if name not in usual]
    for tag, name in dict(entry.get("tags", {})).items():
        if name and name not in _TABLE["tags"] and ROLES.get(name, name) != _TABLE["role_tags"].get(tag):
            faults.append(f"{tag} {name}")
    if not entry.get("ranking"):
        faults += [f'{side} without "ranking": true' for side in ("chosen", "rejected") if side in named]
    if not (entry.get("file_name") or entry.get("hf_hub_url")):
        faults.append("no file_name or hf_hub_url")
    if faults:
        raise ValueError(", ".join(faults))
    kind = "conversation" if "messages" in usual else "completion"
    if entry.get("ranking"):
        kind = "ranking" if "response" in named else "pair"
    columns = {name: f"row[{column!r}]" for name, column in {**usual, **named}.items() if column}
    fields = {}
    for field, text in [*_TABLE["fields"]["all"].items(), *_TABLE["fields"][kind].items()]:
        with contextlib.suppress(KeyError):  # a column that the entry does not name
            fields[field] = text.format_map(columns)
    limits = [limit for limit in (source.limit, entry.get("num_samples")) if limit is not None]
    # As in LLaMA-Factory, no other column is read.
    described = replace(source, name=None, fields=fields, ignore=["*"], limit=min(limits, default=None))
    hub = entry.get("hf_hub_url")
    if hub:
        subset, data_dir, revision, split = map(entry.get, ("subset", "folder", "revision", "split"))
        return replace(described, path=hub, name=subset, data_dir=data_dir, revision=revision, split=split)
    # LLaMA-Factory gives every local file the split train. Names of images are relative to the file's folder.
    split = None if entry.get("split") == "train" else entry.get("split")
    images = described.images or str(folder)
    return replace(described, path=str(folder / entry["file_name"]), split=split, images=images)
