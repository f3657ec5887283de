"""Formats of input records: the fields of the prompt and the responses, and how `format: auto` detects them.

To add a format: add its name to `DataFormat`, and here a function that returns a record's `RawContent` and a
row of `FORMATS`. Text, messages and HH dialogues in these fields are then read by conversations.py, and the
fields beside them by context.py.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from dpo_dist.config.data import DataConfig, DataFormat, OnBadRecord, SourceConfig
from dpo_dist.data.columns import resolved
from dpo_dist.data.context import CONVERSATIONS, check_content, has_prompt, with_context
from dpo_dist.data.counts import DataCounts, Outcome, check_counts
from dpo_dist.data.folders import check_cached_offline
from dpo_dist.data.messages import (
    Reader,
    read_hh,
    read_implicit,
    read_messages,
    read_text,
    reader_of,
    with_turns,
)
from dpo_dist.data.pair_fields import (
    COMPARISONS,
    MESSAGE_SIDES,
    PAIR,
    QUESTION_PAIRS,
    SIDES,
    UNPAIRED,
    as_pair,
    completion_content,
    has_completion,
    has_only_sides,
    has_pair,
    has_ranking,
    is_labelled,
    pair_content,
    ranked_content,
)
from dpo_dist.data.read import Meter
from dpo_dist.data.records import (
    BadRecord,
    Fields,
    Origin,
    PreferenceRecord,
    RawContent,
    UnusableRecordError,
    bad_record_error,
    shown_key,
)
from dpo_dist.data.sources import local_files, raw_records
from dpo_dist.foundation.errors import ConfigError

_MAX_SHOWN_KEYS = 12
_TYPE_NAMES = {str: "text", list: "list", dict: "object", type(None): "null"}


@dataclass(frozen=True)
class Format:
    """One format of input records.

    Attributes:
        content: returns the prompt and the responses of a record, or why they cannot be used.
        fields: the usual fields, each tuple one variant; shown for a record that has no known format.
        matches: whether a record has this format; None: never detected, only configured by its name.
        read: reads the prompt and the responses; None: chosen by their types.
    """

    content: Callable[[Fields, Origin], RawContent | BadRecord]
    fields: tuple[tuple[str, ...], ...] = ()
    matches: Callable[[Fields], bool] | None = None
    read: Reader | None = None


def read_records(
    source: SourceConfig | str, meter: Meter | None = None
) -> Iterator[PreferenceRecord | BadRecord]:
    """Read the records of a source in its order, in bounded memory: pairs, rankings or completions.

    Args:
        source: a string is its path: a file, a pattern of files, a folder, or a dataset on the Hub.
        meter: gets the share of the source that has been read.

    Returns:
        One item per record. Its origin is the file (for a Hub dataset its name), and its line in .jsonl and
        .csv or its number elsewhere.

    Raises:
        DataError: the source does not exist or cannot be read; raised by this call if it is known then.
        ConfigError: `limit` is not positive, or `split` or another key has no effect on such a source.
    """
    return (record for _fields, record in read_with_fields(source, meter))


def read_with_fields(
    source: SourceConfig | str, meter: Meter | None = None
) -> Iterator[tuple[Fields, PreferenceRecord | BadRecord]]:
    """Read the records of a source as `read_records` does, each with its fields (none: unparsable)."""
    if isinstance(source, str):
        source = SourceConfig(path=source)
    if source.limit is not None and source.limit < 1:
        raise ConfigError(
            "the limit of a source is not positive",
            where=f"limit of {source.path}",
            got=str(source.limit),
            expected="a positive number of records, or null for all",
            remedy="write limit: 1000, or remove it",
        )
    source = resolved(source)
    return (
        ({}, record)
        if isinstance(record, BadRecord)
        else (record, parse_record(record, source.format, origin))
        for record, origin in raw_records(source, meter)
    )


def parse_record(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    """Return the preference in a record of format `name`; `auto`: of the only format that matches.

    Details of a bad record never quote its texts, which may be offensive or personal.
    """
    try:
        record = as_pair(with_turns(record))
        format_ = _detected(record) if name is DataFormat.auto else FORMATS[name]
        return _unknown_format(record, origin) if format_ is None else _read(record, format_, origin)
    except UnusableRecordError as fault:
        return fault.at(origin)
    except RecursionError:
        return BadRecord("unparsable", origin, "nested too deeply")


def _read(record: Fields, format_: Format, origin: Origin) -> PreferenceRecord | BadRecord:
    content = format_.content(record, origin)
    if isinstance(content, BadRecord):
        return content
    read = format_.read or reader_of(content) or (read_implicit if has_only_sides(record) else None)
    if read is None:
        is_empty = content.prompt is None and has_prompt(record)
        return BadRecord("empty_prompt", origin) if is_empty else _unknown_format(record, origin)
    result = read(content, origin)
    if isinstance(result, BadRecord):
        return result
    prompt, responses = result
    context = with_context(prompt, record, content, plain=format_.read in (read_text, read_implicit))
    return check_content(
        PreferenceRecord(
            context.prompt,
            tuple(responses),
            origin,
            content.scores,
            context.tools,
            context.template_arguments,
        )
    )


def _detected(record: Fields) -> Format | None:
    """Return the format of a record; None if no format matches. Raises UnusableRecordError for several."""
    found = {name: one for name, one in FORMATS.items() if one.matches is not None and one.matches(record)}
    if len(found) > 1:
        names = ["pair" if name is DataFormat.auto else name for name in found]
        raise UnusableRecordError(
            "ambiguous_format",
            f"the record is a {' and a '.join(names)}; choose by `format`, or ignore a column: columns: "
            "{COLUMN: null}",
        )
    return next(iter(found.values()), None)


def _unknown_format(record: Fields, origin: Origin) -> BadRecord:
    """Return `unknown_format` with the fields of the record and of the formats nearest to it."""
    if is_labelled(record):
        return BadRecord("unpaired", origin, UNPAIRED)
    shown = [f"{shown_key(key)} ({_TYPE_NAMES.get(type(value), 'value')})" for key, value in record.items()]
    if len(shown) > _MAX_SHOWN_KEYS:
        shown[_MAX_SHOWN_KEYS:] = ["..."]
    names: dict[tuple[str, ...], list[str]] = {}
    for name, format_ in FORMATS.items():
        for fields in format_.fields:
            names.setdefault(fields, []).append(name)
    common = {fields: len(record.keys() & set(fields)) for fields in names}
    most = max(common.values())
    nearest = [
        f"{' or '.join(names[fields])}: {', '.join(fields)}" for fields in names if common[fields] == most > 0
    ]
    hint = f"; nearest formats: {'; '.join(nearest)}" if nearest else ""
    return BadRecord("unknown_format", origin, f"fields: {', '.join(shown) or 'none'}{hint}")


def _alpaca(record: Fields, origin: Origin) -> RawContent | BadRecord:
    """Return the responses to an `instruction`."""
    if record.get("instruction") is None:
        return BadRecord("missing_field", origin, "instruction")
    return _responses(record, origin)


def _sharegpt(record: Fields, origin: Origin) -> RawContent | BadRecord:
    """Return the responses to, or at the end of, `conversations`."""
    if all(record.get(name) is None for name in CONVERSATIONS):
        return BadRecord("missing_field", origin, "conversations")
    return _responses(record, origin)


def _responses(record: Fields, origin: Origin) -> RawContent | BadRecord:
    if has_pair(record):
        return pair_content(record, origin)
    return (ranked_content if has_ranking(record) else completion_content)(record, origin)


# Formats with `matches` exclude each other: a record that matches two of them is ambiguous.
FORMATS: dict[DataFormat, Format] = {
    DataFormat.text: Format(pair_content, (PAIR,), read=read_text),
    DataFormat.messages: Format(pair_content, (PAIR, *MESSAGE_SIDES), read=read_messages),
    DataFormat.hh: Format(pair_content, (SIDES,), read=read_hh),
    DataFormat.implicit_prompt: Format(pair_content, (SIDES,), read=read_implicit),
    DataFormat.alpaca: Format(_alpaca, (("instruction", "input", "history", "system", *SIDES),)),
    DataFormat.sharegpt: Format(_sharegpt, (("conversations", "tools", *SIDES),)),
    # A pair in any of these.
    DataFormat.auto: Format(
        pair_content, (*QUESTION_PAIRS, *(row.fields for row in COMPARISONS)), matches=has_pair
    ),
    DataFormat.ranked: Format(
        ranked_content,
        (("prompt", "responses", "scores"), ("instruction", "input", "output", "history", "system")),
        matches=has_ranking,
    ),
    DataFormat.completion: Format(
        completion_content, (("prompt", "completion"), ("messages",)), matches=has_completion
    ),
}


_CHECKED_RECORDS = 64
_MANY_RECORDS = 16_384
_OF_ALL_RECORDS = frozenset({"unknown_format", "unpaired"})
"""Reasons that the other records of a source share, if the first ones have them."""
_OF_MANY_RECORDS = _OF_ALL_RECORDS | {"unparsable", "missing_field"}
"""Reasons that they share if many have them: sorted data can begin with records without a response."""


def check_first_formats(source: SourceConfig, config: DataConfig) -> None:
    """Check that one of the first records has a known format; for a Hub dataset, that offline it is cached.

    Raises:
        DataError: none of them can be used, or one cannot and `data.on_bad_record` is `error`.
    """
    source = resolved(source)
    if local_files(source) is None:
        check_cached_offline(source)
        return
    bad: list[BadRecord] = []
    reasons: set[str] = set()
    is_whole = True
    for index, record in enumerate(read_records(source)):
        if index >= _most(reasons):
            is_whole = False
            break
        if not isinstance(record, BadRecord):
            if config.on_bad_record is OnBadRecord.drop:
                return
            continue
        if config.on_bad_record is OnBadRecord.error:
            raise bad_record_error(record)
        bad.append(record)
        reasons.add(record.reason)
    if bad and (is_whole or reasons <= _OF_MANY_RECORDS):
        _raise(bad, source, config, is_whole)


def _most(reasons: Collection[str]) -> int:
    """Return the number of records to read if the bad ones so far have these reasons."""
    is_of_many = _OF_MANY_RECORDS.issuperset(reasons) and not _OF_ALL_RECORDS.issuperset(reasons)
    return _MANY_RECORDS if is_of_many else _CHECKED_RECORDS


def _raise(bad: list[BadRecord], source: SourceConfig, config: DataConfig, is_whole: bool) -> None:
    counts = DataCounts.of(
        {Outcome(dropped=reason): number for reason, number in Counter(one.reason for one in bad).items()},
        [f"{one.origin} {one.reason}" for one in bad],
        {one.reason: one.detail for one in reversed(bad) if one.detail},
    )
    check_counts(counts, source.path, config, of_first=not is_whole)
