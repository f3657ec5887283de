"""Context of a record's responses: system text, history, tools; fields that nothing reads."""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from dpo_dist.config.losses import NUMBERS
from dpo_dist.data.read.columns import OTHERS, VOTES
from dpo_dist.data.read.layouts import LABEL_FIELDS, PAIR_SCORE_FIELDS, Content, ends_with_response
from dpo_dist.data.read.messages import (
    CONVERSATIONS,
    IMAGES,
    MEDIA,
    TOOLS,
    is_messages,
    parse_messages,
    unread_error,
)
from dpo_dist.data.read.plain import PROMPTS, TEMPLATE_ARGUMENTS, TOOLS_OF_SIDES, UNREAD_WEIGHTS
from dpo_dist.data.read.values import has_value, to_number
from dpo_dist.data.records import Dialogue, Message, Prompt, UnusableRecordError, turns_of
from dpo_dist.foundation.types import Fields

_SYSTEMS = ("system", "system_prompt")
_SCHEMAS = ("input_schema", "inputSchema")  # of Anthropic and of MCP
# Parts of the question in some datasets, which the prompt must contain. No format adds `context` to it.
_QUESTION_FIELDS = ("instruction", *PROMPTS[1:], "context")
_SIDES = ("chosen", "rejected")
# Fields that a chat template or a model uses, but no format reads: dropping them would change the prompt.
_UNREAD = ("documents", *MEDIA, *(f"{side}_{name}" for side in _SIDES for name in MEDIA))
_IMAGES_OF_SIDES = tuple(f"{side}_{name}" for side in _SIDES for name in IMAGES)
# Each value of these fields is read, or drops its record; `provenance` says how `pairs` made the record.
_READ = {
    "prompt",
    *_QUESTION_FIELDS,
    *CONVERSATIONS,
    "conversation",
    *_SYSTEMS,
    "history",
    TEMPLATE_ARGUMENTS,
}
_READ |= {"enable_thinking", *TOOLS, *TOOLS_OF_SIDES, *_UNREAD, *UNREAD_WEIGHTS, *NUMBERS, *VOTES}
_READ |= {"provenance", *IMAGES, *_IMAGES_OF_SIDES}


def with_context(
    prompt: Prompt, record: Fields, responses: Collection[str], *, is_plain: bool
) -> tuple[Prompt, tuple[Fields, ...], Fields]:
    """Return the prompt after the record's system text and `history`, its tools and template arguments.

    A text prompt becomes a user's turn if the record has such context, unless the prompt `is_plain` by the
    configured format. `responses` are the names of the fields that were read. Raises UnusableRecordError:
    `unread_content` with the names of fields that would be lost, `image_in_response`, or `invalid_tools`.
    """
    if of_sides := tuple(name for name in _IMAGES_OF_SIDES if name in record):
        raise UnusableRecordError("image_in_response", f"fields: {', '.join(of_sides)}", of_sides)
    unread = [name for name in _UNREAD if name in record]
    # Even a false `enable_thinking`: outside of the template's arguments it would be ignored.
    unread += ["enable_thinking"] if record.get("enable_thinking") not in (None, "") else []
    weights = [w for w in UNREAD_WEIGHTS if record.get(w) not in (None, "") and to_number(record[w]) != 1]
    given = [name for name in (*TOOLS, TEMPLATE_ARGUMENTS) if name in record]
    is_dialogue, messages = isinstance(prompt, Dialogue), turns_of(prompt, "user")
    before: list[Message] = []
    if is_plain or is_dialogue:
        unread += [*given, *(name for name in (*_SYSTEMS, "history") if name in record)]
    else:
        unread += TOOLS[1:] if set(TOOLS) <= set(given) else ()
        for name in _SYSTEMS:
            text, first = record.get(name), [*before, *messages][:1]
            if isinstance(text, str) and (not first or first[0].role != "system"):
                before.append(Message("system", text))
            elif name in record and (not isinstance(text, str) or first[0].content.strip() != text.strip()):
                unread.append(name)
        history = record.get("history")
        if has_value(history):
            turns = _history(history)
            before += turns or ()
            if turns is None or [turn.role for turn in messages] != ["user"]:
                unread.append("history")
    # A dialogue is read from the responses alone; a conversation may repeat the prompt or a response.
    conversations = (*CONVERSATIONS, "conversation")
    for name in (*_QUESTION_FIELDS, *(["prompt"] if is_dialogue else []), *conversations):
        is_response = name in conversations and (name in responses or ends_with_response(record.get(name)))
        if name in record and not is_response and _is_outside(record[name], prompt):
            unread.append(name)
    if unread or weights:
        remedy = f"; of the loss: columns: {{loss_weight: {weights[0]}}}" if weights else ""
        unread = [*unread, *weights]
        raise unread_error(f"fields: {', '.join(unread)}{remedy}", unread)
    sides = [name for name in TOOLS_OF_SIDES if name in record]
    if not before and not given and not sides:
        return prompt, (), {}
    tools = next((_tools(record[name]) for name in TOOLS if name in given), ())
    if differing := [name for name in sides if _tools(record[name]) != tools]:
        raise unread_error(f"fields: {', '.join(differing)}, other than tools", differing)
    arguments = record.get(TEMPLATE_ARGUMENTS, {})
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UnusableRecordError(
            "unread_content", f"{TEMPLATE_ARGUMENTS} is not an object", (TEMPLATE_ARGUMENTS,)
        )
    return (*before, *messages), tools, arguments


def _history(history: Any) -> list[Message] | None:
    """Return the turns before a question: pairs of a question and its answer, or messages; None: neither."""
    if isinstance(history, list) and all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in history
    ):
        roles = itertools.cycle(("user", "assistant"))
        return [Message(role, text) for role, text in zip(roles, itertools.chain(*history), strict=False)]
    return list(parse_messages(history, role="user")) if is_messages(history) else None


def _tools(value: Any) -> tuple[Fields, ...]:
    """Return definitions of tools, each as `{type: function, function: {name, ...}}` if it has a name."""
    read: list[Fields] = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name", ""), str):
            raise UnusableRecordError("invalid_tools", "a tool or its name is no JSON of that kind")
        # The schema of the arguments is in `parameters`.
        schema = next((name for name in _SCHEMAS if has_value(function.get(name))), None)
        if schema is not None and not has_value(function.get("parameters")):
            names = {name: "parameters" if name == schema else name for name in function}
            function = {names[name]: function[name] for name in function if name != "parameters"}
        if "function" in tool:
            read.append({**tool, "function": function})
        else:
            read.append({"type": "function", "function": function} if "name" in tool else tool)
    return tuple(read)


def _is_outside(value: Any, prompt: Prompt) -> bool:
    """Return whether a field has a value that is not part of the prompt."""
    if not has_value(value):
        return False
    whole = [turn.content for turn in turns_of(prompt, "user")]
    whole += [prompt.text] if isinstance(prompt, Dialogue) else []
    texts = [turn.content for turn in parse_messages(value, role="user")] if is_messages(value) else [value]
    return not all(isinstance(text, str) and any(text.strip() in part for part in whole) for text in texts)


def unread_fields(record: Fields, content: Content) -> tuple[str, ...]:
    """Return the names of fields with a value that nothing reads."""
    scores: tuple[str, ...] = ()
    if content.scores is not None and content.field:
        scores = ("scores",)
    elif content.scores is not None:
        scores = PAIR_SCORE_FIELDS if len(content.responses) == 2 else LABEL_FIELDS
    read = _READ.union(content.responses, [content.field], scores)
    names = tuple(name for name in record if name not in read and has_value(record[name]))
    if not isinstance(left_out := record.get(OTHERS), tuple):  # else a column of this name
        return names
    return (*(name for name in names if name != OTHERS), *left_out)
