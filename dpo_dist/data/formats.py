"""From files to preference records: how the texts of a row are written, one way per function.

Nothing is lost on the way: a record that cannot be used comes out as a `BadRecord` with its reason. Texts
are taken as they stand. Details of bad records never quote a record's text, which may be offensive or
personal.
"""

from collections.abc import Iterator
from itertools import combinations, islice

from dpo_dist.config.schema import DataFormat, SourceConfig
from dpo_dist.data.context import in_context
from dpo_dist.data.conversations import conversation, is_messages, prompt_before
from dpo_dist.data.layouts import (
    Answers,
    Row,
    completion_answers,
    pair_answers,
    ranked_answers,
    recognise,
    unrecognised,
)
from dpo_dist.data.records import BadRecord, Dialogue, Messages, Origin, PreferenceRecord, Prompt
from dpo_dist.data.sources import read_rows
from dpo_dist.errors import ConfigError

_LAST_TURN = "\n\nAssistant:"
_FIRST_TURN = "\n\nHuman:"
_STYLES = (DataFormat.hh, DataFormat.text, DataFormat.messages)


def read_records(source: SourceConfig | str) -> Iterator[PreferenceRecord | BadRecord]:
    """Read one source of pairs, rankings or completions, in its own order.

    Args:
        source: what to read; a bare string is its path. The path names a local .jsonl, .json (an array), .csv
            or .parquet file (the first three also as .gz or .zst), files by a pattern, a folder of shards, a
            folder saved by `datasets`, or a dataset on the hub.

    Returns:
        One item per record, read as the iterator is advanced. Reasons of bad records: `unparsable`,
        `unknown_format`, `missing_field`, `history_differs`, `not_one_answer`, `unread_content`,
        `no_ranking`, `all_tied`, `invalid_scores`, `invalid_unicode`, `empty_prompt`, `empty_response`,
        `identical_responses`.

    Raises:
        DataError: the source does not exist or cannot be read at all; raised by this call.
        ConfigError: `limit` is not positive, or `split` or another key has no effect on such a source.
    """
    if isinstance(source, str):
        source = SourceConfig(path=source)
    if source.limit is not None and source.limit < 1:
        raise ConfigError(
            "a source is limited to no records",
            where=f"limit of {source.path}",
            got=str(source.limit),
            expected="a positive number of records, or null for all",
        )
    rows = islice(read_rows(source), source.limit)
    return (
        row if isinstance(row, BadRecord) else _from_row(row, source.format, origin) for row, origin in rows
    )


def _from_row(row: Row, layout: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    answers = _answers(row, layout, origin)
    if isinstance(answers, BadRecord):
        return answers
    read = _read(row, answers, layout, origin)
    if isinstance(read, BadRecord):
        return read
    prompt, texts = read
    whole = in_context(prompt, row, answers, origin, plain=layout is DataFormat.text)
    if isinstance(whole, BadRecord):
        return whole
    return _checked(PreferenceRecord(whole, tuple(texts), origin, answers.scores))


def _answers(row: Row, layout: DataFormat, origin: Origin) -> Answers | BadRecord:
    match recognise(row) if layout is DataFormat.auto else layout:
        case None:
            return unrecognised(row, origin)
        case DataFormat.ranked:
            return ranked_answers(row, origin)
        case DataFormat.completion:
            return completion_answers(row, origin)
    return pair_answers(row, origin)


def _read(
    row: Row, answers: Answers, layout: DataFormat, origin: Origin
) -> tuple[Prompt, list[str]] | BadRecord:
    match layout if layout in _STYLES else _style(answers):
        case None:
            return unrecognised(row, origin)
        case DataFormat.hh:
            return _read_hh(answers, origin)
        case DataFormat.text:
            return _read_text(answers, origin)
    return _read_messages(answers, origin)


def _style(answers: Answers) -> DataFormat | None:
    """How prompt and answers are written, by their types; None where no known way fits."""
    values = answers.values.values()
    if all(map(is_messages, values)) or is_messages(answers.prompt):
        return DataFormat.messages
    if not all(isinstance(value, str) for value in values):
        return None
    if isinstance(answers.prompt, str):
        return DataFormat.text
    if answers.prompt is None and any(value.startswith(_FIRST_TURN) for value in values):
        return DataFormat.hh
    return None


def _read_hh(answers: Answers, origin: Origin) -> tuple[Prompt, list[str]] | BadRecord:
    """Whole dialogues; the prompt is what all have before their last answer (arXiv:2204.05862)."""
    histories, texts = [], []
    for name, dialogue in answers.values.items():
        if not isinstance(dialogue, str) or not dialogue.startswith(_FIRST_TURN):
            return BadRecord("unknown_format", origin, f"{name} is not a text that starts with a Human turn")
        history, turn, text = dialogue.rpartition(_LAST_TURN)
        if not turn or _FIRST_TURN in text:
            return BadRecord("not_one_answer", origin, f"{name} does not end with an Assistant turn")
        histories.append(history + turn)
        texts.append(text)
    if any(history != histories[0] for history in histories):
        return BadRecord("history_differs", origin, "the dialogue before the last answer is not the same")
    return Dialogue(histories[0]), texts


def _read_text(answers: Answers, origin: Origin) -> tuple[Prompt, list[str]] | BadRecord:
    """Prompt and answers as plain texts."""
    if answers.prompt is None:
        return BadRecord("missing_field", origin, "prompt")
    texts = [answers.prompt, *answers.values.values()]
    if not all(isinstance(text, str) for text in texts):
        return BadRecord("unknown_format", origin, f"prompt, {', '.join(answers.values)} are not all texts")
    return texts[0], texts[1:]


def _read_messages(answers: Answers, origin: Origin) -> tuple[Prompt, list[str]] | BadRecord:
    """Conversations: the prompt as messages beside one answer each, or contained in every side."""
    histories: list[Messages] = []
    texts: list[str] = []
    for name, value in answers.values.items():
        messages = conversation(value, origin, role="assistant")
        if isinstance(messages, BadRecord):
            return messages
        if not messages or messages[-1].role != "assistant":
            return BadRecord("not_one_answer", origin, f"{name} does not end with an assistant message")
        histories.append(messages[:-1])
        texts.append(messages[-1].content)
    prompt = prompt_before(answers.prompt, histories, origin)
    return prompt if isinstance(prompt, BadRecord) else (prompt, texts)


def _checked(record: PreferenceRecord) -> PreferenceRecord | BadRecord:
    """The record, or the reason why its content cannot teach anything; shared by all layouts."""
    prompt_texts = _prompt_texts(record)
    if not all(map(_is_valid_unicode, (*prompt_texts, *record.responses))):
        return BadRecord("invalid_unicode", record.origin, "a text holds a lone surrogate")
    if not any(text.strip() for text in prompt_texts):
        return BadRecord("empty_prompt", record.origin)
    empty = [str(rank) for rank, text in enumerate(record.responses, start=1) if not text.strip()]
    if empty:
        return BadRecord("empty_response", record.origin, f"rank {', '.join(empty)}")
    if any(first.strip() == second.strip() for first, second in combinations(record.responses, 2)):
        return BadRecord("identical_responses", record.origin)
    return record


def _prompt_texts(record: PreferenceRecord) -> tuple[str, ...]:
    if isinstance(record.prompt, str):
        return (record.prompt,)
    messages = record.prompt.messages() if isinstance(record.prompt, Dialogue) else record.prompt
    return tuple(message.content for message in messages)


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
