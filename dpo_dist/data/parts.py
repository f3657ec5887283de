"""Consecutive records encoded to one part of a data set, and the count of what became of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import DataConfig, OnBadRecord
from dpo_dist.data.encode import EncodedPair, TokenIds, encode_pair, response_key
from dpo_dist.data.rankings import training_examples
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_EXAMPLES = 20


@dataclass
class DataCounts:
    """What became of the records read: `read` = `kept` + sum of `dropped`.

    `pairs` is what the kept ones gave: one each, or several from a ranking. `changed` is what was done to
    records that were kept, and how many ties were left out of them.
    """

    read: int = 0
    kept: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def drop(self, bad: BadRecord) -> None:
        """Count a record that cannot be used; the first few are kept with their place."""
        self.dropped[bad.reason] += 1
        self._show([f"{bad.origin} {bad.reason}"])

    def keep(self, encoded: EncodedPair, pairs: int, ties: int) -> None:
        """Count a record, the pairs that it gave, and what was done to it."""
        self.kept += 1
        self.pairs += pairs
        self.changed["ties_left_out"] += ties
        for name in ("prompt_truncated", "response_truncated", "boundary_resplit"):
            self.changed[name] += bool(getattr(encoded, name))

    def add(self, later: "DataCounts") -> None:
        """Count the records that follow these."""
        self.read += later.read
        self.kept += later.kept
        self.pairs += later.pairs
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
            "pairs": self.pairs,
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
        scores: float64 [responses], nan where the source has none.
        lines: int64 [pairs], where each pair stood in its source.
        counts: what became of the records.
    """

    ids: TokenIds
    piece_tokens: npt.NDArray[np.int64]
    pair_pieces: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float64]
    lines: npt.NDArray[np.int64]
    counts: DataCounts


@dataclass(frozen=True, eq=False)
class _Pair:
    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]
    scores: tuple[float, ...]
    line: int


def encode_part(
    records: Sequence[PreferenceRecord | BadRecord], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> EncodedPart:
    """Encode `records`, and count those that cannot be used.

    Raises:
        DataError: a record cannot be used and `data.on_bad_record` is `error`.
    """
    counts = DataCounts(read=len(records))
    pairs: list[_Pair] = []
    for record in records:
        encoded = record if isinstance(record, BadRecord) else _encode(record, config, tokenizer, counts)
        if not isinstance(encoded, BadRecord):
            pairs += encoded
        elif config.on_bad_record is OnBadRecord.error:
            raise DataError(
                f"a record cannot be used: {encoded.reason}",
                where=str(encoded.origin),
                got=encoded.detail,
                remedy="mend the record, or set data.on_bad_record=drop",
            )
        else:
            counts.drop(encoded)
    pieces = [piece for pair in pairs for piece in (pair.prompt_ids, *pair.responses)]
    keys = [response_key(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
    return EncodedPart(
        ids=np.concatenate([np.empty(0, dtype=np.int32), *pieces]),
        piece_tokens=np.array([len(piece) for piece in pieces], dtype=np.int64),
        pair_pieces=np.array([1 + len(pair.responses) for pair in pairs], dtype=np.int64),
        keys=np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2),
        scores=np.array([score for pair in pairs for score in pair.scores], dtype=np.float64),
        lines=np.array([pair.line for pair in pairs], dtype=np.int64),
        counts=counts,
    )


def _encode(
    record: PreferenceRecord, config: DataConfig, tokenizer: "PreTrainedTokenizerBase", counts: DataCounts
) -> list[_Pair] | BadRecord:
    """The pairs of a record, counted. They share one encoding: a response of several is scored once."""
    examples, ties = training_examples(record, config.ranked)
    used = sorted(set().union(*examples))
    responses = tuple(record.responses[place] for place in used)
    encoded = encode_pair(replace(record, responses=responses), tokenizer, config)
    if isinstance(encoded, BadRecord):
        return encoded
    counts.keep(encoded, len(examples), ties)
    ids = dict(zip(used, encoded.responses, strict=True))
    scores = record.scores or (np.nan,) * len(record.responses)
    return [
        _Pair(
            encoded.prompt_ids,
            tuple(ids[place] for place in example),
            tuple(scores[place] for place in example),
            record.origin.line,
        )
        for example in examples
    ]
