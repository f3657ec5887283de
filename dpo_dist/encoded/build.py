"""Encode sources on several processes, and store them by content; reuse stored ones."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.prefixes import common_tokens
from dpo_dist.data import (
    BadRecord,
    ChatTemplate,
    DataConfig,
    DataSource,
    EncodedRecord,
    ExpandedImage,
    ImageProcessor,
    Outcome,
    Part,
    PreferenceRecord,
    RawRecord,
    Record,
    SourceConfig,
    encode_record,
    prompt_hash,
    source_labels,
)
from dpo_dist.encoded.store import (
    IMAGE_SCHEMA,
    ROW_SCHEMA,
    EncodedChunk,
    EncodedSource,
    cache_errors,
    ensure_order,
    is_whole,
    write_source,
)
from dpo_dist.encoded.watched_images import recorded_state
from dpo_dist.encoded.workers import CHUNK_RECORDS, in_chunks, in_order
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.files import (
    MEMO_FOLDER,
    file_identity,
    remove_abandoned,
    text_digest,
)
from dpo_dist.foundation.types import Tokenizer

# Increase it when the same records get other token ids or files: else old files would be reused.
_ENCODING_VERSION = 28
_ALL_RECORDS = Part()
EncodingProgress = Callable[[str], AbstractContextManager[Callable[..., None]]]
"""Called with the path of a source that is encoded. The entered function is called with the number of encoded
records, and perhaps with about how many records this process encodes in all."""


def no_progress(_source: str) -> AbstractContextManager[Callable[..., None]]:
    """Show no progress."""
    return nullcontext(lambda _records, _total=None: None)


class PlannedSource(NamedTuple):
    """A pinned source, the file of its encoded records, and the identities of its files at the start."""

    source: DataSource
    target: EncodedSource
    state: list[str]


@dataclass(frozen=True)
class Preparation:
    """Encodes each source into its own file in `config.cache`, unless it is encoded already.

    A file is named by its content: a source is not encoded again if it moved, is in another list, or has
    another weight. `digest` is that of the tokenizer's files. The `processor` reads images, whose files are
    watched: if one changed, its source is encoded again. `part`: the records to encode, those of the training
    or of the evaluation data. `systems`: see `encode_record`.
    """

    sources: Sequence[SourceConfig]
    config: DataConfig
    tokenizer: Tokenizer
    digest: str
    progress: EncodingProgress = no_progress
    part: Part = _ALL_RECORDS
    processor: ImageProcessor | None = None
    systems: Mapping[str, str] | None = None

    def plan(self) -> tuple[PlannedSource, ...]:
        """Return the sources with the files of their encoded records. Raises DataError or ConfigError."""
        config = self.config
        tokenizer = self.tokenizer
        processor = self.processor
        template = ChatTemplate(tokenizer, config.chat_template)
        template.check_arguments(config.template_arguments or ())
        digest = self.digest
        if processor is not None:
            digest += processor.settings.hex()
        digest = text_digest(digest + (template.text() or ""))
        cache = Path(config.cache)
        remove_abandoned(cache)
        planned = []
        pinned = [DataSource(source).pinned() for source in self.sources]
        for source, label in zip(pinned, source_labels(self.sources), strict=True):
            folders = ""
            if processor is not None:  # in other folders equal records may name other images
                of_records = sorted({file.parent for file in source.files() or ()})
                resolved = [str(folder.resolve()) for folder in (*source.image_folders(), *of_records)]
                folders = text_digest("\n".join(resolved))
            state = _identities(source)
            fingerprint = _fingerprint(source, config, digest, self.part, self.systems)
            target = EncodedSource(source.path, cache, fingerprint, source.config.limit, label, folders)
            planned.append(PlannedSource(source, target, state))
        return tuple(planned)

    def whole(self) -> tuple[EncodedSource, ...]:
        """Return the encoded sources.

        Raises DataError; PeerLostError if a process that encodes has died.
        """
        placeholder = None if self.processor is None else self.processor.placeholder_id
        planned = self.plan()
        for each in planned:
            try:
                if not is_whole(each.target):
                    self._encode(each)
            except DpoDistError:
                # Perhaps another job has encoded the source, and removed the copies.
                if not is_whole(each.target):
                    raise
            finally:
                shutil.rmtree(each.target.copies, ignore_errors=True)
            ensure_order(each.target, placeholder)
        return tuple(each.target for each in planned)

    def _encode(self, planned: PlannedSource) -> None:
        source = planned.source
        target = planned.target
        chunk_records = CHUNK_RECORDS if self.processor is None else _CHUNK_WITH_IMAGES
        work = partial(
            _encode_chunk,
            source=source,
            config=self.config,
            tokenizer=self.tokenizer,
            part=self.part,
            processor=self.processor,
            systems=self.systems,
        )
        # `in_order` asks for chunks to encode, a few ahead, and `write_source` for encoded ones.
        chunks = in_chunks(source.raw_records(target.copies), chunk_records)
        with (
            cache_errors(target.file),  # of a copy of a URL's file
            self.progress(source.path) as show,
            closing(in_order(chunks, work)) as encoded,
        ):
            shown = _with_progress(encoded, show)
            write_source(target, _unless_changed(shown, planned))


def _with_progress(chunks: Iterable[EncodedChunk], show: Callable[..., None]) -> Iterator[EncodedChunk]:
    """Yield the chunks, and show after each how many records have been encoded."""
    encoded = 0
    for chunk in chunks:
        yield chunk
        encoded += len(chunk[0])
        show(encoded)


def _unless_changed(chunks: Iterable[EncodedChunk], planned: PlannedSource) -> Iterator[EncodedChunk]:
    """Yield the chunks of a source, which is not committed if one of its files has changed meanwhile."""
    yield from chunks
    # The fingerprint would name other records.
    if _identities(planned.source) != planned.state:
        raise planned.source.changed_error()


def _encode_chunk(records: Sequence[RawRecord], source: DataSource, **options: Any) -> EncodedChunk:
    images: dict[bytes, ExpandedImage] = {}
    encoded = encode_records([*map(source.parse, records)], images=images, **options)
    # Names of files are relative to the path of the source, which may be moved.
    names = encoded["file"].dictionary_encode()
    files = [*map(source.relative_name, names.dictionary.to_pylist())]
    encoded = encoded.set_column(0, "file", pa.array(files, pa.string()).take(names.indices))
    rows = [{name: getattr(image, name) for name in IMAGE_SCHEMA.names} for image in images.values()]
    return encoded, pa.RecordBatch.from_pylist(rows, schema=IMAGE_SCHEMA)


def encode_records(
    records: Sequence[Record],
    config: DataConfig,
    tokenizer: Tokenizer,
    part: Part = _ALL_RECORDS,
    processor: ImageProcessor | None = None,
    images: dict[bytes, ExpandedImage] | None = None,
    systems: Mapping[str, str] | None = None,
) -> pa.RecordBatch:
    """Encode the `records` of `part` as rows of `ROW_SCHEMA`; unusable ones are dropped with a reason.

    The images of kept records are added to `images`, by their digests.
    """
    rows = []
    for record in records:
        origin: dict[str, Any] = {"file": record.origin.source, "line": record.origin.line}
        if processor is not None and isinstance(record, PreferenceRecord):
            origin["watched"] = list(filter(None, map(recorded_state, record.images)))
        readable = record if processor is None else record.readable()
        prompt = 0
        values = dict[str, Any]()
        encoded: EncodedRecord | BadRecord | None = None  # the record belongs to another part
        if isinstance(readable, BadRecord):
            encoded = None if part.is_eval else readable  # no prompt to divide by: it is training data
        else:
            prompt = prompt_hash(readable.prompt, () if processor is None else readable.images)
            if part.has(prompt):
                encoded = encode_record(readable, config, tokenizer, processor, systems)
        if isinstance(encoded, BadRecord):
            outcome = Outcome(encoded.reason, unread=encoded.unread)
            values = {"detail": encoded.detail, "tokens": encoded.tokens}
        elif encoded is None:
            outcome = Outcome(changed=((part.count_of_others, 1),))
        else:
            outcome = replace(encoded.outcome, unread=readable.unread)
            values = _row_values(encoded) | {"prompt": prompt}
            if images is not None:
                images.update((image.digest, image) for image in encoded.example.images)
        rows.append({**_EMPTY_ROW, **origin, "outcome": _as_json(outcome), **values})
    return pa.RecordBatch.from_arrays([_arrow_array(rows, field) for field in ROW_SCHEMA], schema=ROW_SCHEMA)


@lru_cache(maxsize=1024)
def _as_json(outcome: Outcome) -> str:
    return json.dumps(astuple(outcome))


def _arrow_array(rows: Sequence[Mapping[str, Any]], field: pa.Field) -> pa.Array:
    """Return a field's values; lists of numbers, most bytes, are joined without a Python value for each."""
    values = [row[field.name] for row in rows]
    kind = field.type
    if not values or not pa.types.is_list(kind) or not pa.types.is_primitive(kind.value_type):
        return pa.array(values, kind)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    joined = np.concatenate([np.asarray(value, kind.value_type.to_pandas_dtype()) for value in values])
    return pa.ListArray.from_arrays(offsets, pa.array(joined, kind.value_type))


_EMPTY_ROW = {
    "detail": "",
    "prompt": 0,
    "largest_id": -1,
    "tokens": 0,
    **{field.name: () for field in ROW_SCHEMA if pa.types.is_list(field.type)},
}


def _row_values(record: EncodedRecord) -> dict[str, Any]:
    example = record.example
    pieces = (example.prompt_ids, *example.responses)
    ids = np.concatenate(pieces)
    return {
        "largest_id": max(map(np.max, (ids, *example.scorer_prompts.values()))),
        "ids": ids,
        "piece_tokens": list(map(len, pieces)),
        "keys": response_keys([example]).ravel(),
        "scores": record.scores,
        "numbers": record.numbers,
        "truncated": example.truncated,
        "begins": [
            max((common_tokens(ids[:-1], before[:-1]) for before in example.responses[:place]), default=0)
            for place, ids in enumerate(example.responses)
        ],
        "trained_tokens": [int(mask.sum()) for mask in example.trained] or list(map(len, example.responses)),
        "trained": np.concatenate([np.empty(0, np.bool_), *(m for m in example.trained if not m.all())]),
        "examples": record.ranks,  # an example is a ranking of the record's responses, which are stored once
        "images": [image.digest for image in example.images],
        **{f"{scorer}_prompt": prompt for scorer, prompt in example.scorer_prompts.items()},
    }


def _identities(source: DataSource) -> list[str]:
    """Return the identities of local files; others are copies of what the pinned source names."""
    return list(map(file_identity, source.files() or ()))


def _fingerprint(
    source: DataSource, config: DataConfig, digest: str, part: Part, systems: Mapping[str, str] | None
) -> str:
    """Return a digest of everything that decides the ids of a pinned source, but the files of its images."""
    content = {
        "encoding": _ENCODING_VERSION,
        "tokenizer": digest,
        **config.encoding_identity,
        **source.encoding_identity(Path(config.cache) / MEMO_FOLDER),
        "part": part.identity,
        "systems": dict(systems or {}),
    }
    return text_digest(json.dumps(content, sort_keys=True))


_CHUNK_WITH_IMAGES = 16
"""An image takes as long as ten texts, and may have megabytes."""
