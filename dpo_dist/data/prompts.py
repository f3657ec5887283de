"""Read the prompts of a source: of records in any format, or of records that have no response."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dpo_dist.config.data_schema import DataFormat, SourceConfig
from dpo_dist.data.fields.dataset_info import resolved
from dpo_dist.data.formats import parse_record
from dpo_dist.data.records import BadRecord, Fields, Origin, PreferenceRecord
from dpo_dist.data.sources import raw_records

# Faults of the responses of a record; its prompt may be usable.
_OF_RESPONSES = frozenset(
    {
        "unknown_format",
        "missing_field",
        "not_one_answer",
        "no_ranking",
        "all_tied",
        "invalid_scores",
        "empty_response",
        "identical_responses",
    }
)
_CONVERSATION = "messages"
_PLACEHOLDER = "response"


def read_prompts(source: SourceConfig) -> Iterator[PreferenceRecord | BadRecord]:
    """Read the records of a source as prompts, in its order.

    Returns:
        One item per record: a record without responses, or the reason why it has no usable prompt.

    Raises:
        DataError: as `formats.read_records`.
        ConfigError: as `formats.read_records`.
    """
    source = resolved(source)
    return (
        record if isinstance(record, BadRecord) else parse_prompt(record, source.format, origin)
        for record, origin in raw_records(source)
    )


def parse_prompt(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    """Return the prompt of a record of format `name`, as a record without responses.

    A record without responses has a `prompt`, or `messages` that end before an assistant turn, with the same
    fields beside them as other formats.
    """
    parsed = parse_record(record, name, origin)
    if isinstance(parsed, BadRecord) and parsed.reason in _OF_RESPONSES:
        completed = parse_record(_completed(record), DataFormat.completion, origin)
        has_no_prompt = isinstance(completed, BadRecord) and completed.reason in _OF_RESPONSES
        parsed = parsed if has_no_prompt else completed
    return parsed if isinstance(parsed, BadRecord) else replace(parsed, responses=(), scores=None)


def _completed(record: Fields) -> dict[str, Any]:
    """Return a record with an invented response, so that its prompt is read as that of any completion."""
    turns = record.get(_CONVERSATION)
    if record.get("prompt") is None and isinstance(turns, list):
        return {**record, _CONVERSATION: [*turns, {"role": "assistant", "content": _PLACEHOLDER}]}
    return {**record, "completion": _PLACEHOLDER}
