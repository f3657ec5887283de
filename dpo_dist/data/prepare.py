"""From sources to an encoded data set on disk: read, encode, count, write; for one process of a run."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder, write_text
from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.dataset import ARRAYS, MANIFEST, is_complete
from dpo_dist.data.formats import read_records
from dpo_dist.data.parts import DataCounts, EncodedPart
from dpo_dist.data.processes import CHUNK_RECORDS, Records, encode_in_order
from dpo_dist.data.sources import pinned, source_identity

# Raised when the same records would be encoded to other ids, or laid out otherwise.
_ENCODING_VERSION = 2


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
        PeerLostError: a process that encodes has died.
    """
    sources = [pinned(source, Path(config.cache)) for source in sources]
    fingerprint = _fingerprint(sources, config, tokenizer_digest)
    folder = Path(config.cache) / fingerprint
    if not is_complete(folder):
        with staged_folder(folder, stands=is_complete) as temporary:
            writer = _Writer(temporary, sources, fingerprint)
            with contextlib.closing(encode_in_order(_chunks(sources), config, tokenizer)) as parts:
                for source, part in parts:
                    writer.add(source, part)
            writer.finish()
    return folder


def _chunks(sources: Sequence[SourceConfig]) -> Iterator[tuple[int, Records]]:
    for number, source in enumerate(sources):
        records = read_records(source)
        while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
            yield number, chunk


def _fingerprint(sources: Sequence[SourceConfig], config: DataConfig, tokenizer_digest: str) -> str:
    content = {
        "encoding": _ENCODING_VERSION,
        "tokenizer": tokenizer_digest,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "truncation": config.truncation,
        "text_as_messages": config.text_as_messages,
        "ranked": config.ranked,
        "on_bad_record": config.on_bad_record,
        "sources": [
            {
                "path": source.path,
                "content": source_identity(source),
                "format": source.format,
                "split": source.split,
                "limit": source.limit,
            }
            for source in sources
        ],
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Writer:
    """Appends parts to the arrays of a folder; memory does not grow with their number."""

    def __init__(self, folder: Path, sources: Sequence[SourceConfig], fingerprint: str):
        self.folder = folder
        self.sources = sources
        self.fingerprint = fingerprint
        self.counts = DataCounts()
        self.source_pairs = [0] * len(sources)
        self.sizes = dict.fromkeys(ARRAYS, 0)
        self.files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self.total_pieces = 0

    def add(self, source: int, part: EncodedPart) -> None:
        self._append("piece_ends", self.sizes["ids"] + np.cumsum(part.piece_tokens))
        self._append("ids", part.ids)
        self._append("keys", part.keys)
        self._append("scores", part.scores)
        self._append("pair_pieces", self.total_pieces + np.cumsum(part.pair_pieces))
        self._append("origins", np.stack([np.full_like(part.lines, source), part.lines], axis=1))
        self.total_pieces += len(part.piece_tokens)
        self.source_pairs[source] += len(part.lines)
        self.counts.add(part.counts)

    def _append(self, name: str, values: npt.NDArray[Any]) -> None:
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
