"""An encoded source on disk: flat arrays and a manifest with their digests, written once and memory-mapped.

The arrays of a folder are the token ids of all distinct pieces (prompts and responses); offset and length of
each piece of each example; the end of each example's pieces; key and score of each response; the masks of
responses of which the loss does not count every token, and the number of counted tokens of each response;
prompt hash and origin of each example; and the outcome of each record, so that the counts of the first n
records can be computed. The name of the folder is a digest of everything that decides the ids, never a path.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.atomic import is_temporary, write_text
from dpo_dist.data.concatenated import Array
from dpo_dist.data.counts import SHOWN_EXAMPLES, DataCounts, Outcome
from dpo_dist.data.encode_chunk import EncodedChunk
from dpo_dist.data.encoded_manifest import ARRAYS, MANIFEST, Manifest, read_manifest
from dpo_dist.data.files.folders import root_of
from dpo_dist.data.offsets import check_offsets
from dpo_dist.digests import remember_digest, remembered_digest, text_digest
from dpo_dist.errors import ConfigError

MEMO_FOLDER = "file_digests"
_FIRST = "-first-"


@dataclass(frozen=True)
class EncodedSource:
    """The first `limit` records (None: all) of a source, encoded in `folder`; configured path, label."""

    path: str
    folder: Path
    limit: int | None = None
    label: str = ""


class SourceWriter:
    """Append encoded chunks to the arrays of a folder, in constant memory."""

    def __init__(self, folder: Path, path: str):
        self.records = 0
        self._largest_id = -1
        self._folder = folder
        self._path = path
        self._sizes = dict.fromkeys(ARRAYS, 0)
        self._streams = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in ARRAYS}
        self._pieces = 0
        self._outcomes: dict[Outcome, int] = {}
        self._files: dict[str, int] = {}
        self._examples: list[tuple[int, int, int, str, str]] = []

    def add(self, chunk: EncodedChunk) -> None:
        """Append the examples of the next records."""
        self._append("piece_starts", self._sizes["ids"] + chunk.piece_starts)
        self._append("piece_tokens", chunk.piece_tokens)
        self._append("ids", chunk.ids)
        self._largest_id = max(self._largest_id, int(chunk.ids.max(initial=-1)))
        self._append("keys", chunk.keys)
        self._append("scores", chunk.scores)
        self._append("mask_starts", self._sizes["trained"] + chunk.mask_starts)
        self._append("trained", chunk.trained)
        self._append("trained_tokens", chunk.trained_tokens)
        self._append("truncated", chunk.truncated)
        self._append("prompts", chunk.prompts)
        self._append("pair_pieces", self._pieces + np.cumsum(chunk.pair_pieces))
        self._append("origins", [(self._file(at.source), at.line) for at in chunk.origins])
        codes = [self._outcomes.setdefault(outcome, len(self._outcomes)) for outcome in chunk.outcomes]
        self._append("outcomes", codes)
        for index, bad in chunk.bad:
            if len(self._examples) < SHOWN_EXAMPLES or all(
                bad.reason != shown[3] for shown in self._examples
            ):
                origin = self._file(bad.origin.source), bad.origin.line
                self._examples.append((self.records + index, *origin, bad.reason, bad.detail))
        self._pieces += len(chunk.piece_starts)
        self.records += len(chunk.outcomes)

    def _file(self, source: str) -> int:
        return self._files.setdefault(source, len(self._files))

    def _append(self, name: str, values: Any) -> None:
        array: Array = np.asarray(values, dtype=ARRAYS[name])
        content = array.tobytes()
        with self._writing():
            self._streams[name].write(content)
        self._hashes[name].update(content)
        self._sizes[name] += array.size

    def finish(self, fingerprint: str, whole: bool) -> None:
        """Write the manifest, which completes the folder."""
        self.close()
        manifest = Manifest(
            fingerprint=fingerprint,
            whole=whole,
            records=self.records,
            largest_id=self._largest_id,
            sizes=self._sizes,
            digests={name: digest.hexdigest() for name, digest in self._hashes.items()},
            outcomes=[(one.dropped, one.pairs, list(one.changed), one.read_as) for one in self._outcomes],
            files=[_relative_name(self._path, source) for source in self._files],
            examples=self._examples,
        )
        content = json.dumps(asdict(manifest), indent=1)
        write_text(self._folder / MANIFEST, json.dumps({"digest": text_digest(content), "content": content}))

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            with self._writing():
                stream.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the error of a full disk has no file name
            raise ConfigError(
                "the encoded data cannot be written",
                where="data.cache",
                got=f"{self._folder}: {error}",
                remedy="free disk space, or set data.cache to a folder on another disk",
            ) from error


def find_encoded(cache: Path, fingerprint: str, limit: int | None) -> Path | None:
    """Return an undamaged folder with the first `limit` records (None: all) of this content, or None."""
    folders = sorted(cache.glob(f"{fingerprint}*"), key=lambda folder: (len(folder.name), folder.name))
    for folder in folders:
        if is_temporary(folder):
            continue
        manifest = read_manifest(folder)
        if manifest is None or manifest.fingerprint != fingerprint:  # damaged, or a renamed folder
            continue
        if manifest.covers(limit) and not find_damage(folder, manifest):
            return folder
    return None


def folder_name(fingerprint: str, limit: int | None) -> str:
    """Return the name of a folder with the first `limit` records (None: all) of this content."""
    return fingerprint if limit is None else f"{fingerprint}{_FIRST}{limit}"


def find_damage(folder: Path, manifest: Manifest) -> list[str]:
    """Return the arrays whose files differ from the manifest; only files that have changed are read."""
    return [name for name in ARRAYS if not _is_whole(folder, name, manifest)]


def _is_whole(folder: Path, name: str, manifest: Manifest) -> bool:
    file = folder / f"{name}.bin"
    try:
        if file.stat().st_size != manifest.sizes[name] * np.dtype(ARRAYS[name]).itemsize:
            return False
        return remembered_digest(file, folder.parent / MEMO_FOLDER) == manifest.digests[name]
    except (OSError, ConfigError, KeyError):  # an older version has fewer arrays
        return False


def remember_written(folder: Path) -> None:
    """Remember the digests of a folder just written by this process."""
    manifest = read_manifest(folder)
    if manifest is not None:
        for name in ARRAYS:
            remember_digest(folder / f"{name}.bin", folder.parent / MEMO_FOLDER, manifest.digests[name])


def array_files(folder: Path) -> list[Path]:
    """Return the files of the arrays of an encoded source."""
    return [folder / f"{name}.bin" for name in ARRAYS]


def is_intact(file: Path) -> bool:
    """Return whether the file of an array has the content that the manifest beside it states."""
    manifest = read_manifest(file.parent)
    return manifest is not None and _is_whole(file.parent, file.stem, manifest)


@dataclass(frozen=True)
class SourceView:
    """The used records of a source, memory-mapped.

    Attributes:
        counts: of these records.
        pairs: number of examples made from them.
        files: their files, named as the source was configured.
        arrays: by the names of `PreferenceDataset`'s attributes.
    """

    counts: DataCounts
    pairs: int
    files: list[str]
    arrays: dict[str, Array]


def view(source: EncodedSource, manifest: Manifest) -> SourceView:
    """Map the first `limit` records of an encoded source without reading their ids."""
    arrays = {name: _map(source.folder, name, manifest.sizes[name]) for name in ARRAYS}
    used = arrays["outcomes"][: source.limit]
    check_offsets(arrays, [pairs for _, pairs, *_ in manifest.outcomes], len(manifest.files), source.folder)
    outcomes = [
        Outcome(drop, pairs, tuple((n, k) for n, k in changed), *read_as)
        for drop, pairs, changed, *read_as in manifest.outcomes
    ]
    numbers = np.bincount(used, minlength=len(outcomes)).tolist()
    files = [_display_name(source.path, name) for name in manifest.files]
    shown = [example for example in manifest.examples if example[0] < len(used)]
    examples = [f"{files[file]}:{line} {reason}" for _, file, line, reason, _ in shown]
    details = {reason: detail for *_, reason, detail in reversed(shown) if detail}
    counts = DataCounts.of(Counter(dict(zip(outcomes, numbers, strict=True))), examples, details)
    pieces = int(arrays["pair_pieces"][pairs - 1]) if (pairs := counts.pairs) else 0
    responses = pieces - pairs
    return SourceView(
        counts,
        pairs,
        files,
        {
            "ids": arrays["ids"],
            "piece_starts": arrays["piece_starts"][:pieces],
            "piece_tokens": arrays["piece_tokens"][:pieces],
            "pair_pieces": arrays["pair_pieces"][:pairs],
            "keys": arrays["keys"].reshape(-1, 2)[:responses],
            "scores": arrays["scores"][:responses],
            "trained": arrays["trained"],
            "mask_starts": arrays["mask_starts"][:responses],
            "trained_tokens": arrays["trained_tokens"][:responses],
            "truncated": arrays["truncated"][:responses],
            "prompts": arrays["prompts"][:pairs],
            "origins": arrays["origins"].reshape(-1, 2)[:pairs],
        },
    )


def _map(folder: Path, name: str, size: int) -> npt.NDArray[Any]:
    if not size:
        return np.empty(0, dtype=ARRAYS[name])
    return np.memmap(folder / f"{name}.bin", dtype=ARRAYS[name], mode="r", shape=(size,))


def _relative_name(path: str, source: str) -> str:
    return os.path.relpath(Path(source).expanduser(), root_of(path).expanduser())


def _display_name(path: str, name: str) -> str:
    return path if name == "." else str(root_of(path) / name)
