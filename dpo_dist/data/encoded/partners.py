"""Partners of labelled records: each gets a response to another prompt, from which `kto` estimates z.

The partner of a record is a function of the records of its source alone, so that the store holds its
log-probs for all epochs and runs: neither seed nor order, batch or number of processes change it.
"""

from dataclasses import replace

import numpy as np

from dpo_dist.batching.example import response_keys
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.encoded.dataset import PreferenceDataset
from dpo_dist.data.encoded.store import Array
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import text_digest

_VERSION = 1  # increased when records get other partners


def with_partners(dataset: PreferenceDataset, max_length: int) -> PreferenceDataset:
    """Give each example, which has one response, its partner's response as a second one.

    The partner's response is cut to the room that `max_length` leaves after the prompt; no ids are copied.
    Raises DataError: more than half of a source's records have the same prompt.
    """
    stops = np.cumsum(dataset.source_pairs)
    partner = np.concatenate(
        [
            _partners(dataset, stop - pairs, stop)
            for stop, pairs in zip(stops, dataset.source_pairs, strict=True)
        ]
    )
    starts, tokens = (part.reshape(-1, 2) for part in (dataset.piece_starts, dataset.piece_tokens))
    prompts, responses = tokens.T
    kept = np.minimum(responses[partner], np.maximum(max_length - prompts, 1)).astype(tokens.dtype)
    is_cut = kept < responses[partner]
    trained = np.where(is_cut, kept, dataset.trained_tokens[partner])
    for example in np.flatnonzero(is_cut & (dataset.trained_tokens[partner] < responses[partner])):
        start = int(dataset.mask_starts[partner[example]])
        trained[example] = np.count_nonzero(dataset.trained[start : start + int(kept[example])])

    def beside(first: Array, second: Array) -> Array:
        """Return the values of each example's response, and then of its partner's."""
        both: Array = np.stack((first, second), axis=1).reshape(-1, *first.shape[1:])
        return both

    extended = replace(
        dataset,
        fingerprint=text_digest(f"{dataset.fingerprint} partners {_VERSION}"),
        piece_starts=np.column_stack((starts, starts[partner, 1])).ravel(),
        piece_tokens=np.column_stack((tokens, kept)).ravel(),
        first_pieces=np.arange(len(dataset) + 1, dtype=np.int64) * 3,
        scores=beside(dataset.scores, np.full(len(dataset), np.nan)),
        mask_starts=beside(dataset.mask_starts, dataset.mask_starts[partner]),
        trained_tokens=beside(dataset.trained_tokens, trained.astype(dataset.trained_tokens.dtype)),
        truncated=beside(dataset.truncated, dataset.truncated[partner] | is_cut),
        begins=np.zeros_like(tokens).ravel(),
    )
    partner_keys = response_keys(extended.example(index, [1]) for index in range(len(dataset)))
    return replace(extended, keys=beside(dataset.keys, partner_keys))


def _partners(dataset: PreferenceDataset, start: int, stop: int) -> Indices:
    """Return the partner of each example of a source, which has another prompt: a permutation."""
    prompts, keys = dataset.prompt_hashes[start:stop], dataset.keys[start:stop]
    order = np.lexsort((keys[:, 1], keys[:, 0], prompts))
    shift = int(np.unique(prompts, return_counts=True)[1].max(initial=0))
    if 2 * shift > len(order):
        raise DataError(
            "kto needs for each record a response to another prompt, but most records have the same prompt",
            where=str(dataset.origin(start)) if len(order) else "",
            got=f"{shift} of {len(order)} records of this source have one prompt",
            remedy="join files of one kind, or set loss=apo_zero_unpaired, which needs no other response",
        )
    partner = np.empty_like(order)
    partner[order] = start + np.roll(order, -shift)
    return partner
