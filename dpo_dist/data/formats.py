"""Formats of input records: one table, and how a record is read by its row.

To add a format: add its name to `DataFormat`, a function that returns a record's `Content` to
`responses`, and a row to `FORMATS`. `messages` reads the texts and messages in these fields, `context` the
fields beside them.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpo_dist.config.data import DataConfig, DataFormat, OnBadRecord, SourceConfig
from dpo_dist.data.columns import resolved
from dpo_dist.data.context import CONVERSATIONS, QUESTIONS, check_content, has_prompt, with_context
from dpo_dist.data.counts import DataCounts, Outcome, check_counts
from dpo_dist.data.messages import (
    Reader,
    from_json,
    read_hh,
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
    completion,
    has_completion,
    has_pair,
    has_ranking,
    is_labelled,
    is_response,
    pair,
    ranking,
)
from dpo_dist.data.sources import check_cached_offline, local_files, raw_records

_CHECKED_RECORDS = 64
_MANY_RECORDS = 16_384
# Reasons that the other records of a source share, if the first ones have them.
_SHARED_REASONS = frozenset({"unknown_format", "unpaired", "unparsable", "missing_field", "reader_failed"})
_MAX_SHOWN_KEYS = 12


def read_records(
    source: SourceConfig | str, meter: Meter | None = None
) -> Iterator[PreferenceRecord | BadRecord]:
    """Read the records of a source (a string: its path) in its order, in bounded memory.

    One item per record: a pair, a ranking, a completion, or the reason why it cannot be used. DataError and
    ConfigError are raised by this call if they are known then.
    """
    source = resolved(SourceConfig(path=source) if isinstance(source, str) else source)
    return (
        record if isinstance(record, BadRecord) else parse_record(record, source.format, origin)
        for record, origin in raw_records(source, meter)
    )


def check_first_formats(source: SourceConfig, config: DataConfig) -> None:
    """Check that one of the first records has a known format; for a Hub dataset, that offline it is cached.

    With `data.on_bad_record=error` all of the first ones must be usable. Raises DataError.
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
            bad,
        )
        check_counts(counts, source.path, config, of_first=not is_whole)


def parse_record(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    """Return the preference in a record of format `name`; `auto`: of the first format that matches.

    Details of a bad record never quote its texts, which may be offensive or personal.
    """
    try:
        return _parse(_with_values(record, name), name, origin)
    except UnusableRecordError as fault:
        return fault.at(origin)
    except RecursionError:
        return BadRecord("unparsable", origin, "nested too deeply")


def _parse(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord:
    if name is DataFormat.auto:
        row = next((row for row in FORMATS.values() if row.matches and row.matches(record)), None)
        if row is None:
            raise _unknown_format(record)
    else:
        row = FORMATS[name]
    content = row.content(record)
    if name is DataFormat.auto:
        _check_no_other(record, content)
    read = row.read or reader_of(content.prompt, content.responses)
    if read is None:
        raise (
            UnusableRecordError("empty_prompt")
            if content.prompt is None and has_prompt(record)
            else _unknown_format(record)
        )
    prompt, responses = read(content.prompt, content.responses)
    prompt, tools, arguments = with_context(prompt, record, content.responses, is_plain=row.read is read_text)
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


def _check_no_other(record: Fields, content: Content) -> None:
    """Check that a record has no other responses than those read; copies of them are none."""
    used = {content.field} if content.field else set(content.responses)
    values = [record.get(name) for name in used]
    others = [
        name
        for name in (*SIDE_NAMES, "completion", *LISTS, *CONVERSATIONS)
        if name not in used and is_response(record, name) and record[name] not in values
    ]
    if others:
        raise UnusableRecordError(
            "ambiguous_format", f"other responses in {', '.join(others)}; choose by `format`, or {IGNORE}"
        )


def _unknown_format(record: Fields) -> UnusableRecordError:
    if is_labelled(record):
        return UnusableRecordError("unpaired", UNPAIRED)
    kinds = {str: "text", list: "list", dict: "object", type(None): "null"}
    shown = [f"{shown_key(key)} ({kinds.get(type(value), 'value')})" for key, value in record.items()]
    shown[_MAX_SHOWN_KEYS:] = ["..."] if len(shown) > _MAX_SHOWN_KEYS else []
    return UnusableRecordError("unknown_format", f"fields: {', '.join(shown) or 'none'}")


# The role of a message that a text in one of these fields may spell alone.
_SPELLED = {
    **dict.fromkeys(("prompt", *QUESTIONS, "context"), "user"),
    **dict.fromkeys(("completion", *SIDE_NAMES, "response"), "assistant"),
}


def _with_values(record: Fields, name: DataFormat) -> Fields:
    """Return a record with the messages and lists that its texts spell as JSON, as cells of a table do."""
    is_text = name in (DataFormat.text, DataFormat.hh)
    found = dict(record)
    for field, value in record.items():
        if field in CONVERSATIONS:
            found[field] = from_json(value)
        elif field in LISTS and isinstance(listed := from_json(value), list):
            found[field] = listed
        elif field in _SPELLED and not is_text:
            found[field] = spelled_messages(value, _SPELLED[field])
    return found


def _with(*names: str) -> Callable[[Fields], Content]:
    """Return the content of records of any kind that have one of these fields."""

    def content(record: Fields) -> Content:
        if all(record.get(name) is None for name in names):
            raise UnusableRecordError("missing_field", names[0])
        if has_pair(record):
            return pair(record)
        return ranking(record) if has_ranking(record) else completion(record)

    return content


# The first that matches is read.
FORMATS: dict[DataFormat, Format] = {
    DataFormat.text: Format(pair, read=read_text),
    DataFormat.messages: Format(pair, read=read_messages),
    DataFormat.hh: Format(pair, read=read_hh),
    DataFormat.alpaca: Format(_with("instruction")),
    DataFormat.sharegpt: Format(_with("conversations", "messages")),
    # A pair in any of these.
    DataFormat.auto: Format(pair, matches=has_pair),
    DataFormat.ranked: Format(ranking, matches=has_ranking),
    DataFormat.completion: Format(completion, matches=has_completion),
}
