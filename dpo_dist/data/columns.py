"""Other names of a source's fields: `columns` and `tags`, and LLaMA-Factory's `dataset_info.json`."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_dist.config.data import DataFormat, SourceConfig
from dpo_dist.data.counts import UNPAIRED_REMEDY
from dpo_dist.data.folders import is_saved
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

_MEDIA = ("images", "videos", "audios")
_OPTIONAL = (
    *("system", "history", "input", "tools", "chat_template_kwargs", "documents", *_MEDIA),
    *("score_chosen", "score_rejected", "scores", "label"),
)
_WHOLE = "record"
# The fields that formats read; `record` is an object with all of them.
FIELDS = (
    *("prompt", "chosen", "rejected", *_OPTIONAL, "messages", "conversations"),
    *("chosen_messages", "rejected_messages", "rejected_response", "instruction", "question", "query"),
    *("output", "completion", "responses", "response_0", "response_1", "better_response_id", _WHOLE),
)
# With null: no column is read except those that are named.
OTHERS = "*"
_MAX_SHOWN = 20
_MISSING = object()


def check_columns(source: SourceConfig) -> None:
    """Check the names in `columns` and `tags` of a source. Raises ConfigError."""
    for key, names, known in (("columns", source.columns, (*FIELDS, OTHERS)), ("tags", source.tags, [*TAGS])):
        for name, value in (names or {}).items():
            if key == "columns" and value is None:
                continue
            where = f"{key}.{name} of {source.path}"
            if name not in known:
                what, remedy = f"{key} has a name that no format reads", f"write {key}: {{{known[0]}: NAME}}"
                raise ConfigError(
                    what,
                    where=where,
                    got=name,
                    expected=", ".join(known),
                    remedy=_nearest(name, known) or remedy,
                )
            if not isinstance(value, str) or not value or name == OTHERS:
                raise ConfigError(
                    f"{key} has a value that is no name",
                    where=where,
                    got=str(value),
                    expected="a name; for columns also a path into nested objects (answers.good), or null to "
                    "ignore the column",
                    remedy=f"write {key}: {{{name}: NAME}}",
                )


def check_first_columns(records: Sequence[Fields], source: SourceConfig) -> None:
    """Check that the first records of a source have its columns, but for fields that few records may have.

    Raises:
        DataError: none of them has one of the columns.
    """
    paths = {path for field, path in (source.columns or {}).items() if path and field not in _OPTIONAL}
    missing = {path for path in paths if all(_value_at(record, path) is _MISSING for record in records)}
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
    return _renamed(records, source) if source.columns or source.tags else records


def _renamed(records: Iterator[RawRecord], source: SourceConfig) -> Iterator[RawRecord]:
    columns, tags = source.columns or {}, source.tags or {}
    paths = {field: path for field, path in columns.items() if path is not None}
    # `metadata` is no field of its own: a pair's scores in it stay.
    outer = {path.split(".")[0] for path in paths.values()} - {"metadata"}
    hidden = {*columns, *paths.values(), *outer}
    unseen, seen = set(paths.values()), dict[str, None]()
    has_turns = has_records = False
    for record, origin in records:
        if isinstance(record, BadRecord):
            yield record, origin
            continue
        found = {
            field: value for field in paths if (value := _value_at(record, paths[field])) is not _MISSING
        }
        if unseen:
            unseen -= {paths[field] for field in found}
            seen |= dict.fromkeys(map(shown_key, record))
        rest = {} if OTHERS in columns else {name: record[name] for name in record if name not in hidden}
        whole = from_json(found.pop(_WHOLE, None if _WHOLE in paths else {}))
        if not isinstance(whole, Mapping):
            yield BadRecord("missing_field", origin, f"{paths[_WHOLE]} is no object"), origin
            continue
        fields = {**rest, **whole, **found}
        if tags:
            has_turns = has_turns or any(has_role_tag(from_json(value), tags) for value in fields.values())
            fields = {name: _with_tags(value, tags) for name, value in fields.items()}
        has_records = True
        yield fields, origin
    if unseen and seen:
        raise _unknown_columns(unseen, list(seen), source)
    if tags and has_records and not has_turns:
        raise DataError(
            f"tags have no effect: no record has a turn with the field {role_tag(tags)}",
            where=f"tags of {source.path}",
            got=", ".join(f"{tag}: {name}" for tag, name in tags.items()),
            remedy="set role_tag to the field with the role of a turn, or remove tags",
        )


def _with_tags(value: Any, tags: Mapping[str, str]) -> Any:
    """Return messages, also those that a text spells as JSON, with usual tags; other values unchanged."""
    found = with_usual_tags(from_json(value), tags)
    return found if not isinstance(value, str) or (found and is_messages(found)) else value


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


def _unknown_columns(missing: Iterable[str], seen: list[str], source: SourceConfig) -> DataError:
    first, *others = sorted(missing)
    return DataError(
        "no record has a column of the source",
        where=f"columns of {source.path}",
        got=", ".join([first, *others]),
        expected=", ".join(seen[:_MAX_SHOWN]) + (", ..." if len(seen) > _MAX_SHOWN else ""),
        remedy=_nearest(first, seen) or "correct or remove these columns",
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


_FILE = "dataset_info.json"
# The columns of each formatting, and the fields that they name.
_SHARED = {name: name for name in ("system", "tools", "chosen", "rejected", *_MEDIA)} | {"kto_tag": "label"}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_FORMATTINGS = {
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


class _Entry(BaseModel):
    """One entry of a dataset_info.json; the locations after `hf_hub_url` cannot be read here."""

    model_config = ConfigDict(extra="forbid", strict=True)
    file_name: str | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    om_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    file_sha1: str | None = None
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    revision: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] | None = None
    num_samples: int | None = None
    ranking: bool | None = None
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None


_LOCATIONS = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


def resolved(source: SourceConfig) -> SourceConfig:
    """Return the source that an entry of a `dataset_info.json` describes; any other source unchanged.

    `path` is the folder with a dataset_info.json, or this file, and `name` the entry.

    Raises:
        ConfigError, DataError: the file or the entry cannot be read, or has no meaning here.
    """
    local = Path(source.path).expanduser()
    file = local if local.name == _FILE else local / _FILE
    try:
        if "://" in source.path or not file.is_file() or is_saved(file.parent):
            return source
    except OSError:
        return source  # no path of a source; `sources.local_files` says why
    entries = _entries(file, is_required=source.name is not None or file == local)
    if entries is None:
        return source
    if source.name not in entries:
        raise ConfigError(
            f"{_FILE} has no such entry" if source.name else f"`name` chooses an entry of {_FILE}",
            where=f"name of {source.path}",
            got=str(source.name),
            expected=", ".join(sorted(entries)),
            remedy=_nearest(source.name or "", entries)
            or f"write {{path: {source.path}, name: ENTRY}}; to read files without it, set path to a file or "
            "pattern",
        )
    return _described(source, file, entries[source.name])


def _entries(file: Path, *, is_required: bool) -> dict[str, Mapping[str, Any]] | None:
    """Return the entries of the file; None if it is another program's and no entry is required."""
    found, fault = None, "no entry with file_name or hf_hub_url"
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        fault = fault_of(error) if isinstance(error, ValueError) else str(error)
    entries = found if isinstance(found, dict) and all(isinstance(e, dict) for e in found.values()) else {}
    if any(not entry.keys().isdisjoint(_LOCATIONS) for entry in entries.values()):
        return entries
    if not is_required:
        return None
    is_list = isinstance(found, list)
    raise DataError(
        f"the file is no {_FILE} of LLaMA-Factory",
        where=str(file),
        got="a list, as of ms-swift" if is_list else fault,
        expected='{"NAME": {"file_name": "pairs.json", ...}, ...}',
        remedy="set path to the entry's dataset_path or hf_dataset_id, and columns: {FIELD: COLUMN}"
        if is_list
        else "remove `name` and set path to the data file",
    )


def _described(source: SourceConfig, file: Path, fields: Mapping[str, Any]) -> SourceConfig:
    """Return the source that an entry describes, with the weight and limit of the one that asks for it."""
    entry = _checked(source, f"{source.name} in {file}", fields)
    formatting = entry.formatting or "alpaca"
    kind, field_of = _FORMATTINGS[formatting]
    columns: dict[str, str | None] | None = None
    if named := {field_of[name]: column for name, column in (entry.columns or {}).items() if column}:
        columns = {**named, OTHERS: None}  # as in LLaMA-Factory, no other column is read
    elif entry.ranking is False:
        columns = {"chosen": None, "rejected": None}
    tags = (_OPENAI_TAGS if formatting == "openai" else {}) | {
        tag: name for tag, name in (entry.tags or {}).items() if name
    }
    limits = [limit for limit in (source.limit, entry.num_samples) if limit is not None]
    found = replace(
        source,
        name=None,
        format=kind,
        columns=columns,
        tags=None if formatting == "alpaca" else tags or None,  # texts of alpaca have none
        limit=min(limits, default=None),
        split=entry.split,
    )
    if entry.hf_hub_url:
        return replace(
            found,
            path=entry.hf_hub_url,
            name=entry.subset,
            data_dir=entry.folder,
            revision=entry.revision,
        )
    # LLaMA-Factory gives every local file the split train.
    split = None if entry.split == "train" else entry.split
    return replace(found, path=str(file.parent / str(entry.file_name)), split=split)


def _checked(source: SourceConfig, where: str, fields: Mapping[str, Any]) -> _Entry:
    """Return an entry that can be read here, of a source that asks for nothing beside it."""
    for key in ("format", "columns", "tags", "split", "data_dir", "revision"):
        if getattr(source, key) not in (None, DataFormat.auto):
            remedy = f"the entry decides: set its {key}, or set path to its file"
            raise _fault(where, f"{key} of the source has no effect", getattr(source, key), remedy=remedy)
    try:
        entry = _Entry.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"the entry has a wrong {key}: {first['msg']}"
        raise _fault(where, what, first["input"], ", ".join(_Entry.model_fields)) from None
    known = _FORMATTINGS[entry.formatting or "alpaca"][1]
    columns = {name: column for name, column in (entry.columns or {}).items() if column}
    for kind, names, all_names in (("column", columns, known), ("tag", entry.tags or {}, TAGS)):
        if unknown := sorted(names.keys() - all_names.keys()):
            raise _fault(where, f"unknown {kind} of the entry", ", ".join(unknown), ", ".join(all_names))
    if not entry.file_name and not entry.hf_hub_url:
        others = ", ".join(key for key in _LOCATIONS if getattr(entry, key)) or "no location"
        what, remedy = "the entry names no data that can be read here", "download the data and set file_name"
        raise DataError(what, where=where, got=others, expected="file_name or hf_hub_url", remedy=remedy)
    if "kto_tag" in columns:
        raise DataError(
            "the entry has unpaired responses with a good/bad label (KTO)",
            where=where,
            got=f"kto_tag: {columns['kto_tag']}",
            expected="pairs: columns with chosen and rejected",
            remedy=UNPAIRED_REMEDY,
        )
    if not entry.ranking and (sides := [name for name in ("chosen", "rejected") if name in columns]):
        what = "the entry has sides of pairs, but is no ranking"
        raise _fault(where, what, ", ".join(sides), '"ranking": true')
    return entry


def _fault(where: str, what: str, got: Any, expected: str = "", remedy: str = "") -> ConfigError:
    return ConfigError(what, where=where, got=str(got), expected=expected, remedy=remedy)
