"""How a source is read: by its own `fields`, or by the known shape that its columns have."""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dpo_dist.data.config import SourceConfig
from dpo_dist.data.read.expressions import ExpressionError, expression
from dpo_dist.data.read.messages import OF_KEYS, Keys, is_messages, is_spelled
from dpo_dist.data.read.plain import is_given
from dpo_dist.data.read.reading import CONTEXT, FIELDS, KINDS, Reading, parse_record
from dpo_dist.data.records import (
    NOT_KEPT,
    BadRecord,
    Dialogue,
    Origin,
    RawRecord,
    UnusableRecordError,
    shown_key,
)
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.fields import as_written
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.types import Fields

FIRST_RECORDS = 20
_MOST_BAD = 10_000
_MAX_SHOWN = 30
_FEW = 4
_SHORT = 20
_FORMS = ("text", "dialogue", "implicit")
# Faults of a record that are those of its source, if all of the first records have one.
_OF_SOURCE = ("unknown_format", "expression_failed", "spelled_messages", "unknown_key", "unread_column")
_OF_SOURCE += ("unknown_label", "missing_field", NOT_KEPT)
_TABLE = own_table(Path(__file__).with_suffix(".yaml"))
_SHAPES: dict[str, dict[str, Any]] = _TABLE["shapes"]
_HELP: str = _TABLE["help"]


def declared(
    records: Iterator[RawRecord], source: SourceConfig, *, of_prompts: bool = False
) -> tuple[Reading, Iterator[RawRecord]]:
    """Return how a source is read, by its `fields` or its first records, and all of its records.

    `of_prompts`: records without responses have a shape, too. Raises ConfigError: the fields are wrong;
    DataError: no known shape fits, or several do, or none of the first records can be read.
    """
    first = list[RawRecord]()
    rows = list[Fields]()
    for raw in islice(records, _MOST_BAD):
        first.append(raw)
        if not isinstance(raw[0], BadRecord):
            rows.append(raw[0])
        if len(rows) == FIRST_RECORDS:
            break
    columns = dict.fromkeys(chain.from_iterable(rows))
    if isinstance(source.fields, dict):
        reading = _own(source, columns)
    elif source.fields is not None:
        reading = _named(source, source.fields, columns)
    else:
        reading = _recognised(source, rows, columns, of_prompts=of_prompts)
    notes = {name: _note(rows, name) for name in columns if name not in reading.columns | reading.ignored}
    reading = replace(reading, notes=notes, reserved=_reserved())
    parsed = [parse_record(row, reading, Origin(source.path, 0)) for row in rows]
    faults = [record for record in parsed if isinstance(record, BadRecord) and record.reason in _OF_SOURCE]
    if rows and len(faults) == len(rows):
        raise _of_first(source, reading, rows, faults)
    prompts = [record.prompt for record in parsed if not isinstance(record, BadRecord)]
    if prompts:
        is_chat = any(not isinstance(prompt, str | Dialogue) for prompt in prompts)
        reading = replace(reading, is_chat=is_chat)
    return reading, chain(first, records)


@cache
def _reserved() -> frozenset[str]:
    """Return names of columns that must be read or ignored: they may change what is trained."""
    of_trainers = [shape["columns"] for shape in _SHAPES.values() if not shape.get("public")]
    return frozenset(FIELDS).union(
        _TABLE["reserved"], *of_trainers, *(_columns_of(text) for _, text in _beside())
    )


def _beside() -> Iterator[tuple[str, str]]:
    for field, texts in _TABLE["beside"].items():
        yield from ((field, text) for text in texts)


def _columns_of(*texts: str) -> frozenset[str]:
    return frozenset().union(*(expression(text).columns for text in texts))


def _ignored(names: Collection[str], given: Collection[str] = ()) -> dict[str, Any]:
    """Return the columns to ignore, and the keys of messages to ignore or to give to the chat template."""
    of_keys = (name.removeprefix(OF_KEYS) for name in names if name.startswith(OF_KEYS))
    return {"ignored": frozenset(names), "keys": Keys(frozenset(given), frozenset(of_keys))}


# A source's own fields.


def _own(source: SourceConfig, columns: Collection[str]) -> Reading:
    """Return the reading that a source declares."""
    assert isinstance(source.fields, dict), "else it names a shape"
    given = dict(source.fields)
    form = given.pop("form", "")
    keys = given.pop("keys", ())
    fields = {name: str(text) for name, text in given.items()}
    kinds = [kind for kind in KINDS if not fields.keys().isdisjoint(kind)]
    is_one = len(kinds) == 1 and fields.keys() >= set(kinds[0])
    unknown = fields.keys() - set(FIELDS)
    if unknown or not is_one or form not in ("", *_FORMS) or not isinstance(keys, list | tuple):
        raise ConfigError(
            "fields has a name that nothing reads" if unknown else "fields do not say what the responses are",
            where=f"fields of {source.path}",
            got=as_written(source.fields),
            expected=f"one of {' | '.join(map(' and '.join, KINDS))}; {', '.join(FIELDS)}; keys: [KEY]; "
            f"form: {' | '.join(_FORMS)}",
            remedy="write fields: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}",
        )
    reading = Reading(fields, form, **_ignored(source.ignore or (), keys))
    for name, text in fields.items():
        try:
            expression(text)
        except ExpressionError as fault:
            raise ConfigError(
                "an expression of fields cannot be read",
                where=f"fields.{name} of {source.path}",
                got=f"{text}: {fault}",
                expected="an expression over the columns, such as answers[0].text",
                remedy="correct it; docs/data.md has the language",
            ) from fault
    optional = frozenset().union(*(expression(text).optional for text in fields.values()))
    missing = reading.columns - optional - {*columns}
    if missing and columns:
        raise DataError(
            f"none of the first {FIRST_RECORDS} records has a column of fields",
            where=f"fields of {source.path}",
            got=", ".join(sorted(missing)),
            expected=", ".join(map(shown_key, islice(columns, _MAX_SHOWN))),
            remedy="correct the column; one that records may lack is COLUMN|default(none)",
        )
    return reading


# Known shapes.


def _named(source: SourceConfig, name: str, columns: Mapping[str, None]) -> Reading:
    shape = _SHAPES.get(name, {"columns": ()})
    lacks = [column for column in shape["columns"] if columns and column not in columns]
    if lacks or name not in _SHAPES:
        raise ConfigError(
            "fields names no known shape" if name not in _SHAPES else "the source lacks columns of its shape",
            where=f"fields of {source.path}",
            got=f"{name}; no {', '.join(lacks)}" if lacks else name,
            expected=", ".join(shape["columns"] or _SHAPES),
            remedy="write fields as a mapping: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}",
        )
    return _reading(name, source, columns)


def _reading(name: str, source: SourceConfig, columns: Mapping[str, None]) -> Reading:
    """Return the reading of a known shape, with the fields beside it that the source has."""
    shape = _SHAPES[name]
    fields = dict(shape["fields"])
    ignored = _ignored([*(source.ignore or ()), *shape.get("ignore", ())], shape.get("keys", ()))
    taken = _columns_of(*fields.values()) | ignored["ignored"]
    is_pair = not fields.keys().isdisjoint(("chosen", "pair"))
    for field, text in _beside():
        used = _columns_of(text)
        if not used <= columns.keys() or used & taken or (field == "scores" and not is_pair):
            continue
        if field in fields:
            raise DataError(
                f"two columns of the source are {field}",
                where=source.path,
                got=f"{fields[field]} and {text}",
                remedy=f"ignore one: {_line(source, ignore=[*(source.ignore or ()), *sorted(used)])}",
            )
        fields[field] = text
    form = shape.get("form", "")
    context = [field for field in CONTEXT if field in fields]
    if form and context:
        raise DataError(
            f"the shape {name} has texts, beside which nothing else is rendered",
            where=source.path,
            got=", ".join(context),
            remedy=f"ignore them: {_line(source, fields=name, ignore=context)}; or write fields with prompt: COLUMN|turn",
        )
    return Reading(fields, form, shape.get("when", "true"), **ignored, shape=name)


def _recognised(
    source: SourceConfig, rows: Sequence[Fields], columns: Mapping[str, None], *, of_prompts: bool
) -> Reading:
    """Return the reading of the one known shape that fits."""
    tried = [name for name, shape in _SHAPES.items() if not shape.get("by_name") and not shape.get("prompts")]
    fits = _fitting(tried, rows, columns)
    if not fits and of_prompts:
        fits = _fitting([name for name in _SHAPES if _SHAPES[name].get("prompts")], rows, columns)
    # Those that leave no column with a reserved name, if there are any.
    unread = {name: _unread(_reading(name, source, columns), rows) & _reserved() for name in fits}
    fits = [name for name in fits if not unread[name]] or fits
    if len(fits) == 1:
        return _reading(fits[0], source, columns)
    if not rows:
        return Reading({"prompt": "prompt", "completion": "completion"})  # all records are bad
    if not fits:
        raise _unlike(source, rows, "the columns are none of the known shapes: say what they mean")
    used = {name: _columns_of(*_SHAPES[name]["fields"].values()) for name in fits}
    others = {name: sorted(frozenset().union(*used.values()) - used[name]) for name in fits}
    ways = [_line(source, fields=name, ignore=[*(source.ignore or ()), *others[name]]) for name in fits]
    raise DataError(
        f"the columns have {len(fits)} known meanings",
        where=source.path,
        got=", ".join(fits),
        remedy="\n    ".join(["write the source as one of these", *ways]),
    )


def _fitting(names: Sequence[str], rows: Sequence[Fields], columns: Mapping[str, None]) -> list[str]:
    """Return the shapes that fit, without those whose columns are a part of another's."""
    fits = [name for name in names if _fits(_SHAPES[name], rows, columns)]
    sets = {name: set(_SHAPES[name]["columns"]) for name in fits}
    return [name for name in fits if not any(sets[name] < sets[other] for other in fits)]


def _fits(shape: Mapping[str, Any], rows: Sequence[Fields], columns: Mapping[str, None]) -> bool:
    if not columns.keys() >= set(shape["columns"]):
        return False
    beside = _columns_of(*(text for _, text in _beside()))
    if shape.get("alone") and columns.keys() - beside > set(shape["columns"]):
        return False  # one of the others may be the prompt
    # A record without a value in one of the columns is a bad one of any shape.
    whole = [row for row in rows if all(is_given(row.get(column)) for column in shape["columns"])] or rows
    try:
        return all(expression(shape.get("when", "true"))(row) is True for row in whole)
    except UnusableRecordError:
        return False


def _unread(reading: Reading, rows: Sequence[Fields]) -> set[str]:
    return set().union(*(reading.unread(row) for row in rows))


# What to do about a source that cannot be read.


def _line(source: SourceConfig, **changes: Any) -> str:
    """Return the source with other keys, as a user writes it on the command line."""
    return f"data.train={shlex.quote(f'[{as_written(replace(source, **changes))}]')}"


def _unlike(source: SourceConfig, rows: Sequence[Fields], message: str, remedy: str = "") -> DataError:
    """Return the error with the columns of a source, and the lines to complete."""
    columns = dict.fromkeys(chain.from_iterable(rows))
    listed = [f"{shown_key(name)}: {_type(rows, name)}" for name in islice(columns, _MAX_SHOWN)]
    example = _line(source, fields=dict.fromkeys(("prompt", "chosen", "rejected"), "COLUMN"))
    return DataError(
        message,
        where=source.path,
        got="\n    ".join(["columns", *listed]),
        remedy=f"{remedy or f'replace each COLUMN by one of them: {example}'}\n{_HELP}".rstrip(),
    )


def _of_first(
    source: SourceConfig, reading: Reading, rows: Sequence[Fields], faults: Sequence[BadRecord]
) -> DataError:
    """Return the error of a source whose first records all fail, with the line that reads them."""
    fields: dict[str, Any] = dict(reading.fields)
    ignore = [*(source.ignore or ())]
    remedy = f"correct the expressions: {_line(source, fields=fields)}"
    match faults[0].reason:
        case "spelled_messages":
            for name in fields:
                texts = [text for text in (expression(fields[name])(row) for row in rows) if is_spelled(text)]
                if texts:
                    fields[name] += (
                        "|fromjson"
                        if all('"role"' in text or '"from"' in text for text in texts)
                        else "|frompython"
                    )
            remedy = f"read them: {_line(source, fields=fields)}; or add form: text to train the JSON itself"
        case "unknown_label":
            fields["label"] += ' == "GOOD"'
            remedy = f"name the good label in place of GOOD: {_line(source, fields=fields)}"
        case "unread_column":
            names = sorted(_unread(reading, rows) & reading.reserved)
            read = {name: name for name in names if name in FIELDS}
            remedy = (
                f"ignore them, if no response depends on them: {_line(source, ignore=ignore + names)}; or read "
                f"them: {_line(source, fields={**fields, **read})}"
            )
        case "unknown_key":
            keys = sorted(_unknown_keys(reading, rows))
            given = [key.removeprefix(OF_KEYS) for key in keys]
            remedy = (
                f"ignore them, if nothing depends on them: {_line(source, ignore=ignore + keys)}; or, if the chat "
                f"template reads them: {_line(source, fields={**fields, 'keys': given})}"
            )
    return _unlike(
        source, rows, f"none of the first {len(rows)} records can be read: {faults[0].why}", remedy
    )


def _unknown_keys(reading: Reading, rows: Sequence[Fields]) -> set[str]:
    """Return all keys of messages in the first records that nothing reads: a record names those of one."""
    found = set[str]()
    while True:
        keys = reading.keys._replace(
            ignored=reading.keys.ignored.union(key.removeprefix(OF_KEYS) for key in found)
        )
        parsed = [parse_record(row, replace(reading, keys=keys), Origin("", 0)) for row in rows]
        more = {
            key
            for bad in parsed
            if isinstance(bad, BadRecord) and bad.reason == "unknown_key"
            for key in bad.unread
        }
        if not more:
            return found
        found |= more


def _few_values(rows: Sequence[Fields], name: str) -> list[str]:
    """Return the values of a column, if they are few and short; a column of texts has none."""
    values = {
        str(row[name]) for row in rows if is_given(row.get(name)) and isinstance(row[name], str | int | float)
    }
    is_few = len(values) <= _FEW < len(rows) and all(len(value) <= _SHORT for value in values)
    return sorted(map(shown_key, values)) if is_few else []


def _note(rows: Sequence[Fields], name: str) -> str:
    """Return the name of a column, with its values if they are few and short."""
    values = _few_values(rows, name)
    return f"{shown_key(name)} ({', '.join(values)})" if values else shown_key(name)


def _type(rows: Sequence[Fields], name: str) -> str:
    """Return the type of a column's first value, and its values if they are few and short."""
    value = next((row[name] for row in rows if row.get(name) is not None), None)
    if is_messages(value) and value:
        return "messages"
    if isinstance(value, Mapping):
        return f"object with {', '.join(map(shown_key, value))}"
    if isinstance(value, list):
        return f"list of {len(value)}: {_type([{name: value[0]}], name)}" if value else "empty list"
    kinds = {str: "text", bool: "true or false", int: "number", float: "number"}
    kind = kinds.get(type(value), "null")
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        kind = "text that looks like JSON"
    values = _few_values(rows, name)
    return f"{kind}, one of {', '.join(values)}" if values else kind
