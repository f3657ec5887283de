"""Other names of a source's fields: `reader`, `columns`, and LLaMA-Factory's `dataset_info.json`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.data.config import DataFormat, SourceConfig
from dpo_dist.data.read.fields import FIELDS, OTHERS, PAIRS, WHOLE, fields_with
from dpo_dist.data.read.values import CALLING, ROLES, from_json, has_value, parse_json, with_value
from dpo_dist.data.read.verdicts import are_verdicts, check_columns
from dpo_dist.data.records import BadRecord, RawRecord, UnusableRecordError, shown_key
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import check_readable
from dpo_dist.foundation.types import Fields
from dpo_dist.foundation.user_code import user_function

READER = "reader"
_RARE = set(fields_with("rare"))
_MAX_SHOWN = 20
_MISSING = object()
FIRST_RECORDS = 20


def with_columns(records: Iterator[RawRecord], source: SourceConfig) -> Iterator[RawRecord]:
    """Return records with their fields renamed by the source's `reader` and `columns`.

    Raises ConfigError at once if one of these keys is wrong. Raises DataError if no record has one of the
    columns: after the first records, or for rare fields after the last one.
    """
    for name, path in (source.columns or {}).items():
        if path is not None and name not in FIELDS:
            raise ConfigError(
                "columns has a name that no format reads",
                where=f"columns.{name} of {source.path}",
                got=name,
                expected=", ".join((*FIELDS, f"{OTHERS} with null")),
                remedy="write columns: {prompt: NAME}",
            )
    if source.reader is not None:
        records = _by_reader(records, user_function(source.reader, READER))
    return _renamed(records, source) if source.columns else records


def _by_reader(records: Iterator[RawRecord], read: Callable[..., Any]) -> Iterator[RawRecord]:
    for record, origin in records:
        if isinstance(record, BadRecord):
            yield record, origin
            continue
        try:
            fields = read(dict(record))  # a reader may change it
        except Exception as fault:  # the user's code can raise anything
            fields = BadRecord("reader_failed", origin, f"reader raised {type(fault).__name__}")
        if not isinstance(fields, Mapping | BadRecord):
            fields = BadRecord("reader_failed", origin, f"reader returned a {type(fields).__name__}")
        yield fields, origin


def _renamed(records: Iterator[RawRecord], source: SourceConfig) -> Iterator[RawRecord]:
    columns = source.columns or {}
    # The sets of names, for columns: {chosen: answers.good, rejected: answers.bad, label: null},
    # which make of
    #   {prompt: q, answers: {good: a, bad: b}, label: 1, chosen: c}
    #   {prompt: q, chosen: a, rejected: b}; its own chosen, c, is reported as left out, and label is not.
    paths = {field: path for field, path in columns.items() if path is not None}
    ignored = columns.keys() - paths.keys()  # label
    has_others = OTHERS in columns
    # Columns that fields are read from: answers, and answers.good, which may be a column's name. `metadata`
    # stays, as it may also hold the scores of a pair.
    sources = {*paths.values(), *({path.split(".")[0] for path in paths.values()} - {"metadata"})}
    # What a record does not keep: its own chosen, rejected and label, too. Only the first two are left out
    # without a word of the user, and reported if they have a value.
    hidden = {*columns, *sources}
    settled = sources | ignored
    # Fields that no record has had so far, and the names that the records have had.
    unseen = dict(paths)
    seen = dict[str, None]()
    what = "no record has"
    # The first values of both sides: a column of verdicts is none of responses.
    sides: dict[str, list[Any]] = {side: [] for side in PAIRS[0]}
    for number, (record, origin) in enumerate(records, start=1):
        if isinstance(record, BadRecord):
            yield record, origin
            continue
        values = _values_at(record, paths)
        if unseen:
            unseen = {field: path for field, path in unseen.items() if field not in values}
            seen |= dict.fromkeys(map(shown_key, record))
        if number >= FIRST_RECORDS and seen and not unseen.keys() <= _RARE:
            what = f"none of the first {number} records has"
            break
        for side, firsts in sides.items():
            if number <= FIRST_RECORDS and side in values:
                firsts.append(values[side])
        if number == FIRST_RECORDS:
            _check_sides(sides, source)
        try:
            check_columns(record, columns)
        except UnusableRecordError as fault:
            yield fault.as_bad_record(origin), origin
            continue
        # The fields that keep their names, and those inside of a column for `record`.
        rest = {} if has_others else {name: record[name] for name in record if name not in hidden}
        inside = from_json(values.pop(WHOLE, None if WHOLE in paths else {}))
        if not isinstance(inside, Mapping):
            yield BadRecord("missing_field", origin, f"{paths[WHOLE]} is not an object"), origin
            continue
        twice = [name for name in with_value(rest, FIELDS) if inside.get(name, rest[name]) != rest[name]]
        if twice:
            detail = f"beside {paths[WHOLE]} and inside it: {', '.join(twice)}"
            yield BadRecord("ambiguous_format", origin, detail), origin
            continue
        fields = {**rest, **inside, **values}
        unsettled = (name for name in record if name not in settled and (has_others or name in paths))
        left_out = tuple(name for name in unsettled if has_value(record[name]))
        if left_out:
            fields[OTHERS] = left_out
        yield fields, origin
    _check_sides(sides, source)
    if unseen and seen:
        raise DataError(
            f"{what} a column of the source",
            where=f"columns of {source.path}",
            got=", ".join(sorted(set(unseen.values()))),
            expected=", ".join([*seen][:_MAX_SHOWN]) + (", ..." if len(seen) > _MAX_SHOWN else ""),
            remedy="correct or remove these columns",
        )


def _check_sides(sides: Mapping[str, list[Any]], source: SourceConfig) -> None:
    """Check that no side of a pair is a column of verdicts. Raises DataError."""
    for side, other in (PAIRS[0], PAIRS[0][::-1]):
        if side in (source.columns or {}) and are_verdicts(sides[side], sides[other]):
            raise DataError(
                f"the column for {side} has a few short values that repeat: verdicts, not responses",
                where=f"columns.{side} of {source.path}",
                got=f"{(source.columns or {})[side]}, beside longer texts for {other}",
                remedy="remove chosen and rejected from columns: the verdict is read, or an error shows a "
                "reader for it; if these are the responses, let a reader of the source return them",
            )


def _values_at(record: Fields, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of fields whose columns the record has."""
    values = {field: _value_at(record, path) for field, path in paths.items()}
    return {field: value for field, value in values.items() if value is not _MISSING}


def _value_at(record: Any, path: str) -> Any:
    """Return the value of a column, or the nested value at a path of names and indices, also in JSON."""
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


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


_FILE = "dataset_info.json"
_LOCATIONS = ("file_name", "hf_hub_url")
_SELECTIONS = ("split", "subset", "folder", "revision", "num_samples")
_WITHOUT_EFFECT = ("ms_hub_url", "om_hub_url", "file_sha1")
_KEYS = ("formatting", "ranking", "columns", "tags", *_LOCATIONS, *_SELECTIONS, *_WITHOUT_EFFECT)
_SHARED = {name: name for name in ("system", "tools", "chosen", "rejected", "images", "videos", "audios")} | {
    "kto_tag": "label"
}
# The columns of each formatting, and the fields that they name.
_FORMATTINGS = {
    "alpaca": _SHARED
    | {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": _SHARED | {"messages": "conversations"},
    "openai": _SHARED | {"messages": "messages"},
}
# Tags that name the fields of a turn, and calls, by any name; the role that each other tag must name.
_TAGS = ("from", "role", "value", "content", *CALLING)
_ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool"}


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
            remedy=f"write {{path: {source.path}, name: ENTRY}}, or set path to a data file and its columns",
        )
    try:
        return _read_entry(source, file.parent, entries[source.name])
    except (TypeError, ValueError) as fault:
        raise ConfigError(
            f"the entry of {_FILE} cannot be read",
            where=f"{source.name} in {file}",
            got=" ".join(str(fault).split()),
            expected="the keys and values that docs/data.md lists",
            remedy="correct the entry, or set the source's path to the file, and its columns or reader",
        ) from fault


def _read_entry(source: SourceConfig, folder: Path, entry: Fields) -> SourceConfig:
    """Return the source that an entry describes, with the weight and limit of `source`."""
    entry = {key: value for key, value in entry.items() if value is not None}
    formatting = entry.get("formatting", "alpaca")
    field_of = _FORMATTINGS.get(formatting, {})
    columns_of = {name: column for name, column in dict(entry.get("columns", {})).items() if column}
    tags = {tag: name for tag, name in dict(entry.get("tags", {})).items() if name}
    keys = ("columns", "split", "data_dir", "revision")
    # An entry has no word for a list that is best first; all other formats are said by its columns.
    faults = list[str]()
    if source.format not in (DataFormat.auto, DataFormat.ranked):
        faults.append("format of the source")
    faults += [f"{key} of the source" for key in keys if getattr(source, key) is not None]
    if not field_of:
        faults.append(f"formatting {formatting}")
    faults += [key for key in entry if key not in _KEYS]
    faults += [f"column {name}" for name in columns_of if name not in field_of]
    for tag, name in tags.items():
        names_role = ROLES.get(name, name) == _ROLE_TAGS.get(tag, "system")
        if name not in _TAGS and not names_role:
            faults.append(f"{tag} {name}")
    if not entry.get("ranking"):
        faults += [f'{side} without "ranking": true' for side in PAIRS[0] if side in columns_of]
    if not any(map(entry.get, _LOCATIONS)):
        faults.append("no file_name or hf_hub_url")
    if faults:
        raise ValueError(", ".join(faults))
    columns: dict[str, str | None] | None = None
    if columns_of:  # as in LLaMA-Factory, no other column is read
        columns = {**{field_of[name]: column for name, column in columns_of.items()}, OTHERS: None}
    elif entry.get("ranking") is False:
        columns = dict.fromkeys(PAIRS[0])
    limits = [limit for limit in (source.limit, entry.get("num_samples")) if limit is not None]
    described = replace(
        source, name=None, columns=columns, limit=min(limits, default=None), split=entry.get("split")
    )
    hub = entry.get("hf_hub_url")
    if hub:
        subset, data_dir, revision = map(entry.get, ("subset", "folder", "revision"))
        return replace(described, path=hub, name=subset, data_dir=data_dir, revision=revision)
    # LLaMA-Factory gives every local file the split train.
    split = None if described.split == "train" else described.split
    # Names of images are relative to the folder of dataset_info.json.
    images = described.images or str(folder)
    return replace(described, path=str(folder / entry["file_name"]), split=split, images=images)
