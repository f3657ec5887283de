"""Parts of a source while it is encoded: written whole, reused after a kill, joined at the end."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import pyarrow as pa

from dpo_dist.data.encoded.store import (
    ROW_SCHEMA,
    EncodedChunk,
    EncodedSource,
    has_changed_images,
    write_source,
)
from dpo_dist.data.images import ExpandedImage
from dpo_dist.data.records import RawRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import locked, sync

log = logging.getLogger(__name__)

PART_RECORDS = 8192
"""Records of a part: seconds of a core, so that a kill loses little and a short source is a single part."""
PART_WITH_IMAGES = 512

Share = tuple[int, int]
"""Index and number of the processes that divide the parts of a source."""
EVERY_PART: Share = (0, 1)
_NO_ID = -1


def encode_parts(
    wanted: EncodedSource,
    records: Iterator[RawRecord],
    encode: Callable[[Iterator[RawRecord]], Generator[EncodedChunk, None, None]],
    check: Callable[[], None],
    share: Share,
    part_records: int,
) -> int:
    """Write the missing parts of this share of a source; return the number of all its parts.

    `encode` yields chunks of records in order, none across parts. `check` runs before a part is committed.
    """
    parts, missing = 0, deque[EncodedSource]()

    def unread() -> Iterator[RawRecord]:
        nonlocal parts
        for parts in itertools.count():
            part = itertools.islice(records, part_records)
            first = list(itertools.islice(part, 1))
            if not first and parts:
                return
            file = replace(wanted, part=parts)
            if parts % share[1] == share[0] and not is_whole(file):
                missing.append(file)
                yield from itertools.chain(first, part)
            deque(part, maxlen=0)

    with closing(encode(unread())) as chunks:
        chunk = next(chunks, None)
        while missing:
            yielded = itertools.chain([] if chunk is None else [chunk], chunks)
            write_source(missing.popleft(), _until_whole(yielded, part_records, check))
            chunk = next(chunks, None)
    return parts


def missing_records(
    wanted: EncodedSource, records: int | None, share: Share, part_records: int
) -> int | None:
    """Return how many of a source's `records` are in missing parts of this share; None if not known."""
    if records is None:
        return None
    firsts = range(share[0] * part_records, records, share[1] * part_records)
    missing = [first for first in firsts if not replace(wanted, part=first // part_records).file.exists()]
    return sum(min(part_records, records - first) for first in missing)


def _until_whole(
    chunks: Iterator[EncodedChunk], part_records: int, check: Callable[[], None]
) -> Iterator[EncodedChunk]:
    """Yield the chunks of one part, then run `check`."""
    records = 0
    while records < part_records and (chunk := next(chunks, None)) is not None:
        records += len(chunk[0])
        yield chunk
    check()


def join_parts(wanted: EncodedSource, parts: int) -> bool:
    """Write a source from its parts, and remove them.

    Returns False if a part is missing or damaged, or another process joins them now.
    """
    lock = wanted.file.with_suffix(".lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, "joins the parts of a source"))
        except ConfigError:
            return False
        stack.callback(lock.unlink, missing_ok=True)
        return is_whole(wanted) or _join([replace(wanted, part=number) for number in range(parts)], wanted)


def _join(every: list[EncodedSource], wanted: EncodedSource) -> bool:
    if not all(map(is_whole, every)):
        return False
    if len(every) == 1:  # the part is the whole
        [part] = every
        if part.image_file.exists():
            part.image_file.replace(wanted.image_file)
        part.file.replace(wanted.file)
        sync(wanted.cache)
        return True
    write_source(wanted, itertools.chain.from_iterable(map(_chunks, every)))
    remove_parts(wanted)
    return True


def remove_parts(joined: EncodedSource) -> None:
    """Remove the parts of a joined source, also those that a killed or slower process left."""
    for file in joined.cache.glob(f"{joined.file.stem}-part-*.arrow"):
        with suppress(OSError):  # another process has removed it, or the cache is read-only
            file.unlink()


def is_whole(source: EncodedSource) -> bool:
    """Return whether the file of a source or a part is undamaged, and no image of it has changed."""
    if not source.file.exists():
        return False
    table = source.table()
    if table is not None and not has_changed_images(table):
        return True
    log.warning("%s is damaged, or images have changed: it is encoded again", source.file)
    return False


def _chunks(part: EncodedSource) -> Iterator[EncodedChunk]:
    """Yield the images of a part, as they were written, then its records."""
    records, images = part.table(), part.images()
    assert records is not None, "just verified"
    for batch in [] if images is None else images.to_batches():
        rows = {row["digest"]: row for row in batch.to_pylist()}
        stored = {
            digest: ExpandedImage(digest, row["tokens"], _NO_ID, content=row["content"])
            for digest, row in rows.items()
        }
        yield pa.RecordBatch.from_pylist([], schema=ROW_SCHEMA), stored
    for batch in records.cast(ROW_SCHEMA).to_batches():
        yield batch, {}
