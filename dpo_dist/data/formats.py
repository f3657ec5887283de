"""Formats of input records: a table with a row for each, and functions that read a record by its row.

To add a format: add its name to `DataFormat`, a function that returns a record's `Content`, and a row to
`FORMATS`. `read/layouts` has these functions, `read/messages` reads the texts and messages that they return.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from dpo_dist.config.losses import NUMBERS
from dpo_dist.config.schema import DataConfig, DataFormat, OnBadRecord, SourceConfig
from dpo_dist.data.counts import DataCounts, check_counts
from dpo_dist.data.read.columns import FIRST_RECORDS, OTHERS, VOTES, resolve_source, with_columns
from dpo_dist.data.read.context import unread_fields, with_context
from dpo_dist.data.read.images import place_images
from dpo_dist.data.read.layouts import (
    PAIR_SCORE_FIELDS,
    QUESTIONS,
    SIDE_NAMES,
    Content,
    check_no_other,
    completion,
    has_completion,
    has_pair,
    has_ranking,
    is_labelled,
    labelled,
    pair,
    ranking,
)
from dpo_dist.data.read.messages import (
    CONVERSATIONS,
    Reader,
    read_hh,
    read_implicit,
    read_messages,
    read_text,
    select_reader,
)
from dpo_dist.data.read.plain import plain_record
from dpo_dist.data.read.sources import local_files, pin_source, raw_records
from dpo_dist.data.read.values import to_number
from dpo_dist.data.records import (
    IMAGE,
    MAX_RECORD_BYTES,
    MAX_SHOWN_KEYS,
    BadRecord,
    Message,
    Origin,
    PreferenceRecord,
    Record,
    UnusableRecordError,
    bad_record_error,
    shown_key,
    turns_of,
)
from dpo_dist.foundation.remote import is_url
from dpo_dist.foundation.types import Fields

# A record with one of these faults may still have a usable prompt.
_RESPONSE_FAULTS = {
    "unknown_format",
    "missing_field",
    "not_one_answer",
    "empty_response",
    "identical_responses",
    "unread_content",
    "invalid_tool_call",
    "unknown_label",
    "no_ranking",
    "all_tied",
    "invalid_scores",
    "invalid_numbers",
}
# A record with only these fields has its prompt inside the sides.
_BESIDE_SIDES = frozenset((*SIDE_NAMES, *PAIR_SCORE_FIELDS, OTHERS))


def parse_record(record: Fields, name: DataFormat, origin: Origin) -> Record:
    """Return the preference in a record, read in the format `name` (`auto`: the first that matches).

    Details of a bad record never quote its texts, which may be offensive or personal.
    """
    try:
        return _parse(record, name, origin)
    except UnusableRecordError as fault:
        return fault.as_bad_record(origin)
    except RecursionError:
        return BadRecord("unparsable", origin, "nested too deeply")


def parse_prompt(record: Fields, name: DataFormat, origin: Origin) -> Record:
    """Return a record of format `name`, without responses if it has none that can be used."""
    parsed = parse_record(record, name, origin)
    if not isinstance(parsed, BadRecord) or parsed.reason not in _RESPONSE_FAULTS:
        return parsed
    # With a made-up response, the prompt is read as in any completion record.
    turns = record.get("messages")
    if record.get("prompt") is None and isinstance(turns, list):
        invented: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": "response"}]}
    else:
        invented = {"completion": "response"}
    completed = parse_record({**record, **invented}, DataFormat.completion, origin)
    if isinstance(completed, BadRecord):
        return parsed if completed.reason in _RESPONSE_FAULTS else completed
    return replace(completed, responses=(), scores=None)


def read_records(
    source: SourceConfig | str,
    parse: Callable[[Fields, DataFormat, Origin], Record] = parse_record,
) -> Iterator[Record]:
    """Read the records of a source (a string: its path) in its order; only a .json is read whole.

    One item per record: a pair, a ranking, a completion, or the reason why the record cannot be used. The
    call itself raises the DataError or ConfigError of a source with wrong keys.
    """
    source = resolve_source(SourceConfig(path=source) if isinstance(source, str) else source)
    return (
        record if isinstance(record, BadRecord) else parse(record, source.format, origin)
        for record, origin in raw_records(source)
    )


def read_prompts(source: SourceConfig) -> Iterator[Record]:
    """Read a source's records for their prompts; a record without usable responses has none."""
    return read_records(source, parse=parse_prompt)


def check_source(source: SourceConfig, config: DataConfig | None = None) -> None:
    """Check the keys of a source and the columns of its first records; with `config`, that some are usable.

    With `data.on_bad_record=error` every record that is read must be usable. Sends no request. Raises
    DataError or ConfigError.
    """
    from huggingface_hub import constants  # noqa: PLC0415  # slow to import

    source = resolve_source(source)
    with_columns(iter(()), source)
    if local_files(source) is None:
        if constants.HF_HUB_OFFLINE and not is_url(source.path):
            pin_source(source)  # raises if the Hub's cache lacks the dataset
        return
    counts = DataCounts()
    # Sorted data can begin with many records without a response.
    for record in read_records(source):
        if isinstance(record, BadRecord) and config and config.on_bad_record is OnBadRecord.error:
            raise bad_record_error(record)
        counts.add(record)
        if counts.read > FIRST_RECORDS and (config is None or counts.kept):
            return
    if config is not None and not counts.kept:
        check_counts(counts, source.path, config)


def _parse(given: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord:
    row: Format | None = FORMATS[name]
    assert row is not None
    record = plain_record(given, has_texts=row.read in _READS_TEXT, is_ranking=name is DataFormat.ranked)
    if name is DataFormat.auto:
        row = next((row for row in FORMATS.values() if row.matches and row.matches(record)), None)
    if row is None:
        raise _unknown_format(given)
    # The prompt and the responses.
    content = row.content(record)
    if name is DataFormat.auto:
        check_no_other(record, content)
    read = row.read or select_reader(content.prompt, content.responses)
    if read is None and _BESIDE_SIDES.issuperset(field for field in given if given[field] is not None):
        read = read_implicit  # the prompt can only be inside the sides
    if read is None:
        fields = ("prompt", "instruction", *QUESTIONS, *CONVERSATIONS)
        is_empty = content.prompt is None and any(record.get(field) is not None for field in fields)
        raise UnusableRecordError("empty_prompt") if is_empty else _unknown_format(given)
    prompt, responses = read(content.prompt, content.responses)
    # What stands beside them.
    is_plain = row.read in (read_text, read_implicit)
    prompt, tools, arguments = with_context(prompt, record, content.responses, is_plain=is_plain)
    prompt, images = place_images(prompt, responses, record, origin.folders, is_plain=is_plain)
    numbers = _numbers(record, len(responses))
    unread = unread_fields(record, content)
    result = PreferenceRecord(
        prompt, tuple(responses), origin, content.scores, tools, arguments, numbers, False, unread, images
    )
    check_content(result)
    return _exchanged(result) if numbers.get("soft_label", 1.0) < 0.5 else result


class Format(NamedTuple):
    """One format: `content` returns a record's content, or raises UnusableRecordError.

    `read` parses the prompt and the responses; None: chosen by their types. `matches`: whether a record has
    this format; None: never detected, only configured by its name.
    """

    content: Callable[[Fields], Content]
    read: Reader | None = None
    matches: Callable[[Fields], bool] | None = None


_READS_TEXT = (read_text, read_implicit, read_hh)


def _unknown_format(record: Fields) -> UnusableRecordError:
    fields = [shown_key(key) for key, value in record.items() if value is not None and key != OTHERS]
    columns = dict[str, str]()
    for name, value in record.items():
        if isinstance(value, Mapping) and {"chosen", "rejected"} <= value.keys():
            columns.setdefault("record", shown_key(name))
    fields = fields[: MAX_SHOWN_KEYS + 1]  # one more, so that it is known that there are more
    return UnusableRecordError(
        "unknown_format", "" if fields else "no fields", fields=fields, columns=columns
    )


def _numbers(record: Fields, responses: int) -> dict[str, float]:
    """Return a record's `NUMBERS` that have an effect; votes become a soft label."""
    given = {name: record[name] for name in (*NUMBERS, *VOTES) if record.get(name) not in (None, "")}
    read = {name: math.nan if isinstance(given[name], bool) else to_number(given[name]) for name in given}
    if votes := [read.pop(name) for name in VOTES if name in read]:
        total = sum(votes)
        if len(votes) < 2 or "soft_label" in read or not 0 <= min(votes) < total < math.inf:
            detail = f"{' and '.join(VOTES)} must be two numbers, not both 0, and replace soft_label"
            raise UnusableRecordError("invalid_numbers", detail)
        read["soft_label"] = votes[0] / total
    for name, value in read.items():
        least, most = (-math.inf if name == "margin" else 0.0), (1.0 if name == "soft_label" else math.inf)
        if not (math.isfinite(value) and least <= value <= most):
            raise UnusableRecordError("invalid_numbers", f"{name} is not a number from {least:g} to {most:g}")
    numbers = {name: value for name, value in read.items() if value != NUMBERS[name]}
    if responses != 2 and (of_pairs := numbers.keys() - {"loss_weight"}):
        raise UnusableRecordError("invalid_numbers", f"{min(of_pairs)} of a record that is no pair")
    return numbers


def _exchanged(record: PreferenceRecord) -> PreferenceRecord:
    """Return a pair with its sides exchanged, its soft label and its margin too: the loss stays the same."""
    opposite = {"soft_label": 1 - record.numbers["soft_label"], "margin": -record.numbers.get("margin", 0.0)}
    responses, scores = record.responses[::-1], record.scores and record.scores[::-1]
    given = {**record.numbers, **opposite}
    numbers = {name: value for name, value in given.items() if value != NUMBERS[name]}
    return replace(record, responses=responses, scores=scores, numbers=numbers, is_exchanged=True)


def check_content(record: PreferenceRecord) -> None:
    """Check that a record has a prompt and different responses that the loss can count."""
    prompt, *responses = turns_of(record.prompt, "user"), *map(turns_of, record.responses)
    values = [
        [(turn.role, turn.content.strip(), turn.fields) for turn in turns] for turns in (prompt, *responses)
    ]
    try:
        plain = _json([values, record.tools, record.template_arguments])
        size = len(plain.encode())
    except UnicodeEncodeError:
        raise UnusableRecordError("invalid_unicode", "a text has a lone surrogate") from None
    if size > MAX_RECORD_BYTES:
        raise UnusableRecordError("unparsable", f"{size:,} bytes, more than {MAX_RECORD_BYTES:,}")
    if plain.count(IMAGE) != len(record.images):
        raise UnusableRecordError("reserved_character", f"a text has the noncharacter U+{ord(IMAGE):X}")
    if not any(map(_has_content, prompt)):
        raise UnusableRecordError("empty_prompt")
    for turns in responses:
        # The loss must count at least one turn with content.
        trained = [turn for turn in turns if turn.role == "assistant" and turn.is_trained is not False]
        if not any(map(_has_content, trained)):
            raise UnusableRecordError("empty_response")
    if len(set(map(_json, values[1:]))) < len(responses):
        raise UnusableRecordError("identical_responses")


def _has_content(turn: Message) -> bool:
    return bool(turn.content.strip() or turn.fields)


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


# A record is read by the first row that matches.
FORMATS: dict[DataFormat, Format] = {
    DataFormat.text: Format(pair, read=read_text),
    DataFormat.messages: Format(pair, read=read_messages),
    DataFormat.hh: Format(pair, read=read_hh),
    DataFormat.implicit_prompt: Format(pair, read=read_implicit),
    # A pair in any of the formats above.
    DataFormat.auto: Format(pair, matches=has_pair),
    DataFormat.ranked: Format(ranking, matches=has_ranking),
    DataFormat.labelled: Format(labelled, matches=is_labelled),
    # As TRL reads texts: also those that look like a dialogue, or like messages in JSON.
    DataFormat.labelled_text: Format(labelled, read=read_text),
    DataFormat.completion: Format(completion, matches=has_completion),
}
