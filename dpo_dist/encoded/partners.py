"""Partners of labelled records: each gets a response to another prompt, from which `kto` estimates z.

The partner of a record is a function of the records of its source alone, so that the store holds its
log-probs for all epochs and runs: neither seed nor order, batch or number of processes change it.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.sampler import Indices
from dpo_dist.data import Example
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import key_order, made_from
from dpo_dist.encoded.store import cache_errors
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.tables import Array, Columns, TableFacts, stored_columns

_CHUNK_EXAMPLES = 2**18
_VERSION = 2  # increased when records get other partners


def with_partners(
    dataset: PreferenceDataset, max_length: int, scored_length: int | None = None
) -> PreferenceDataset:
    """Give each example, which has one response, its partner's response as a second one.

    The partner's response is cut to the room that `max_length` leaves after the prompt, and `scored_length`
    (None: the same) after a scorer's own; no ids are copied.
    The columns are computed once for the sources of the dataset, and then mapped. Raises DataError: more than
    half of a source's records have the same prompt.
    """
    fingerprint = text_digest(f"{dataset.fingerprint} partners {_VERSION}")
    # The dataset's fingerprint has the `max_length` of its own encoding; this one is what the caller gives.
    most = scored_length or max_length
    limits = {"max_length": max_length, "scored_length": most}
    content = {"dataset": dataset.fingerprint, **limits, **made_from(dataset.encoded)}
    # Examples that were never in a file have no cache.
    with nullcontext(dataset.encoded[0].cache) if dataset.encoded else TemporaryDirectory() as cache:
        file = Path(cache) / f"{fingerprint}-{max_length}-{most}-columns.arrow"
        with cache_errors(file):
            arrays, _ = stored_columns(file, content, partial(_write_partners, dataset, max_length, most))
    files = (*dataset.columns_files, file) if dataset.encoded else ()
    return replace(dataset, fingerprint=fingerprint, columns_files=files, **arrays)


def _write_partners(
    dataset: PreferenceDataset, max_length: int, scored_length: int, columns: Columns
) -> TableFacts:
    """Append the columns that partners change, with the examples' own values and their partners'."""
    stops = np.cumsum(dataset.source_pairs)
    sources = zip(stops, dataset.source_pairs, strict=True)
    partners = np.concatenate([_partners(dataset, stop - pairs, stop) for stop, pairs in sources])
    starts, tokens = (part.reshape(-1, 2) for part in (dataset.piece_starts, dataset.piece_tokens))
    ids = dataset.ids
    images = dataset.images

    def beside(first: Array, second: Array) -> Array:
        """Return the values of each example's response, and then of its partner's."""
        both: Array = np.stack((first, second), axis=1).reshape(-1, *first.shape[1:])
        return both

    for first in range(0, len(dataset), _CHUNK_EXAMPLES):  # memory does not grow with the examples
        examples = np.arange(first, min(first + _CHUNK_EXAMPLES, len(dataset)), dtype=np.int64)
        partner = partners[examples]
        # The partner's response, cut to the room that is left, and how many of its tokens the loss counts.
        prompts = tokens[examples, 0]
        responses = tokens[partner, 1]
        left = max_length - prompts
        for others in dataset.scorer_prompts.values():
            left = np.minimum(left, scored_length - others.tokens[examples])
        room = np.minimum(responses, np.maximum(left, 1)).astype(tokens.dtype)
        is_cut = room < responses
        trained = np.where(is_cut, room, dataset.trained_tokens[partner])
        for place in np.flatnonzero(is_cut & (dataset.trained_tokens[partner] < responses)):
            start = int(dataset.mask_starts[partner[place]])
            trained[place] = np.count_nonzero(dataset.trained[start : start + int(room[place])])
        prompt_starts = starts[examples, 0]
        partner_starts = starts[partner, 1]
        spans = (prompt_starts, prompt_starts + prompts, partner_starts, partner_starts + room)
        with_partner_alone = (
            Example(
                np.asarray(ids[start:stop]),
                (np.asarray(ids[partner_start:partner_stop]),),
                images=() if images is None else images.in_prompt(index),
            )
            for index, start, stop, partner_start, partner_stop in np.column_stack(
                (examples, *spans)
            ).tolist()
        )
        trained_tokens = trained.astype(dataset.trained_tokens.dtype)
        columns.append(
            piece_starts=np.column_stack((starts[examples], partner_starts)).ravel(),
            piece_tokens=np.column_stack((tokens[examples], room)).ravel(),
            first_pieces=examples * 3,
            keys=beside(dataset.keys[examples], response_keys(with_partner_alone)),
            scores=beside(dataset.scores[examples], np.full(len(examples), np.nan)),
            mask_starts=beside(dataset.mask_starts[examples], dataset.mask_starts[partner]),
            trained_tokens=beside(dataset.trained_tokens[examples], trained_tokens),
            truncated=beside(dataset.truncated[examples], dataset.truncated[partner] | is_cut),
            begins=np.zeros(2 * len(examples), dtype=np.int32),
        )
    columns.append(first_pieces=np.array([3 * len(dataset)], dtype=np.int64))
    columns.append(key_order=key_order(columns["keys"]))
    return {}


def _partners(dataset: PreferenceDataset, start: int, stop: int) -> Indices:
    """Return the partner of each example of a source, which has another prompt: a permutation."""
    prompts, keys = dataset.prompt_hashes[start:stop], dataset.keys[start:stop]
    order = np.lexsort((keys[:, 1], keys[:, 0], prompts))
    shift = int(np.unique(prompts, return_counts=True)[1].max(initial=0))
    if 2 * shift > len(order):
        raise DataError(
            "kto needs for each record a response to another prompt, but most records have the same prompt",
            where=str(dataset.origin(start)),
            got=f"{shift} of {len(order)} records of this source have one prompt",
            remedy="join files of one kind, or set loss=apo_zero_unpaired, which needs no other response",
        )
    partner = np.empty_like(order)
    partner[order] = start + np.roll(order, -shift)
    return partner
