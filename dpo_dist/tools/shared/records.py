"""Records that tools read: the usable ones of each source, and a record as values for JSON."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.counts import DataCounts, check_counts, describe_dropped
from dpo_dist.data.records import BadRecord, Dialogue, PreferenceRecord, Prompt, Response, turns_of
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.text import counted

Read: TypeAlias = Callable[[SourceConfig], Iterator[PreferenceRecord | BadRecord]]
"""`read_records` or `read_prompts`."""


def good_records(
    records: Iterator[PreferenceRecord | BadRecord],
    source: SourceConfig,
    data: DataConfig,
    say: Callable[[str], None],
    enough: Callable[[], bool] = lambda: False,
    *,
    of_first: bool = False,
) -> Iterator[PreferenceRecord]:
    """Yield the usable records of a source until there are `enough`; then print the counts.

    `of_first`: they are the first records of more.
    """
    counts = DataCounts()
    while not enough() and (record := next(records, None)) is not None:
        counts.add(record)
        if isinstance(record, PreferenceRecord):
            yield record
    check_counts(counts, source.path, data, of_first=of_first)
    say(f"{source.path}: {counts.kept:,} of {counted(counts.read, 'record')} kept")
    for line in describe_dropped(counts.dropped):
        say(line)


def as_fields(prompt: Prompt, responses: Sequence[Response]) -> list[Any]:
    """Return a prompt and responses as values for JSON; a dialogue, part of the responses, is None."""
    if isinstance(prompt, Dialogue):
        return [None, *(f"{prompt.text}{response}" for response in responses)]
    if isinstance(prompt, str):
        return [prompt, *map(str, responses)]
    return [
        [
            {"role": turn.role, "content": turn.content, **turn.fields}
            | ({} if turn.is_trained is None else {"loss_weight": int(turn.is_trained)})
            for turn in turns
        ]
        for turns in (prompt, *map(turns_of, responses))
    ]


def context_fields(record: PreferenceRecord) -> dict[str, Any]:
    """Return tools and template arguments of a record, if it has any."""
    tools, arguments = [dict(tool) for tool in record.tools], dict(record.template_arguments)
    fields = {"tools": tools, "chat_template_kwargs": arguments}
    return {name: value for name, value in fields.items() if value}


def prompt_key(record: PreferenceRecord) -> str:
    """Return 32 hex digits over the prompt, its tools and template arguments: the same for equal prompts."""
    prompt: Any = record.prompt
    if isinstance(prompt, Dialogue):
        prompt = {"dialogue": prompt.text}
    elif not isinstance(prompt, str):
        prompt = [[turn.role, turn.content, dict(turn.fields)] for turn in prompt]
    content = {"prompt": prompt, "tools": list(record.tools), "arguments": dict(record.template_arguments)}
    return text_digest(json.dumps(content, sort_keys=True))


def side_of(record: PreferenceRecord) -> str | None:
    """Return the side of a single labelled response: chosen if it is good, else rejected; None of others."""
    if len(record.responses) != 1 or record.scores is None:
        return None
    return "chosen" if record.scores[0] > 0 else "rejected"
