"""Records in memory, written to files that are read by TRL's columns; their token ids, as TRL shows them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.encode import EncodedExample, encode_record
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.files import write_records
from dpo_dist.data.records import BadRecord
from dpo_dist.tools.convert.arguments import ScriptError, TrainerArguments

_COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "completion": "completion"}
_COLUMNS |= {"label": "label", "images": "images", "image": "images"}
_COLUMNS |= {"tools": "tools", "chat_template_kwargs": "chat_template_kwargs"}
"""The columns that TRL reads, and the fields of dpo_dist for them."""
_OF_MESSAGES = ("tools", "chat_template_kwargs")


def sources(given: Any, name: str, args: TrainerArguments) -> list[dict[str, Any]]:
    """Write records in memory, or a mapping of several sets, below `output_dir`; return them as sources."""
    sets = given if isinstance(given, Mapping) else {"": given}
    if given is None or not sets:
        raise ScriptError(f"`{name}` is required", where=name, remedy="pass a datasets.Dataset")
    if args.precompute_ref_log_probs and any(isinstance(one, IterableDataset) for one in sets.values()):
        # TRL stores the reference's log-probs by the places of records, which a stream does not have.
        message = "`precompute_ref_log_probs=True` is not supported with IterableDataset"
        remedy = "leave it out: here the reference's log-probs are always computed once"
        raise ScriptError(message, where=name, remedy=remedy)
    folder = Path(args.output_dir) / "encoded" / "records"
    files = {label: write_records(one, folder, name) for label, one in sets.items()}
    labels = {label: {"label": label} if label else {} for label in files}
    return [{"path": str(file), **labels[label], **_as_trl_reads(file)} for label, file in files.items()]


def _as_trl_reads(file: Path) -> dict[str, Any]:
    """Return the columns and the format by which records are read as by TRL: texts stay texts, without a
    template, and no other column counts, such as `system` or `margin`."""
    first, names, response = dict[str, Any](), set[str](), None
    with file.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            names |= record.keys()  # a list's first record may lack a column
            if response is None:
                first, response = record, record.get("chosen", record.get("completion"))
    columns = {field: name for name, field in _COLUMNS.items() if name in names}
    if response is None:  # which TRL cannot read
        return {}
    read: dict[str, Any] = {}
    if isinstance(response, str) and isinstance(first.get("prompt") or "", str) and "images" not in columns:
        columns = {field: name for field, name in columns.items() if field not in _OF_MESSAGES}
        plain = "text" if "prompt" in columns else "implicit_prompt"
        read = {"format": plain if "chosen" in first else "labelled_text"}
    return {"columns": columns | {"*": None}, **read}


def with_token_ids(given: Any, written: list[dict[str, Any]], tokenizer: Any, limits: DataConfig) -> Any:
    """Return the records that training uses, with their columns and token ids, in the form that was given.

    As in TRL: `prompt_ids`, and `chosen_ids` and `rejected_ids`, or `completion_ids`. Records with images are
    returned as they are: their ids depend on the images.
    """
    if given is None or any("images" in source.get("columns", {}) for source in written):
        return given
    if isinstance(given, Mapping):
        every = {source["label"]: source for source in written}
        return {name: _encoded(every[name], tokenizer, limits) for name in given}
    return _encoded(written[0], tokenizer, limits)


def longest_tokens(written: list[dict[str, Any]], tokenizer: Any, limits: DataConfig) -> int:
    """Return the tokens of the longest prompt with a response; `limits` cut none."""
    pairs = (pair for source in written for _, pair in _examples(source, tokenizer, limits))
    return max((len(pair.prompt_ids) + max(map(len, pair.responses)) for pair in pairs), default=2)


def examples(written: list[dict[str, Any]], tokenizer: Any, limits: DataConfig) -> int:
    """Return the number of pairs, or of labelled responses, that training makes of all records."""
    return sum(1 for source in written for _ in _examples(source, tokenizer, limits))


def _encoded(source: dict[str, Any], tokenizer: Any, limits: DataConfig) -> Dataset:
    given = [json.loads(line) for line in Path(source["path"]).read_bytes().splitlines()]
    rows = []
    for line, example in _examples(source, tokenizer, limits):
        names = ("chosen_ids", "rejected_ids") if len(example.responses) > 1 else ("completion_ids",)
        ids = dict(zip(names, (one.tolist() for one in example.responses), strict=False))
        rows.append({**given[line - 1], "prompt_ids": example.prompt_ids.tolist(), **ids})
    columns = dict.fromkeys(name for row in rows for name in row)  # `from_list` takes those of the first row
    return Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])


def _examples(
    source: dict[str, Any], tokenizer: Any, limits: DataConfig
) -> Iterator[tuple[int, EncodedExample]]:
    """Yield the examples that training makes of a source, with the lines of their records."""
    text = getattr(tokenizer, "tokenizer", tokenizer)
    for record in read_records(SourceConfig(**source)):
        encoded = record if isinstance(record, BadRecord) else encode_record(record, limits, text, None)
        if not isinstance(encoded, BadRecord):
            yield from ((record.origin.line, example) for example in encoded.examples())
