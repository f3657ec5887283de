"""From sources to encoded sources on disk: read, encode, count, write; for one process of a run."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import collect_abandoned, staged_folder
from dpo_dist.config.schema import DataConfig, SourceConfig, TextTemplate
from dpo_dist.data.chat_template import has_clock
from dpo_dist.data.encode_workers import CHUNK_RECORDS, Records, encode_in_order
from dpo_dist.data.encoded_source import (
    MEMO_FOLDER,
    EncodedSource,
    SourceWriter,
    find_encoded,
    folder_name,
    remember_written,
)
from dpo_dist.data.files import file_kind
from dpo_dist.data.formats import read_records
from dpo_dist.data.sources import local_files, pinned, source_identity
from dpo_dist.digests import file_identity, text_digest
from dpo_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# Raised when the same records would be encoded to other ids, or laid out otherwise.
_ENCODING_VERSION = 5

Progress = Callable[[int], None]
"""Called with how many records more are encoded."""


def prepare_dataset(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    progress: Progress = lambda _records: None,
) -> tuple[EncodedSource, ...]:
    """Encode each source into a folder of its own below `config.cache`, or find it there; for one process.

    A folder is found by content: a source that was moved, or stands in another list, with another weight or
    a lower limit, is not encoded again. What is damaged is.

    Returns:
        The sources in their order, for `open_dataset`.

    Raises:
        DataError: a source cannot be read or changes while it is, or a record cannot be used and
            `data.on_bad_record` is `error`.
        PeerLostError: a process that encodes has died.
    """
    check_template_date(config, tokenizer)
    cache = Path(config.cache)
    collect_abandoned(cache)
    encoded = []
    for source in sources:
        folder = _encoded(source, config, tokenizer, tokenizer_digest, progress)
        encoded.append(EncodedSource(source.path, folder, source.limit))
    return tuple(encoded)


def _encoded(
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    progress: Progress,
) -> Path:
    cache = Path(config.cache)
    source = pinned(source, cache)
    state = _state(source)
    identity = source_identity(source, cache / MEMO_FOLDER)
    fingerprint = _fingerprint(source, identity, config, tokenizer_digest)
    found = find_encoded(cache, fingerprint, source.limit)
    if found is not None:
        return found
    folder = cache / folder_name(fingerprint, source.limit)
    if folder.exists():
        log.warning("%s is damaged and is encoded anew", folder)
    stands = partial(_stands, cache, fingerprint, source.limit)
    with staged_folder(folder, stands) as temporary, closing(SourceWriter(temporary, source.path)) as writer:
        with closing(encode_in_order(_chunks(source), config, tokenizer)) as parts:
            for part in parts:
                writer.add(part)
                progress(len(part.outcomes))
        # The digest is that of what was read only if nothing has changed meanwhile.
        if _state(source) != state or source_identity(source) != identity:
            raise DataError(
                "the data changed while they were read",
                where=source.path,
                remedy="start again when nothing writes to them",
            )
        writer.finish(fingerprint, whole=source.limit is None or writer.records < source.limit)
    remember_written(folder)
    return folder


def check_template_date(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a date that has no effect. Raises ConfigError."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if config.template_date != DataConfig.template_date and not has_clock(template):
        raise ConfigError(
            "the tokenizer's chat template has no clock, so that no date has an effect",
            where="data.template_date",
            got=config.template_date,
            expected=f"{DataConfig.template_date} (the default)",
            remedy="leave data.template_date out",
        )


def _stands(cache: Path, fingerprint: str, limit: int | None, folder: Path) -> bool:
    return find_encoded(cache, fingerprint, limit) == folder


def _state(source: SourceConfig) -> list[str]:
    """What changes when a file of the source is replaced, also by one that is put back afterwards."""
    files = local_files(source) or []
    # The link itself too, where the path is one.
    return [f"{file.lstat().st_ino}|{file.lstat().st_ctime_ns}|{file_identity(file)}" for file in files]


def _chunks(source: SourceConfig) -> Iterator[Records]:
    records = read_records(source)
    while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
        yield chunk


def _fingerprint(source: SourceConfig, identity: str, config: DataConfig, tokenizer_digest: str) -> str:
    content = {
        "encoding": _ENCODING_VERSION,
        "tokenizer": tokenizer_digest,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "truncation": config.truncation,
        "text_as_messages": config.text_as_messages,
        "template_applied": config.template is TextTemplate.applied,
        "template_date": config.template_date,
        "ranked": config.ranked,
        "on_bad_record": config.on_bad_record,
        "content": identity,
        "kinds": [file_kind(file) for file in local_files(source) or []],
        "format": source.format,
        "split": source.split,
    }
    return text_digest(json.dumps(content, sort_keys=True))
