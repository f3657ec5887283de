"""Other names of a source's fields: `columns` and `tags`, and LLaMA-Factory's `dataset_info.json`."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.config.data import DataFormat, SourceConfig
from dpo_dist.data.counts import UNPAIRED_REMEDY
from dpo_dist.data.folders import check_inside, is_saved
from dpo_dist.data.messages import (
    TAGS,
    fault_of,
    from_json,
    has_role_tag,
    is_messages,
    parse_json,
    role_tag,
    with_usual_tags,
)
from dpo_dist.data.records import BadRecord, Fields, RawRecord, shown_key
from dpo_dist.foundation.errors import ConfigError, DataError

# The fields that formats read; `record` is an object with all of them.
FIELDS = (
    *("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "system", "history"),
    *("messages", "conversations", "chosen_messages", "rejected_messages", "rejected_response"),
    *("instruction", "input", "question", "query", "output", "completion", "responses", "scores"),
    *("response_0", "response_1", "better_response_id"),
    *("tools", "chat_template_kwargs", "documents", "images", "videos", "audios", "label", "record"),
)
_OPTIONAL = (
    *(
        "system",
        "history",
        "input",
        "tools",
        "chat_template_kwargs",
        "documents",
        "images",
        "videos",
        "audios",
    ),
    *("score_chosen", "score_rejected", "scores", "label"),
)
# With null: no column is read except those that are named.
OTHERS = "*"
_WHOLE = "record"
_MAX_SHOWN = 20
_MISSING = object()


def check_columns(source: SourceConfig) -> None:
    """Check the names in `columns` and `tags` of a source. Raises ConfigError."""
    _check_names("columns", source.columns, source.path, (*FIELDS, OTHERS))
    _check_names("tags", source.tags, source.path, tuple(TAGS))
    for field, column in (source.columns or {}).items():
        is_ignored = column is None
        if not is_ignored and (not isinstance(column, str) or not column or field == OTHERS):
            raise ConfigError(
                "a column is not a name",
                where=f"columns.{field} of {source.path}",
                got=str(column),
                expected="the name of a column, a path into nested objects (answers.good), or null to ignore "
                "the column",
                remedy=f"write columns: {{{field}: COLUMN}}",
            )
    for tag, name in (source.tags or {}).items():
        if not isinstance(name, str) or not name:
            raise ConfigError(
                "a tag is not a name",
                where=f"tags.{tag} of {source.path}",
                got=str(name),
                expected="a text",
                remedy=f"write tags: {{{tag}: NAME}}",
            )


def check_first_columns(records: Sequence[Fields], source: SourceConfig) -> None:
    """Check that the first records of a source have its columns, but for fields that few records may have.

    Raises:
        DataError: none of them has one of the columns.
    """
    columns = {column for field, column in (source.columns or {}).items() if field not in _OPTIONAL}
    paths = sorted(column for column in columns if column is not None)
    missing = [path for path in paths if all(_value_at(record, path) is _MISSING for record in records)]
    if records and missing:
        seen = dict.fromkeys(shown_key(name) for record in records for name in record)
        raise _unknown_columns(missing, list(seen), source)


def with_columns(records: Iterator[RawRecord], source: SourceConfig) -> Iterator[RawRecord]:
    """Return records with the fields' usual names.

    Raises:
        ConfigError: as `check_columns`; by this call.
        DataError: no record has one of the columns, or turns with the role's tag; after the last record.
    """
    check_columns(source)
    if not source.columns and not source.tags:
        return records
    return _renamed(records, source)


def _check_names(key: str, names: Any, path: str, known: tuple[str, ...]) -> None:
    if names is None:
        return
    where = f"{key} of {path}"
    if not isinstance(names, Mapping):
        raise ConfigError(
            f"{key} is not a mapping",
            where=where,
            got=str(names),
            expected="a mapping",
            remedy=f"write {key}: {{{known[0]}: NAME}}",
        )
    ignored = [name for name, column in names.items() if key == "columns" and column is None]
    unknown = [str(name) for name in names if name not in known and name not in ignored]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"{key} has a name that no format reads",
            where=where,
            got=", ".join(unknown),
            expected=", ".join(known),
            remedy=f"did you mean {near[0]}?" if near else "write {FIELD: COLUMN}, as in {prompt: question}",
        )


def _renamed(records: Iterator[RawRecord], source: SourceConfig) -> Iterator[RawRecord]:
    columns, tags = dict(source.columns or {}), dict(source.tags or {})
    paths = {field: column for field, column in columns.items() if column is not None}
    # `metadata` is no field of its own: a pair's scores in it stay.
    outer = {path.split(".")[0] for path in paths.values()} - {"metadata"}
    hidden = {*columns, *paths.values(), *outer}
    unseen, seen = set(paths.values()), dict[str, None]()
    has_turns, seen_any = not tags, False
    for record, origin in records:
        if isinstance(record, BadRecord):
            yield record, origin
            continue
        values = {field: _value_at(record, path) for field, path in paths.items()}
        if unseen:
            unseen -= {paths[field] for field, value in values.items() if value is not _MISSING}
            seen |= dict.fromkeys(map(shown_key, record))
        rest = {} if OTHERS in columns else {name: record[name] for name in record if name not in hidden}
        found = {field: value for field, value in values.items() if value is not _MISSING}
        whole = from_json(found.pop(_WHOLE, rest))
        if not isinstance(whole, Mapping) or (_WHOLE in paths and values[_WHOLE] is _MISSING):
            yield BadRecord("missing_field", origin, f"{paths[_WHOLE]} is no object"), origin
            continue
        fields = {**rest, **whole, **found}
        if tags:
            has_turns = has_turns or any(has_role_tag(from_json(value), tags) for value in fields.values())
            fields = {name: _with_tags(value, tags) for name, value in fields.items()}
        seen_any = True
        yield fields, origin
    if unseen and seen:
        raise _unknown_columns(sorted(unseen), list(seen), source)
    if seen_any and not has_turns:
        raise _unused_tags(tags, source)


def _with_tags(value: Any, tags: Mapping[str, str]) -> Any:
    """Return messages, also those that a text spells as JSON, with usual tags; other values unchanged."""
    found = with_usual_tags(from_json(value), tags)
    return found if not isinstance(value, str) or (found and is_messages(found)) else value


def _unused_tags(tags: Mapping[str, str], source: SourceConfig) -> DataError:
    role = role_tag(tags)
    return DataError(
        f"tags have no effect: no record has a turn with the field {role}",
        where=f"tags of {source.path}",
        got=", ".join(f"{tag}: {name}" for tag, name in tags.items()),
        remedy="set role_tag to the field with the role of a turn, or remove tags",
    )


def _value_at(record: Any, path: str) -> Any:
    """Return the value of a column, or at a path of names and indices into nested values, also in JSON."""
    if path in record:
        return record[path]
    value = record
    for part in path.split("."):
        value = from_json(value)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def _unknown_columns(missing: list[str], seen: list[str], source: SourceConfig) -> DataError:
    near = difflib.get_close_matches(missing[0], seen, n=1)
    return DataError(
        "no record has a column of the source",
        where=f"columns of {source.path}",
        got=", ".join(missing),
        expected=", ".join(seen[:_MAX_SHOWN]) + (", ..." if len(seen) > _MAX_SHOWN else ""),
        remedy=f"did you mean {near[0]}?" if near else "correct or remove these columns",
    )


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
        for key, given in (("format", form), ("columns", asked.columns), ("tags", asked.tags)):
            if given:
                raise self._fault(
                    f"{key} of the source has no effect",
                    given,
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
