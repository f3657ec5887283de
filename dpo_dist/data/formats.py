"""Formats of input records: one table, and how a record is read by its row.

To add a format: add its name to `DataFormat`, a function that returns a record's `Content`,
and a row to `FORMATS`. `messages` reads the texts and messages in these fields.
"""

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from dpo_dist.config.losses import NUMBERS
from dpo_dist.config.schema import DataConfig, DataFormat, OnBadRecord, SourceConfig
from dpo_dist.data.counts import DataCounts, check_counts
from dpo_dist.data.read.columns import FIRST_RECORDS, OTHERS, VOTES, resolved, with_columns
from dpo_dist.data.read.messages import (
    CONVERSATIONS,
    MEDIA,
    TOOLS,
    Reader,
    check_no_media,
    has_more,
    is_messages,
    messages_of,
    nested_conversation,
    read_hh,
    read_implicit,
    read_messages,
    read_text,
    reader_of,
    role_of,
    spelled_messages,
    unread_error,
)
from dpo_dist.data.read.sources import local_files, pinned, raw_records
from dpo_dist.data.read.values import BAD, GOOD, from_json, has_value, without_nulls
from dpo_dist.data.records import (
    FIRST_TURN,
    MAX_RECORD_BYTES,
    BadRecord,
    Dialogue,
    Fields,
    Message,
    Messages,
    Origin,
    PreferenceRecord,
    Prompt,
    Record,
    UnusableRecordError,
    bad_record_error,
    shown_key,
    turns_of,
)

# Faults of the responses of a record; its prompt may be usable.
_OF_RESPONSES = {"unknown_format", "missing_field", "not_one_answer", "empty_response", "identical_responses"}
_OF_RESPONSES |= {"no_ranking", "all_tied", "invalid_scores", "invalid_numbers"}
_MAX_SHOWN_KEYS = 12


def parse_record(record: Fields, name: DataFormat, origin: Origin) -> Record:
    """Return the preference in a record of format `name`; `auto`: of the first format that matches.

    Details of a bad record never quote its texts, which may be offensive or personal.
    """
    try:
        return _parse(_with_values(record, name), name, origin)
    except UnusableRecordError as fault:
        return fault.at(origin)
    except RecursionError:
        return BadRecord("unparsable", origin, "nested too deeply")


def parse_prompt(record: Fields, name: DataFormat, origin: Origin) -> Record:
    """Return a record of format `name`, without responses if it has none that can be used."""
    parsed = parse_record(record, name, origin)
    if not isinstance(parsed, BadRecord) or parsed.reason not in _OF_RESPONSES:
        return parsed
    # With a made-up response, the prompt is read as in any completion record.
    turns = record.get("messages")
    if record.get("prompt") is None and isinstance(turns, list):
        invented: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": "response"}]}
    else:
        invented = {"completion": "response"}
    completed = parse_record({**record, **invented}, DataFormat.completion, origin)
    if isinstance(completed, BadRecord):
        return parsed if completed.reason in _OF_RESPONSES else completed
    return replace(completed, responses=(), scores=None)


def read_records(
    source: SourceConfig | str, parse: Callable[[Fields, DataFormat, Origin], Record] = parse_record
) -> Iterator[Record]:
    """Read the records of a source (a string: its path) in its order; only a .json is read whole.

    One item per record: a pair, a ranking, a completion, or the reason why it cannot be used. DataError and
    ConfigError are raised by this call if they are known then.
    """
    source = resolved(SourceConfig(path=source) if isinstance(source, str) else source)
    return (
        record if isinstance(record, BadRecord) else parse(record, source.format, origin)
        for record, origin in raw_records(source)
    )


def read_prompts(source: SourceConfig) -> Iterator[Record]:
    """Read the records of a source for their prompts: without responses where none can be used."""
    return read_records(source, parse=parse_prompt)


def check_source(source: SourceConfig, config: DataConfig | None = None) -> None:
    """Check the keys of a source and the columns of its first records; with `config`, that one can be used.

    With `data.on_bad_record=error` all that are read must be usable. Sends no request. Raises DataError or
    ConfigError.
    """
    from huggingface_hub import constants  # noqa: PLC0415  # slow to import

    source = resolved(source)
    with_columns(iter(()), source)
    if local_files(source) is None:
        if constants.HF_HUB_OFFLINE:
            pinned(source)  # its cache must have the dataset
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


def _parse(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord:
    row: Format | None = FORMATS[name]
    if name is DataFormat.auto:
        row = next((row for row in FORMATS.values() if row.matches and row.matches(record)), None)
    if row is None:
        raise _unknown_format(record)
    content = row.content(record)
    if name is DataFormat.auto:
        _check_no_other(record, content)
    read = row.read or reader_of(content.prompt, content.responses)
    if read is None and _BESIDE_SIDES.issuperset(field for field in record if record[field] is not None):
        read = read_implicit  # the sides are all that there is
    if read is None:
        fields = ("prompt", "instruction", *QUESTIONS, *CONVERSATIONS)
        is_empty = content.prompt is None and any(record.get(field) is not None for field in fields)
        raise UnusableRecordError("empty_prompt") if is_empty else _unknown_format(record)
    prompt, responses = read(content.prompt, content.responses)
    is_plain = row.read in (read_text, read_implicit)
    prompt, tools, arguments = with_context(prompt, record, content.responses, is_plain=is_plain)
    numbers = _numbers(record, len(responses))
    unread = _unread_fields(record, content)
    of_record = (tuple(responses), origin, content.scores, tools, arguments, numbers)
    result = PreferenceRecord(prompt, *of_record, unread=unread)
    check_content(result)
    return _exchanged(result) if numbers.get("soft_label", 1.0) < 0.5 else result


class Content(NamedTuple):
    """The prompt and the responses of a record, with values as in the source.

    `prompt` is None if the responses contain it. `responses` are text or messages each, best first, by the
    names that errors use, `scores` finite. `field` has the responses, if they are a list.
    """

    prompt: Any
    responses: Fields
    scores: tuple[float, ...] | None = None
    field: str | None = None


class Format(NamedTuple):
    """One format: the function that returns a record's content, and may raise UnusableRecordError.

    `read` reads the prompt and the responses; None: chosen by their types. `matches`: whether a record has
    this format; None: never detected, only configured by its name.
    """

    content: Callable[[Fields], Content]
    read: Reader | None = None
    matches: Callable[[Fields], bool] | None = None


def _check_no_other(record: Fields, content: Content) -> None:
    """Check that a record has no other responses than those read, except copies of them."""
    used = {content.field} if content.field else set(content.responses)
    values = [record.get(name) for name in used]
    others = [
        name
        for name in (*SIDE_NAMES, "completion", *LISTS, *CONVERSATIONS)
        if name not in used and is_response(record, name) and record[name] not in values
    ]
    if others:
        raise UnusableRecordError("ambiguous_format", f"other responses in {', '.join(others)}")


def _unknown_format(record: Fields) -> UnusableRecordError:
    shown = [shown_key(key) for key, value in record.items() if value is not None and key != OTHERS]
    shown[_MAX_SHOWN_KEYS:] = ["..."] if len(shown) > _MAX_SHOWN_KEYS else []
    return UnusableRecordError("unknown_format", f"fields: {', '.join(shown) or 'none'}")


# The prompt.
# A question in these fields is a user's turn.
QUESTIONS = ("question", "query", "input")
_SYSTEMS = ("system", "system_prompt")
_ARGUMENTS = "chat_template_kwargs"
# Parts of the question in some datasets: they must be in the prompt. No format adds `context` to it.
_OF_PROMPT = ("instruction", *QUESTIONS, "context")
# A chat template renders these or a model sees them, and no format reads them.
_UNREAD = ("documents", *MEDIA, *(f"{side}_{name}" for side in ("chosen", "rejected") for name in MEDIA))
# Perhaps weights of a record in the loss; a value other than 1 is not read.
_UNREAD_WEIGHTS = ("weight", "sample_weight")
# Tools of one side: both are rendered with those of the record.
_TOOLS_OF_SIDES = ("chosen_tools", "rejected_tools")
# Fields of which each value is read, or drops its record; and how `pairs` made it.
_READ = {"prompt", *_OF_PROMPT, *CONVERSATIONS, "conversation", *_SYSTEMS, "history", _ARGUMENTS}
_READ |= {
    "enable_thinking",
    *TOOLS,
    *_TOOLS_OF_SIDES,
    *_UNREAD,
    *_UNREAD_WEIGHTS,
    *NUMBERS,
    *VOTES,
    "provenance",
}


def prompt_of(record: Fields, responses: Iterable[Any]) -> Any:
    """Return a record's prompt: text or messages; None without one, or if responses are conversations."""
    if record.get("prompt") is not None or any(map(is_conversation, responses)):
        return record.get("prompt")
    for turns in map(record.get, CONVERSATIONS):
        if turns is not None and not ends_with_response(turns):
            return _asked(turns)
    if has_value(record.get("instruction")):
        parts = [record["instruction"], record.get("input")]
        return _asked("\n".join(part for part in parts if isinstance(part, str) and part))
    question = next((record[name] for name in QUESTIONS if has_value(record.get(name))), None)
    return question if question is None or is_messages(question) else [{"role": "user", "content": question}]


def _asked(turns: Any) -> Any:
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns


def is_conversation(response: Any) -> bool:
    """Return whether a response includes the turns before it, as messages or as an HH dialogue."""
    if isinstance(response, str):
        return response.startswith(FIRST_TURN)
    is_list = isinstance(response, list) and bool(response) and is_messages(response)
    return is_list and not ends_with_response(response[:1])


def ends_with_response(turns: Any) -> bool:
    """Return whether the last of a list of messages is the assistant's."""
    return isinstance(turns, list) and bool(turns) and role_of(turns[-1]) == "assistant"


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
    # Read only if both sides have a score: some datasets score the chosen side only.
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_OF_PAIR_SCORES = (*itertools.chain(*_PAIR_SCORES), "metadata")
# Sides that have no other fields beside them contain their prompt.
_BESIDE_SIDES = frozenset((*SIDE_NAMES, *_OF_PAIR_SCORES, OTHERS))


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
    places = [record, metadata] if isinstance(metadata, Mapping) else [record]
    for fields, names in itertools.product(places, _PAIR_SCORES):
        scores = [None if fields.get(name) == "" else fields.get(name) for name in names]
        if None not in scores or (names == _PAIR_SCORES[0] and scores != [None, None]):
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
    name = next((name for name in lists if isinstance(record[name], list)), lists[0])
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
    by_rank = {f"rank {rank}": spelled_messages(text) for rank, text in enumerate(responses, start=1)}
    return Content(prompt_of(record, by_rank.values()), by_rank, scores, name)


def _sorted(items: list[Any], scores: Any) -> tuple[list[Any], tuple[float, ...] | None]:
    """Return the responses, best first, and their scores: those inside of them, or `scores`."""
    inside = [_own_score(item) if isinstance(item, Mapping) else None for item in items]
    if any(score is not None for score in inside):
        numbers = _finite(inside)
        if scores is not None and _finite(scores) != numbers:
            raise UnusableRecordError("invalid_scores", "two different scores of a response")
        best_first = sorted(zip(numbers, items, strict=True), key=lambda scored: -scored[0])
        texts = [
            # The whole message if it has tool calls or thoughts.
            {"role": "assistant", **item, "content": text} if has_more(item) else text
            for _, item in best_first
            for text in [_first(item, _TEXTS)]
        ]
        return texts, tuple(number for number, _ in best_first)
    if scores is None:
        return items, None
    numbers = _finite(scores)
    if len(numbers) != len(items) or any(low < high for low, high in itertools.pairwise(numbers)):
        raise UnusableRecordError("invalid_scores", "not one score for each response, best first")
    return items, numbers


def _own_score(response: Fields) -> Any:
    """Return the score inside a response; a rank without a score, 1 for the best, is a negative score."""
    score, rank = _first(response, _SCORES), response.get("rank")
    return -_finite([rank])[0] if score is None and rank is not None else score


def _first(fields: Fields, names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    """Return the values as finite numbers. Raises UnusableRecordError if any is not."""
    given = values if isinstance(values, Iterable) and not isinstance(values, str | Mapping) else ()
    numbers = tuple(math.nan if isinstance(value, bool) else _number(value) for value in given)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UnusableRecordError("invalid_scores", "a score is missing or is no finite number")
    return numbers


def _number(value: Any) -> float:
    """Return a number, perhaps written as text; nan for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


_LABELS = ("label", "kto_tag")


def is_labelled(record: Fields) -> bool:
    """Return whether a record is a single response with a good/bad label, as for KTO."""
    return bool(_labels_of(record)) and not has_pair(record) and not has_ranking(record)


def _labels_of(record: Fields) -> set[float]:
    """Return the different labels of a record: 1 for good, 0 for bad."""
    words = {str(record.get(name)).strip().lower() for name in _LABELS}
    return {float(word in GOOD) for word in words.intersection(GOOD + BAD)}


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
    has_field = any(record.get(name) is not None for name in ("completion", *CONVERSATIONS))
    return has_field or is_response(record, "output")


def completion(record: Fields) -> Content:
    """Return the one response: `completion`, the end of a conversation, `output`, or `chosen`.

    A label, if the record has one, is its score: 1 for good, 0 for bad.
    """
    labels = _labels_of(record) if is_labelled(record) else set[float]()
    if len(labels) > 1:
        raise UnusableRecordError("invalid_scores", "a good and a bad label")
    for name in ("completion", *CONVERSATIONS, "output", "chosen"):
        value = record.get(name)
        if is_response(record, name) and not (name == "output" and isinstance(value, list)):
            return Content(prompt_of(record, [value]), {name: value}, tuple(labels) or None)
    if any(record.get(name) is not None for name in CONVERSATIONS):
        raise UnusableRecordError("not_one_answer", "the messages do not end with the assistant's")
    raise UnusableRecordError("missing_field", "completion or messages")


def labelled(record: Fields) -> Content:
    """Return the one response of a record, with its label as score."""
    if not _labels_of(record):
        known = f"{', '.join(GOOD)} or {', '.join(BAD)}"
        raise UnusableRecordError("invalid_scores", f"{' or '.join(_LABELS)} is none of {known}")
    return completion(record)


def _numbers(record: Fields, responses: int) -> dict[str, float]:
    """Return those of `NUMBERS` that a record has, other than without effect; votes are a soft label."""
    given = {name: record[name] for name in (*NUMBERS, *VOTES) if record.get(name) not in (None, "")}
    read = {name: math.nan if isinstance(given[name], bool) else _number(given[name]) for name in given}
    if votes := [read.pop(name) for name in VOTES if name in read]:
        total = sum(votes)
        if len(votes) < 2 or "soft_label" in read or not 0 <= min(votes) < total < math.inf:
            detail = f"{' and '.join(VOTES)} are no two numbers, not both 0, in place of soft_label"
            raise UnusableRecordError("invalid_numbers", detail)
        read["soft_label"] = votes[0] / total
    for name, value in read.items():
        least, most = (-math.inf if name == "margin" else 0.0), (1.0 if name == "soft_label" else math.inf)
        if not (math.isfinite(value) and least <= value <= most):
            raise UnusableRecordError("invalid_numbers", f"{name} is no number from {least:g} to {most:g}")
    numbers = {name: value for name, value in read.items() if value != NUMBERS[name]}
    if responses != 2 and (of_pairs := numbers.keys() - {"loss_weight"}):
        raise UnusableRecordError("invalid_numbers", f"{min(of_pairs)} of a record that is no pair")
    return numbers


def _exchanged(record: PreferenceRecord) -> PreferenceRecord:
    """Return a pair with its sides exchanged, with the same loss for whatever takes its soft label."""
    opposite = {"soft_label": 1 - record.numbers["soft_label"], "margin": -record.numbers.get("margin", 0.0)}
    responses, scores = record.responses[::-1], record.scores and record.scores[::-1]
    given = {**record.numbers, **opposite}
    numbers = {name: value for name, value in given.items() if value != NUMBERS[name]}
    return replace(record, responses=responses, scores=scores, numbers=numbers, is_exchanged=True)


def _unread_fields(record: Fields, content: Content) -> tuple[str, ...]:
    """Return the names of fields with a value of which nothing was read."""
    of_scores = ("scores",) if content.field else _OF_PAIR_SCORES if len(content.responses) == 2 else _LABELS
    read = _READ.union(content.responses, [content.field], of_scores if content.scores is not None else ())
    names = tuple(name for name in record if name not in read and has_value(record[name]))
    if not isinstance(left_out := record.get(OTHERS), tuple):  # else a column of this name
        return names
    return (*(name for name in names if name != OTHERS), *left_out)


# What a record has beside its responses: system text, history, tools, arguments of the template.
def with_context(
    prompt: Prompt, record: Fields, responses: Collection[str], *, is_plain: bool
) -> tuple[Prompt, tuple[Fields, ...], Fields]:
    """Return the prompt after the record's system text and `history`, its tools and template arguments.

    A text prompt becomes a user's turn if the record has any of them, unless the configured format says that
    it `is_plain`. `responses` are the names of the fields that were read. Raises UnusableRecordError:
    `unread_content` with the names of fields that would be lost, or `invalid_tools`.
    """
    is_dialogue = isinstance(prompt, Dialogue)
    messages = turns_of(prompt, "user")
    unread = [name for name in _UNREAD if has_value(record.get(name))]
    # Also false: it belongs into the arguments of the template.
    unread += ["enable_thinking"] if record.get("enable_thinking") not in (None, "") else []
    weights = [w for w in _UNREAD_WEIGHTS if record.get(w) not in (None, "") and _number(record[w]) != 1]
    given = [name for name in (*TOOLS, _ARGUMENTS) if has_value(record.get(name))]
    turns: list[Message] = []
    if is_plain or is_dialogue:
        unread += [*given, *(name for name in (*_SYSTEMS, "history") if has_value(record.get(name)))]
    else:
        unread += TOOLS[1:] if set(TOOLS) <= set(given) else ()
        unread += _add_turns_before(turns, record, messages)
    # A dialogue is read from the responses alone; a conversation may repeat the prompt or a response.
    conversations = (*CONVERSATIONS, "conversation")
    for name in (*_OF_PROMPT, *(["prompt"] if is_dialogue else []), *conversations):
        is_response = name in conversations and (name in responses or ends_with_response(record.get(name)))
        if not is_response and _is_outside(record.get(name), prompt):
            unread.append(name)
    if unread or weights:
        remedy = f"; of the loss: columns: {{loss_weight: {weights[0]}}}" if weights else ""
        unread = [*unread, *weights]
        raise unread_error(f"fields: {', '.join(unread)}{remedy}", unread)
    sides = [name for name in _TOOLS_OF_SIDES if name in record and has_value(record[name])]
    if not turns and not given and not sides:
        return prompt, (), {}
    tools = next((_tools(record[name]) for name in TOOLS if name in given), ())
    if differing := [name for name in sides if _tools(record[name]) != tools]:
        raise unread_error(f"fields: {', '.join(differing)}, other than tools", differing)
    return (*turns, *messages), tools, _arguments(record)


def _add_turns_before(turns: list[Message], record: Fields, prompt: Messages) -> list[str]:
    """Add the turns of a record's system text and history to `turns`; return the ambiguous fields."""
    unread = []
    for name in _SYSTEMS:
        text, first = record.get(name), [*turns, *prompt][:1]
        if not has_value(text):
            continue
        if isinstance(text, str) and (not first or first[0].role != "system"):
            turns.append(Message("system", text))
        elif not isinstance(text, str) or first[0].content.strip() != text.strip():
            unread.append(name)
    history = from_json(record.get("history"))
    if not has_value(history):
        return unread
    if isinstance(history, list) and all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in history
    ):
        roles = itertools.cycle(("user", "assistant"))
        turns += [Message(role, text) for role, text in zip(roles, itertools.chain(*history), strict=False)]
    elif is_messages(history):
        turns += messages_of(history, role="user")
    else:
        unread.append("history")
    return unread if [turn.role for turn in prompt] == ["user"] else [*dict.fromkeys([*unread, "history"])]


def _tools(value: Any) -> tuple[Fields, ...]:
    """Return definitions of tools, each as `{type: function, function: {name, ...}}` if it has a name."""
    spelled = from_json(without_nulls(value))
    tools = list(map(from_json, spelled)) if isinstance(spelled, list) else [spelled]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name", ""), str):
            raise UnusableRecordError("invalid_tools", "a tool or its name is no JSON of that kind")
    return tuple(
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
        for tool in tools
    )


def _arguments(record: Fields) -> Fields:
    """Return the arguments of the chat template, an object that may be spelled in JSON."""
    value = record.get(_ARGUMENTS)
    arguments = from_json(without_nulls(value)) if has_value(value) else {}
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UnusableRecordError("unread_content", f"{_ARGUMENTS} is not an object", (_ARGUMENTS,))
    return arguments


def _is_outside(value: Any, prompt: Prompt) -> bool:
    """Return whether a field has a value that the prompt does not contain."""
    if not has_value(value):
        return False
    whole = [turn.content for turn in turns_of(prompt, "user")]
    whole += [prompt.text] if isinstance(prompt, Dialogue) else []
    texts = [turn.content for turn in messages_of(value, role="user")] if is_messages(value) else [value]
    return not all(isinstance(text, str) and any(text.strip() in part for part in whole) for text in texts)


def check_content(record: PreferenceRecord) -> None:
    """Check that something can be learned from a record."""
    prompt, *responses = turns_of(record.prompt, "user"), *map(turns_of, record.responses)
    values = [
        [(turn.role, turn.content.strip(), turn.fields) for turn in turns] for turns in (prompt, *responses)
    ]
    try:
        size = len(_json([values, record.tools, record.template_arguments]).encode())
    except UnicodeEncodeError:
        raise UnusableRecordError("invalid_unicode", "a text has a lone surrogate") from None
    if size > MAX_RECORD_BYTES:
        raise UnusableRecordError("unparsable", f"{size:,} bytes, more than {MAX_RECORD_BYTES:,}")
    if not any(map(_has_content, prompt)):
        raise UnusableRecordError("empty_prompt")
    for turns in responses:
        # Something that the loss can count.
        trained = [turn for turn in turns if turn.role == "assistant" and turn.is_trained is not False]
        if not any(map(_has_content, trained)):
            raise UnusableRecordError("empty_response")
    if len(set(map(_json, values[1:]))) < len(responses):
        raise UnusableRecordError("identical_responses")


def _has_content(turn: Message) -> bool:
    return bool(turn.content.strip() or turn.fields)


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


# Text in these fields may spell out messages.
_SPELLED = ("prompt", *QUESTIONS, "context", "completion", *SIDE_NAMES, "response")
# In others a list is written only as such: an `output` can be a text that happens to be JSON.
_SPELLED_LISTS = ("responses", "completions")


def _with_values(record: Fields, name: DataFormat) -> Fields:
    """Return a record with the messages and lists that its texts spell as JSON, as cells of a table do."""
    is_text = name in (DataFormat.text, DataFormat.implicit_prompt, DataFormat.hh)
    lists = LISTS if name is DataFormat.ranked else _SPELLED_LISTS
    read = dict(record)
    nested: dict[str, str] = {}
    for field, value in record.items():
        if field in CONVERSATIONS:
            read[field] = from_json(value)
        elif field in lists and isinstance(listed := from_json(value), list):
            read[field] = listed
        elif field in _SPELLED and not is_text:
            read[field] = spelled = spelled_messages(value)
            if spelled[:1] == "{" if isinstance(spelled, str) else isinstance(spelled, Mapping):
                nested |= nested_conversation(field, spelled)
    if nested:
        columns = ", ".join(f"{field}: {path}" for field, path in nested.items())
        raise UnusableRecordError("unknown_format", f"objects with messages inside: columns: {{{columns}}}")
    return read


# The first that matches is read.
FORMATS: dict[DataFormat, Format] = {
    DataFormat.text: Format(pair, read=read_text),
    DataFormat.messages: Format(pair, read=read_messages),
    DataFormat.hh: Format(pair, read=read_hh),
    DataFormat.implicit_prompt: Format(pair, read=read_implicit),
    # A pair in any of these.
    DataFormat.auto: Format(pair, matches=has_pair),
    DataFormat.ranked: Format(ranking, matches=has_ranking),
    DataFormat.labelled: Format(labelled, matches=is_labelled),
    DataFormat.completion: Format(completion, matches=has_completion),
}
