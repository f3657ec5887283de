"""Formats of input records: one table, and how a record is read by its row.

To add a format: add its name to `DataFormat`, a function that returns a record's `Content`,
and a row to `FORMATS`. `messages` reads the texts and messages in these fields, `context` the
fields beside them.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpo_dist.config.data import DataConfig, DataFormat, OnBadRecord, SourceConfig
from dpo_dist.data.columns import resolved, with_columns
from dpo_dist.data.context import (
    CONVERSATIONS,
    QUESTIONS,
    check_content,
    ends_with_response,
    has_prompt,
    is_conversation,
    prompt_of,
    with_context,
)
from dpo_dist.data.counts import DataCounts, Outcome, check_counts, no_records
from dpo_dist.data.messages import (
    Reader,
    check_no_media,
    from_json,
    has_more,
    has_value,
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
from dpo_dist.data.sources import check_cached_offline, local_files, raw_records

_FIRST_RECORDS = 20
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


def check_source(source: SourceConfig, config: DataConfig | None = None) -> None:
    """Check the keys of a source and the columns of its first records; offline, that a Hub dataset is cached.

    With `config` one of the first records must be usable, or with `data.on_bad_record=error` all of them.
    Sends no request. Raises DataError or ConfigError.
    """
    source = resolved(source)
    with_columns(iter(()), source)
    if local_files(source) is None:
        check_cached_offline(source)
        return
    most = min(_FIRST_RECORDS, source.limit or _FIRST_RECORDS)
    first = list(raw_records(replace(source, limit=most), of_first=True))
    if config is not None:
        if not first:
            raise no_records(source.path)
        _check_first_formats(source, config)


def _check_first_formats(source: SourceConfig, config: DataConfig) -> None:
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
    if is_whole or _SHARED_REASONS.issuperset(reasons):
        outcomes = {Outcome(dropped=reason): number for reason, number in reasons.items()}
        check_counts(DataCounts.of(outcomes, bad), source.path, config, of_first=not is_whole)


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
    if read is None and has_only_sides(record):
        read = read_implicit
    if read is None:
        raise (
            UnusableRecordError("empty_prompt")
            if content.prompt is None and has_prompt(record)
            else _unknown_format(record)
        )
    prompt, responses = read(content.prompt, content.responses)
    prompt, tools, arguments = with_context(
        prompt, record, content.responses, is_plain=row.read in (read_text, read_implicit)
    )
    result = PreferenceRecord(prompt, tuple(responses), origin, content.scores, tools, arguments)
    check_content(result)
    return result


@dataclass(frozen=True)
class Content:
    """The prompt and the responses of a record, with values as in the source.

    Attributes:
        prompt: text or messages; None if the responses contain it.
        responses: text or messages each, best first, by the names that error messages use.
        scores: of each response, finite; None if the source has none.
        field: the field that has the responses, if they are a list.
    """

    prompt: Any
    responses: Fields
    scores: tuple[float, ...] | None = None
    field: str | None = None


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
            "ambiguous_format", f"other responses in {', '.join(others)}; choose by `format`, or {_IGNORE}"
        )


def _unknown_format(record: Fields) -> UnusableRecordError:
    if is_labelled(record):
        return UnusableRecordError("unpaired", _UNPAIRED)
    kinds = {str: "text", list: "list", dict: "object", type(None): "null"}
    shown = [f"{shown_key(key)} ({kinds.get(type(value), 'value')})" for key, value in record.items()]
    shown[_MAX_SHOWN_KEYS:] = ["..."] if len(shown) > _MAX_SHOWN_KEYS else []
    return UnusableRecordError("unknown_format", f"fields: {', '.join(shown) or 'none'}")


_IGNORE = "ignore one: columns: {COLUMN: null}"
_UNPAIRED = "one response with a good/bad label is neither a pair nor a completion"


# Pairs: the names of the chosen and the rejected side.
_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
)
# Fields of other kinds of records too: by themselves they are no pair.
_SHARED_NAMES = ("messages", "response")
SIDE_NAMES = tuple(dict.fromkeys(name for names in _PAIRS for name in names if name not in _SHARED_NAMES))
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    # Read if both sides have one: some datasets score the chosen side only.
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


def _sides(record: Fields) -> tuple[str, str] | None:
    """Return the names of the first complete pair of a record, else of the first with a side."""
    given = [
        (chosen, rejected)
        for chosen, rejected in _PAIRS
        if record.get(rejected) is not None
        or (record.get(chosen) is not None and (chosen not in _SHARED_NAMES or rejected in record))
    ]
    complete = [names for names in given if None not in map(record.get, names)]
    return next(iter([*complete, *given]), None)


def has_pair(record: Fields) -> bool:
    """Return whether a record has a side of a pair, or the field of a rejected side beside a chosen one."""
    return _sides(record) is not None


def has_only_sides(record: Fields) -> bool:
    """Return whether the sides of a pair are all that a record has, so that they contain its prompt."""
    known = {*SIDE_NAMES, *itertools.chain(*_PAIR_SCORES), "metadata"}
    return all(name in known or value is None for name, value in record.items())


def pair(record: Fields) -> Content:
    """Return the two sides of a pair, and their scores from the record or its metadata."""
    chosen, rejected = names = _sides(record) or _PAIRS[0]
    for name in names:
        if record.get(name) is None:
            raise UnusableRecordError("missing_field", name)
    scores = _pair_scores(record)
    sides = {name: record[name] for name in names}
    if chosen == "messages" and not is_conversation(record[rejected]):
        # The other response to the same question as the last message.
        turns = record[chosen]
        if not ends_with_response(turns):
            raise UnusableRecordError("not_one_answer", "messages does not end with an assistant message")
        return Content(turns[:-1], sides | {chosen: turns[-1]}, scores)
    return Content(prompt_of(record, sides.values()), sides, scores)


def _pair_scores(record: Fields) -> tuple[float, ...] | None:
    metadata = from_json(record.get("metadata"))
    inner = metadata if isinstance(metadata, Mapping) else {}
    for fields, names in itertools.product((record, inner), _PAIR_SCORES):
        scores = [None if fields.get(name) == "" else fields.get(name) for name in names]
        has_score = [score is not None for score in scores]
        if all(has_score) or (any(has_score) and names == _PAIR_SCORES[0]):
            return _finite(scores)
    return None


# Rankings.
LISTS = ("responses", "completions", "output")
_TEXTS = ("content", "text", "response", "answer")
_SCORES = ("score", "fine-grained_score", "overall_score", "rating", "reward")
# An order beside the list that no format reads.
_ORDERS = ("rank", "ranks", "reward", "rewards", "rating", "ratings", "label", "labels", "choice")


def has_ranking(record: Fields) -> bool:
    """Return whether a record has a list of responses."""
    return any(isinstance(record.get(name), list) for name in LISTS)


def ranking(record: Fields) -> Content:
    """Return a list of responses: best first as given, or sorted by the score inside each of them."""
    lists = [name for name in LISTS if record.get(name) is not None]
    if not lists:
        raise UnusableRecordError("missing_field", "responses")
    name = next((one for one in lists if isinstance(record[one], list)), lists[0])
    items = record[name]
    if not isinstance(items, list):
        raise UnusableRecordError("unknown_format", f"{name} is not a list")
    if len(items) < 2:
        raise UnusableRecordError("no_ranking", f"{name} has {len(items)}, not at least 2")
    check_no_media([item for item in items if isinstance(item, Mapping)])
    responses, scores = _sorted(items, from_json(record.get("scores")))
    if any(response is None for response in responses):
        raise UnusableRecordError("missing_field", f"a response in {name}")
    if scores is not None and scores[0] == scores[-1]:
        raise UnusableRecordError("all_tied", f"all scores are {scores[0]:g}")
    unread = [field for field in _ORDERS if has_value(record.get(field))]
    if scores is None and unread:
        detail = f"an order of the responses in {', '.join(unread)}; write `scores`: higher is better"
        raise UnusableRecordError("unread_content", detail, tuple(unread))
    by_rank = {f"rank {rank}": spelled_messages(one) for rank, one in enumerate(responses, start=1)}
    return Content(prompt_of(record, by_rank.values()), by_rank, scores, name)


def _sorted(items: list[Any], scores: Any) -> tuple[list[Any], tuple[float, ...] | None]:
    """Return the responses, best first, and their scores: those inside of them, or `scores`."""
    own = [_own_score(item) if isinstance(item, Mapping) else None for item in items]
    if any(score is not None for score in own):
        numbers = _finite(own)
        if scores is not None and _finite(scores) != numbers:
            raise UnusableRecordError("invalid_scores", "two different scores of a response")
        order = sorted(range(len(items)), key=lambda index: -numbers[index])
        return [_scored_response(items[index]) for index in order], tuple(numbers[index] for index in order)
    if scores is None:
        return items, None
    numbers = _finite(scores)
    if len(numbers) != len(items) or any(low < high for low, high in itertools.pairwise(numbers)):
        raise UnusableRecordError("invalid_scores", "not one score for each response, best first")
    return items, numbers


def _scored_response(item: Fields) -> Any:
    """Return the text of a response; the whole message if it has tool calls or thoughts."""
    text = _first(item, _TEXTS)
    return {"role": "assistant"} | dict(item) | {"content": text} if has_more(item) else text


def _own_score(response: Fields) -> Any:
    """Return the score inside a response; a rank without a score, 1 for the best, is a negative score."""
    score, rank = _first(response, _SCORES), response.get("rank")
    return -_finite([rank])[0] if score is None and rank is not None else score


def _first(fields: Fields, names: Iterable[str]) -> Any:
    """Return the value of the first of `names` that has one."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    """Return the values as finite numbers. Raises UnusableRecordError if one is not."""
    try:
        given = [] if isinstance(values, str | Mapping) else list(values)
        numbers = tuple(map(float, given))
        if numbers and all(map(math.isfinite, numbers)) and bool not in map(type, given):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    raise UnusableRecordError("invalid_scores", "a score is missing or is no finite number")


_LABELS = ("label", "kto_tag")
_LABEL_VALUES = frozenset(
    (
        *("0", "1", "-1", "0.0", "1.0", "-1.0", "true", "false"),
        *("good", "bad", "chosen", "rejected", "desirable", "undesirable"),
    )
)


def is_labelled(record: Fields) -> bool:
    """Return whether a record is a single response with a good/bad label, as for KTO."""
    has_label = any(str(record.get(name)).strip().lower() in _LABEL_VALUES for name in _LABELS)
    return has_label and not has_pair(record) and not has_ranking(record)


def is_response(record: Fields, name: str) -> bool:
    """Return whether a field has a response or several."""
    value = record.get(name)
    if name in CONVERSATIONS:
        return ends_with_response(value)
    if name == "output" and isinstance(value, str):
        return record.get("instruction") is not None
    return isinstance(value, list) if name in LISTS else value is not None


def has_completion(record: Fields) -> bool:
    """Return whether a record has a single response."""
    has_one = any(record.get(name) is not None for name in ("completion", *CONVERSATIONS))
    return (has_one or is_response(record, "output")) and not is_labelled(record)


def completion(record: Fields) -> Content:
    """Return the one response to learn: `completion`, the end of a conversation, `output`, or `chosen`."""
    if is_labelled(record):
        raise UnusableRecordError("unpaired", _UNPAIRED)
    for name in ("completion", *CONVERSATIONS, "output", "chosen"):
        value = record.get(name)
        if is_response(record, name) and not (name == "output" and isinstance(value, list)):
            return Content(prompt_of(record, [value]), {name: value})
    if any(record.get(name) is not None for name in CONVERSATIONS):
        raise UnusableRecordError("not_one_answer", "the messages do not end with the assistant's")
    raise UnusableRecordError("missing_field", "completion or messages")


# The role of a message that a text in one of these fields may spell alone.
_SPELLED = {
    **dict.fromkeys(("prompt", *QUESTIONS, "context"), "user"),
    **dict.fromkeys(("completion", *SIDE_NAMES, "response"), "assistant"),
}


def _with_values(record: Fields, name: DataFormat) -> Fields:
    """Return a record with the messages and lists that its texts spell as JSON, as cells of a table do."""
    is_text = name in (DataFormat.text, DataFormat.implicit_prompt, DataFormat.hh)
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
    DataFormat.implicit_prompt: Format(pair, read=read_implicit),
    DataFormat.alpaca: Format(_with("instruction")),
    DataFormat.sharegpt: Format(_with("conversations", "messages")),
    # A pair in any of these.
    DataFormat.auto: Format(pair, matches=has_pair),
    DataFormat.ranked: Format(ranking, matches=has_ranking),
    DataFormat.completion: Format(completion, matches=has_completion),
}
