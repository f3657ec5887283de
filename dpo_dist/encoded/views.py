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
import numpy.typing as npt
import pyarrow as pa

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.prefixes import Prefixes, input_rows
from dpo_dist.batching.sampler import Indices
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import PREFIX_COLUMNS, ScorerPrompts, key_order, made_from
from dpo_dist.encoded.store import cache_errors, sorted_places
from dpo_dist.foundation.files import temporary_folder, text_digest
from dpo_dist.foundation.tables import Columns, TableFacts, stored_columns

_VERSION = 2  # increased when equal examples get another view


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
    own = dataset.ids.chunks if isinstance(dataset.ids, pa.ChunkedArray) else [pa.array(dataset.ids)]
    ids = pa.chunked_array([*own, *prompts.ids.chunks], pa.int32())
    # Examples that were never in a file have no cache.
    with nullcontext(dataset.encoded[0].cache) if dataset.encoded else TemporaryDirectory() as cache:
        file = Path(cache) / f"{fingerprint}-{text_digest(repr(names))[:8]}-columns.arrow"
        with cache_errors(file):
            arrays, _ = stored_columns(file, content, partial(_write_view, dataset, ids, prompts, file))
    return replace(
        dataset,
        ids=ids,
        prefixes=Prefixes(*map(arrays.pop, PREFIX_COLUMNS)),
        scorer_prompts={},
        columns_files=(*dataset.columns_files, file) if dataset.encoded else (),
        **arrays,
    )


def _write_view(
    dataset: PreferenceDataset, ids: pa.ChunkedArray, prompts: ScorerPrompts, file: Path, columns: Columns
) -> TableFacts:
    """Append the columns that other prompts change; in `ids` theirs stand behind those of the dataset."""
    for examples in _chunks(dataset):
        pieces = slice(int(dataset.first_pieces[examples[0]]), int(dataset.first_pieces[examples[-1] + 1]))
        own = dataset.first_pieces[examples] - pieces.start
        starts = np.array(dataset.piece_starts[pieces])
        tokens = np.array(dataset.piece_tokens[pieces])
        is_other = prompts.tokens[examples] > 0
        starts[own[is_other]] = len(dataset.ids) + prompts.starts[examples][is_other]
        tokens[own[is_other]] = prompts.tokens[examples][is_other]
        columns.append(piece_starts=starts, piece_tokens=tokens)
    view = replace(
        dataset, ids=ids, piece_starts=columns["piece_starts"], piece_tokens=columns["piece_tokens"]
    )
    for examples in _chunks(dataset):
        is_other = prompts.tokens[examples] > 0
        keys = np.array(dataset.keys[dataset.response_indices(examples)])
        keys[np.repeat(is_other, dataset.response_counts(examples))] = response_keys(
            map(view.example, examples[is_other].tolist())
        )
        columns.append(keys=keys)
    columns.append(key_order=key_order(columns["keys"]))
    places, shared = _prompt_order(view, file)
    columns.append(places=places, rows=view.piece_tokens[view.first_pieces[:-1]].astype(np.int64))
    columns.append(shared=np.append(shared, np.int32(0)))
    return {}


def _chunks(dataset: PreferenceDataset, examples: int = 2**18) -> Iterator[Indices]:
    """Yield the indices of all examples in order, so few at once that memory does not grow with them."""
    for first in range(0, len(dataset), examples):
        yield np.arange(first, min(first + examples, len(dataset)), dtype=np.int64)


def _prompt_order(view: PreferenceDataset, file: Path) -> tuple[Indices, npt.NDArray[np.int32]]:
    """Return the place of each example by the ids of its prompt, and what neighbouring places share.

    The prompts are copied to a folder beside `file`. An example has a place of its own: what the responses of
    examples with one prompt share is left to `pack`.
    """
    stops = [np.zeros(1, dtype=np.int64)]
    with temporary_folder(file) as folder:
        rows = Columns(folder)
        for examples in _chunks(view, 2**12):
            read = [view.example(index, [0]) for index in examples.tolist()]
            prompts = [input_rows(example)[0][: len(example.prompt_ids)] for example in read]
            rows.append(ids=np.concatenate(prompts))
            stops.append(np.cumsum([*map(len, prompts)]) + stops[-1][-1])
        values = rows["ids"]
        buffers = [None, pa.py_buffer(np.concatenate(stops) * values.itemsize), pa.py_buffer(values)]
        texts = pa.Array.from_buffers(pa.large_binary(), len(view), buffers)
        places, shared = sorted_places(pa.chunked_array([texts]))
    return places.astype(np.int64), shared
