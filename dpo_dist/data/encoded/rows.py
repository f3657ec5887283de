"""Encode records as rows of the encoded data's schema."""

import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_dist.batching.example import response_keys
from dpo_dist.config.schema import DataConfig, OnBadRecord
from dpo_dist.data.counts import Outcome
from dpo_dist.data.encode import EncodedRecord, encode_record
from dpo_dist.data.encoded.store import SCHEMA
from dpo_dist.data.records import (
    ALL_RECORDS,
    HELD_OUT,
    LEFT_IN_TRAIN,
    BadRecord,
    Part,
    Record,
    Tokenizer,
    bad_record_error,
    prompt_hash,
)


def encode_records(
    records: Sequence[Record],
    config: DataConfig,
    tokenizer: Tokenizer,
    part: Part = ALL_RECORDS,
) -> pa.RecordBatch:
    """Encode the `records` of `part` as rows of `store.SCHEMA`; unusable ones are dropped with a reason."""
    rows = []
    for record in records:
        prompt, values = 0, dict[str, Any]()
        encoded: EncodedRecord | BadRecord | None = None  # of another part
        if isinstance(record, BadRecord):
            encoded = None if part.is_eval else record  # it has no prompt
        elif part.has(prompt := prompt_hash(record.prompt)):
            encoded = encode_record(record, config, tokenizer)
        if isinstance(encoded, BadRecord):
            if config.on_bad_record is OnBadRecord.error:
                raise bad_record_error(encoded)
            outcome = Outcome(encoded.reason, changed=tuple((f"unread_{name}", 1) for name in encoded.unread))
            values = {"detail": encoded.detail, "lengths": encoded.lengths}
        elif encoded is None:
            outcome = Outcome(changed=((LEFT_IN_TRAIN if part.is_eval else HELD_OUT, 1),))
        else:
            outcome, values = encoded.outcome, _columns(encoded) | {"prompt": prompt}
        origin = {"file": record.origin.source, "line": record.origin.line}
        rows.append({**_EMPTY_ROW, **origin, "outcome": json.dumps(astuple(outcome)), **values})
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


_EMPTY_ROW = {
    "detail": "",
    "prompt": 0,
    "largest_id": -1,
    **{field.name: () for field in SCHEMA if pa.types.is_list(field.type)},
}


def _columns(record: EncodedRecord) -> dict[str, Any]:
    example = record.example
    pieces = (example.prompt_ids, *example.responses)
    ids = np.concatenate(pieces)
    return {
        "largest_id": ids.max(),
        "ids": ids,
        "piece_tokens": list(map(len, pieces)),
        "keys": response_keys([example]).ravel(),
        "scores": record.scores,
        "numbers": record.numbers,
        "truncated": example.truncated,
        "trained_tokens": [int(mask.sum()) for mask in example.masks],
        "trained": np.concatenate([np.empty(0, np.bool_), *(m for m in example.masks if not m.all())]),
        "examples": record.ranks,
        "lengths": example.lengths,
    }
