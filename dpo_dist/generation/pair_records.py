"""Preference records as files: the fields that the trainer reads, with provenance; .jsonl or .parquet."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dpo_dist.atomic import staged_file
from dpo_dist.data.records import Dialogue, Message, Messages, PreferenceRecord, Prompt, Response
from dpo_dist.errors import DataError

_ROWS_PER_GROUP = 1024
_TEXT = pyarrow.string()
_MESSAGE_TYPES = {
    **dict.fromkeys(("role", "content", "reasoning_content", "thinking"), _TEXT),
    **dict.fromkeys(("tool_calls", "tool_call_id", "name"), _TEXT),
    "loss_weight": pyarrow.int8(),
}
_MESSAGES = pyarrow.list_(pyarrow.struct(_MESSAGE_TYPES))
_ESCAPED = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
_IN_JSON = ("tools", "chat_template_kwargs", "provenance")
"""Columns whose values have other fields in each record: a table would fill them up with nulls."""


def pair_fields(
    record: PreferenceRecord,
    responses: tuple[Response, Response],
    scores: tuple[float, float] | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of one preference record.

    Messages if the prompt is a conversation, else texts: the trainer renders both as it renders the record
    from which the prompt was read.

    Args:
        record: the prompt with its tools and template arguments; its own responses are not used.
        responses: chosen and rejected.
        scores: of both, or None.
        provenance: the origin of the record.
    """
    prompt, *sides = as_fields(record.prompt, responses)
    fields: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    fields |= dict(zip(("chosen", "rejected"), sides, strict=True))
    fields |= context_fields(record)
    if scores is not None:
        fields |= dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    return fields | {"provenance": dict(provenance)}


def as_fields(prompt: Prompt, responses: Sequence[Response]) -> list[Any]:
    """Return a prompt and responses as values for JSON; a dialogue, part of the responses, is None."""
    if isinstance(prompt, Dialogue):
        return [None, *(f"{prompt.text}{response}" for response in responses)]
    if isinstance(prompt, str):
        return [prompt, *map(str, responses)]
    return [_messages(prompt), *(_messages(_as_messages(response)) for response in responses)]


def context_fields(record: PreferenceRecord) -> dict[str, Any]:
    """Return tools and template arguments of a record, if it has any."""
    fields: dict[str, Any] = {}
    if record.tools:
        fields["tools"] = [dict(tool) for tool in record.tools]
    if record.template_arguments:
        fields["chat_template_kwargs"] = dict(record.template_arguments)
    return fields


def _as_messages(response: Response) -> Messages:
    return (Message("assistant", response),) if isinstance(response, str) else response


def _messages(messages: Messages) -> list[dict[str, Any]]:
    return [
        {"role": turn.role, "content": turn.content, **turn.fields}
        | ({} if turn.is_trained is None else {"loss_weight": int(turn.is_trained)})
        for turn in messages
    ]


def write_pairs(
    file: Path,
    records: Iterable[Mapping[str, Any]],
    before_commit: Callable[[int], None] = lambda _number: None,
) -> int:
    """Write records to a .jsonl or .parquet file, whole or not at all; return their number.

    Args:
        file: the path.
        records: in their order.
        before_commit: called with their number before the file appears.

    Raises:
        DataError: there is no record, or a .parquet file cannot have both text and messages in one column.
    """
    with staged_file(file) as temporary:
        write = _write_parquet if file.suffix == ".parquet" else write_lines
        number = write(temporary, records)
        if not number:
            raise DataError(
                "no pair can be made",
                where=str(file),
                got="no two usable responses of a prompt with different scores",
                remedy="see the counts: scores can be missing, equal or within pairs.margin; responses not "
                "finished within pairs.max_new_tokens; pairs.method=samples makes and scores responses",
            )
        before_commit(number)
    return number


def json_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line; line ends in texts are escaped, also those that only Unicode knows."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).translate(_ESCAPED) + "\n"


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line; return their number."""
    number = 0
    with file.open("w", encoding="utf-8") as stream:
        for number, record in enumerate(records, start=1):  # noqa: B007  (the last number is the result)
            stream.write(json_line(record))
    return number


def _write_parquet(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    number, writer = 0, None
    try:
        for rows in _groups(records):
            writer = writer or pyarrow.parquet.ParquetWriter(file, _schema(rows[0]))
            writer.write_table(pyarrow.Table.from_pylist([_flat(row) for row in rows], schema=writer.schema))
            number += len(rows)
    except (pyarrow.ArrowException, TypeError) as fault:
        raise DataError(
            "these records do not fit into one table",
            where="pairs.output",
            got=str(fault).splitlines()[0][:200],
            remedy="name a file that ends with .jsonl",
        ) from fault
    finally:
        if writer is not None:
            writer.close()
    return number


def _schema(row: Mapping[str, Any]) -> pyarrow.Schema:
    """Return all columns that a record may have: pyarrow drops a field that the schema does not have."""
    content = _TEXT if isinstance(row["chosen"], str) else _MESSAGES
    return pyarrow.schema(
        {
            **dict.fromkeys(("prompt", "chosen", "rejected"), content),
            **dict.fromkeys(_IN_JSON, _TEXT),
            **dict.fromkeys(("score_chosen", "score_rejected"), pyarrow.float64()),
        }
    )


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with JSON texts in place of values that fit into no common column."""
    flat = {
        name: [_flat_message(turn) for turn in value] if isinstance(value, list) else value
        for name, value in row.items()
        if name not in _IN_JSON
    }
    return flat | {name: _as_json(row[name]) for name in _IN_JSON if name in row}


def _flat_message(turn: Mapping[str, Any]) -> dict[str, Any]:
    assert not turn.keys() - _MESSAGE_TYPES.keys(), turn.keys()
    return {**turn, "tool_calls": _as_json(turn["tool_calls"]) if "tool_calls" in turn else None}


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _groups(records: Iterable[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for record in records:
        rows.append(dict(record))
        if len(rows) == _ROWS_PER_GROUP:
            yield rows
            rows = []
    if rows:
        yield rows
