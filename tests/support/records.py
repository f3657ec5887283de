"""Input records as people write them into files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_dist.data.config import DataFormat
from dpo_dist.data.formats import parse_record
from dpo_dist.data.records import BadRecord, Origin, PreferenceRecord

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


def good(fields: Any, format_: DataFormat = DataFormat.auto) -> PreferenceRecord:
    record = parse_record(fields, format_, Origin("here", 1))
    assert isinstance(record, PreferenceRecord), record
    return record


def bad(fields: Any, format_: DataFormat = DataFormat.auto) -> BadRecord:
    record = parse_record(fields, format_, Origin("here", 1))
    assert isinstance(record, BadRecord), record
    return record
