"""From sources to an encoded data set on disk: read, encode, count, write; for one process of a run."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder, write_text
from dpo_dist.config.schema import DataConfig, OnBadRecord, SourceConfig
from dpo_dist.data.dataset import ARRAYS, MANIFEST, is_complete, response_key
from dpo_dist.data.encode import EncodedPair, encode_pair
from dpo_dist.data.files import source_identity
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Origin
from dpo_dist.errors import DataError

# Raised when the same records would be encoded to other ids, or laid out otherwise.
_ENCODING_VERSION = 1
_SHOWN_EXAMPLES = 20


@dataclass
class DataCounts:
    """What became of the records read: `read` = `kept` + sum of `dropped`; `changed` were kept but cut."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def drop(self, bad: BadRecord) -> None:
        """Count a record that cannot be used; the first few are kept with their place."""
        self.dropped[bad.reason] += 1
        if len(self.examples) < _SHOWN_EXAMPLES:
            self.examples.append(f"{bad.origin} {bad.reason}")

    def keep(self, pair: EncodedPair) -> None:
        """Count a pair and what encoding did to it."""
        self.kept += 1
        for name in ("prompt_truncated", "response_truncated", "boundary_resplit"):
            self.changed[name] += bool(getattr(pair, name))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, and examples as ``file:line reason``."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            **{name: self.changed[name] for name in sorted(self.changed)},
            "examples": self.examples,
        }


def prepare_dataset(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
) -> Path:
    """Encode `sources` into a folder below `config.cache`, or find it there; for one process of a run.

    Returns:
        The folder, for `open_dataset`.

    Raises:
        DataError: a source cannot be read, or a record cannot be used and `data.on_bad_record` is `error`.
    """
    fingerprint = _fingerprint(sources, config, tokenizer_digest)
    folder = Path(config.cache) / fingerprint
    if not is_complete(folder):
        with staged_folder(folder, stands=is_complete) as temporary:
            writer = _Writer(temporary, sources, fingerprint)
            for number, source in enumerate(sources):
                writer.add_source(number, _encoded(source, config, tokenizer, writer.counts))
            writer.finish()
    return folder


def _encoded(
    source: SourceConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, counts: DataCounts
) -> Iterator[tuple[EncodedPair, Origin]]:
    for record in read_records(source):
        counts.read += 1
        pair = record if isinstance(record, BadRecord) else encode_pair(record, tokenizer, config)
        if isinstance(pair, BadRecord):
            if config.on_bad_record is OnBadRecord.error:
                raise DataError(
                    f"a record cannot be used: {pair.reason}",
                    where=str(pair.origin),
                    got=pair.detail,
                    remedy="mend the record, or set data.on_bad_record=drop",
                )
            counts.drop(pair)
            continue
        counts.keep(pair)
        yield pair, record.origin


def _fingerprint(sources: Sequence[SourceConfig], config: DataConfig, tokenizer_digest: str) -> str:
    content = {
        "encoding": _ENCODING_VERSION,
        "tokenizer": tokenizer_digest,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "truncation": config.truncation,
        "text_as_messages": config.text_as_messages,
        "on_bad_record": config.on_bad_record,
        "sources": [
            {
                "path": source.path,
                "content": source_identity(source.path),
                "format": source.format,
                "split": source.split,
                "limit": source.limit,
            }
            for source in sources
        ],
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Writer:
    """Appends pairs to the arrays of a folder; memory does not grow with their number."""

    def __init__(self, folder: Path, sources: Sequence[SourceConfig], fingerprint: str):
        self.folder = folder
        self.sources = sources
        self.fingerprint = fingerprint
        self.counts = DataCounts()
        self.source_pairs: list[int] = []
        self.sizes = dict.fromkeys(ARRAYS, 0)
        self.files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self.total_pieces = 0

    def add_source(self, number: int, pairs: Iterable[tuple[EncodedPair, Origin]]) -> None:
        kept = 0
        for pair, origin in pairs:
            self._add(pair, number, origin.line)
            kept += 1
        self.source_pairs.append(kept)

    def _add(self, pair: EncodedPair, source: int, line: int) -> None:
        for piece in (pair.prompt_ids, *pair.responses):
            self._append("ids", piece)
            self._append("piece_ends", [self.sizes["ids"]])
            self.total_pieces += 1
        for response in pair.responses:
            self._append("keys", np.frombuffer(response_key(pair.prompt_ids, response), dtype=np.uint64))
        self._append("pair_pieces", [self.total_pieces])
        self._append("origins", [source, line])

    def _append(self, name: str, values: npt.ArrayLike) -> None:
        array = np.asarray(values, dtype=ARRAYS[name])
        self.files[name].write(array.tobytes())
        self.sizes[name] += array.size

    def finish(self) -> None:
        for file in self.files.values():
            file.close()
        manifest = {
            "fingerprint": self.fingerprint,
            "sizes": self.sizes,
            "source_paths": [source.path for source in self.sources],
            "source_pairs": self.source_pairs,
            "counts": self.counts.as_dict(),
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))
