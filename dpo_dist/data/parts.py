"""Consecutive records encoded to one part of a data set, and the count of what became of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import DataConfig, OnBadRecord
from dpo_dist.data.encode import EncodedPair, TokenIds, encode_pair, response_key
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_EXAMPLES = 20


@dataclass
class DataCounts:
    """What became of the records read: `read` = `kept` + sum of `dropped`; `changed` were kept but cut."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def drop(self, bad: BadRecord) -> None:
        """Count a record that cannot be used; the first few are kept with their place."""
        self.dropped[bad.reason] += 1
        self._show([f"{bad.origin} {bad.reason}"])

    def keep(self, pair: EncodedPair) -> None:
        """Count a pair and what encoding did to it."""
        self.kept += 1
        for name in ("prompt_truncated", "response_truncated", "boundary_resplit"):
            self.changed[name] += bool(getattr(pair, name))

    def add(self, later: "DataCounts") -> None:
        """Count the records that follow these."""
        self.read += later.read
        self.kept += later.kept
        self.dropped.update(later.dropped)
        self.changed.update(later.changed)
        self._show(later.examples)

    def _show(self, examples: list[str]) -> None:
        self.examples += examples[: _SHOWN_EXAMPLES - len(self.examples)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, and examples as ``file:line reason``."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            **{name: self.changed[name] for name in sorted(self.changed)},
            "examples": self.examples,
        }


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """The pairs of consecutive records of one source, laid end to end.

    Attributes:
        ids: int32 [tokens], of all pieces; a pair's pieces are its prompt and its responses.
        piece_tokens: int64 [pieces], tokens of each piece.
        pair_pieces: int64 [pairs], pieces of each pair.
        keys: uint64 [responses, 2], `response_key` of each response.
        lines: int64 [pairs], where each pair stood in its source.
        counts: what became of the records.
    """

    ids: TokenIds
    piece_tokens: npt.NDArray[np.int64]
    pair_pieces: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    lines: npt.NDArray[np.int64]
    counts: DataCounts


def encode_part(
    records: Sequence[PreferenceRecord | BadRecord], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> EncodedPart:
    """Encode `records`, and count those that cannot be used.

    Raises:
        DataError: a record cannot be used and `data.on_bad_record` is `error`.
    """
    counts = DataCounts(read=len(records))
    pieces: list[TokenIds] = [np.empty(0, dtype=np.int32)]
    pair_pieces, keys, lines = [], [], []
    for record in records:
        pair = record if isinstance(record, BadRecord) else encode_pair(record, tokenizer, config)
        if isinstance(pair, BadRecord):
            if config.on_bad_record is OnBadRecord.error:
                raise DataError(
                    f"a record cannot be used: {pair.reason}",
                    where=str(pair.origin),
                    got=pair.detail,
                    remedy="mend the record, or set data.on_bad_record=drop",
                )
            counts.drop(pair)
            continue
        counts.keep(pair)
        pieces += [pair.prompt_ids, *pair.responses]
        pair_pieces.append(1 + len(pair.responses))
        keys += [response_key(pair.prompt_ids, response) for response in pair.responses]
        lines.append(record.origin.line)
    return EncodedPart(
        ids=np.concatenate(pieces),
        piece_tokens=np.array([len(piece) for piece in pieces[1:]], dtype=np.int64),
        pair_pieces=np.array(pair_pieces, dtype=np.int64),
        keys=np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2),
        lines=np.array(lines, dtype=np.int64),
        counts=counts,
    )
