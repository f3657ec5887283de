"""How a source is read: by its own `fields`, or by the known shape that its columns have."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, NamedTuple

from dpo_dist.data.config import SourceConfig
from dpo_dist.data.read.expressions import ExpressionError, expression
from dpo_dist.data.read.messages import OF_KEYS, MessageKeys, is_messages, spelled_as, unknown_keys
from dpo_dist.data.read.plain import is_given
from dpo_dist.data.read.reading import (
    CONTEXT,
    FIELDS,
    FORMS,
    RESPONSE_FIELDS,
    TURN,
    Reading,
    bare_name,
    parse_prompt,
    parse_record,
)
from dpo_dist.data.records import (
    NOT_KEPT,
    SCORERS,
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
_FEW_VALUES = 4
_SHORT = 20
# Faults of a record that are those of its source, if all of the first records have one.
_OF_SOURCE = {"unknown_format", "expression_failed", "spelled_messages", "unknown_key", "unread_column"}
_OF_SOURCE |= {"unknown_label"}
# Beside them: records that say nothing of how the source is read.
_OF_RECORD = {NOT_KEPT, "all_tied"}
_READ_BESIDE = (
    *("system", "history", "tools", "images", "loss_weight", "soft_label", "margin", "keep"),
    *(f"{scorer}_prompt" for scorer in SCORERS),
)
"""Fields that a column of the same name can be read as, whatever the responses are."""
_TABLE = own_table(Path(__file__).with_suffix(".yaml"))
_SHAPES: dict[str, dict[str, Any]] = _TABLE["shapes"]
_BESIDE = [(field, text) for field, texts in _TABLE["beside"].items() for text in texts]


class _First(NamedTuple):
    """A source, the key that has it, and its first good records."""

    source: SourceConfig
    key: str
    rows: list[Fields]

    @property
    def columns(self) -> dict[str, None]:
        """The columns of these records, in their order."""
        return dict.fromkeys(chain.from_iterable(self.rows))


def declared(
    records: Iterator[RawRecord],
    source: SourceConfig,
    *,
    key: str = "data.train",
    of_prompts: bool = False,
) -> tuple[Reading, Iterator[RawRecord]]:
    """Return how a source is read, by its `fields` or its first records, and all of its records.

    `key`: of the source, for errors. `of_prompts`: records without responses have a shape, too. Raises
    ConfigError: the fields are wrong; DataError: no known shape fits, or several do, or none of the first
    records can be read.
    """
    seen = list[RawRecord]()
    first = _First(source, key, [])
    for record, place in islice(records, _MOST_BAD):
        seen.append((record, place))
        if not isinstance(record, BadRecord):
            first.rows.append(record)
        if len(first.rows) == FIRST_RECORDS:
            break
    rows = first.rows
    if source.fields is None:
        reading = _recognised(first, of_prompts=of_prompts)
    else:
        reading = _declared(source, first.columns)
    if rows:
        _check_ignored(source, first.columns)
    unread = dict.fromkeys(chain.from_iterable(map(reading.unread, rows)))
    notes = {name: shown_key(name) + _few_values(rows, name) for name in unread}
    reading = replace(reading, notes=notes, reserved=_reserved())
    parse = parse_prompt if of_prompts else parse_record
    parsed = [parse(row, reading, Origin(source.path, 0)) for row in rows]
    reasons = {record.reason for record in parsed if isinstance(record, BadRecord)}
    faults = [record for record in parsed if isinstance(record, BadRecord) and record.reason in _OF_SOURCE]
    prompts = [record.prompt for record in parsed if not isinstance(record, BadRecord)]
    if faults and not prompts and reasons <= _OF_SOURCE | _OF_RECORD:
        raise _of_first(first, reading, faults)
    is_chat = any(not isinstance(prompt, str | Dialogue) for prompt in prompts)
    return replace(reading, is_chat=is_chat if prompts else None), chain(seen, records)


@cache
def _reserved() -> frozenset[str]:
    """Return plain names of columns that must be read or ignored: they may change what is trained."""
    of_trainers = [shape["columns"] for shape in _SHAPES.values() if not shape.get("public")]
    beside = _columns_of(text for _, text in _BESIDE)
    return frozenset(map(bare_name, chain(beside, FIELDS, _TABLE["reserved"], *of_trainers)))


def _check_ignored(source: SourceConfig, columns: Mapping[str, None]) -> None:
    """Check that a source has the columns that it ignores; one of a reserved name may come later."""
    unknown = {name for name in source.ignore or () if OF_KEYS not in name}.difference(columns, "*")
    missing = [name for name in unknown if bare_name(name) not in _reserved()]
    if missing:
        raise _no_column(f"ignore of {source.path}", missing, columns, "correct or remove the name")


def _no_column(where: str, missing: Iterable[str], columns: Iterable[str], remedy: str) -> DataError:
    return DataError(
        f"none of the first {FIRST_RECORDS} records has this column",
        where=where,
        got=", ".join(sorted(missing)),
        expected=", ".join(map(_as_expression, islice(columns, _MAX_SHOWN))),
        remedy=remedy,
    )


def _as_expression(name: str) -> str:
    """Return a column as a user writes it in `fields`; a name that is no word is row["A NAME"]."""
    return shown_key(name) if shown_key(name) != name else as_written([_column(name)])[1:-1]


def _column(name: str) -> str:
    with suppress(ExpressionError):
        if expression(name).columns == {name}:
            return name
    return f"row[{json.dumps(name, ensure_ascii=False)}]"


def _columns_of(texts: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*(expression(text).columns for text in texts))


def _declared(source: SourceConfig, columns: Mapping[str, None]) -> Reading:
    """Return the reading by a source's own fields, or by the shape that they name."""
    where = f"fields of {source.path}"
    reading = _own(source, where) if isinstance(source.fields, dict) else _named(source, where, columns)
    optional = [expression(text).optional for text in reading.fields.values()]
    missing = reading.columns.difference(columns, *optional)
    if missing and columns:
        remedy = "correct the column; one that records may lack is COLUMN|default(none)"
        raise _no_column(where, missing, columns, remedy)
    return reading


def _own(source: SourceConfig, where: str) -> Reading:
    assert isinstance(source.fields, dict), "else it names a shape"
    given = dict(source.fields)
    form = given.pop("form", "")
    keys = given.pop("keys", [])
    fields = {name: str(text) for name, text in given.items()}
    kinds = [kind for kind in RESPONSE_FIELDS if not fields.keys().isdisjoint(kind)]
    is_one = len(kinds) == 1 and fields.keys() >= set(kinds[0])
    orders = fields.keys() & set().union(*RESPONSE_FIELDS.values())
    is_ordered = len(orders) <= 1 and is_one and orders <= RESPONSE_FIELDS[kinds[0]]
    is_true = fields.get("best_first", "true").lower() == "true"
    is_read = fields.keys() <= set(FIELDS) and form in FORMS and isinstance(keys, list)
    if not (is_ordered and is_true and is_read):
        raise ConfigError(
            "fields do not say what the responses are, or have a name that nothing reads",
            where=where,
            got=as_written(source.fields),
            expected=f"one of {' | '.join(map(' and '.join, RESPONSE_FIELDS))}; "
            f"{', '.join(FIELDS)}; keys: [KEY]; "
            f"form: {' | '.join(filter(None, FORMS))}; label with completion alone; "
            "scores, ranks or best_first: true with responses; scores with a pair",
            remedy="write fields: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}",
        )
    for name, text in fields.items():
        try:
            expression(text)
        except ExpressionError as fault:
            raise ConfigError(
                "an expression of fields cannot be read",
                where=where,
                got=f"{name}: {text}: {fault}",
                expected="an expression over the columns, such as answers[0].text",
                remedy='correct it; a column whose name is no word is row["A NAME"]',
            ) from fault
    return _with_ignored(Reading(fields, form), source, {"keys": keys})


def _with_ignored(reading: Reading, source: SourceConfig, shape: Mapping[str, Any]) -> Reading:
    """Return the reading with what the source and its shape ignore, and the keys for the chat template."""
    ignored = frozenset([*(source.ignore or ()), *shape.get("ignore", ())])
    of_keys = frozenset(name.removeprefix(OF_KEYS) for name in ignored if name.startswith(OF_KEYS))
    return replace(reading, ignored=ignored, keys=MessageKeys(frozenset(shape.get("keys", ())), of_keys))


# Known shapes.


def _named(source: SourceConfig, where: str, columns: Mapping[str, None]) -> Reading:
    name = str(source.fields)
    if name in _SHAPES:
        return _reading(name, source, columns)
    raise ConfigError(
        "fields names no known shape",
        where=where,
        got=name,
        expected=", ".join(_SHAPES),
        remedy="name one of these, or write fields: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}",
    )


def _reading(name: str, source: SourceConfig, columns: Mapping[str, None]) -> Reading:
    """Return the reading of a known shape, with the fields beside it that the source has."""
    shape = _SHAPES[name]
    fields = dict(shape["fields"])
    reading = Reading(fields, shape.get("form", ""), shape.get("when", "true"), shape=name)
    reading = _with_ignored(reading, source, shape)
    taken = _columns_of(fields.values()) | reading.ignored
    # A second column for a field, or turns beside texts, are left unread: an error, by their reserved names.
    others = fields.keys() | (CONTEXT if reading.form else set())
    if fields.keys().isdisjoint(("chosen", "pair")):
        others |= {"scores"}
    for field, text in _BESIDE:
        used = _columns_of([text])
        if field not in others and used <= columns.keys() and used.isdisjoint(taken):
            fields.setdefault(field, text)
    return reading


def _recognised(first: _First, *, of_prompts: bool) -> Reading:
    """Return the reading of the one known shape that fits."""
    source = first.source
    fits = _fitting(first.rows, of_prompts=of_prompts)
    readings = [_reading(name, source, first.columns) for name in fits]
    if len(readings) == 1:
        if not of_prompts:
            _check_sides(first, readings[0])
        return readings[0]
    if not first.rows:
        return Reading({"prompt": "prompt", "completion": "completion"})  # all records are bad
    if not readings:
        raise _unlike(first, "the columns are none of the known shapes: say what they mean")
    every = frozenset().union(*(reading.columns for reading in readings))
    ways = []
    for reading in readings:
        ignore = [*(source.ignore or ()), *sorted(every - reading.columns)]
        ways.append(_line(first, fields=reading.shape, ignore=ignore))
    raise DataError(
        f"the columns have {len(ways)} known meanings",
        where=source.path,
        got=", ".join(reading.shape for reading in readings),
        remedy="\n    ".join(["write the source as one of these", *ways]),
    )


def _check_sides(first: _First, reading: Reading) -> None:
    """Check that records are not read as one response because the column of the other has no value."""
    texts = [shape["fields"].get("rejected", "none") for shape in _SHAPES.values()]
    sides = _columns_of(texts).intersection(first.columns) - reading.ignored
    empty = sorted(name for name in sides if not any(is_given(row.get(name)) for row in first.rows))
    if empty and "completion" in reading.fields:
        line = _line(first, ignore=[*(first.source.ignore or ()), *empty])
        raise _unlike(
            first,
            f"{', '.join(empty)} has no value in the first {len(first.rows)} records: they are no pairs",
            f"write the rejected side; or, to read each record as one response: {line}",
        )


def _fitting(rows: Sequence[Fields], *, of_prompts: bool) -> list[str]:
    """Return the names of the shapes that fit records, without those that are a part of another."""
    columns = dict.fromkeys(chain.from_iterable(rows))
    # A column of nulls counts only if no shape fits without: tables have them for other records.
    filled = {name for name in columns if any(row.get(name) is not None for row in rows)}
    fits = list[str]()
    for is_prompts, counted in product((False, True)[: 1 + of_prompts], (filled, columns.keys())):
        fits = fits or [
            name
            for name, shape in _SHAPES.items()
            if _fits(shape, rows, columns, counted, of_prompts=is_prompts)
        ]
    sets = {name: set(_SHAPES[name]["columns"]) for name in fits}
    return [name for name in fits if not any(sets[name] < sets[other] for other in fits)]


def _fits(
    shape: Mapping[str, Any],
    rows: Sequence[Fields],
    columns: Mapping[str, None],
    counted: Set[str],
    *,
    of_prompts: bool,
) -> bool:
    """Return whether a shape fits records with these columns, of which it needs some that are counted."""
    own = set(shape["columns"])
    if shape.get("by_name") or bool(shape.get("prompts")) is not of_prompts or not own <= counted:
        return False
    if shape.get("alone") and columns.keys() - own - _columns_of(text for _, text in _BESIDE):
        return False  # one of the others may be the prompt
    # A record without a value in one of the columns is a bad one of any shape.
    whole = [row for row in rows if all(is_given(row.get(column)) for column in own)] or rows
    try:
        return all(expression(shape.get("when", "true"))(row) is True for row in whole)
    except UnusableRecordError:
        return False


# What to do about a source that cannot be read.


def _line(first: _First, **changes: Any) -> str:
    """Return the source with other keys, as a user writes it on the command line."""
    return f"{first.key}={shlex.quote(f'[{as_written(replace(first.source, **changes))}]')}"


def _unlike(first: _First, message: str, remedy: str = "") -> DataError:
    """Return the error with the columns of a source, and the lines to complete."""
    columns = islice(first.columns, _MAX_SHOWN)
    listed = [f"{_as_expression(name)}: {_type(first.rows, name)}" for name in columns]
    example = _line(first, fields=dict.fromkeys(("prompt", "chosen", "rejected"), "COLUMN"))
    return DataError(
        message,
        where=first.source.path,
        got="\n    ".join(["columns", *listed]),
        remedy=f"{remedy or f'replace each COLUMN by one of them: {example}'}\n{_TABLE['help']}".rstrip(),
    )


def _of_first(first: _First, reading: Reading, faults: Sequence[BadRecord]) -> DataError:
    """Return the error of a source whose first records all fail, with the lines that read them."""
    columns = {*first.columns, "*"}
    ignore = sorted(name for name in reading.ignored if name in columns or OF_KEYS in name)
    fields = dict(reading.fields)
    own: dict[str, Any] = fields | ({"form": reading.form} if reading.form else {})
    if reading.keys.given:
        own["keys"] = sorted(reading.keys.given)
    reason = faults[0].reason
    names = sorted({name for fault in faults if fault.reason == reason for name in fault.unread})
    ways = list[tuple[str, Fields]]()
    match reason:
        case "spelled_messages":
            # Each text that one of the records spells in JSON, or as Python prints it.
            for name, text in reading.fields.items():
                spelled = text.removesuffix(TURN)
                found = filter(None, (spelled_as(expression(spelled)(row)) for row in first.rows))
                fields[name] = next((spelled + way for way in found), text)
            read = replace(reading, fields=fields, form="")
            records = [parse_record(row, read, Origin("", 0)) for row in first.rows]
            if not all(isinstance(record, BadRecord) for record in records):
                ways.append(("read the messages", {"fields": fields}))
            if not reading.form:
                ways.append(("train the texts as they are", {"fields": {**reading.fields, "form": "text"}}))
        case "unknown_label":
            good = {**own, "label": fields["label"] + ' == "GOOD"'}
            ways = [("name the good label in place of GOOD", {"fields": good})]
        case "unread_column":
            beside = {name: name for name in names if name in _READ_BESIDE}
            if beside:
                ways.append(("read them", {"fields": own | beside}))
            elif fields.keys() >= {"chosen", "rejected"}:
                del own["chosen"], own["rejected"]
                by_verdict = {"fields": own | _TABLE["verdict"], "ignore": ignore + names}
                ways.append(("if one of the columns says which answer is better", by_verdict))
            ways.append(("ignore them, if no response depends on them", {"ignore": ignore + names}))
        case "unknown_key":
            values = [expression(text)(row) for text in fields.values() for row in first.rows]
            keys = sorted(set().union(*(unknown_keys(value, reading.keys) for value in values)))
            bare = [key.removeprefix(OF_KEYS) for key in keys]
            if not reading.reserved.isdisjoint(map(bare_name, bare)):
                candidates = {"fields": _TABLE["candidates"], "ignore": ignore + keys}
                ways.append(("if KEY is GOOD in the better answer and BAD in the other", candidates))
            given = {**own, "keys": sorted(reading.keys.given.union(bare))}
            ways.append(("if the chat template reads them", {"fields": given}))
            ways.append(("ignore them, if nothing depends on them", {"ignore": ignore + keys}))
        case _:
            ways = [("correct the expressions", {"fields": own})]
    message = f"none of the first {len(first.rows)} records can be read: {faults[0].why}"
    lines = [f"{words}: {_line(first, **{'ignore': ignore, **changes})}" for words, changes in ways]
    return _unlike(first, message, "\n    ".join(["write the source as one of these", *lines]))


def _few_values(rows: Sequence[Fields], name: str) -> str:
    """Return the values of a column in parentheses, if they are few and short; else nothing."""
    values = {str(row[name]) for row in rows if is_given(row.get(name))}
    is_few = 0 < len(values) <= _FEW_VALUES < len(rows) and all(len(value) <= _SHORT for value in values)
    return f" ({', '.join(sorted(map(shown_key, values)))})" if is_few else ""


def _type(rows: Sequence[Fields], name: str) -> str:
    """Return the type of a column's first value, and its values if they are few and short."""
    value = next((row[name] for row in rows if row.get(name) is not None), None)
    if is_messages(value) and value:
        return "messages"
    if isinstance(value, Mapping):
        return f"object with {', '.join(map(shown_key, value))}"
    if isinstance(value, list):
        return f"list of {len(value)}: {_type([{name: item} for item in value[:1]], name)}"
    kinds = {str: "text", bool: "true or false", int: "number", float: "number"}
    kind = kinds.get(type(value), "null")
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        kind = "text that looks like JSON"
    return kind + _few_values(rows, name)
