"""ShareGPT's turns, `from` and `value`: order of the roles, and other names (LLaMA-Factory's tags)."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.data.records import Fields, UnusableRecordError, shown_key

# Names of the fields of a message, and of its roles.
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ASKING = ("human", "user", "observation", "tool", "tool_response")
_ANSWERING = ("gpt", "assistant", "chatgpt", "function_call", "tool_call")
_RESULTS = ("observation", "tool", "tool_response")
_EXCHANGES = ("conversation", "conversations")
_EXCHANGE = ({"human", "user", "tool"}, {"assistant", "gpt", "bot"})


def with_turns(record: Fields) -> Fields:
    """Return a record whose `conversation` is a list of `{human, assistant}` with the turns in `messages`.

    Any other record is unchanged.
    """
    name = next((name for name in _EXCHANGES if _is_exchanges(record.get(name))), None)
    if name is None or record.get("messages") is not None:
        return record
    turns = [
        {"role": role, "content": exchange[role]}
        for exchange in record[name]
        for side in _EXCHANGE
        for role in side.intersection(exchange)
        if exchange[role] is not None
    ]
    return {**{other: record[other] for other in record if other != name}, "messages": turns}


def _is_exchanges(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_exchange, value))


def _is_exchange(value: Any) -> bool:
    """Return whether a value is an object of one question, or tool result, and one response."""
    return (
        isinstance(value, Mapping)
        and value.keys() <= set.union(*_EXCHANGE)
        and all(len(side.intersection(value)) == 1 for side in _EXCHANGE)
    )


def check_turns(messages: Sequence[Fields]) -> None:
    """Check that turns alternate: after a system text, questions or tool results, and responses or calls.

    Raises:
        UnusableRecordError: `roles_out_of_turn`.
    """
    roles = [message.get("from") for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    for index, role in enumerate(roles):
        if role not in _ASKING and role not in _ANSWERING:
            raise UnusableRecordError("roles_out_of_turn", f"turn {index + 1} is from {shown_key(role)}")
        before = roles[index - 1] if index else None
        results = role in _RESULTS and before in _RESULTS
        if before is not None and (role in _ASKING) == (before in _ASKING) and not results:
            raise UnusableRecordError("roles_out_of_turn", f"turn {index + 1} follows one of the same side")


def role_tag(tags: Mapping[str, str]) -> str:
    """Return the name of the field with the role of a turn."""
    return {**TAGS, **tags}["role_tag"]


def has_role_tag(value: Any, tags: Mapping[str, str]) -> bool:
    """Return whether a value is a turn of these tags, or a list with one."""
    if isinstance(value, list):
        return any(has_role_tag(item, tags) for item in value)
    return isinstance(value, Mapping) and role_tag(tags) in value


def with_usual_tags(value: Any, tags: Mapping[str, str]) -> Any:
    """Return messages whose fields and roles have other names by their usual names; other values unchanged.

    Args:
        value: a message, a list of messages, or anything else.
        tags: name of each tag of `TAGS` that is not usual.
    """
    if isinstance(value, list):
        return [with_usual_tags(item, tags) for item in value]
    names = {**TAGS, **tags}
    role, content = names["role_tag"], names["content_tag"]
    if not has_role_tag(value, tags):
        return value
    usual = {names[tag]: name for tag, name in TAGS.items() if tag not in ("role_tag", "content_tag")}
    rest = {name: item for name, item in value.items() if name not in (role, content)}
    given = value[role]
    return rest | {
        "from": usual.get(given, given) if isinstance(given, str) else given,
        "value": value.get(content),
    }
