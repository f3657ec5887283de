"""Facts that only encoding shows: tokens by side, cuts, doubled BOS and EOS."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dpo_dist.config.data_schema import DataConfig, Truncation
from dpo_dist.data.counts import Outcome
from dpo_dist.data.encode import TokenIds
from dpo_dist.data.encode_chunk import EncodedChunk, encode_chunk
from dpo_dist.data.records import Origin, PreferenceRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More tokens than any record has.
_NO_LIMIT = 2**31 - 1
_CUT = ("prompt_truncated", "response_truncated")
# With these reasons a record is encoded but too long.
_TOO_LONG = {
    "too_long",
    "prompt_fills_max_length",
    "response_fills_max_length",
    "identical_after_truncation",
}


class Names(Protocol):
    """Counts records by name."""

    def add(self, name: str, origin: Origin) -> None:
        """Count a record under `name`."""


@dataclass(eq=False)
class TokenFacts:
    """Facts about encoded records.

    Attributes:
        kept: records with at least one example.
        pairs: examples.
        changed: changes made by encoding, by kind.
        lengths: [encoded, 3], tokens of prompt, first and last response before anything is cut; -1 for a
            missing rejected one. Records that are dropped because of their length are included.
        cut: kept records of which a side is cut, by side.
        cut_tokens: tokens cut from these, by side.
        tokens: of all responses, each with its prompt, as trained.
        unique_tokens: with each prompt counted once per record.
        response_tokens: of the responses of all examples.
        trained_tokens: those of them that the loss counts.
    """

    kept: int = 0
    pairs: int = 0
    changed: Counter[str] = field(default_factory=Counter)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    cut: Counter[str] = field(default_factory=Counter)
    cut_tokens: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    unique_tokens: int = 0
    response_tokens: int = 0
    trained_tokens: int = 0


def token_facts(
    records: Sequence[PreferenceRecord],
    chunk: EncodedChunk,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    names: Names,
) -> TokenFacts:
    """Return the facts about `records`, which were encoded as `chunk`; count faults in `names`."""
    prompts = np.cumsum(chunk.pair_pieces) - chunk.pair_pieces
    facts = TokenFacts(
        response_tokens=int(chunk.piece_tokens.sum() - chunk.piece_tokens[prompts].sum()),
        trained_tokens=int(chunk.trained_tokens.sum()),
    )
    pieces = _pieces(chunk)
    long = [index for index, outcome in enumerate(chunk.outcomes) if _is_cut(outcome)]
    whole_config = replace(config, max_length=_NO_LIMIT, max_prompt_length=None, truncation=Truncation.drop)
    whole_chunk = encode_chunk([records[index] for index in long], whole_config, tokenizer)
    whole_pieces = dict(zip(long, _pieces(whole_chunk), strict=True))
    for index, (record, outcome, kept) in enumerate(zip(records, chunk.outcomes, pieces, strict=True)):
        whole = whole_pieces.get(index, kept)
        if not whole:
            continue
        lengths = _side_lengths(whole)
        facts.lengths.append(lengths)
        if outcome.dropped is None:
            facts.kept += 1
            facts.pairs += outcome.pairs
            facts.changed.update(dict(outcome.changed))
            _add_cuts(facts, lengths, _side_lengths(kept))
            _name(record, whole, outcome, tokenizer, names)
            prompt, *responses = map(len, kept)
            facts.tokens += prompt * len(responses) + sum(responses)
            facts.unique_tokens += prompt + sum(responses)
    return facts


def _is_cut(outcome: Outcome) -> bool:
    return outcome.dropped in _TOO_LONG or any(name in _CUT for name, _times in outcome.changed)


def _pieces(chunk: EncodedChunk) -> list[list[TokenIds]]:
    """Return the prompt and the different responses of each record, best first; empty if it was dropped."""
    found: list[list[TokenIds]] = []
    example = piece = 0
    for outcome in chunk.outcomes:
        spans: dict[int, int] = {}
        for _ in range(outcome.pairs):
            count = int(chunk.pair_pieces[example])
            for at in range(piece, piece + count):
                # Two responses of no tokens can start at the same offset; neither trains anything.
                spans[int(chunk.piece_starts[at])] = int(chunk.piece_tokens[at])
            example, piece = example + 1, piece + count
        found.append([chunk.ids[start : start + length] for start, length in sorted(spans.items())])
    return found


def _side_lengths(pieces: list[TokenIds]) -> tuple[int, int, int]:
    return len(pieces[0]), len(pieces[1]), len(pieces[-1]) if len(pieces) > 2 else -1


def _add_cuts(facts: TokenFacts, whole: tuple[int, int, int], kept: tuple[int, int, int]) -> None:
    for side, before, after in zip(("prompt", "chosen", "rejected"), whole, kept, strict=True):
        if before > after:
            facts.cut[side] += 1
            facts.cut_tokens[side] += before - after


def _name(
    record: PreferenceRecord,
    pieces: list[TokenIds],
    outcome: Outcome,
    tokenizer: "PreTrainedTokenizerBase",
    names: Names,
) -> None:
    prompt, *responses = pieces
    for name, _times in outcome.changed:
        names.add(name, record.origin)
    bos = tokenizer.bos_token_id
    if bos is not None and (prompt[:2] == bos).sum() > 1:
        names.add("doubled_bos", record.origin)
    special = set(tokenizer.all_special_ids)
    if any(len(ids) > 1 and ids[-1] == ids[-2] and int(ids[-1]) in special for ids in responses):
        names.add("doubled_end", record.origin)
    # The last token ends the turn.
    if any(len(ids) <= 2 for ids in responses):
        names.add("one_token_response", record.origin)
