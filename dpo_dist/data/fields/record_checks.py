"""Check the texts of a record: Unicode, empty prompts and responses, identical responses."""

import itertools
import json
from collections.abc import Iterator, Sequence

from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages, PreferenceRecord, Response

_FEW = {1: ("the completion",), 2: ("chosen", "rejected")}


def check_content(record: PreferenceRecord) -> PreferenceRecord | BadRecord:
    """Return the record, or the reason why nothing can be learned from it.

    The reasons are `invalid_unicode`, `empty_prompt`, `empty_response` and `identical_responses`.
    """
    prompt = record.prompt.contents if isinstance(record.prompt, Dialogue) else record.prompt
    prompt_texts = [prompt] if isinstance(prompt, str) else _texts(prompt)
    texts = [[text] if isinstance(text, str) else _texts(text) for text in record.responses]
    if not _is_valid_unicode("".join(itertools.chain(prompt_texts, *texts, _other_texts(record)))):
        return BadRecord("invalid_unicode", record.origin, "a text has a lone surrogate")
    if not any(text.strip() for text in prompt_texts):
        return BadRecord("empty_prompt", record.origin)
    empty = [
        name
        for name, response in zip(_names(len(record.responses)), record.responses, strict=True)
        if not (response.strip() if isinstance(response, str) else any(map(_has_content, response)))
    ]
    if empty:
        return BadRecord("empty_response", record.origin, f"no text in {', '.join(empty)}")
    if len(set(map(_stripped, record.responses))) < len(record.responses):
        return BadRecord("identical_responses", record.origin)
    return record


def _names(responses: int) -> Sequence[str]:
    """Return the names of the responses of a record, the best first."""
    numbered = [f"response {number} of the ranking" for number in range(1, responses + 1)]
    return _FEW.get(responses, numbered)


def _texts(messages: Messages) -> list[str]:
    """Return the contents of messages, and their other fields as JSON."""
    fields = [
        json.dumps(message.fields, ensure_ascii=False, default=str) for message in messages if message.fields
    ]
    return [message.content for message in messages] + fields


def _other_texts(record: PreferenceRecord) -> Iterator[str]:
    """Yield what a chat template writes besides the texts of turns."""
    if record.tools or record.template_arguments:
        yield json.dumps([record.tools, record.template_arguments], ensure_ascii=False, default=str)
    for turns in (record.prompt, *record.responses):
        if isinstance(turns, tuple):
            yield from (message.role for message in turns)


def _has_content(message: Message) -> bool:
    """Return whether the loss may count anything of a message."""
    return (
        message.role == "assistant"
        and message.is_trained is not False
        and bool(message.content.strip() or message.fields)
    )


def _stripped(response: Response) -> str:
    """Return a text that is equal for responses that differ only in outer white space."""
    if isinstance(response, str):
        return response.strip()
    turns = [(turn.role, turn.content.strip(), turn.fields) for turn in response]
    return json.dumps(turns, ensure_ascii=False, sort_keys=True, default=str)


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
