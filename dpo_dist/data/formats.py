"""Formats of input records: the fields of the prompt and the responses, and how `format: auto` detects them.

To add a format: add its name to `DataFormat`, and here a function that returns a record's `RawContent` and a
row of `FORMATS`. Text, messages and HH dialogues in these fields are then read by conversations.py.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dpo_dist.config.data_schema import DataFormat, SourceConfig
from dpo_dist.data.conversations import (
    Reader,
    read_hh,
    read_messages,
    read_text,
    reader_of,
    with_context,
)
from dpo_dist.data.rankings import LIST_FIELDS, finite_scores, ranked_content
from dpo_dist.data.records import (
    BadRecord,
    Dialogue,
    Fields,
    Origin,
    PreferenceRecord,
    RawContent,
    shown_key,
)
from dpo_dist.data.sources import raw_records
from dpo_dist.errors import ConfigError

_SIDES = ("chosen", "rejected")
_PAIR = ("prompt", *_SIDES)
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


def read_records(source: SourceConfig | str) -> Iterator[PreferenceRecord | BadRecord]:
    """Read the records of a source in its order: pairs, rankings or completions.

    Args:
        source: a string is its path: a local .jsonl, .json (an array), .csv or .parquet file (the first three
            also as .gz or .zst), a pattern of files, a folder of shards, a folder saved by `datasets`, or a
            dataset on the Hugging Face Hub.

    Returns:
        One item per record, streamed except for a .json array; several files follow each other by path. The
        origin of a record is the file (for a Hub dataset its name), and its line in .jsonl and .csv or its
        number elsewhere. Reasons of bad records: `unparsable`, `unknown_format`, `missing_field`,
        `history_differs`, `not_one_answer`, `unread_content`, `no_ranking`, `all_tied`, `invalid_scores`,
        `invalid_unicode`, `empty_prompt`, `empty_response`, `identical_responses`.

    Raises:
        DataError: the source does not exist or cannot be read; raised by this call if it is known then.
        ConfigError: `limit` is not positive, or `split` or another key has no effect on such a source.
    """
    if isinstance(source, str):
        source = SourceConfig(path=source)
    if source.limit is not None and source.limit < 1:
        raise ConfigError(
            "the limit of a source is not positive",
            where=f"limit of {source.path}",
            got=str(source.limit),
            expected="a positive number of records, or null for all",
        )
    raw = itertools.islice(raw_records(source), source.limit)
    return (
        record if isinstance(record, BadRecord) else parse_record(record, source.format, origin)
        for record, origin in raw
    )


def parse_record(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    """Return the preference in a record of format `name`; `auto`: of the first format that matches.

    Details of a bad record never quote its texts, which may be offensive or personal.
    """
    format_ = _detected(record) if name is DataFormat.auto else FORMATS[name]
    if format_ is None:
        return _unknown_format(record, origin)
    content = format_.content(record, origin)
    if isinstance(content, BadRecord):
        return content
    read = format_.read or reader_of(content)
    if read is None:
        return _unknown_format(record, origin)
    result = read(content, origin)
    if isinstance(result, BadRecord):
        return result
    prompt, responses = result
    whole = with_context(prompt, record, content, origin, plain=format_.read is read_text)
    if isinstance(whole, BadRecord):
        return whole
    return _check_content(PreferenceRecord(whole, tuple(responses), origin, content.scores))


def _detected(record: Fields) -> Format | None:
    return next((one for one in FORMATS.values() if one.matches is not None and one.matches(record)), None)


def _unknown_format(record: Fields, origin: Origin) -> BadRecord:
    """Return `unknown_format` with the fields of the record and of the formats nearest to it."""
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
    if record.get("label") is not None:
        hint = "; label: one response with a good/bad label is neither a pair nor a completion"
    return BadRecord("unknown_format", origin, f"fields: {', '.join(shown) or 'none'}{hint}")


def _has_pair(record: Fields) -> bool:
    return any(record.get(side) is not None for side in _SIDES)


def _pair(record: Fields, origin: Origin) -> RawContent | BadRecord:
    """Return `chosen` and `rejected`, and their scores from the record or its metadata."""
    for side in _SIDES:
        if record.get(side) is None:
            return BadRecord("missing_field", origin, side)
    try:
        scores = _pair_scores(record)
    except (TypeError, ValueError):
        return BadRecord("invalid_scores", origin, "score_chosen and score_rejected must be two numbers")
    return RawContent(record.get("prompt"), {side: record[side] for side in _SIDES}, scores)


def _pair_scores(record: Fields) -> tuple[float, ...] | None:
    metadata = record.get("metadata")
    for fields in (record, metadata if isinstance(metadata, Mapping) else {}):
        scores = [fields.get(f"score_{side}") for side in _SIDES]
        if any(score is not None for score in scores):
            return finite_scores(scores)
    return None


def _has_completion(record: Fields) -> bool:
    return record.get("label") is None and any(
        record.get(name) is not None for name in ("completion", "messages")
    )


def _completion(record: Fields, origin: Origin) -> RawContent | BadRecord:
    """Return the one response to learn: `completion`, the end of `messages`, or `chosen`."""
    if record.get("label") is not None:
        return BadRecord(
            "unknown_format", origin, "label: a response with a good/bad label is not a completion"
        )
    for name in ("completion", "messages", "chosen"):
        if record.get(name) is not None:
            return RawContent(record.get("prompt"), {name: record[name]})
    return BadRecord("missing_field", origin, "completion or messages")


def _has_ranking(record: Fields) -> bool:
    return any(isinstance(record.get(name), list) for name in LIST_FIELDS)


def _check_content(record: PreferenceRecord) -> PreferenceRecord | BadRecord:
    """Return the record, or why nothing can be learned from it."""
    prompt = record.prompt.messages() if isinstance(record.prompt, Dialogue) else record.prompt
    prompt_texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    if not all(map(_is_valid_unicode, (*prompt_texts, *record.response_texts))):
        return BadRecord("invalid_unicode", record.origin, "a text has a lone surrogate")
    if not any(text.strip() for text in prompt_texts):
        return BadRecord("empty_prompt", record.origin)
    empty = [str(rank) for rank, text in enumerate(record.response_texts, start=1) if not text.strip()]
    if empty:
        return BadRecord("empty_response", record.origin, f"rank {', '.join(empty)}")
    if any(one.strip() == other.strip() for one, other in itertools.combinations(record.response_texts, 2)):
        return BadRecord("identical_responses", record.origin)
    return record


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# In the order of detection: a format whose records also match another one precedes it.
FORMATS: dict[DataFormat, Format] = {
    DataFormat.text: Format(_pair, (_PAIR,), read=read_text),
    DataFormat.messages: Format(_pair, (_PAIR,), read=read_messages),
    DataFormat.hh: Format(_pair, (_SIDES,), read=read_hh),
    # A pair in any of these three.
    DataFormat.auto: Format(_pair, matches=_has_pair),
    DataFormat.ranked: Format(
        ranked_content,
        (("prompt", "responses", "scores"), ("instruction", "input", "output", "history", "system")),
        matches=_has_ranking,
    ),
    DataFormat.completion: Format(
        _completion, (("prompt", "completion"), ("messages",)), matches=_has_completion
    ),
}
