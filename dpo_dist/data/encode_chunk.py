"""Consecutive records encoded to one part of a source, and what became of each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import DataConfig, OnBadRecord, TextTemplate
from dpo_dist.data.counts import FLAGS, SHOWN_EXAMPLES, Outcome
from dpo_dist.data.encode import EncodedExample, TokenIds, encode_pair, response_key
from dpo_dist.data.rankings import training_examples
from dpo_dist.data.records import BadRecord, Origin, PreferenceRecord
from dpo_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class EncodedChunk:
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
        bad: the first few records that were dropped, and the first for each reason, each with its place among
            the records.
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

    def add(
        self, encoded: EncodedExample, examples: Sequence[Sequence[int]], scores: Sequence[float]
    ) -> None:
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


def encode_chunk(
    records: Sequence[PreferenceRecord | BadRecord], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> EncodedChunk:
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
        unread = tuple((f"unread_{name}", 1) for name in outcome.unread)
        outcomes.append(Outcome(dropped=outcome.reason, changed=unread))
        if len(bad) < SHOWN_EXAMPLES or all(outcome.reason != shown.reason for _, shown in bad):
            bad.append((place, outcome))
    return EncodedChunk(
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
    changed = {name: int(getattr(encoded, name)) for name in FLAGS} | {"ties_left_out": ties}
    stands = encoded.templated_text and config.template is TextTemplate.applied
    plain = isinstance(record.prompt, str) and not config.text_as_messages
    if plain and not stands and tokenizer.chat_template:
        changed["chat_template_not_applied"] = 1
    return Outcome(None, len(examples), tuple((name, times) for name, times in changed.items() if times))
