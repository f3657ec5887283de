"""Encode a chunk of consecutive records, with the outcome of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data_schema import DataConfig, OnBadRecord, TextTemplate
from dpo_dist.data.counts import SHOWN_EXAMPLES, Outcome
from dpo_dist.data.encode import EncodedExample, TokenIds, encode_pair, response_key
from dpo_dist.data.fields.rankings import training_examples
from dpo_dist.data.prompt_split import ALL_RECORDS, Part, PromptHashes, prompt_hash
from dpo_dist.data.records import BadRecord, Dialogue, Origin, PreferenceRecord, bad_record_error
from dpo_dist.data.tokenization.loss_mask import Mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class EncodedChunk:
    """Examples of consecutive records of one source, in flat arrays.

    Attributes:
        ids: int32 [tokens], of the distinct pieces; all examples of a record share its prompt and responses.
        piece_starts: int64 [pieces], offset of each piece in `ids`; the pieces of an example are its prompt
            and its responses.
        piece_tokens: int64 [pieces], length of each piece.
        pair_pieces: int64 [examples], number of pieces of each example.
        keys: uint64 [responses, 2], `response_key` of each response.
        scores: float64 [responses], nan if the record has none.
        trained: bool [tokens of responses with a mask], `EncodedExample.trained` of responses of which the
            loss does not count every token.
        mask_starts: int64 [responses], offset of each response's mask in `trained`, if it has one.
        trained_tokens: int64 [responses], number of tokens that the loss counts.
        truncated: bool [responses], whether the end of each response was cut.
        prompts: uint64 [examples], `prompt_hash` of each example's record.
        origins: [examples], origin of each example's record.
        outcomes: [records].
        bad: the first dropped records and the first for each reason, each with its index in the chunk.
    """

    ids: TokenIds
    piece_starts: npt.NDArray[np.int64]
    piece_tokens: npt.NDArray[np.int64]
    pair_pieces: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float64]
    trained: Mask
    mask_starts: npt.NDArray[np.int64]
    trained_tokens: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    prompts: PromptHashes
    origins: list[Origin]
    outcomes: list[Outcome]
    bad: list[tuple[int, BadRecord]]


@dataclass(frozen=True, eq=False)
class EncodedRecord:
    """The examples of one record. They share one encoding, so each response is stored and scored once.

    Attributes:
        encoded: the prompt and the responses that an example uses; others count for no limit.
        ranks: for each example the indices of its responses in `encoded.responses`, best first.
        scores: of `encoded.responses`, nan if the record has none.
        ties: `rankings.training_examples`.
    """

    encoded: EncodedExample
    ranks: list[list[int]]
    scores: list[float]
    ties: int

    def examples(self) -> list[EncodedExample]:
        """Return the examples, each with its own responses."""
        responses, trained, truncated = self.encoded.responses, self.encoded.trained, self.encoded.truncated
        return [
            replace(
                self.encoded,
                responses=tuple(responses[index] for index in ranks),
                trained=tuple(trained[index] for index in ranks if trained),
                truncated=tuple(truncated[index] for index in ranks),
            )
            for ranks in self.ranks
        ]


class _Examples:
    """Collects the examples of a chunk."""

    def __init__(self) -> None:
        self.ids: list[TokenIds] = [np.empty(0, dtype=np.int32)]
        self.tokens = 0
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.pieces: list[int] = []
        self.keys: list[bytes] = []
        self.scores: list[float] = []
        self.masks: list[Mask] = [np.empty(0, dtype=np.bool_)]
        self.masked_tokens = 0
        self.mask_starts: list[int] = []
        self.trained_tokens: list[int] = []
        self.truncated: list[bool] = []
        self.prompts: list[int] = []
        self.origins: list[Origin] = []

    def add(self, record: EncodedRecord, prompt: int, origin: Origin) -> None:
        encoded = record.encoded
        pieces = (encoded.prompt_ids, *encoded.responses)
        starts = [self.tokens + int(before) for before in np.cumsum([0, *map(len, pieces)])]
        keys = [response_key(encoded.prompt_ids, response) for response in encoded.responses]
        self.ids += pieces
        self.tokens = starts[-1]
        masks = self._add_masks(encoded)
        for ranks in record.ranks:
            used = [0, *(1 + index for index in ranks)]
            self.starts += [starts[piece] for piece in used]
            self.lengths += [len(pieces[piece]) for piece in used]
            self.pieces.append(len(used))
            self.keys += [keys[index] for index in ranks]
            self.scores += [record.scores[index] for index in ranks]
            self.mask_starts += [masks[index][0] for index in ranks]
            self.trained_tokens += [masks[index][1] for index in ranks]
            self.truncated += [encoded.truncated[index] for index in ranks]
            self.prompts.append(prompt)
            self.origins.append(origin)

    def _add_masks(self, encoded: EncodedExample) -> list[tuple[int, int]]:
        """Add the masks of a record; return offset and number of trained tokens of each response."""
        found = []
        for number, response in enumerate(encoded.responses):
            trained = len(response)
            start = self.masked_tokens
            if encoded.trained and not encoded.trained[number].all():
                trained = int(encoded.trained[number].sum())
                self.masks.append(encoded.trained[number])
                self.masked_tokens += len(response)
            found.append((start, trained))
        return found


def encode_chunk(
    records: Sequence[PreferenceRecord | BadRecord],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    part: Part = ALL_RECORDS,
) -> EncodedChunk:
    """Encode the `records` of `part`; one that cannot be used is dropped and its reason recorded.

    Raises:
        DataError: a record cannot be used and `data.on_bad_record` is `error`.
    """
    examples = _Examples()
    outcomes: list[Outcome] = []
    bad: list[tuple[int, BadRecord]] = []
    for index, record in enumerate(records):
        outcome = _outcome(record, config, tokenizer, part, examples)
        if isinstance(outcome, Outcome):
            outcomes.append(outcome)
            continue
        if config.on_bad_record is OnBadRecord.error:
            raise bad_record_error(outcome)
        unread = tuple((f"unread_{name}", 1) for name in outcome.unread)
        outcomes.append(Outcome(dropped=outcome.reason, changed=unread))
        if len(bad) < SHOWN_EXAMPLES or all(outcome.reason != shown.reason for _, shown in bad):
            bad.append((index, outcome))
    return EncodedChunk(
        ids=np.concatenate(examples.ids),
        piece_starts=np.array(examples.starts, dtype=np.int64),
        piece_tokens=np.array(examples.lengths, dtype=np.int64),
        pair_pieces=np.array(examples.pieces, dtype=np.int64),
        keys=np.frombuffer(b"".join(examples.keys), dtype=np.uint64).reshape(-1, 2),
        scores=np.array(examples.scores, dtype=np.float64),
        trained=np.concatenate(examples.masks),
        mask_starts=np.array(examples.mask_starts, dtype=np.int64),
        trained_tokens=np.array(examples.trained_tokens, dtype=np.int64),
        truncated=np.array(examples.truncated, dtype=np.bool_),
        prompts=np.array(examples.prompts, dtype=np.uint64),
        origins=examples.origins,
        outcomes=outcomes,
        bad=bad,
    )


def encode_record(
    record: PreferenceRecord, config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> EncodedRecord | BadRecord:
    """Encode the training examples of a record; errors and bad records as `encode_pair`."""
    ranks, ties = training_examples(record, config.ranked)
    used = sorted(set().union(*ranks))
    responses = tuple(record.responses[index] for index in used)
    encoded = encode_pair(replace(record, responses=responses), tokenizer, config)
    if isinstance(encoded, BadRecord):
        return encoded
    new_index = {index: number for number, index in enumerate(used)}
    scores = record.scores or (np.nan,) * len(record.responses)
    return EncodedRecord(
        encoded,
        [[new_index[index] for index in example] for example in ranks],
        [scores[index] for index in used],
        ties,
    )


def _outcome(
    record: PreferenceRecord | BadRecord,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    part: Part,
    examples: _Examples,
) -> Outcome | BadRecord:
    """Add the examples of a record, if it belongs to `part`."""
    elsewhere = Outcome(changed=((part.others, 1),))
    if isinstance(record, BadRecord):
        return record if part.has_bad_records else elsewhere
    prompt = prompt_hash(record.prompt)
    if not part.has(prompt):
        return elsewhere
    found = encode_record(record, config, tokenizer)
    if isinstance(found, BadRecord):
        return found
    examples.add(found, prompt, record.origin)
    changed = found.encoded.changes.counts() | {"ties_left_out": found.ties}
    best, *others = found.encoded.truncated
    if others:
        changed |= {"chosen_truncated": int(best), "rejected_truncated": int(any(others))}
    is_applied = found.encoded.changes.templated_text and config.template is TextTemplate.applied
    form = {str: "text", Dialogue: "hh (Human/Assistant turns)"}.get(type(record.prompt), "messages")
    way = "without the chat template"
    if found.encoded.changes.by_template:
        way = "by the chat template"
    elif is_applied:
        way = "with the template that is in it"
    elif form == "text" and tokenizer.chat_template:
        changed["chat_template_not_applied"] = 1
    counted = tuple((name, times) for name, times in changed.items() if times)
    return Outcome(None, len(found.ranks), counted, f"{form}, {way}")
