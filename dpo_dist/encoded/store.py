"""Encoded sources on disk: an Arrow file with a row per record, and a digest; written once, then mapped.

The distinct images of a source are in a second such file, the order of its records by token ids in a third.
The columns of a dataset (`dataset_columns.py`) are in such a file too.
"""

import json
import logging
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_dist.batching.prefixes import Row, common_tokens, image_words
from dpo_dist.data import (
    SCORERS,
    BadRecord,
    DataConfig,
    DataCounts,
    ImageFile,
    Origin,
    Outcome,
)
from dpo_dist.encoded.watched_images import is_unchanged, is_unchanged_by_metadata, metadata_in_folders
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import MEMO_FOLDER, recall, remember, text_digest
from dpo_dist.foundation.tables import map_table, write_table

log = logging.getLogger(__name__)

_BATCH_BYTES = 2**24

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
        # The prompts that scorers read in place of the record's; empty: the same.
        **{f"{scorer}_prompt": pa.list_(pa.int32()) for scorer in SCORERS},
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
        # Of records that are dropped and could be used with other limits; else 0.
        "tokens": pa.int64(),
        # The digests of the prompt's images; their files, if the record only names them, as they were read.
        "images": pa.list_(pa.binary()),
        "watched": pa.list_(
            pa.struct({"name": pa.string(), "folders": pa.list_(pa.string()), "state": pa.string()})
        ),
    }
)
IMAGE_SCHEMA = pa.schema({"digest": pa.binary(), "tokens": pa.int64(), "content": pa.large_binary()})

ORDER_SCHEMA = pa.schema(
    {
        "place": pa.int32(),  # of each record in the order
        "shared": pa.int32(),  # of each place: leading tokens of its record that the one before it has
    }
)

EncodedChunk: TypeAlias = tuple[pa.RecordBatch, pa.RecordBatch]
"""Encoded records, and their distinct images."""


@dataclass(frozen=True)
class EncodedSource:
    """The first `limit` records (None: all) of a source, encoded in a file of the cache; its label."""

    path: str
    cache: Path
    fingerprint: str  # digest of everything that decides the ids, but the files of images
    limit: int | None = None
    label: str = ""
    folders: str = ""  # digest of the folders in which images are looked up; empty: images are not read

    @property
    def file(self) -> Path:
        """The file with the records."""
        folders = f"-{self.folders}" if self.folders else ""
        first = "" if self.limit is None else f"-first-{self.limit}"
        return self.cache / f"{self.fingerprint}{folders}{first}.arrow"

    @property
    def copies(self) -> Path:
        """The folder with the files of a URL, while the source is encoded."""
        return self.cache / f"{self.file.stem}-copies"

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
        table = map_table(self.file)
        return None if table is None or (has_images(table) and self.images() is None) else table

    def images(self) -> pa.Table | None:
        """Map the images; None if there is no file, or it is damaged."""
        return map_table(self.image_file)

    def order(self, records: pa.Table) -> pa.Table | None:
        """Map the order of these records; None if there is no file, it is damaged, or of other records."""
        table = map_table(self.order_file)
        is_theirs = table is not None and table.schema.metadata == records.schema.metadata
        return table if is_theirs else None


def has_images(table: pa.Table) -> bool:
    """Return whether any of these records has an image."""
    return any(len(chunk.flatten()) for chunk in table["images"].chunks)


def has_changed_images(table: pa.Table, memo: Path) -> bool:
    """Return whether names of images lead to other contents than were read; an absent file's copy is stored.

    Files of which only the metadata changed are read once: `memo` is the folder with cached findings.
    """
    # Each file once; as columns, because millions of records would be gigabytes of objects.
    watched = pa.Table.from_struct_array(pc.list_flatten(table["watched"]))
    folders = pc.binary_join(watched["folders"], "\0")
    watched = watched.set_column(watched.schema.get_field_index("folders"), "folders", folders)
    doubtful = []
    for batch in watched.group_by(watched.column_names).aggregate([]).to_batches(max_chunksize=10_000):
        for each in batch.to_pylist():
            file = ImageFile(None, each["name"], tuple(each["folders"].split("\0")))
            if not is_unchanged_by_metadata(file, each["state"]):
                doubtful.append((file, each["state"]))
    doubtful.sort(key=lambda each: (each[0].name, each[0].folders, each[1]))
    files = text_digest(json.dumps([[metadata_in_folders(file), state] for file, state in doubtful]))
    if not doubtful or recall(memo, files) is not None:
        return False
    if all(is_unchanged(file, state) for file, state in doubtful):
        remember(memo, files, "equal images")
        return False
    return True


def write_source(source: EncodedSource, chunks: Iterable[EncodedChunk]) -> None:
    """Write a source's records, and each distinct image once, to its files, in constant memory."""
    stored = set[bytes]()
    pending = list[pa.RecordBatch]()
    with cache_errors(source.file), write_table(source.file, ROW_SCHEMA) as writer, ExitStack() as stack:
        image_writer = None
        for records, images in chunks:
            digests = images["digest"].to_pylist()
            new = [place for place, digest in enumerate(digests) if digest not in stored]
            if new:
                if image_writer is None:
                    image_writer = stack.enter_context(write_table(source.image_file, IMAGE_SCHEMA))
                image_writer.write_batch(images.take(pa.array(new)))
                stored.update(digests)
            # Consecutive records are joined: reading many small batches is slow.
            pending.append(records)
            if sum(batch.nbytes for batch in pending) >= _BATCH_BYTES:
                writer.write_batch(pa.concat_batches(pending))
                pending.clear()
        if pending:
            writer.write_batch(pa.concat_batches(pending))


def is_whole(source: EncodedSource) -> bool:
    """Return whether the file of a source is undamaged, and no image of it has changed."""
    if not source.file.exists():
        return False
    table = source.table()
    if table is not None and not has_changed_images(table, source.cache / MEMO_FOLDER):
        return True
    log.warning("%s is damaged, or images have changed: it is encoded again", source.file)
    return False


def ensure_order(source: EncodedSource, placeholder_id: int | None) -> None:
    """Write the order of an encoded source's records by the bytes of their ids, unless it is there.

    Ids are the prompt's and those of all responses, so that they begin with the record's first row. Those of
    images, the `placeholder_id`, are words of the digests. Sorting takes about 40 bytes a record.
    """
    records = source.table()
    if records is None or source.order(records) is not None:
        return
    tokens = dict[bytes, int]()
    images = source.images()
    if images is not None:
        tokens.update(zip(images["digest"].to_pylist(), images["tokens"].to_pylist(), strict=True))
    chunks = []
    for batch in records.select(["ids", "images"]).to_batches():
        ids = batch["ids"]
        digests = batch["images"].flatten().to_pylist()
        values = ids.values.to_numpy()
        if digests:  # else the ids are not copied
            values = values.copy()
            words = [image_words(digest, tokens[digest]) for digest in digests]
            values[values == placeholder_id] = np.concatenate(words)
        starts = ids.offsets.to_numpy().astype(np.int64) * values.itemsize
        buffers = [None, pa.py_buffer(starts), pa.py_buffer(values)]
        chunks.append(pa.Array.from_buffers(pa.large_binary(), len(ids), buffers))
    texts = pa.chunked_array(chunks, pa.large_binary())
    places, shared = sorted_places(texts)
    schema = ORDER_SCHEMA.with_metadata(records.schema.metadata)
    with cache_errors(source.order_file), write_table(source.order_file, schema) as writer:
        writer.write_batch(pa.record_batch([places, shared], schema=ORDER_SCHEMA))


def sorted_places(texts: pa.ChunkedArray) -> tuple[Row, Row]:
    """Return the place of each text by its bytes, which are ids, and how many ids two neighbours share.

    Both int32 [texts]; the second by place, with the text before it.
    """
    order = pc.sort_indices(texts).to_numpy()
    places, shared = np.empty((2, len(order)), dtype=np.int32)
    places[order] = np.arange(len(order))
    before: Row = np.empty(0, dtype=np.int32)
    for place, record in enumerate(order.tolist()):
        row: Row = np.frombuffer(texts[record].as_buffer(), dtype=np.int32)
        shared[place] = common_tokens(before, row)
        before = row
    return places, shared


@contextmanager
def cache_errors(final: Path) -> Iterator[None]:
    """Raise a ConfigError for an OSError while the file `final` of the cache is written."""
    try:
        yield
    except OSError as error:  # the error of a full disk has no file name
        raise ConfigError(
            "the encoded data cannot be written",
            where="data.cache",
            got=f"{final}: {error}",
            remedy="free disk space, or set data.cache to a folder on another disk",
        ) from error


def read_source(source: EncodedSource) -> pa.Table:
    """Map the records of an encoded source, with the columns of their order. Raises DataError: damaged."""
    table = source.table()
    order = None if table is None else source.order(table)
    if table is None or order is None:
        raise _damaged(source)
    for name in ORDER_SCHEMA.names:
        table = table.append_column(name, order[name])
    return table


def _damaged(source: EncodedSource) -> DataError:
    if not source.file.exists():
        return DataError(
            "the encoded data that other processes have are missing here",
            where=f"data.cache on {socket.gethostname()}: {source.file}",
            remedy="put data.cache on a file system that every node sees; then start again",
        )
    return DataError(
        "the encoded data are damaged",
        where=f"data.cache: {source.file}",
        remedy="start again: damaged data are encoded again",
    )


def read_counts(table: pa.Table) -> DataCounts:
    """Return the counts of an encoded source's records; names of files are those of the column `file`."""
    coded = table["outcome"].dictionary_encode().combine_chunks()  # texts of many records overflow an array
    outcomes = [
        Outcome(drop, pairs, tuple(map(tuple, changed)), read_as, tuple(unread))
        for drop, pairs, changed, read_as, unread in map(json.loads, coded.dictionary.to_pylist())
    ]
    codes = coded.indices.to_numpy()
    is_dropped = np.array([outcome.dropped is not None for outcome in outcomes], dtype=np.bool_)
    examples = np.flatnonzero(is_dropped[codes])[: DataCounts.MAX_EXAMPLES]
    rows = table.select(["file", "line", "detail"]).take(examples).to_pylist()
    bad_records = [
        BadRecord(str(outcomes[code].dropped), Origin(row["file"], row["line"]), row["detail"])
        for code, row in zip(codes[examples], rows, strict=True)
    ]
    numbers = np.bincount(codes, minlength=len(outcomes)).tolist()
    return DataCounts.from_outcomes(dict(zip(outcomes, numbers, strict=True)), bad_records)


def fitting_length(table: pa.Table, counts: DataCounts, config: DataConfig) -> int:
    """Return the least `data.max_length` that drops no more records than allowed; 0: there is none."""
    tokens = np.sort(table["tokens"].to_numpy())[::-1]
    tokens = tokens[tokens > 0]
    others = counts.read - counts.kept - len(tokens)
    may_drop = int(config.max_bad_share * counts.read) - others
    if may_drop < 0 or not len(tokens):
        return 0
    return int(tokens[min(may_drop, len(tokens) - 1)])
