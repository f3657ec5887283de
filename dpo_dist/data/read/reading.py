"""From a record to a preference, by what its source declares: a prompt, and its responses best first."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any

from dpo_dist.data.read.expressions import expression
from dpo_dist.data.read.images import place_images
from dpo_dist.data.read.messages import (
    OF_KEYS,
    PLACED,
    MessageKeys,
    given_images,
    is_messages,
    parse_messages,
    read_history,
    read_messages,
    read_tools,
    spelled_as,
)
from dpo_dist.data.read.plain import NUMBERS, finite_numbers, is_given, record_numbers, without_nulls
from dpo_dist.data.records import (
    FIRST_TURN,
    IMAGE,
    LAST_TURN,
    MAX_TEXT_BYTES,
    NOT_KEPT,
    RESERVED_CHARACTER,
    SCORERS,
    BadRecord,
    Dialogue,
    Message,
    Messages,
    Origin,
    PreferenceRecord,
    Prompt,
    Record,
    Response,
    UnusableRecordError,
    shown_key,
    turns_of,
)
from dpo_dist.foundation.types import Fields

CONTEXT = {"system", "history", "tools", "template_arguments"}
"""Fields of chats: a source that declares one has turns as prompts, also in records without a value."""
RESPONSE_FIELDS = {
    ("pair",): {"scores"},
    ("chosen", "rejected"): {"scores"},
    ("responses",): {"scores", "ranks", "best_first"},
    ("completion",): {"label"},
}
"""How responses are declared: [chosen, rejected], both by name, a list, or one; what may tell their worth."""
FIELDS = (
    *(
        "prompt",
        "system",
        "history",
        "tools",
        "template_arguments",
        "chosen",
        "rejected",
        "pair",
        "responses",
        "scores",
        "ranks",
        "best_first",
    ),
    *("completion", "label", "images", *NUMBERS, "keep"),
    *(f"{scorer}_prompt" for scorer in SCORERS),
)
FORMS = ("", "text", "dialogue", "implicit")
"""How texts are read: by what they are, always as texts, as dialogues (HH-RLHF), without a prompt (TRL)."""
TURN = "|turn"
_LONGEST_VERDICT = 40
_LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}


@dataclass(frozen=True)
class Reading:
    """How the records of a source are read.

    `fields`: an expression for each. `form`: one of `FORMS`. `when`: an expression, true of each record.
    `ignored`: columns, or `*` for all others. `is_chat`: whether every prompt is turns; None: not known yet.
    `notes`: columns that are not read, in words. `reserved`: what the `bare_name` of none of these may be.
    """

    fields: Mapping[str, str]
    form: str = ""
    when: str = "true"
    ignored: frozenset[str] = frozenset()
    keys: MessageKeys = field(default_factory=MessageKeys)
    shape: str = ""
    is_chat: bool | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns that are read."""
        return frozenset().union(*(expression(text).columns for text in (self.when, *self.fields.values())))

    @cached_property
    def keys_of_items(self) -> Mapping[str, frozenset[str]]:
        """The columns with lists of which only some keys of their items are read, and these keys."""
        read = dict[str, frozenset[str]]()
        for text in self.fields.values():
            for column, key in expression(text).keys:
                if column not in self.fields.values():
                    read[column] = read.get(column, frozenset()) | {key}
        return read

    def unread(self, record: Fields) -> list[str]:
        """Return the columns of a record that have a value, and are neither read nor ignored.

        Of lists of which only some keys are read, these are the other keys: COLUMN[].KEY.
        """
        if "*" in self.ignored:
            return []
        unread = [name for name in _without(tuple(record), self.columns) if is_given(record[name])]
        for column, keys in self.keys_of_items.items():
            items = record.get(column)
            for item in items if isinstance(items, list) else ():
                if isinstance(item, Mapping):
                    others = [key for key in _without(tuple(item), keys) if is_given(item[key])]
                    unread += [f"{column}{OF_KEYS}{key}" for key in others]
        return [name for name in dict.fromkeys(unread) if name not in self.ignored]


@lru_cache(maxsize=256)
def _without(names: tuple[str, ...], known: frozenset[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in known)


@lru_cache(maxsize=1024)
def bare_name(name: str) -> str:
    """Return a name without what people write in several ways: its case, separators, and a plural's s."""
    return re.sub(r"[\W_]+", "", str(name).rpartition(OF_KEYS)[2]).casefold().removesuffix("s")


def _named_by(side: Any, columns: Sequence[str]) -> list[str]:
    """Return the columns of which a side may be the name: a verdict, where an answer is meant.

    It is the whole name; or the end, or one character, in which it differs from the name of another column.
    """
    word = bare_name(side) if isinstance(side, str) and len(side) <= _LONGEST_VERDICT else ""
    if not word:
        return []
    stems = Counter(bare_name(name)[: -len(word)] for name in columns)
    named = list[str]()
    for name in columns:
        bare = bare_name(name)
        stem = bare[: -len(word)]
        is_end = stem and stems[stem] > 1 and (bare.endswith(word) or len(word) == 1)
        if bare == word or is_end:
            named.append(name)
    return named


def parse_record(record: Fields, reading: Reading, origin: Origin) -> Record:
    """Return the preference in a record. Details of a bad record never quote its texts."""
    try:
        return _preference(record, reading, origin)
    except UnusableRecordError as fault:
        return fault.as_bad_record(origin)
    except RecursionError:
        return BadRecord("unparsable", origin, "nested too deeply")


def parse_prompt(record: Fields, reading: Reading, origin: Origin) -> Record:
    """Return a record, without responses if it has none that can be used."""
    parsed = parse_record(record, reading, origin)
    if not isinstance(parsed, BadRecord) or "prompt" not in reading.fields:
        return parsed
    of_prompts = ("prompt", *CONTEXT, "images", "keep", *(f"{scorer}_prompt" for scorer in SCORERS))
    fields = {name: text for name, text in reading.fields.items() if name in of_prompts}
    others = frozenset("*")  # the responses
    asked = replace(reading, fields=fields | {"completion": "'response'"}, ignored=others)
    parsed = parse_record(record, asked, origin)
    return parsed if isinstance(parsed, BadRecord) else replace(parsed, responses=(), scores=None)


def _preference(record: Fields, reading: Reading, origin: Origin) -> PreferenceRecord:
    # Whether it is read. A record that is left out may lack a value that others have.
    fields = dict(reading.fields)
    kept = expression(fields.pop("keep", "true"))(record)
    if not isinstance(kept, bool):
        raise UnusableRecordError("expression_failed", "keep is neither true nor false")
    if not kept:
        raise UnusableRecordError(NOT_KEPT)
    if expression(reading.when)(record) is not True:
        raise UnusableRecordError("other_shape", f"not {reading.shape}: {reading.when}")
    values = {name: expression(text)(record, is_strict=True) for name, text in fields.items()}
    unread = reading.unread(record)
    # The prompt and the responses.
    responses, scores = _responses(values)
    # A side that an expression looks up is an answer.
    columns = [side for name, side in responses.items() if fields.get(name) in record]
    named = {name for side in columns for name in _named_by(side, unread)}
    suspects = tuple(name for name in unread if name in named or bare_name(name) in reading.reserved)
    if suspects:
        raise UnusableRecordError("unread_column", ", ".join(map(shown_key, suspects)), suspects)
    asked = values.get("prompt")
    text = asked
    if fields.get("prompt", "").endswith(TURN) and isinstance(asked, list):
        text = next((turn.get("content") for turn in asked if isinstance(turn, Mapping)), None)
    _check_texts({"prompt": text, **responses}, reading)
    prompt, texts = _read(asked, responses, reading)
    if reading.is_chat or (reading.is_chat is None and any(name in values for name in CONTEXT)):
        prompt = (*_before(values, turns_of(prompt, "user"), reading.keys), *turns_of(prompt, "user"))
    elif reading.is_chat is False and not isinstance(prompt, str | Dialogue):
        raise UnusableRecordError("other_shape", "messages, where the first records have texts")
    # What stands beside them.
    images = given_images(values.get("images"))
    prompt, files = place_images(prompt, texts, images, origin.folders, is_plain=bool(reading.form))
    arguments = values.get("template_arguments") or {}
    if not isinstance(arguments, Mapping):
        raise UnusableRecordError(
            "unread_content", "template_arguments is no object", ("template_arguments",)
        )
    numbers = record_numbers(values, len(texts))
    result = PreferenceRecord(
        prompt,
        tuple(texts),
        origin,
        scores=scores,
        tools=read_tools(values["tools"]) if is_given(values.get("tools")) else (),
        template_arguments=without_nulls(arguments),
        numbers=numbers,
        unread=tuple(reading.notes.get(name, shown_key(name)) for name in unread),
        images=files,
        scorer_prompts=_scorer_prompts(values, prompt, files, reading.keys),
    )
    check_content(result)
    return _exchanged(result) if numbers.get("soft_label", 1.0) < 0.5 else result


def _scorer_prompts(
    values: Fields, prompt: Prompt, images: Sequence[Any], keys: MessageKeys
) -> dict[str, Prompt]:
    """Return what scorers read in place of the prompt, each in its form: a text, or messages."""
    prompts = dict[str, Prompt]()
    for scorer in SCORERS:
        name = f"{scorer}_prompt"
        value = values.get(name)
        if not is_given(value):
            continue
        if images or isinstance(prompt, Dialogue):
            what = "images" if images else "Human and Assistant turns"
            raise UnusableRecordError("scorer_prompt_differs", f"{name} beside a prompt with {what}")
        if isinstance(prompt, str):
            if not isinstance(value, str):
                raise UnusableRecordError("scorer_prompt_differs", f"{name} is no text, as the prompt is")
            prompts[scorer] = value
            continue
        turns = parse_messages(value, "user", keys)
        if not turns or any(PLACED in turn.fields for turn in turns):
            raise UnusableRecordError("scorer_prompt_differs", f"{name} has an image, or no message")
        prompts[scorer] = turns
    return prompts


def _responses(values: Fields) -> tuple[dict[str, Any], tuple[float, ...] | None]:
    """Return the responses, best first, by names for errors, and their scores."""
    scores: tuple[float, ...] | None = None
    if "responses" in values:
        return _ranking(values)
    if "completion" in values:
        responses = {"completion": values["completion"]}
        if "label" in values:
            word = str(values["label"]).strip().lower()
            if word not in _LABELS:
                raise UnusableRecordError("unknown_label", shown_key(values["label"]))
            scores = (_LABELS[word],)
    else:
        sides = values["pair"] if "pair" in values else [values.get("chosen"), values.get("rejected")]
        if not isinstance(sides, list) or len(sides) != 2:
            raise UnusableRecordError(
                "missing_field", "pair is not a list of the chosen and the rejected side"
            )
        responses = dict(zip(("chosen", "rejected"), sides, strict=True))
        of_sides = values.get("scores")
        if of_sides is not None and not (isinstance(of_sides, list) and len(of_sides) == 2):
            raise UnusableRecordError("invalid_scores", "scores are not a list of two")
        if any(map(is_given, of_sides or ())):
            scores = finite_numbers(of_sides)
    missing = [name for name, response in responses.items() if response is None]
    if missing:
        raise UnusableRecordError("missing_field", ", ".join(missing))
    return responses, scores


def _ranking(values: Fields) -> tuple[dict[str, Any], tuple[float, ...] | None]:
    items = values["responses"]
    if not isinstance(items, list):
        raise UnusableRecordError("unknown_format", "responses is not a list")
    if len(items) < 2:
        raise UnusableRecordError("no_ranking", f"responses has {len(items)}, not at least 2")
    if None in items:
        raise UnusableRecordError("missing_field", "a response in responses")
    scores: tuple[float, ...] | None = None
    if "best_first" not in values:
        sign = -1 if "ranks" in values else 1
        numbers = [sign * number for number in finite_numbers(values.get("scores", values.get("ranks")))]
        if len(numbers) != len(items):
            raise UnusableRecordError("invalid_scores", f"{len(numbers)} scores of {len(items)} responses")
        order = sorted(range(len(items)), key=lambda index: -numbers[index])
        items = [items[index] for index in order]
        scores = tuple(numbers[index] for index in order)
        if scores[0] == scores[-1]:
            raise UnusableRecordError("all_tied", f"all scores are {scores[0]:g}")
    return {f"rank {rank}": item for rank, item in enumerate(items, start=1)}, scores


def _check_texts(texts: Fields, reading: Reading) -> None:
    """Check that texts are texts, and not messages in JSON, or the name of a column."""
    for name, value in texts.items():
        if isinstance(value, str) and name != "prompt" and value in reading.columns:
            detail = f"{name} is the name of a column, {shown_key(value)}, not a text"
            raise UnusableRecordError("expression_failed", detail)
        if reading.form != "text" and spelled_as(value):
            raise UnusableRecordError("spelled_messages", name)


def _read(prompt: Any, responses: Fields, reading: Reading) -> tuple[Prompt, Sequence[Response]]:
    """Return prompt and responses as texts or messages, in the form that the source has."""
    is_chat = is_messages(prompt) or all(map(is_messages, responses.values()))
    if is_chat and not reading.form:
        return read_messages(prompt, responses, reading.keys)
    texts = {**({"prompt": prompt} if reading.form != "implicit" else {}), **responses}
    others = [name for name, text in texts.items() if not isinstance(text, str)]
    if reading.form == "dialogue":
        return _read_dialogue(prompt, responses)
    if others:
        raise UnusableRecordError("unknown_format", f"{', '.join(others)}: neither texts nor messages")
    return (
        _read_implicit([*responses.values()])
        if reading.form == "implicit"
        else (prompt, [*responses.values()])
    )


def _read_implicit(texts: list[str]) -> tuple[Prompt, Sequence[Response]]:
    """Split texts at their first difference: the prompt is the start that they share, as in TRL."""
    # A response is at least a space and one character.
    shared = os.path.commonprefix(texts)  # noqa: RUF071  (of characters)
    end = min(len(shared), min(map(len, texts)) - 1)
    end = max(end - (texts[0][max(end - 1, 0) : end] == " "), 0)
    return texts[0][:end], [text[end:] for text in texts]


def _read_dialogue(prompt: Any, responses: Fields) -> tuple[Prompt, Sequence[Response]]:
    """Split dialogues before their last response; the prompt is the part they share (arXiv:2204.05862)."""
    histories, texts = [], []
    for name, side in responses.items():
        dialogue = side if isinstance(side, str) else ""
        if not dialogue.lstrip().startswith(FIRST_TURN.strip()):
            dialogue = f"{prompt or ''}{dialogue}"
        dialogue = "\n\n" + dialogue.lstrip()
        if not dialogue.startswith(FIRST_TURN):
            raise UnusableRecordError("unknown_format", f"{name} does not start with a Human turn")
        history, turn, text = dialogue.rpartition(LAST_TURN)
        if not turn or FIRST_TURN in text:
            raise UnusableRecordError("not_one_answer", f"{name} does not end with an Assistant turn")
        histories.append(history + turn)
        texts.append(text)
    if len(set(histories)) > 1:
        raise UnusableRecordError("history_differs", "the dialogues differ before their last response")
    return Dialogue(histories[0]), texts


def _before(values: Fields, turns: Messages, keys: MessageKeys) -> list[Message]:
    """Return the turns before a prompt's own: the system text and the history."""
    before: list[Message] = []
    system = values.get("system")
    if is_given(system):
        has_own = bool(turns) and turns[0].role == "system"
        if not isinstance(system, str) or (has_own and turns[0].content.strip() != system.strip()):
            raise UnusableRecordError("unread_content", "system is no text, or a second one", ("system",))
        before += [] if has_own else [Message("system", system)]
    if is_given(values.get("history")):
        if [turn.role for turn in turns] != ["user"]:
            raise UnusableRecordError("unread_content", "a history before a conversation", ("history",))
        before += read_history(values["history"], keys)
    return before


def _exchanged(record: PreferenceRecord) -> PreferenceRecord:
    """Return a pair with its sides exchanged, its soft label and its margin too: the loss stays the same."""
    numbers = dict(record.numbers)
    numbers["soft_label"] = 1 - record.numbers["soft_label"]
    numbers["margin"] = -record.numbers.get("margin", 0.0)
    return replace(
        record,
        responses=record.responses[::-1],
        scores=record.scores and record.scores[::-1],
        numbers={name: value for name, value in numbers.items() if value != NUMBERS[name]},
        is_exchanged=True,
    )


def check_content(record: PreferenceRecord) -> None:
    """Check that a record has a prompt and different responses that the loss can count."""
    prompt = turns_of(record.prompt, "user")
    responses = [*map(turns_of, record.responses)]
    values = [*map(_values, (prompt, *responses))]
    of_scorers = [_values(turns_of(other, "user")) for other in record.scorer_prompts.values()]
    try:
        texts = [values, record.tools, record.template_arguments, of_scorers]
        plain = json.dumps(texts, ensure_ascii=False, default=str)
        size = len(plain.encode())
    except UnicodeEncodeError:
        raise UnusableRecordError("invalid_unicode", "a text has a lone surrogate") from None
    if size > MAX_TEXT_BYTES:
        raise UnusableRecordError("unparsable", f"{size:,} bytes of texts, more than {MAX_TEXT_BYTES:,}")
    if plain.count(IMAGE) != len(record.images) or RESERVED_CHARACTER in plain:
        raise UnusableRecordError("reserved_character", "a text has the noncharacter U+FDD0 or U+FDD1")
    if not any(map(_has_content, prompt)):
        raise UnusableRecordError("empty_prompt")
    for turns in responses:
        # The loss must count at least one turn with content.
        answers = [turn for turn in turns if turn.role == "assistant"]
        if not any(_has_content(turn) for turn in answers if turn.is_trained is not False):
            raise UnusableRecordError("empty_response")
    if any(one == other for one, other in combinations(values[1:], 2)):
        raise UnusableRecordError("identical_responses")


def _values(turns: Messages) -> list[tuple[str, str, Fields]]:
    return [(turn.role, turn.content.strip(), turn.fields) for turn in turns]


def _has_content(turn: Message) -> bool:
    return bool(turn.content.strip() or turn.fields)
