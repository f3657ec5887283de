"""Encode sources to disk, or find them there by content; for one process of a run."""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dpo_dist.config.schema import TEMPLATE_DATE, DataConfig, SourceConfig, TextTemplate
from dpo_dist.config.user_code import find_function
from dpo_dist.data.columns import READER
from dpo_dist.data.encode import Records, encode_chunk, in_order
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import ALL_RECORDS, Part
from dpo_dist.data.sources import file_kind, local_files, pinned, source_identity, source_labels
from dpo_dist.data.store import MEMO_FOLDER, EncodedSource, write_source
from dpo_dist.data.template import check_template_keys, chosen_template
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import collect_abandoned, content_digest, file_identity, text_digest

# Increased when the token ids or the files of the same records change.
_ENCODING_VERSION = 13
_ENCODING_KEYS = (
    *("max_length", "max_prompt_length", "truncation", "text_as_messages", "template_arguments", "ranked"),
    "on_bad_record",
)
_TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "*.tiktoken", "tekken*", "*.py", "vocab*", "merges*"),
    *("special_tokens*", "added_tokens*", "chat_template*", "additional_chat_templates/*"),
)

Progress = Callable[[str], AbstractContextManager[Callable[[int], None]]]
"""Called with the path of a source that is encoded. The entered function is called with the number of encoded
records."""


def no_progress(_source: str) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress."""
    return nullcontext(lambda _records: None)


def prepare_dataset(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    digest: str,
    progress: Progress = no_progress,
    part: Part = ALL_RECORDS,
) -> tuple[EncodedSource, ...]:
    """Encode each source into its own file in `config.cache`, unless it is encoded already.

    A file is found by content: a source is not encoded again if it was moved, or is in another list, or with
    another weight. `digest` is the `tokenizer_digest`. Raises DataError; PeerLostError if a
    process that encodes has died.
    """
    check_template_keys(config, tokenizer)
    digest = text_digest(digest + (chosen_template(tokenizer, config.chat_template) or ""))
    cache = Path(config.cache)
    collect_abandoned(cache)
    found = [pinned(source) for source in sources]
    fingerprints = [_fingerprint(source, config, digest, part) for source in found]
    encode = partial(encode_chunk, config=config, tokenizer=tokenizer, part=part)
    encoded = []
    for source, fingerprint, label in zip(found, fingerprints, source_labels(sources), strict=True):
        wanted = EncodedSource(source.path, cache, fingerprint, source.limit, label)
        if wanted.rows() is None:
            with (
                progress(source.path) as show,
                closing(_encoded(source, encode, config.processes, show)) as batches,
            ):
                write_source(wanted, batches)
        encoded.append(wanted)
    return tuple(encoded)


def _encoded(
    source: SourceConfig,
    encode: Callable[[Records], pa.RecordBatch],
    processes: int | None,
    show: Callable[[int], None],
) -> Generator[pa.RecordBatch, None, None]:
    records, state = 0, _identities(source)
    with closing(in_order(read_records(source), encode, processes)) as chunks:
        for chunk in chunks:
            yield chunk
            records += len(chunk)
            show(records)
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
