"""Formats of input records: one table, and how a record is read by its row.

To add a format: add its name to `DataFormat`, a function that returns a record's `Content` to `responses`,
and a row to `FORMATS`. `messages` reads the text, messages and HH dialogues in these fields, `context` the
fields beside them.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.config.data import DataConfig, DataFormat, OnBadRecord, SourceConfig
from dpo_dist.data.columns import resolved
from dpo_dist.data.context import CONVERSATIONS, QUESTIONS, check_content, has_prompt, with_context
from dpo_dist.data.counts import DataCounts, Outcome, check_counts
from dpo_dist.data.folders import check_cached_offline
from dpo_dist.data.messages import (
    Reader,
    from_json,
    read_hh,
    read_implicit,
    read_messages,
    read_text,
    reader_of,
    spelled_messages,
)
from dpo_dist.data.read import Meter
from dpo_dist.data.records import (
    BadRecord,
    Fields,
    Origin,
    PreferenceRecord,
    UnusableRecordError,
    bad_record_error,
    shown_key,
)
from dpo_dist.data.responses import (
    IGNORE,
    LISTS,
    SIDE_NAMES,
    UNPAIRED,
    Content,
    as_pair,
    completion,
    has_completion,
    has_only_sides,
    has_pair,
    has_ranking,
    is_labelled,
    pair,
    ranking,
)
from dpo_dist.data.sources import local_files, raw_records

_CHECKED_RECORDS = 64
_MANY_RECORDS = 16_384
# Reasons that the other records of a source share, if the first ones have them.
_SHARED_REASONS = frozenset({"unknown_format", "unpaired", "unparsable", "missing_field"})


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
        ConfigError: `split` or another key has no effect on such a source.
    """
    source = resolved(SourceConfig(path=source) if isinstance(source, str) else source)
    return (
        record if isinstance(record, BadRecord) else parse_record(record, source.format, origin)
        for record, origin in raw_records(source, meter)
    )


def check_first_formats(source: SourceConfig, config: DataConfig) -> None:
    """Check that one of the first records has a known format; for a Hub dataset, that offline it is cached.

    Raises:
        DataError: none of them can be used, or one cannot and `data.on_bad_record` is `error`.
    """
    source = resolved(source)
    if local_files(source) is None:
        check_cached_offline(source)
        return
    records = read_records(source)
    if config.on_bad_record is OnBadRecord.error:
        for record in itertools.islice(records, _CHECKED_RECORDS):
            if isinstance(record, BadRecord):
                raise bad_record_error(record)
        return
    # Sorted data can begin with many records without a response.
    bad: list[BadRecord] = []
    for record in itertools.islice(records, _MANY_RECORDS):
        if not isinstance(record, BadRecord):
            return
        bad.append(record)
    is_whole = next(records, None) is None
    reasons = Counter(one.reason for one in bad)
    if bad and (is_whole or _SHARED_REASONS.issuperset(reasons)):
        counts = DataCounts.of(
            {Outcome(dropped=reason): number for reason, number in reasons.items()},
            [f"{one.origin} {one.reason}" for one in bad],
            {one.reason: one.detail for one in reversed(bad) if one.detail},
        )
        check_counts(counts, source.path, config, of_first=not is_whole)


def parse_record(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    """Return the preference in a record of format `name`; `auto`: of the only format that matches.

    Details of a bad record never quote its texts, which may be offensive or personal.
    """
    try:
        return _parse(record, name, origin)
    except UnusableRecordError as fault:
        return fault.at(origin)
    except RecursionError:
        return BadRecord("unparsable", origin, "nested too deeply")


def _parse(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord:
    record = _with_values(as_pair(record), name)
    row = _detected(record) if name is DataFormat.auto else FORMATS[name]
    content = row.content(record)
    read = row.read or reader_of(content.prompt, content.responses)
    if read is None and has_only_sides(record):
        read = read_implicit
    if read is None:
        raise (
            UnusableRecordError("empty_prompt")
            if content.prompt is None and has_prompt(record)
            else _unknown_format(record)
        )
    prompt, responses = read(content.prompt, content.responses)
    is_plain = row.read in (read_text, read_implicit)
    prompt, tools, arguments = with_context(prompt, record, content.responses, plain=is_plain)
    result = PreferenceRecord(prompt, tuple(responses), origin, content.scores, tools, arguments)
    check_content(result)
    return result


@dataclass(frozen=True)
class Format:
    """One format of input records.

    Attributes:
        content: returns the prompt and the responses of a record. Raises UnusableRecordError.
        read: reads the prompt and the responses; None: chosen by their types.
        matches: whether a record has this format; None: never detected, only configured by its name.
    """

    content: Callable[[Fields], Content]
    read: Reader | None = None
    matches: Callable[[Fields], bool] | None = None


def _detected(record: Fields) -> Format:
    """Return the only format that matches a record. Raises UnusableRecordError: none, or several."""
    found = {name: row for name, row in FORMATS.items() if row.matches is not None and row.matches(record)}
    if len(found) > 1:
        names = ["pair" if name is DataFormat.auto else name for name in found]
        raise UnusableRecordError(
            "ambiguous_format", f"the record is a {' and a '.join(names)}; choose by `format`, or {IGNORE}"
        )
    if not found:
        raise _unknown_format(record)
    return next(iter(found.values()))


def _unknown_format(record: Fields) -> UnusableRecordError:
    if is_labelled(record):
        return UnusableRecordError("unpaired", UNPAIRED)
    kinds = {str: "text", list: "list", dict: "object", type(None): "null"}
    shown = [f"{shown_key(key)} ({kinds.get(type(value), 'value')})" for key, value in record.items()]
    shown[_MAX_SHOWN_KEYS:] = ["..."] if len(shown) > _MAX_SHOWN_KEYS else []
    return UnusableRecordError("unknown_format", f"fields: {', '.join(shown) or 'none'}")


_MAX_SHOWN_KEYS = 12


def _with_values(record: Fields, name: DataFormat) -> Fields:
    """Return a record with the messages and lists that its texts spell as JSON, as cells of a table do."""
    is_text = name in (DataFormat.text, DataFormat.implicit_prompt, DataFormat.hh)
    spelled = {} if is_text else _SPELLED
    return {field: _value(field, value, spelled) for field, value in record.items()}


def _value(field: str, value: Any, spelled: Mapping[str, str]) -> Any:
    if field in CONVERSATIONS:
        return from_json(value)
    if field in LISTS:
        found = from_json(value)
        return found if isinstance(found, list) else value
    return spelled_messages(value, spelled[field]) if field in spelled else value


def _with(*names: str) -> Callable[[Fields], Content]:
    """Return the content of records of any kind that have one of these fields."""

    def content(record: Fields) -> Content:
        if all(record.get(name) is None for name in names):
            raise UnusableRecordError("missing_field", names[0])
        if has_pair(record):
            return pair(record)
        return ranking(record) if has_ranking(record) else completion(record)

    return content


# The role of a message that a text in one of these fields may spell alone.
_SPELLED = {
    **dict.fromkeys(("prompt", *QUESTIONS, "context"), "user"),
    **dict.fromkeys(("completion", *SIDE_NAMES, "response"), "assistant"),
}
# Formats with `matches` exclude each other: a record that matches two of them is ambiguous.
FORMATS: dict[DataFormat, Format] = {
    DataFormat.text: Format(pair, read=read_text),
    DataFormat.messages: Format(pair, read=read_messages),
    DataFormat.hh: Format(pair, read=read_hh),
    DataFormat.implicit_prompt: Format(pair, read=read_implicit),
    DataFormat.alpaca: Format(_with("instruction")),
    DataFormat.sharegpt: Format(_with("conversations", "messages")),
    # A pair in any of these.
    DataFormat.auto: Format(pair, matches=has_pair),
    DataFormat.ranked: Format(ranking, matches=has_ranking),
    DataFormat.completion: Format(completion, matches=has_completion),
}
