"""Make a record plain, once, before anything reads it: JSON in texts, objects in the prompt, empty fields."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.config.losses import NUMBERS
from dpo_dist.data.read.columns import OTHERS, VOTES
from dpo_dist.data.read.layouts import LABEL_FIELDS, LISTS, PAIR_SCORE_FIELDS, QUESTIONS, SIDE_NAMES
from dpo_dist.data.read.messages import CONVERSATIONS, TOOLS, is_messages, spelled_messages
from dpo_dist.data.read.values import from_json, has_value, may_be_json, without_nulls
from dpo_dist.data.records import UnusableRecordError, shown_key
from dpo_dist.foundation.types import Fields

PROMPTS = ("prompt", *QUESTIONS)
TOOLS_OF_SIDES = ("chosen_tools", "rejected_tools")
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
# Perhaps a record's weight in the loss: a value other than 1 would be ignored.
UNREAD_WEIGHTS = ("weight", "sample_weight")

_JSON = frozenset((*CONVERSATIONS, "history", "metadata", "scores"))
# A table writes null for each field that another record's tool or argument has.
_WITH_NULLS = frozenset((*TOOLS, *TOOLS_OF_SIDES, TEMPLATE_ARGUMENTS))
# A text here may be messages in JSON.
_TEXTS = frozenset((*PROMPTS, "context", "completion", *SIDE_NAMES, "response"))
# Fields that decide, also without a value, what a record is: an empty response is not an absent one.
_KEPT = _TEXTS - {"context"} | {"instruction", *CONVERSATIONS, *LISTS, *LABEL_FIELDS, *NUMBERS, *VOTES}
_KEPT |= {"scores", *PAIR_SCORE_FIELDS[:-1], *UNREAD_WEIGHTS, "enable_thinking", OTHERS}


def plain_record(given: Fields, *, has_texts: bool, is_ranking: bool) -> Fields:
    """Return a record with the values that its texts hold as JSON, and without other fields that are empty.

    `has_texts`: by its configured format prompt and responses are texts, whatever they look like.
    `is_ranking`: by this format `output` has a list of responses; else it may be a text that is JSON, too.
    """
    record: dict[str, Any] = {}
    columns: dict[str, str] = {}
    for name, as_given in (given if has_texts else _with_prompt_outside(given)).items():
        if name not in _KEPT and not has_value(as_given):
            continue
        value = as_given
        if name in _WITH_NULLS:
            value = from_json(without_nulls(as_given))
            value = list(map(from_json, value)) if isinstance(value, list) else value
        elif name in _JSON:
            value = from_json(as_given)
        elif name in LISTS and (is_ranking or name != "output") and may_be_json(as_given):
            listed = from_json(as_given)
            value = listed if isinstance(listed, list) else as_given
        elif name in _TEXTS and not has_texts:
            value = spelled_messages(as_given) if may_be_json(as_given) else as_given
            is_object = value[:1] == "{" if isinstance(value, str) else isinstance(value, Mapping)
            if is_object and name not in PROMPTS:
                columns |= _nested_conversation(name, value)
        record[name] = value
    if columns:
        raise UnusableRecordError("unknown_format", "objects with messages inside", columns=columns)
    return record


def _with_prompt_outside(record: Fields) -> Fields:
    """Return a record with the fields of a prompt that is an object of messages, tools and others.

    So OpenAI writes preferences: {input: {messages, tools}, preferred_output, non_preferred_output}.
    """
    for field in PROMPTS:
        paths = _nested_conversation(field, record.get(field))
        if not paths:
            continue
        inner, outer = from_json(record[field]), {name: record[name] for name in record if name != field}
        messages = paths[field].rpartition(".")[2]
        inner = {"prompt" if name == messages else name: inner[name] for name in inner}
        if twice := [name for name in inner if has_value(outer.get(name)) and has_value(inner[name])]:
            raise UnusableRecordError(
                "ambiguous_format", f"also in {field}: {', '.join(map(shown_key, twice))}"
            )
        return outer | {name: value for name, value in inner.items() if has_value(value)}
    return record


def _nested_conversation(field: str, value: Any) -> dict[str, str]:
    """Return the paths of messages and tools inside a field, if it holds an object, perhaps as JSON."""
    whole = from_json(value)
    if not isinstance(whole, Mapping):
        return {}
    given = [name for name in CONVERSATIONS if (turns := from_json(whole.get(name))) and is_messages(turns)]
    columns = {field: f"{field}.{given[0]}"} if given else {}
    return columns | {name: f"{field}.{name}" for name in TOOLS if given and has_value(whole.get(name))}
