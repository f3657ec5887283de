"""Encode sources to disk, or find them there by content; for one process of a run."""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dpo_dist.config.data import TEMPLATE_DATE, DataConfig, SourceConfig, TextTemplate
from dpo_dist.config.user_code import find_function
from dpo_dist.data.columns import READER
from dpo_dist.data.encode import CHUNK_RECORDS, Records, encode_chunk, in_order
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import ALL_RECORDS, BadRecord, Part, PreferenceRecord, turns_of
from dpo_dist.data.sources import Meter, file_kind, local_files, pinned, source_identity, source_labels
from dpo_dist.data.store import MEMO_FOLDER, EncodedSource, find_encoded, write_source
from dpo_dist.data.template import check_template_keys, chosen_template
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import collect_abandoned, content_digest, file_identity, text_digest

# Increased when the token ids or the files of the same records change.
_ENCODING_VERSION = 13
_ENCODING_KEYS = (
    *("max_length", "max_prompt_length", "truncation", "text_as_messages", "template_arguments", "ranked"),
    "on_bad_record",
)
_CHUNK_CHARACTERS = 2**22
_TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "*.tiktoken", "tekken*", "*.py", "vocab*", "merges*"),
    *("special_tokens*", "added_tokens*", "chat_template*", "additional_chat_templates/*"),
)

Progress = Callable[[str], AbstractContextManager[Callable[..., None]]]
"""Called with the path of a source that is encoded. The entered function is called with the number of encoded
records and, as `share`, the share of the source that was read; None if its size is unknown."""


def no_progress(_source: str) -> AbstractContextManager[Callable[..., None]]:
    """Show no progress."""
    return nullcontext(lambda _records, share: None)  # noqa: ARG005


def prepare_dataset(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    digest: str,
    progress: Progress = no_progress,
    part: Part = ALL_RECORDS,
) -> tuple[EncodedSource, ...]:
    """Encode each source into its own file in `config.cache`, unless it is encoded already.

    A file is found by content: a source is not encoded again if it was moved, or is in another list, with
    another weight or a lower limit. `digest` is the `tokenizer_digest`. Raises DataError; PeerLostError if a
    process that encodes has died.
    """
    check_template_keys(config, tokenizer)
    digest = text_digest(digest + (chosen_template(tokenizer, config.chat_template) or ""))
    cache = Path(config.cache)
    collect_abandoned(cache)
    found = [pinned(source, cache) for source in sources]
    fingerprints = [_fingerprint(source, config, digest, part) for source in found]
    encode = partial(encode_chunk, config=config, tokenizer=tokenizer, part=part)
    encoded = []
    for source, fingerprint, label in zip(found, fingerprints, source_labels(sources), strict=True):
        file = find_encoded(cache, fingerprint, source.limit)
        if file is None:
            with (
                progress(source.path) as show,
                closing(_encoded(source, encode, config.processes, show)) as batches,
            ):
                file = write_source(cache, fingerprint, source.path, source.limit, batches)
        encoded.append(EncodedSource(source.path, file, source.limit, label))
    return tuple(encoded)


def _encoded(
    source: SourceConfig,
    encode: Callable[[Records], pa.RecordBatch],
    processes: int | None,
    show: Callable[..., None],
) -> Generator[pa.RecordBatch, None, None]:
    meter, records, state = Meter(), 0, _identities(source)
    with closing(in_order(_chunks(source, meter), encode, processes)) as chunks:
        for chunk in chunks:
            yield chunk
            records += len(chunk)
            show(records, share=share_read(meter, source.limit, records))
    # The fingerprint belongs to the records read only if nothing has changed meanwhile.
    if _identities(source) != state:
        raise DataError(
            "the data changed while they were read",
            where=source.path,
            remedy="start again when no other program writes to the files",
        )


def tokenizer_digest(folder: Path) -> str:
    """Return a digest of the files of a model folder that decide how text becomes token ids."""
    files = sorted({file for name in _TOKENIZER_FILES for file in folder.glob(name) if file.is_file()})
    parts = [(str(file.relative_to(folder)), content_digest([file])) for file in files]
    config_file = folder / "config.json"  # an adapter's folder with a tokenizer has none
    config = json.loads(config_file.read_bytes()) if config_file.exists() else {}
    # transformers chooses the tokenizer's class by these.
    parts += [(key, json.dumps(config.get(key))) for key in ("model_type", "tokenizer_class")]
    return text_digest(json.dumps(parts))


def _identities(source: SourceConfig) -> list[str]:
    return [file_identity(file) for file in local_files(source) or ()]


def _chunks(source: SourceConfig, meter: Meter) -> Iterator[Records]:
    """Yield consecutive records: fewer of long ones, as several chunks are in memory at a time."""
    chunk: list[PreferenceRecord | BadRecord] = []
    characters = 0
    for record in read_records(source, meter):
        chunk.append(record)
        if not isinstance(record, BadRecord):
            texts = (record.prompt, *record.responses)
            characters += sum(len(turn.content) for text in texts for turn in turns_of(text))
        if len(chunk) == CHUNK_RECORDS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def share_read(meter: Meter, limit: int | None, records: int) -> float | None:
    """Return the share of a source that is encoded; reading is a few chunks ahead."""
    if limit is None or meter.share is None:
        return meter.share if limit is None else min(1.0, records / limit)
    return max(meter.share, min(1.0, records / limit))


def _fingerprint(source: SourceConfig, config: DataConfig, digest: str, part: Part) -> str:
    """Return a digest of everything that decides the ids of a `pinned` source."""
    content = {
        "encoding": _ENCODING_VERSION,
        "tokenizer": digest,
        **{name: getattr(config, name) for name in _ENCODING_KEYS},
        "template_applied": config.template is TextTemplate.applied,
        "template_date": TEMPLATE_DATE,
        "trained_roles": sorted(set(config.trained_roles)),
        "untrained": sorted(set(config.untrained)),
        "content": source_identity(source, Path(config.cache) / MEMO_FOLDER),
        "kinds": [file_kind(file) for file in local_files(source) or []],
        **{name: getattr(source, name) for name in ("format", "split", "columns")},
        "reader": source.reader and find_function(source.reader, READER).digest,
        "part": part.identity,
    }
    return text_digest(json.dumps(content, sort_keys=True))
