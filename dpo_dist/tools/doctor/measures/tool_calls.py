"""Find calls that do not fit the tools that their record defines."""

import json
import re
from collections.abc import Iterator, Mapping

from dpo_dist.data.read.values import from_json
from dpo_dist.data.records import Message, PreferenceRecord, Response, turns_of
from dpo_dist.foundation.types import Fields

# A call that is a part of the text, as the templates of Hermes and Qwen write it.
_WRITTEN = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def calls_in(response: Response) -> list[Fields]:
    """Return the `name` and `arguments` of each call in the assistant's turns."""
    calls: list[Fields] = []
    for message in turns_of(response):
        if message.role == "assistant":
            calls += (call["function"] for call in message.fields.get("tool_calls", ()))
            written = map(from_json, _WRITTEN.findall(message.content))
            calls += (call for call in written if isinstance(call, Mapping) and "name" in call)
    return calls


def call_faults(record: PreferenceRecord) -> Iterator[str]:
    """Yield `undefined_tool` and `missing_argument` if the prompt or the best response has such a call.

    A rejected response may have been rejected for its call. In a record that defines no tools, a call may
    name a function that is in the prompt's text.
    """
    prompt = turns_of(record.prompt, "user")
    calls = calls_in((*prompt, *taught_turns(record)))
    functions = [tool.get("function", tool) for tool in record.tools]
    defined = {function["name"]: function for function in functions if "name" in function}
    others = [turn.content for turn in prompt if turn.role != "assistant"] if not defined else []
    others += [json.dumps(function, default=str) for function in functions if "name" not in function]
    for call in calls:
        function = defined.get(call["name"])
        if function is None:
            if not any(str(call["name"]) in text for text in others):
                yield "undefined_tool"
            continue
        parameters, given = function.get("parameters"), call.get("arguments")
        required = parameters.get("required") if isinstance(parameters, Mapping) else None
        if isinstance(required, list) and set(map(str, required)) - set(given or ()):
            yield "missing_argument"


def taught_turns(record: PreferenceRecord) -> tuple[Message, ...]:
    """Return the turns of the response that becomes likelier; none of a bad labelled response."""
    return () if record.labelled_side == "rejected" else turns_of(record.responses[0])
