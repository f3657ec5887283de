"""Views of a dataset: the same examples, with the prompts that a reference or a teacher reads instead.

A view has the examples of its dataset one for one, and the same ids of the responses: indices, batches, masks
and partners are one. Whatever scores or looks up takes the view, whatever trains takes the dataset.
"""

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.data import Example
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import ScorerPrompts, key_order, made_from
from dpo_dist.encoded.store import cache_errors
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.tables import Columns, TableFacts, stored_columns

_CHUNK_EXAMPLES = 2**18
_VERSION = 1  # increased when equal examples get another view


def with_views(dataset: PreferenceDataset, scorers: Collection[str]) -> PreferenceDataset:
    """Return the dataset with views for those of the `scorers` that read another prompt of an example.

    After `with_partners`, whose responses stand behind the scorers' prompts, too. The columns of a view are
    computed once for the sources of the dataset, and then mapped.
    """
    views = {
        scorer: _view(dataset, scorer, prompts)
        for scorer, prompts in dataset.scorer_prompts.items()
        if scorer in scorers
    }
    return replace(dataset, views=views)


def _view(dataset: PreferenceDataset, scorer: str, prompts: ScorerPrompts) -> PreferenceDataset:
    fingerprint = text_digest(f"{dataset.fingerprint} {scorer} {_VERSION}")
    # With partners, whose responses are cut to a length, a dataset has other files of columns.
    names = [file.name for file in dataset.columns_files]
    content = {"dataset": dataset.fingerprint, "columns": names, **made_from(dataset.encoded)}
    # Examples that were never in a file have no cache.
    with nullcontext(dataset.encoded[0].cache) if dataset.encoded else TemporaryDirectory() as cache:
        file = Path(cache) / f"{fingerprint}-{text_digest(repr(names))[:8]}-columns.arrow"
        with cache_errors(file):
            arrays, _ = stored_columns(file, content, partial(_write_view, dataset, prompts))
    own = dataset.ids.chunks if isinstance(dataset.ids, pa.ChunkedArray) else [pa.array(dataset.ids)]
    return replace(
        dataset,
        ids=pa.chunked_array([*own, *prompts.ids.chunks], pa.int32()),
        prefixes=None,
        scorer_prompts={},
        columns_files=(*dataset.columns_files, file) if dataset.encoded else (),
        **arrays,
    )


def _write_view(dataset: PreferenceDataset, prompts: ScorerPrompts, columns: Columns) -> TableFacts:
    """Append the columns that other prompts change; their ids stand behind those of the dataset."""
    for first in range(0, len(dataset), _CHUNK_EXAMPLES):  # memory does not grow with the examples
        examples = np.arange(first, min(first + _CHUNK_EXAMPLES, len(dataset)), dtype=np.int64)
        pieces = slice(int(dataset.first_pieces[examples[0]]), int(dataset.first_pieces[examples[-1] + 1]))
        own = dataset.first_pieces[examples] - pieces.start
        starts = np.array(dataset.piece_starts[pieces])
        tokens = np.array(dataset.piece_tokens[pieces])
        is_other = prompts.tokens[examples] > 0
        starts[own[is_other]] = len(dataset.ids) + prompts.starts[examples][is_other]
        tokens[own[is_other]] = prompts.tokens[examples][is_other]
        responses = dataset.response_indices(examples)
        keys = np.array(dataset.keys[responses])
        keys[np.repeat(is_other, dataset.response_counts(examples))] = response_keys(
            _as_read(dataset, prompts, examples[is_other].tolist())
        )
        columns.append(piece_starts=starts, piece_tokens=tokens, keys=keys)
    columns.append(key_order=key_order(columns["keys"]))
    return {}


def _as_read(
    dataset: PreferenceDataset, prompts: ScorerPrompts, indices: Collection[int]
) -> Iterator[Example]:
    for index in indices:
        start = int(prompts.starts[index])
        ids = np.asarray(prompts.ids[start : start + int(prompts.tokens[index])])
        yield replace(dataset.example(index), prompt_ids=ids)
