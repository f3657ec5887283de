"""Consecutive records encoded to one part of a source, and what became of each of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import DataConfig, OnBadRecord
from dpo_dist.data.encode import EncodedPair, TokenIds, encode_pair, response_key
from dpo_dist.data.rankings import training_examples
from dpo_dist.data.records import BadRecord, Origin, PreferenceRecord
from dpo_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_EXAMPLES = 20
_FLAGS = ("prompt_truncated", "response_truncated", "boundary_resplit")


@dataclass(frozen=True)
class Outcome:
    """What became of a record: the reason why it was dropped; else the pairs that it gave, and how often
    each kind of change was made to it.
    """

    dropped: str | None = None
    pairs: int = 0
    changed: tuple[tuple[str, int], ...] = ()


@dataclass
class DataCounts:
    """What became of the records read: `read` = `kept` + sum of `dropped`.

    `pairs` is what the kept ones gave: one each, or several from a ranking. `changed` is what was done to
    records that were kept, and how many ties were left out of them. `examples` are dropped records as
    ``file:line reason``.
    """

    read: int = 0
    kept: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys((*_FLAGS, "ties_left_out"), 0))
    )
    examples: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, outcomes: Mapping[Outcome, int], examples: Iterable[str]) -> "DataCounts":
        """Count records, given how many of them had each outcome."""
        counts = cls(examples=list(examples)[:SHOWN_EXAMPLES])
        for outcome, records in outcomes.items():
            counts.read += records
            if outcome.dropped is not None:
                counts.dropped[outcome.dropped] += records
                continue
            counts.kept += records
            counts.pairs += records * outcome.pairs
            for name, times in outcome.changed:
                counts.changed[name] += records * times
        counts.dropped += Counter()  # without zeros
        return counts

    def add(self, later: "DataCounts") -> None:
        """Count the records that follow these."""
        self.read += later.read
        self.kept += later.kept
        self.pairs += later.pairs
        self.dropped.update(later.dropped)
        self.changed.update(later.changed)
        self.examples += later.examples[: SHOWN_EXAMPLES - len(self.examples)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        ids: int32 [tokens], of the distinct pieces; all pairs of one record share its prompt and responses.
        piece_starts: int64 [pieces], where each piece starts in `ids`; a pair's pieces are its prompt and its
            responses.
        piece_tokens: int64 [pieces], tokens of each piece.
        pair_pieces: int64 [pairs], pieces of each pair.
        keys: uint64 [responses, 2], `response_key` of each response.
        scores: float64 [responses], nan where the source has none.
        origins: [pairs], where each pair was read.
        outcomes: [records], what became of each record.
        bad: the first few records that were dropped, each with its place among the records.
    """

    ids: TokenIds
    piece_starts: npt.NDArray[np.int64]
    piece_tokens: npt.NDArray[np.int64]
    pair_pieces: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float64]
    origins: list[Origin]
    outcomes: list[Outcome]
    bad: list[tuple[int, BadRecord]]


class _Pairs:
    """Pairs as they are collected."""

    def __init__(self) -> None:
        self.ids: list[TokenIds] = [np.empty(0, dtype=np.int32)]
        self.tokens = 0
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.pieces: list[int] = []
        self.keys: list[bytes] = []
        self.scores: list[float] = []
        self.origins: list[Origin] = []

    def add(self, encoded: EncodedPair, examples: Sequence[Sequence[int]], scores: Sequence[float]) -> None:
        """Add the pairs of a record.

        Args:
            encoded: its prompt and responses.
            examples: each pair as places in `encoded.responses`.
            scores: of `encoded.responses`.
        """
        pieces = (encoded.prompt_ids, *encoded.responses)
        starts = [self.tokens + int(before) for before in np.cumsum([0, *map(len, pieces)])]
        keys = [response_key(encoded.prompt_ids, response) for response in encoded.responses]
        self.ids += pieces
        self.tokens = starts[-1]
        for example in examples:
            used = [0, *(1 + place for place in example)]
            self.starts += [starts[piece] for piece in used]
            self.lengths += [len(pieces[piece]) for piece in used]
            self.pieces.append(len(used))
            self.keys += [keys[place] for place in example]
            self.scores += [scores[place] for place in example]


def encode_part(
    records: Sequence[PreferenceRecord | BadRecord], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> EncodedPart:
    """Encode `records`; those that cannot be used are dropped, and their reason is an outcome.

    Raises:
        DataError: a record cannot be used and `data.on_bad_record` is `error`.
    """
    pairs = _Pairs()
    outcomes: list[Outcome] = []
    bad: list[tuple[int, BadRecord]] = []
    for place, record in enumerate(records):
        outcome = record if isinstance(record, BadRecord) else _encode(record, config, tokenizer, pairs)
        if isinstance(outcome, Outcome):
            outcomes.append(outcome)
            continue
        if config.on_bad_record is OnBadRecord.error:
            raise DataError(
                f"a record cannot be used: {outcome.reason}",
                where=str(outcome.origin),
                got=outcome.detail,
                remedy="correct the record, or set data.on_bad_record=drop",
            )
        outcomes.append(Outcome(dropped=outcome.reason))
        if len(bad) < SHOWN_EXAMPLES:
            bad.append((place, outcome))
    return EncodedPart(
        ids=np.concatenate(pairs.ids),
        piece_starts=np.array(pairs.starts, dtype=np.int64),
        piece_tokens=np.array(pairs.lengths, dtype=np.int64),
        pair_pieces=np.array(pairs.pieces, dtype=np.int64),
        keys=np.frombuffer(b"".join(pairs.keys), dtype=np.uint64).reshape(-1, 2),
        scores=np.array(pairs.scores, dtype=np.float64),
        origins=pairs.origins,
        outcomes=outcomes,
        bad=bad,
    )


def _encode(
    record: PreferenceRecord, config: DataConfig, tokenizer: "PreTrainedTokenizerBase", pairs: _Pairs
) -> Outcome | BadRecord:
    """Add the pairs of a record. They share one encoding: a response of several is stored and scored once."""
    examples, ties = training_examples(record, config.ranked)
    used = sorted(set().union(*examples))
    responses = tuple(record.responses[place] for place in used)
    encoded = encode_pair(replace(record, responses=responses), tokenizer, config)
    if isinstance(encoded, BadRecord):
        return encoded
    places = {place: number for number, place in enumerate(used)}
    scores = record.scores or (np.nan,) * len(record.responses)
    pairs.add(
        encoded,
        [[places[place] for place in example] for example in examples],
        [scores[place] for place in used],
    )
    pairs.origins += [record.origin] * len(examples)
    changed = {name: int(getattr(encoded, name)) for name in _FLAGS} | {"ties_left_out": ties}
    return Outcome(None, len(examples), tuple((name, times) for name, times in changed.items() if times))
