"""Sources by name from LLaMA-Factory's `dataset_info.json`: file or Hub dataset, columns and tags."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.config.data_schema import DataFormat, SourceConfig
from dpo_dist.data.counts import UNPAIRED_REMEDY
from dpo_dist.data.fields.columns import OTHERS
from dpo_dist.data.fields.sharegpt import TAGS
from dpo_dist.data.files.folders import is_saved
from dpo_dist.data.files.inside import check_inside
from dpo_dist.data.files.json_values import fault_of, parse_json
from dpo_dist.errors import ConfigError, DataError

_FILE = "dataset_info.json"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LOCATIONS = ("file_name", "hf_hub_url")
# Locations that cannot be read here, and a checksum that only LLaMA-Factory's old loader compared.
_OTHER_LOCATIONS = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_OPTIONS = (
    "subset",
    "split",
    "folder",
    "revision",
    "num_samples",
    "ranking",
    "formatting",
    "columns",
    "tags",
)
_UNUSED = ("file_sha1",)
_TYPES: dict[str, type] = {
    **dict.fromkeys((*_LOCATIONS, "subset", "split", "folder", "revision", "formatting"), str),
    **{"num_samples": int, "ranking": bool, "columns": dict, "tags": dict},
}
_MEDIA = {name: name for name in ("images", "videos", "audios")}
_SHARED = {name: name for name in ("system", "tools", "chosen", "rejected")} | _MEDIA | {"kto_tag": "label"}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
# The field of each column, by formatting.
_COLUMNS = {
    "alpaca": (DataFormat.alpaca, _ALPACA | _SHARED),
    "sharegpt": (DataFormat.sharegpt, {"messages": "conversations"} | _SHARED),
    "openai": (DataFormat.sharegpt, {"messages": "messages"} | _SHARED),
}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
}


def resolved(source: SourceConfig) -> SourceConfig:
    """Return the source that an entry of a `dataset_info.json` describes; any other source unchanged.

    Args:
        source: `path` is the folder with a dataset_info.json, or this file, and `name` the entry.

    Raises:
        ConfigError: the entry, or one of its keys, does not exist or has no meaning here.
        DataError: the file cannot be read, or the entry has no data that can be read.
    """
    file = _registry_file(source)
    if file is None:
        return source
    entries = _entries(file, is_required=source.name is not None or file == Path(source.path).expanduser())
    if entries is None:
        return source
    if source.name not in entries:
        near = difflib.get_close_matches(source.name or "", entries, n=1)
        raise ConfigError(
            f"{_FILE} has no such entry"
            if source.name
            else f"the folder has a {_FILE}: `name` chooses an entry",
            where=f"name of {source.path}",
            got=str(source.name),
            expected=", ".join(sorted(entries)),
            remedy=f"did you mean {near[0]}?"
            if near
            else f"write {{path: {source.path}, name: ENTRY}}; to read "
            "files without it, set path to a file or pattern",
        )
    return _Entry(source, file, entries[source.name]).source()


def _registry_file(source: SourceConfig) -> Path | None:
    local = Path(source.path).expanduser()
    file = local if local.name == _FILE else local / _FILE
    try:
        is_registry = "://" not in source.path and file.is_file() and not is_saved(file.parent)
    except OSError:
        return None  # no path of a source; `sources.local_files` says why
    return file if is_registry else None


def _entries(file: Path, *, is_required: bool) -> dict[str, Mapping[str, Any]] | None:
    """Return the entries of the file; None if it is another program's and no entry is required."""
    try:
        found, fault = parse_json(file.read_bytes()), ""
    except OSError as error:
        found, fault = None, str(error)
    except ValueError as error:
        found, fault = None, fault_of(error)
    entries = found if isinstance(found, dict) and all(isinstance(e, dict) for e in found.values()) else {}
    if any({*_LOCATIONS, *_OTHER_LOCATIONS} & entry.keys() for entry in entries.values()):
        return entries
    if not is_required:
        return None
    is_list = isinstance(found, list)
    raise DataError(
        f"the file is no {_FILE} of LLaMA-Factory",
        where=str(file),
        got=fault or ("a list, as of ms-swift" if is_list else "no entry with file_name or hf_hub_url"),
        expected='{"NAME": {"file_name": "pairs.json", ...}, ...}',
        remedy="set path to the entry's dataset_path or hf_dataset_id, and columns: {FIELD: COLUMN}"
        if is_list
        else "remove `name` and set path to the data file",
    )


class _Entry:
    """One entry of a file, as the source that `source` asks for."""

    def __init__(self, source: SourceConfig, file: Path, entry: Mapping[str, Any]) -> None:
        self.asked, self.file, self.entry = source, file, entry
        self.where = f"{source.name} in {file}"

    def source(self) -> SourceConfig:
        """Return the described source, with the asked one's weight and limit."""
        self._check()
        kind, fields = _COLUMNS[self.entry.get("formatting") or "alpaca"]
        found = replace(
            self.asked,
            name=None,
            format=kind,
            columns=self._columns(fields),
            tags=self._tags(),
            limit=self._limit(),
        )
        if self.entry.get("hf_hub_url"):
            if not _HUB_NAME.fullmatch(self.entry["hf_hub_url"]):
                raise self._fault("hf_hub_url is no name of a Hub dataset", self.entry["hf_hub_url"])
            check_inside(filter(None, [self.entry.get("folder")]), self.where)
            return replace(
                found,
                path=self.entry["hf_hub_url"],
                name=self.entry.get("subset"),
                data_dir=self.entry.get("folder"),
                split=self.entry.get("split"),
                revision=self.entry.get("revision"),
            )
        for key in ("subset", "folder", "revision"):
            if self.entry.get(key):
                raise self._fault(f"{key} has no effect on a file", self.entry[key], remedy=f"remove {key}")
        # LLaMA-Factory gives every local file the split train.
        split = self.entry.get("split")
        check_inside([self.entry["file_name"]], self.where)
        path = self.file.parent / self.entry["file_name"]
        return replace(found, path=str(path), split=None if split == "train" else split)

    def _check(self) -> None:
        asked = self.asked
        for key, value in (
            ("split", asked.split),
            ("data_dir", asked.data_dir),
            ("revision", asked.revision),
        ):
            if value is not None:
                raise self._fault(
                    f"{key} of the source has no effect", value, remedy=f"the entry decides: set its {key}"
                )
        form = None if asked.format is DataFormat.auto else asked.format
        for key, value in (("format", form), ("columns", asked.columns), ("tags", asked.tags)):
            if value:
                raise self._fault(
                    f"{key} of the source has no effect",
                    value,
                    remedy="the entry decides; or set path to its file",
                )
        for key, kind in _TYPES.items():
            if self.entry.get(key) is not None and not isinstance(self.entry[key], kind):
                raise self._fault(f"{key} of the entry has the wrong type", self.entry[key])
        self._check_keys("key", self.entry, (*_LOCATIONS, *_OPTIONS, *_OTHER_LOCATIONS, *_UNUSED))
        formatting = self.entry.get("formatting") or "alpaca"
        if formatting not in _COLUMNS:
            raise self._fault("unknown formatting", formatting, expected=", ".join(_COLUMNS))
        if not any(self.entry.get(key) for key in _LOCATIONS):
            others = [key for key in _OTHER_LOCATIONS if self.entry.get(key)]
            raise DataError(
                "the entry names no data that can be read here",
                where=self.where,
                got=", ".join(others) or "neither file_name nor hf_hub_url",
                expected=" or ".join(_LOCATIONS),
                remedy="download the data and set file_name",
            )
        columns = self.entry.get("columns") or {}
        self._check_keys("column", columns, tuple(_COLUMNS[formatting][1]))
        self._check_ranking(columns)

    def _check_ranking(self, columns: Mapping[str, Any]) -> None:
        if columns.get("kto_tag"):
            raise DataError(
                "the entry has unpaired responses with a good/bad label (KTO)",
                where=self.where,
                got=f"kto_tag: {columns['kto_tag']}",
                expected="pairs: columns with chosen and rejected",
                remedy=UNPAIRED_REMEDY,
            )
        sides = [name for name in ("chosen", "rejected") if columns.get(name)]
        if sides and not self.entry.get("ranking"):
            raise self._fault(
                "the entry has sides of pairs, but is no ranking",
                ", ".join(sides),
                expected='"ranking": true',
                remedy="add it to the entry; LLaMA-Factory would not read these columns without it",
            )

    def _check_keys(self, kind: str, names: Mapping[str, Any], known: tuple[str, ...]) -> None:
        if unknown := [name for name in names if name not in known]:
            raise self._fault(f"unknown {kind} of the entry", ", ".join(unknown), expected=", ".join(known))

    def _columns(self, fields: Mapping[str, str]) -> dict[str, str | None] | None:
        """Return the field of each column; as in LLaMA-Factory, no other column is read."""
        columns = {name: column for name, column in (self.entry.get("columns") or {}).items() if column}
        if not columns:
            return {"chosen": None, "rejected": None} if self.entry.get("ranking") is False else None
        return {**{fields[name]: column for name, column in columns.items()}, OTHERS: None}

    def _tags(self) -> dict[str, str] | None:
        given = self.entry.get("tags") or {}
        self._check_keys("tag", given, tuple(TAGS))
        formatting = self.entry.get("formatting") or "alpaca"
        if formatting == "alpaca":  # LLaMA-Factory reads its texts without tags
            return None
        usual = _OPENAI_TAGS if formatting == "openai" else {}
        return {**usual, **{tag: name for tag, name in given.items() if name}} or None

    def _limit(self) -> int | None:
        limits = [limit for limit in (self.asked.limit, self.entry.get("num_samples")) if limit is not None]
        return min(limits, default=None)

    def _fault(self, what: str, got: Any, *, expected: str = "", remedy: str = "") -> ConfigError:
        return ConfigError(what, where=self.where, got=str(got), expected=expected, remedy=remedy)
