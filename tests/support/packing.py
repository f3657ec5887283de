"""Pairs as token ids, and what a model says of them one plain sequence after the other."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import PackedBatch, pack
from dpo_dist.batching.prefixes import Prefixes, common_tokens, input_rows
from dpo_dist.data.example import Example, TokenIds
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import key_order

VOCABULARY = 97
# Of a usual model.
COSTS = ComputeCosts(key=1 / 8192, target=0.1, beyond_prompts=True)

# With these a prefix is shared if it has five tokens.
SHARING = ComputeCosts(key=0, target=0, beyond_prompts=True)

# Of pairs: prompt, then one to three responses.
pair_shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=3)).map(
        lambda pair: (pair[0], *pair[1])
    ),
    min_size=1,
    max_size=5,
)


def random_pairs(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[Example]:
    """Prompts and responses of these lengths: prompt, response, response, ..."""
    generator = np.random.default_rng(seed)

    def ids(length: int) -> TokenIds:
        return generator.integers(3, VOCABULARY, length).astype(np.int32)

    return [Example(ids(prompt), tuple(map(ids, responses))) for prompt, *responses in shapes]


def branching(pairs: Sequence[Example], seed: int = 0) -> list[Example]:
    """The same pairs, most of which begin like a part of an earlier row, as do their responses."""
    generator, rows, found = np.random.default_rng(seed), list[TokenIds](), list[Example]()

    def begun(ids: TokenIds, like: TokenIds) -> TokenIds:
        most = min(len(ids), len(like))
        shared = most if generator.integers(3) == 0 else int(generator.integers(most + 1))
        return np.concatenate((like[:shared], ids[shared:]))

    for pair in pairs:
        prompt = begun(pair.prompt_ids, rows[generator.integers(len(rows))]) if rows else pair.prompt_ids
        first, *others = pair.responses
        responses = (first, *(begun(ids, first) for ids in others))
        found.append(Example(prompt, responses, pair.trained))
        rows += input_rows(found[-1])
    return found


def packed_tokens(prompt: int, responses: Sequence[int]) -> int:
    """Tokens of a prompt with its responses in a packed batch."""
    return prompt + sum(tokens - 1 for tokens in responses)


def dataset_of(pairs: Sequence[Example]) -> PreferenceDataset:
    """Return a dataset in memory of these pairs, with their masks and content keys, and how they begin."""
    pieces = [piece for pair in pairs for piece in (pair.prompt_ids, *pair.responses)]
    keys = response_keys(pairs)
    lengths = np.array([len(piece) for piece in pieces])
    masks = [mask for pair in pairs for mask in pair.masks]
    return PreferenceDataset(
        fingerprint="",
        counts={},
        source_paths=("",),
        source_pairs=(len(pairs),),
        source_labels=("",),
        largest_id=int(np.concatenate(pieces).max()),
        ids=np.concatenate(pieces),
        piece_starts=np.cumsum(lengths) - lengths,
        piece_tokens=lengths,
        first_pieces=np.cumsum([0, *(1 + len(pair.responses) for pair in pairs)]),
        keys=keys,
        key_order=key_order(keys),
        scores=np.full(len(keys), np.nan),
        trained=np.concatenate([np.empty(0, dtype=np.bool_), *masks]),
        mask_starts=np.cumsum([0, *map(len, masks)])[:-1],
        trained_tokens=np.array([mask.sum() for mask in masks]),
        truncated=np.zeros(len(keys), dtype=np.bool_),
        begins=np.array([tokens for pair in pairs for tokens in begins_of(pair)], dtype=np.int32),
        prompt_hashes=np.arange(len(pairs), dtype=np.uint64),
        digests=np.arange(len(pairs), dtype=np.uint64),
        origins=np.zeros((len(pairs), 2), dtype=np.int64),
        prefixes=prefixes_of(pairs),
    )


def begins_of(pair: Example) -> list[int]:
    """Return the leading tokens that each response shares with an earlier one of the pair."""
    inputs = [response[:-1] for response in pair.responses]
    earlier = [[common_tokens(own, one) for one in inputs[:place]] for place, own in enumerate(inputs)]
    return [max(common, default=0) for common in earlier]


def prefixes_of(pairs: Sequence[Example]) -> Prefixes:
    """Return how these pairs begin, each a record of its own."""
    rows = [input_rows(pair)[0] for pair in pairs]
    order = sorted(range(len(rows)), key=lambda index: rows[index].tobytes())
    shared = [0, *(common_tokens(rows[a], rows[b]) for a, b in pairwise(order)), 0]
    return Prefixes(np.argsort(order), np.array(list(map(len, rows))), np.array(shared, dtype=np.int32))


def pack_unkeyed(pairs: Sequence[Example], costs: ComputeCosts | None = SHARING) -> PackedBatch:
    """One micro-batch whose keys mean nothing; a tree of the prefixes of five tokens or more."""
    responses = sum(len(pair.responses) for pair in pairs)
    return pack(pairs, np.zeros((responses, 2), dtype=np.uint64), costs=costs)


def plain_logps(causal_lm: Any, pairs: Sequence[Example]) -> Tensor:
    """Log-probs of all response tokens by the model's own forward, a response at a time: the definition."""
    logps = []
    for pair in pairs:
        for response in pair.responses:
            ids = torch.from_numpy(np.concatenate((pair.prompt_ids, response)).astype(np.int64))
            logits = causal_lm(ids[None], use_cache=False).logits[0].log_softmax(-1)
            predictions = logits[len(pair.prompt_ids) - 1 : -1]
            logps.append(predictions.gather(1, ids[len(pair.prompt_ids) :, None]).squeeze(1))
    return torch.cat(logps)
