"""Parts of a record as values for JSON: tools write them into files of pairs and questions to judges."""

from collections.abc import Sequence
from typing import Any

from dpo_dist.data import IMAGE, Dialogue, Message, PreferenceRecord, Prompt, Response, turns_of
from dpo_dist.data.records import parts_of


def as_fields(prompt: Prompt, responses: Sequence[Response]) -> list[Any]:
    """Return a prompt and responses as values for JSON; a dialogue is None: the responses contain it.

    A content with images is in parts.
    """
    if isinstance(prompt, Dialogue):
        return [None, *(f"{prompt.text}{response}" for response in responses)]
    if isinstance(prompt, str):
        return [prompt, *map(str, responses)]
    return [[*map(_turn_fields, turns)] for turns in (prompt, *map(turns_of, responses))]


def _turn_fields(turn: Message) -> dict[str, Any]:
    content = parts_of(turn.content) if IMAGE in turn.content else turn.content
    fields = {"role": turn.role, "content": content, **turn.fields}
    if turn.is_trained is not None:
        fields["loss_weight"] = int(turn.is_trained)
    return fields


def scorer_fields(record: PreferenceRecord) -> dict[str, Any]:
    """Return what a reference and a teacher read in place of the prompt."""
    return {f"{scorer}_prompt": as_fields(prompt, ())[0] for scorer, prompt in record.scorer_prompts.items()}


def context_fields(record: PreferenceRecord) -> dict[str, Any]:
    """Return tools and template arguments, if the record has any."""
    fields: dict[str, Any] = {}
    if record.tools:
        fields["tools"] = list(map(dict, record.tools))
    if record.template_arguments:
        fields["chat_template_kwargs"] = dict(record.template_arguments)
    return fields
