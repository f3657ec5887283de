"""Encoded sources on disk: an Arrow file with a row per record, and a digest; written once, then mapped.

The distinct images of a source are in a second such file, the order of its records by token ids in a third.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_dist.config.losses import NUMBERS
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.counts import SHOWN_EXAMPLES, DataCounts, Outcome
from dpo_dist.data.encoded.order import ORDER_SCHEMA, order_by_ids
from dpo_dist.data.images import ExpandedImage
from dpo_dist.data.read.images import image_state
from dpo_dist.data.read.sources import root_of
from dpo_dist.data.records import BadRecord, Origin
from dpo_dist.data.text.lengths import SourceLengths
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import (
    MEMO_FOLDER,
    content_digest,
    file_identity,
    recall,
    remember,
    staged_file,
)

Array: TypeAlias = npt.NDArray[Any]

_BATCH_BYTES = 2**24
_DIGEST_BYTES = 16  # of the blake2b digest behind the Arrow file

ROW_SCHEMA = pa.schema(
    {
        # Relative to the path of the source, which may be moved.
        "file": pa.string(),
        "line": pa.int64(),
        # `Outcome` in JSON; the detail of a dropped record's reason.
        "outcome": pa.string(),
        "detail": pa.string(),
        # Kept records. Pieces are the prompt and the responses; examples share them.
        "prompt": pa.uint64(),
        "largest_id": pa.int32(),
        "ids": pa.list_(pa.int32()),
        "piece_tokens": pa.list_(pa.int32()),
        "keys": pa.list_(pa.uint64()),
        "scores": pa.list_(pa.float64()),
        # A value for each of `NUMBERS`; empty if no number has an effect.
        "numbers": pa.list_(pa.float64()),
        "truncated": pa.list_(pa.bool_()),
        # For each response, the most leading tokens that an earlier one also has, neither with its last.
        "begins": pa.list_(pa.int32()),
        "trained_tokens": pa.list_(pa.int32()),
        # Masks of the responses of which the loss counts only some tokens.
        "trained": pa.list_(pa.bool_()),
        # The indices of the responses of each example, best first.
        "examples": pa.list_(pa.list_(pa.int32())),
        # `EncodedExample.lengths`, also of records that are dropped for their length.
        "lengths": pa.list_(pa.int64()),
        # The digests of the prompt's images; their files, if the record only names them, as they were read.
        "images": pa.list_(pa.binary()),
        "image_files": pa.list_(pa.string()),
        "image_states": pa.list_(pa.string()),
    }
)
IMAGE_SCHEMA = pa.schema({"digest": pa.binary(), "tokens": pa.int64(), "content": pa.large_binary()})

EncodedChunk: TypeAlias = tuple[pa.RecordBatch, dict[bytes, ExpandedImage]]
"""Encoded records, and their images by digest."""


@dataclass(frozen=True)
class EncodedSource:
    """The first `limit` records (None: all) of a source, encoded in a file of the cache; its label."""

    path: str
    cache: Path
    fingerprint: str  # digest of everything that decides the ids, but the files of images
    limit: int | None = None
    label: str = ""
    folders: str = ""  # digest of the folders in which images are looked up; empty: images are not read
    part: int | None = None  # number of a part that is not joined yet; None: all records

    @property
    def file(self) -> Path:
        """The file with the records."""
        folders = f"-{self.folders}" if self.folders else ""
        first = "" if self.limit is None else f"-first-{self.limit}"
        part = "" if self.part is None else f"-part-{self.part:06}"
        return self.cache / f"{self.fingerprint}{folders}{first}{part}.arrow"

    @property
    def image_file(self) -> Path:
        """The file with the distinct images of the records, if they have any."""
        return self.file.with_name(f"{self.file.stem}-images.arrow")

    @property
    def order_file(self) -> Path:
        """The file with the order of the records by their token ids."""
        return self.file.with_name(f"{self.file.stem}-order.arrow")

    def table(self) -> pa.Table | None:
        """Map the records; None if there is no file, or it or that of the images is damaged."""
        table = self._mapped(self.file)
        return None if table is None or (has_images(table) and self.images() is None) else table

    def images(self) -> pa.Table | None:
        """Map the images; None if there is no file, or it is damaged."""
        return self._mapped(self.image_file)

    def order(self, records: pa.Table) -> pa.Table | None:
        """Map the order of these records; None if there is no file, it is damaged, or of other records."""
        table = self._mapped(self.order_file)
        is_theirs = table is not None and table.schema.metadata == records.schema.metadata
        return table if is_theirs else None

    def _mapped(self, file: Path) -> pa.Table | None:
        """Map a file. It is read for its digest once, and again only if its `file_identity` has changed.

        The metadata of a table are its digest, of an order the digest of its records.
        """
        try:
            identity, memo = file_identity(file), self.cache / MEMO_FOLDER
            whole = pa.memory_map(str(file)).read_buffer()
            end = max(whole.size - _DIGEST_BYTES, 0)
            records, digest = whole.slice(0, end), whole.slice(end).to_pybytes().hex()
            if recall(memo, identity) != digest:
                if hashlib.blake2b(records, digest_size=_DIGEST_BYTES).hexdigest() != digest:
                    return None
                remember(memo, identity, digest)
            table = pa.ipc.open_file(records).read_all()
            return table.replace_schema_metadata(table.schema.metadata or {"digest": digest})
        except (OSError, pa.ArrowInvalid):
            return None


def has_images(table: pa.Table) -> bool:
    """Return whether any of these records has an image."""
    return bool(pc.sum(pc.list_value_length(table["images"])).as_py())


def has_changed_images(table: pa.Table) -> bool:
    """Return whether a file of the records' images has changed since it was read, or appeared.

    An absent file has not changed: its copy is stored.
    """
    files, states = (pc.list_flatten(table[name]).to_pylist() for name in ("image_files", "image_states"))
    known = set(zip(files, states, strict=True))
    return any(image_state(file) not in ("", state) for file, state in known)


def write_source(source: EncodedSource, chunks: Iterable[EncodedChunk]) -> None:
    """Write a source's records and images to its files, in constant memory."""
    with _staged(source.file, ROW_SCHEMA) as writer, ExitStack() as stack:
        for batch in _large(_without_images(chunks, source.image_file, stack)):
            writer.write_batch(batch)


def with_relative_files(batch: pa.RecordBatch, path: str) -> pa.RecordBatch:
    """Return records with the names of their files relative to the `path` of the source."""
    root = root_of(path).expanduser()
    names = batch["file"].dictionary_encode()
    files = [os.path.relpath(Path(name).expanduser(), root) for name in names.dictionary.to_pylist()]
    return batch.set_column(0, "file", pa.array(files, pa.string()).take(names.indices))


def ensure_order(source: EncodedSource, placeholder_id: int | None) -> None:
    """Write the order of an encoded source's records, unless it is there; see `order_by_ids`."""
    records = source.table()
    if records is not None and source.order(records) is None:
        with _staged(source.order_file, ORDER_SCHEMA.with_metadata(records.schema.metadata)) as writer:
            writer.write_batch(order_by_ids(records, source.images(), placeholder_id))


@contextmanager
def _staged(final: Path, schema: pa.Schema) -> Iterator[Any]:
    """Yield a writer of batches; what it wrote becomes the file `final`, with a digest behind it."""
    try:
        with staged_file(final) as staged:
            with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                yield writer
            digest = content_digest([staged])
            with staged.open("ab") as end:
                end.write(bytes.fromhex(digest))
    except OSError as error:  # the error of a full disk has no file name
        raise ConfigError(
            "the encoded data cannot be written",
            where="data.cache",
            got=f"{final}: {error}",
            remedy="free disk space, or set data.cache to a folder on another disk",
        ) from error


def _without_images(
    chunks: Iterable[EncodedChunk], final: Path, stack: ExitStack
) -> Iterator[pa.RecordBatch]:
    """Yield the records of each chunk, and write each distinct image once; `stack` closes their file."""
    writer, written = None, set[bytes]()
    for records, images in chunks:
        if new := [image for digest, image in images.items() if digest not in written]:
            writer = writer or stack.enter_context(_staged(final, IMAGE_SCHEMA))
            rows = [{name: getattr(image, name) for name in IMAGE_SCHEMA.names} for image in new]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=IMAGE_SCHEMA))
            written.update(image.digest for image in new)
        yield records


def _large(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Join consecutive batches: reading many small ones is slow."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(batch.nbytes for batch in pending) >= _BATCH_BYTES:
            yield pa.concat_batches(pending)
            pending = []
    if pending:
        yield pa.concat_batches(pending)


def read_source(source: EncodedSource) -> pa.Table:
    """Map the records of an encoded source, with the names of their files, and the columns of their order.

    Raises DataError: damaged.
    """
    table = source.table()
    order = None if table is None else source.order(table)
    if table is None or order is None:
        raise DataError(
            "the encoded data are damaged",
            where=f"data.cache: {source.file}",
            remedy="start again: damaged data are encoded again",
        )
    files = table["file"].dictionary_encode().combine_chunks()
    root = root_of(source.path)
    names = [source.path if name == "." else str(root / name) for name in files.dictionary.to_pylist()]
    shown = pa.DictionaryArray.from_arrays(files.indices, pa.array(names, pa.string()))
    table = table.set_column(0, "file", shown)
    for name in ORDER_SCHEMA.names:
        table = table.append_column(name, order[name])
    return table


def read_counts(table: pa.Table) -> DataCounts:
    """Return the counts of an encoded source's records."""
    coded = table["outcome"].dictionary_encode().combine_chunks()  # texts of many records overflow an array
    outcomes = [
        Outcome(drop, pairs, tuple(map(tuple, changed)), read_as)
        for drop, pairs, changed, read_as in map(json.loads, coded.dictionary.to_pylist())
    ]
    codes = coded.indices.to_numpy()
    is_dropped = np.array([outcome.dropped is not None for outcome in outcomes], dtype=np.bool_)
    shown = np.flatnonzero(is_dropped[codes])[:SHOWN_EXAMPLES]
    places = table.select(["file", "line", "detail"]).take(shown).to_pylist()
    named = [
        BadRecord(str(outcomes[code].dropped), Origin(row["file"], row["line"]), row["detail"])
        for code, row in zip(codes[shown], places, strict=True)
    ]
    numbers = np.bincount(codes, minlength=len(outcomes)).tolist()
    return DataCounts.from_outcomes(dict(zip(outcomes, numbers, strict=True)), named)


def read_lengths(table: pa.Table, counts: DataCounts, config: DataConfig) -> SourceLengths:
    """Return the lengths of records before they were cut."""
    lengths = pc.list_flatten(table["lengths"]).to_numpy().reshape(-1, 5)
    return SourceLengths(lengths, counts.read - len(lengths), config.max_bad_share * counts.read)


def dataset_columns(table: pa.Table) -> dict[str, Any]:
    """Return the columns of `PreferenceDataset`: ids and masks mapped, the others in memory."""

    def flat(name: str) -> Array:
        values: Array = pc.list_flatten(table[name]).to_numpy()
        return values

    tokens, trained_tokens = flat("piece_tokens"), flat("trained_tokens")
    pieces_of, examples_of = _lengths(table["piece_tokens"]), _lengths(table["examples"])
    examples = pc.list_flatten(table["examples"])
    responses_of = _lengths(examples)
    record = np.repeat(np.arange(len(table)), examples_of)
    # The index of each response of an example among all pieces, and among all responses.
    first_piece = np.cumsum(pieces_of) - pieces_of
    numbers = pc.list_flatten(examples).to_numpy()
    piece = np.repeat(first_piece[record], responses_of) + 1 + numbers
    is_response = np.ones(len(tokens), dtype=np.bool_)
    is_response[first_piece[pieces_of > 0]] = False
    response = (np.cumsum(is_response) - 1)[piece]
    response_tokens = tokens[is_response]
    masked = np.where(trained_tokens < response_tokens, response_tokens, 0)
    # The prompt of an example is before its first response.
    starts = np.cumsum(responses_of) - responses_of
    pieces = np.insert(piece, starts, first_piece[record])
    # An example that lacks one of the record's responses may lack the one that begins like another.
    is_known = np.maximum.reduceat(numbers, starts) < responses_of
    files = table["file"].combine_chunks().dictionary_encode()
    origins = np.stack([files.indices.to_numpy(), table["line"].to_numpy()], axis=1)
    return {
        "source_paths": tuple(files.dictionary.to_pylist()),
        "largest_id": pc.max(table["largest_id"]).as_py(),
        "ids": pc.list_flatten(table["ids"]),
        "piece_starts": (np.cumsum(tokens, dtype=np.int64) - tokens)[pieces],
        "piece_tokens": tokens[pieces],
        "first_pieces": np.insert(np.cumsum(responses_of + 1), 0, 0),
        "keys": flat("keys").reshape(-1, 2)[response],
        "scores": flat("scores")[response],
        "numbers": _numbers(table["numbers"], record),
        "trained": pc.list_flatten(table["trained"]),
        "mask_starts": (np.cumsum(masked, dtype=np.int64) - masked)[response],
        "trained_tokens": trained_tokens[response],
        "truncated": flat("truncated")[response],
        "begins": np.where(np.repeat(is_known, responses_of), flat("begins")[response], np.int32(0)),
        "prompt_hashes": table["prompt"].to_numpy()[record],
        "origins": origins[record],
    }


def _numbers(lists: pa.ChunkedArray, record: Array) -> dict[str, Array]:
    """Return each example's values by name, for the `NUMBERS` that have an effect."""
    given = pc.list_flatten(lists).to_numpy().reshape(-1, len(NUMBERS))
    if not len(given):
        return {}
    values = np.tile(np.array([*NUMBERS.values()]), (len(lists), 1))
    values[_lengths(lists) > 0] = given
    columns = zip(NUMBERS.items(), values[record].T, strict=True)
    return {name: column.copy() for (name, neutral), column in columns if (column != neutral).any()}


def _lengths(lists: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(pc.list_value_length(lists), dtype=np.int64)
