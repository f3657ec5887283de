"""Other names of the fields of a source's records: `columns` and `tags` of a source."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.data.fields.message_fields import from_json, is_messages
from dpo_dist.data.fields.sharegpt import TAGS, has_role_tag, role_tag, with_usual_tags
from dpo_dist.data.records import BadRecord, Fields, RawRecord, shown_key
from dpo_dist.errors import ConfigError, DataError

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
