"""Input records as people write them into files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_dist.data.config import SourceConfig
from dpo_dist.data.read.reading import parse_record
from dpo_dist.data.read.shapes import declared
from dpo_dist.data.records import BadRecord, Origin, PreferenceRecord
from dpo_dist.foundation.errors import DataError

TEXT = {"prompt": "q", "chosen": "good", "rejected": "bad"}
GOOD = [
    {"prompt": f"question {n}", "chosen": f"right {n}", "rejected": f"wrong {n}" * n} for n in range(1, 8)
]
BAD = {"prompt": "q", "chosen": "same", "rejected": "same"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def jsonl(folder: Path, *records: Any) -> str:
    """Return the path of a file with these records."""
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def outcomes(records: Iterable[PreferenceRecord | BadRecord]) -> list[tuple[int, str]]:
    """Return the line and the reason of each record; no reason for a good one."""
    return [
        (record.origin.line, record.reason if isinstance(record, BadRecord) else "") for record in records
    ]


def parsed(record: Any, /, parse: Any = parse_record, *, of_prompts: bool = False, **source: Any) -> Any:
    """Return the record of a source that has this one alone; for an error of the source its reason."""
    here = Origin("here", 1)
    try:
        reading, _ = declared(iter([(record, here)]), SourceConfig("here", **source), of_prompts=of_prompts)
    except DataError as error:
        reason, _, detail = error.message.partition("can be read: ")[2].partition(" (")
        return BadRecord(reason or "unknown_shape", here, detail.removesuffix(")"))
    return parse(record, reading, here)


def good(fields: Any, /, **source: Any) -> PreferenceRecord:
    record = parsed(fields, **source)
    assert isinstance(record, PreferenceRecord), record
    return record


def bad(fields: Any, /, **source: Any) -> BadRecord:
    record = parsed(fields, **source)
    assert isinstance(record, BadRecord), record
    return record
