"""Columns of an encoded dataset, computed once and then mapped (`foundation.tables`)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_dist.batching.content_keys import Keys
from dpo_dist.batching.sampler import Indices
from dpo_dist.data import NUMBERS, SCORERS
from dpo_dist.encoded.store import EncodedSource
from dpo_dist.foundation.tables import Array, Columns, TableFacts, stored_digest

_VERSION = 4  # increased when equal records get other columns or counts
NUMBER = "number_"
"""Begins the name of a column of one of `NUMBERS`."""
PROMPT_STARTS = "prompt_starts_"
PROMPT_TOKENS = "prompt_tokens_"
"""Begin the names of columns of one of `SCORERS`, [examples]: offset and length of its own prompt."""


class ScorerPrompts(NamedTuple):
    """The prompts that a scorer reads in place of the examples' own."""

    ids: pa.ChunkedArray  # int32 [tokens]
    starts: Array  # int64 [examples], offset of each prompt in `ids`
    tokens: Array  # int32 [examples], length of each prompt; 0: the scorer reads the example's own


_NEUTRAL: dict[str, Any] = {
    **{NUMBER + name: neutral for name, neutral in NUMBERS.items()},
    **{PROMPT_STARTS + scorer: np.int64(0) for scorer in SCORERS},
    **{PROMPT_TOKENS + scorer: np.int32(0) for scorer in SCORERS},
}
"""The columns that a dataset has only where a value has an effect, and the value without one."""

# Columns of `dataset_columns` that do not depend on the examples before them.
_UNCHANGED = (
    *("piece_tokens", "keys", "scores", "trained_tokens", "truncated", "begins"),
    *("prompt_hashes", "digests"),
)
DATASET_COLUMNS = (*_UNCHANGED, "piece_starts", "first_pieces", "mask_starts", "origins", "key_order")
"""Columns that are fields of `PreferenceDataset`."""
PREFIX_COLUMNS = ("places", "rows", "shared")
"""Columns that are fields of `Prefixes`."""


def made_from(sources: Sequence[EncodedSource]) -> TableFacts:
    """Return what decides the columns of these sources, for `stored_columns`."""
    return {"version": _VERSION, "records": [stored_digest(source.file) for source in sources]}


def append_records(columns: Columns, tables: Sequence[pa.Table]) -> TableFacts:
    """Append the columns of sources, whose tables are those of `read_source`; return facts about them.

    Needs memory for a batch of records, and to sort the keys. There is at least one example.
    """
    files = dict[tuple[int, str], int]()
    largest = -1
    records = tokens = masked = pieces = examples = 0
    prompt_tokens = dict.fromkeys(SCORERS, 0)
    for source, table in enumerate(tables):
        for batch in table.to_batches():
            columns.append(shared=batch["shared"].to_numpy())
            part = pa.Table.from_batches([batch])
            example_counts = _lengths(part["examples"])
            if not example_counts.any():
                continue
            chunk = dataset_columns(part)
            names = [(source, name) for name in chunk["source_paths"]]
            file_numbers = np.array([files.setdefault(name, len(files)) for name in names])
            starts = chunk["piece_starts"]
            sizes = chunk["piece_tokens"]
            prompts = chunk["first_pieces"]
            counts = np.diff(prompts) - 1
            with_effect = {NUMBER + name: values for name, values in chunk["numbers"].items()}
            for scorer, read in chunk["scorer_prompts"].items():
                with_effect[PROMPT_STARTS + scorer] = read.starts + prompt_tokens[scorer]
                with_effect[PROMPT_TOKENS + scorer] = read.tokens
                prompt_tokens[scorer] += len(read.ids)
            # A chunk has only the columns with an effect. Once one has a column, each example needs a value:
            # those before it, and those of later chunks without the column, get the one without effect.
            for column, neutral in _NEUTRAL.items():
                values = with_effect.get(column)
                if values is None and column not in columns:
                    continue
                earlier = np.full(0 if column in columns else examples, neutral)
                if values is None:
                    values = np.full(len(counts), neutral)
                columns.append(**{column: np.concatenate((earlier, values))})
            columns.append(
                **{name: chunk[name] for name in _UNCHANGED},
                piece_starts=starts + tokens,
                first_pieces=prompts[:-1] + pieces,
                mask_starts=chunk["mask_starts"] + masked,
                origins=np.column_stack((file_numbers[chunk["origins"][:, 0]], chunk["origins"][:, 1])),
                places=np.repeat(batch["place"].to_numpy().astype(np.int64) + records, example_counts),
                rows=first_rows(
                    starts, sizes, prompts[:-1], np.delete(np.arange(len(sizes)), prompts[:-1]), counts
                ),
            )
            largest = max(largest, chunk["largest_id"])
            tokens += len(chunk["ids"])
            masked += len(chunk["trained"])
            pieces += len(sizes)
            examples += len(counts)
        records += len(table)
    columns.append(shared=np.zeros(1, dtype=np.int32), first_pieces=np.array([pieces], dtype=np.int64))
    columns.append(key_order=key_order(columns["keys"]))
    duplicates = examples - len(np.unique(columns["digests"]))
    return {"files": [*files], "largest_id": largest, "duplicates": duplicates}


def key_order(keys: Keys) -> Indices:
    """Return the responses' indices in ascending order of their keys, by both words; int64."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


def example_digests(keys: Keys, counts: Indices) -> npt.NDArray[np.uint64]:
    """Return a digest of each example's keys in their order, which are digests of token ids.

    `keys`: those of the examples' responses, example after example; `counts`: responses of each example.
    """
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(keys)) - np.repeat(starts, counts)
    # Odd factors tell the orders apart. Of ten million examples, two share a digest with odds of 3e-6.
    return np.add.reduceat(keys.sum(axis=1) * (2 * rank + 1).astype(np.uint64), starts)


def first_rows(starts: Array, tokens: Array, prompts: Indices, pieces: Indices, counts: Indices) -> Indices:
    """Return how many leading tokens each example shares with its record's first row, for `Prefixes.rows`.

    `starts` and `tokens`: offset and length of each piece; `prompts` and `pieces`: the pieces that are the
    examples' prompts and responses; `counts`: responses of each example. Without the record's first response,
    which is behind the prompt in `ids`, this is the prompt.
    """
    is_first = starts[pieces] == np.repeat(starts[prompts] + tokens[prompts], counts)
    of_first = np.where(is_first, tokens[pieces] - 1, 0)
    first_tokens = np.add.reduceat(of_first, np.cumsum(counts) - counts)
    rows: Indices = tokens[prompts].astype(np.int64) + first_tokens
    return rows


def dataset_columns(table: pa.Table) -> dict[str, Any]:
    """Return the columns of `PreferenceDataset` of these records: ids and masks mapped."""

    def flat(name: str) -> Array:
        values: Array = pc.list_flatten(table[name]).to_numpy()
        return values

    tokens = flat("piece_tokens")
    trained_tokens = flat("trained_tokens")
    piece_counts = _lengths(table["piece_tokens"])
    example_counts = _lengths(table["examples"])
    examples = pc.list_flatten(table["examples"])
    response_counts = _lengths(examples)
    # The table stores each piece (a prompt or a response) once; several examples may use it. Of two records,
    # with the prompt P and the responses a, b, c, and with Q and d, and the examples (a, b), (a, c) and (d):
    #   stored pieces    P a b c Q d        indices 0 to 5; those of the responses a b c d: 0 to 3
    #   record_of        0     0     1      the record of each example
    #   ranks              0 1   0 2   0    each response of an example, among those of its record
    #   response_piece     1 2   1 3   5    the same, among all stored pieces
    #   response_row       0 1   0 2   3    the same, among all stored responses
    #   piece            0 1 2 0 1 3 4 5    the examples' prompts and responses, among all stored pieces
    record_of = np.repeat(np.arange(len(table)), example_counts)
    ranks = pc.list_flatten(examples).to_numpy()
    prompt_pieces = np.cumsum(piece_counts) - piece_counts  # of each record; a dropped one has no pieces
    response_piece = np.repeat(prompt_pieces[record_of], response_counts) + 1 + ranks
    is_response = np.ones(len(tokens), dtype=np.bool_)
    is_response[prompt_pieces[piece_counts > 0]] = False
    response_row = (np.cumsum(is_response) - 1)[response_piece]
    starts = np.cumsum(response_counts) - response_counts  # of each example, in the arrays of responses
    piece = np.insert(response_piece, starts, prompt_pieces[record_of])
    response_tokens = tokens[is_response]
    masked = np.where(trained_tokens < response_tokens, response_tokens, 0)
    # An example that lacks one of the record's responses may lack the one that begins like another.
    is_known = np.maximum.reduceat(ranks, starts) < response_counts
    keys = flat("keys").reshape(-1, 2)[response_row]
    files = table["file"].combine_chunks().dictionary_encode()
    origins = np.stack([files.indices.to_numpy(), table["line"].to_numpy()], axis=1)
    # Those of the `NUMBERS` that have an effect.
    values = np.tile(np.array([*NUMBERS.values()]), (len(table), 1))
    values[_lengths(table["numbers"]) > 0] = flat("numbers").reshape(-1, len(NUMBERS))
    by_name = zip(NUMBERS.items(), values[record_of].T, strict=True)
    numbers = {name: column.copy() for (name, neutral), column in by_name if (column != neutral).any()}
    scorer_prompts = dict[str, ScorerPrompts]()
    for scorer in SCORERS:
        lengths = _lengths(table[f"{scorer}_prompt"])
        if lengths.any():
            prompt_starts = np.cumsum(lengths) - lengths
            prompt_ids = pc.list_flatten(table[f"{scorer}_prompt"])
            scorer_prompts[scorer] = ScorerPrompts(
                prompt_ids, prompt_starts[record_of], lengths[record_of].astype(np.int32)
            )
    return {
        "source_paths": tuple(files.dictionary.to_pylist()),
        "largest_id": pc.max(table["largest_id"]).as_py(),
        "ids": pc.list_flatten(table["ids"]),
        "piece_starts": (np.cumsum(tokens, dtype=np.int64) - tokens)[piece],
        "piece_tokens": tokens[piece],
        "first_pieces": np.insert(np.cumsum(response_counts + 1), 0, 0),
        "keys": keys,
        "digests": example_digests(keys, response_counts),
        "scores": flat("scores")[response_row],
        "numbers": numbers,
        "scorer_prompts": scorer_prompts,
        "trained": pc.list_flatten(table["trained"]),
        "mask_starts": (np.cumsum(masked, dtype=np.int64) - masked)[response_row],
        "trained_tokens": trained_tokens[response_row],
        "truncated": flat("truncated")[response_row],
        "begins": np.where(np.repeat(is_known, response_counts), flat("begins")[response_row], np.int32(0)),
        "prompt_hashes": table["prompt"].to_numpy()[record_of],
        "origins": origins[record_of],
    }


def _lengths(lists: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(pc.list_value_length(lists), dtype=np.int64)
