"""Reference log-probs on disk: append-only shards of entries, found by content key, verified when read.

    <reference.store>/
      <fingerprint>/space.json                content of the fingerprint
      <fingerprint>/<digest>.safetensors      a shard: sorted keys, ends and checksums of entries, all values
      <fingerprint>/<digest>.fetched          the shard is from this URL, and was not compared with the model
      <fingerprint>/<digest>.index            the entries of all shards, sorted; `verified.json`: see `index`
      file_digests/                           digests of model files

A fingerprint is the digest of model weights, numerics and version of the scoring code (law L3). An entry's
key is computed from its exact token ids. A shard's name is the digest of its fingerprint, keys, ends and
checksums, so that several jobs can write the same shard, and a shard copied from another fingerprint counts
as damaged. Imports no torch before values are read.
"""

import hashlib
import json
import logging
import os
import re
import shlex
import socket
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dpo_dist.batching.content_keys import Keys
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.files import safetensors_header, staged_file, text_digest, write_text
from dpo_dist.reference.index import file_state, forget_whole, open_index, recall_whole, remember_whole

log = logging.getLogger(__name__)

StoredLogps = npt.NDArray[np.float32]
"""Per-token log-probs of a response, float32 [response tokens]; of a teacher [response tokens, width]."""
_Numbers = npt.NDArray[np.int64]

# Raise it when a change of the code changes digits of log-probs: runs would mix old and new ones.
# tests/unit/reference/test_scoring_digits.py detects such a change.
LOGP_PATH_VERSION = 2

# Raise it when the format of the files changes: entries of an older format would be misread.
STORE_FORMAT = 2

FINGERPRINT_FILE = "space.json"
RECIPE_FILE = "recipe.json"
"""What decided the token ids of the last run that filled a folder, for those who fetch from it."""

# Fields of a profile, beside the model, without which two scores differ by more than rounding.
_EXACT = ("dtype", "matmul_precision", "quantization", "rows")
FETCHED = ".fetched"
"""Suffix of the file beside a shard that was fetched and not compared with the model."""
_THREADS = 8  # that wait for a network file system
_SHARDS_AT_ONCE = 64

_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True)
class ReferenceFingerprint:
    """Identity of stored log-probs: the reference model and the numerics that computed them.

    `reference` is the digest of the model's files, `profile` comes from `model.numerics.numerics_profile`.
    The identity does not include `label`, the model's readable name. `width`: numbers of each token, above 1
    for rows of a teacher's distributions (`objective.distillation`).
    """

    reference: str
    profile: dict[str, str]
    label: str = field(default="", compare=False)
    width: int = 1

    def rounds(self, other: "ReferenceFingerprint") -> bool:
        """Return whether log-probs under another fingerprint differ from these, by rounding alone."""
        exact = [(each.reference, each.width, *map(each.profile.get, _EXACT)) for each in (self, other)]
        return self != other and exact[0] == exact[1]

    @property
    def name(self) -> str:
        """The folder's name, 32 hex digits: the digest of reference, profile and versions."""
        identity = {name: value for name, value in self.as_dict().items() if name != "label"}
        return text_digest(json.dumps(identity, sort_keys=True))

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `space.json`."""
        content = {**vars(self), "logp_path": LOGP_PATH_VERSION, "format": STORE_FORMAT}
        if self.width == 1:  # of log-probs, as before there were teachers
            del content["width"]
        return content


def read_fingerprint(folder: Path) -> ReferenceFingerprint | None:
    """Return a folder's fingerprint; None if `space.json` is missing, damaged or of another folder."""
    try:
        return fingerprint_in(json.loads((folder / FINGERPRINT_FILE).read_bytes()), folder.name)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def fingerprint_in(content: dict[str, Any], name: str) -> ReferenceFingerprint:
    """Return the fingerprint with this content of `space.json`, of a folder `name`.

    Raises ValueError, KeyError, TypeError: it is damaged, or of another folder.
    """
    fingerprint = ReferenceFingerprint(
        content["reference"], dict(content["profile"]), content["label"], content.get("width", 1)
    )
    is_whole = fingerprint.as_dict() == content and fingerprint.name == name
    if not is_whole or fingerprint.width < 1:
        raise ValueError("a fingerprint of another folder")
    return fingerprint


def read_fingerprints(root: Path) -> list[ReferenceFingerprint]:
    """Return the fingerprints in a store whose `space.json` can be read; none if `root` is not a store."""
    return list(filter(None, map(read_fingerprint, sorted(root.glob("*")))))


def find_fingerprint_folders(root: Path) -> list[Path]:
    """Return the folders of all fingerprints in a store; a store without any is an error."""
    folders = [path for path in sorted(root.glob("*")) if _FOLDER_NAME.fullmatch(path.name)]
    begun = []
    for folder in folders:
        if (folder / FINGERPRINT_FILE).exists() or any(folder.glob("*.safetensors")):
            begun.append(folder)
    if not begun:
        raise ReferenceModelError(
            "this folder has no reference store",
            where=str(root),
            remedy="give the folder of reference.store, by default output/reference",
        )
    return begun


@dataclass(frozen=True)
class Shard:
    """A verified shard; its values are mapped at the first access.

    `keys`: uint64 [entries, 2]. `ends`: int64 [entries], the end of each entry in `values`. `checks`: int64
    [entries], the CRC-32 of each entry's values. The values are the last bytes of the file: safetensors
    writes wider dtypes first.
    """

    file: Path
    keys: Keys
    ends: _Numbers
    checks: _Numbers

    @property
    def tokens(self) -> int:
        """Number of values: of log-probs one for each response token."""
        return int(self.ends[-1])

    @cached_property
    def values(self) -> StoredLogps:
        """The log-probs of all entries, float32 [tokens]."""
        return _map_file(self.file)[-4 * self.tokens :].view(np.float32)

    @property
    def lengths(self) -> _Numbers:
        """The number of values of each entry, int64 [entries]."""
        return np.diff(self.ends, prepend=0)

    @property
    def starts(self) -> _Numbers:
        """The place of each entry's first value in the file, int64 [entries], in bytes."""
        return self.file.stat().st_size - 4 * (self.tokens - self.ends + self.lengths)

    def are_intact(self) -> npt.NDArray[np.bool_]:
        """Return whether the values of each entry match its checksum, bool [entries]."""
        values = self.values.data.cast("B")
        ends = (4 * self.ends).tolist()
        entries = zip([0, *ends[:-1]], ends, self.checks.tolist(), strict=True)
        return np.array([zlib.crc32(values[start:end]) == check for start, end, check in entries])

    def count_damaged(self) -> int:
        """Return the number of entries whose values do not match their checksums."""
        return int((~self.are_intact()).sum())


def _map_file(file: Path) -> npt.NDArray[np.uint8]:
    """Map a file, read-only and without keeping it open: a store may have thousands of shards."""
    import torch  # noqa: PLC0415  (slow, and `dpo-dist store info` reads no values)

    content: npt.NDArray[np.uint8] = torch.from_file(
        str(file), False, file.stat().st_size, dtype=torch.uint8
    ).numpy()
    content.flags.writeable = False
    return content


def list_shards(folder: Path) -> list[str]:
    """Return the names of all shards in a fingerprint's folder, including damaged ones."""
    with os.scandir(folder) as files:
        names = (file.name for file in files if file.is_file())
        return sorted(filter(_SHARD_NAME.fullmatch, names))


def _shard_name(folder: Path, *arrays: npt.NDArray[np.generic]) -> str:
    digest = hashlib.blake2b(folder.name.encode(), digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return f"{digest.hexdigest()}.safetensors"


def open_shard(file: Path) -> Shard | None:
    """Return a shard whose keys match its name and folder; warn and return None if they do not."""
    try:
        with safe_open(file, "np") as opened:
            keys, ends, checks = map(opened.get_tensor, ("keys", "ends", "checks"))
        shard = Shard(file, keys.view(np.uint64).reshape(-1, 2), ends.view(np.int64), checks.view(np.int64))
        if _shard_name(file.parent, shard.keys, shard.ends, shard.checks) == file.name:
            return shard
        fault = "its keys do not match its name and folder"
    except (FileNotFoundError, SafetensorError, ValueError, TypeError) as error:
        fault = str(error)
    except OSError as error:  # scoring these entries again would be expensive and leave the cause
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    log.warning("shard %s is damaged, and its entries count as missing: %s", file, fault)
    return None


class LogpStore:
    """Log-probs of responses by key, of one fingerprint.

    An entry has one float32 value per completion token, including the end-of-turn token; of a teacher it has
    `fingerprint.width`. Keys are uint64
    [n, 2] (`batching.content_keys`). Opening a store maps the index of its shards, which is written if they
    have changed, and maps the values. A shard is read only if it is not known to be whole.

    Attributes:
        shards: names of the opened shards, relative to `root` (`reference.store`).
        damaged: names of the shards that could not be opened, or had damaged values when read.
    """

    def __init__(self, root: Path, fingerprint: ReferenceFingerprint, names: Iterable[str] | None = None):
        self.root = root
        self.fingerprint = fingerprint
        self.folder = root / fingerprint.name
        if names is None:
            listed = list_shards(self.folder) if self.folder.is_dir() else []
            names = [f"{self.folder.name}/{name}" for name in listed]
        # Sorted, so that every rank takes the same one of several entries of a key; this fingerprint's first.
        names = sorted(names, key=lambda name: (not name.startswith(self.folder.name), name))
        memo = recall_whole(self.folder)
        with ThreadPoolExecutor(_THREADS) as pool:
            states = pool.map(lambda name: file_state(root / name), names)
            unknown = {
                name
                for name, state in zip(names, states, strict=True)
                if memo.get(Path(name).name, "") != state
            }
        opened = zip(unknown, self._open_shards([*unknown]), strict=True)
        self.damaged = {name for name, shard in opened if shard is None}
        self.shards = [name for name in names if name not in self.damaged]
        self._index = open_index(self.folder, self.shards, self._read_entries)
        self._unverified = {number for number, name in enumerate(self.shards) if name in unknown}
        # Now, so that a job continues when its fingerprint is dropped.
        self._contents = [_map_file(root / name) for name in self.shards]

    def _open_shards(self, names: Sequence[str]) -> Iterator[Shard | None]:
        """Yield what `open_shard` returns for each name; in memory are a few at a time."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(names), _SHARDS_AT_ONCE):
                yield from pool.map(
                    open_shard, (self.root / name for name in names[start : start + _SHARDS_AT_ONCE])
                )

    def _read_entries(self) -> Iterator[tuple[npt.NDArray[Any], ...]]:
        """Yield the columns of an `Index` with the entries of each shard."""
        for number, shard in enumerate(self._open_shards(self.shards)):
            if shard is None:  # its times are as they were when it was whole
                forget_whole(self.folder)
                raise OSError(f"{self.shards[number]} is damaged; start again, which verifies all shards")
            numbers = np.full(len(shard.keys), number)
            yield *shard.keys.T, shard.starts, shard.lengths, shard.checks, numbers

    @classmethod
    def open(
        cls, root: Path, fingerprint: ReferenceFingerprint, names: Iterable[str] | None = None
    ) -> "LogpStore":
        """Open the shards `names`; without `names`, open all and record that their folder is used."""
        try:
            if names is None:
                _record_use(root / fingerprint.name, fingerprint)
            store = cls(root, fingerprint, names)
        except OSError as error:
            raise ReferenceModelError(
                "the reference store cannot be opened",
                where="reference.store",
                got=f"{root / fingerprint.name}: {error}",
                remedy="check that the folder exists, is readable, and is visible on every node",
            ) from error
        if names is not None and store.damaged:
            raise ReferenceModelError(
                "shards of reference log-probs that this run uses cannot be read",
                where=f"reference.store on {socket.gethostname()}",
                got=f"{len(store.damaged)} missing or damaged: {root / min(store.damaged)}",
                remedy="put reference.store on a file system that every node sees, and start again: "
                "missing log-probs are computed before training",
            )
        return store

    def check_writable(self) -> None:
        """Check that entries can be written, so that hours of scoring are not lost."""
        if not os.access(self.folder, os.W_OK):
            raise ReferenceModelError(
                "the reference store lacks log-probs that this run needs, and cannot be written",
                where="reference.store",
                got=f"{self.folder} is read-only",
                remedy="fix the permissions, or set another reference.store",
            )

    def __len__(self) -> int:
        return len(self._index.checks)

    def _find(self, keys: Keys) -> Iterator[StoredLogps | None]:
        """Yield the values of each key; None for a key without an intact entry."""
        index = self._index
        starts, stops = index.locate(keys)
        for first, stop, second in zip(starts.tolist(), stops.tolist(), keys[:, 1].tolist(), strict=True):
            for entry in range(first, stop):
                if index.second_words[entry] != second:
                    continue
                start = int(index.starts[entry])
                shard = int(index.shards[entry])
                values = self._contents[shard][start : start + 4 * int(index.tokens[entry])]
                width = self.fingerprint.width
                if zlib.crc32(values.data) == index.checks[entry] and index.tokens[entry] % width == 0:
                    numbers = values.view(np.float32)
                    yield numbers if width == 1 else numbers.reshape(-1, width)
                    break
                self.damaged.add(self.shards[shard])
            else:
                yield None

    def find(self, keys: Keys) -> list[StoredLogps | None]:
        """Return the log-probs of each key, float32 [completion tokens]; None if missing or damaged."""
        return list(self._find(keys))

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return whether each of `keys` has an intact entry, bool [n]; fast for sorted keys.

        Shards that are not known to be whole are read and verified.
        """
        entries, stops = self._index.locate(keys)
        has_entry: npt.NDArray[np.bool_] = entries < stops
        if self._unverified:
            which = np.flatnonzero(has_entry)
            shards = self._index.shards[entries[which]]
            self._verify(sorted(self._unverified.intersection(np.unique(shards).tolist())))
            rest = which[np.isin(shards, [*self._unverified])]
            has_entry[rest] = [values is not None for values in self._find(keys[rest])]
        return has_entry

    def _verify(self, shards: Sequence[int]) -> None:
        """Read all values of these shards; those without damage are no longer in doubt."""

        def is_whole(number: int) -> bool:
            shard = open_shard(self.root / self.shards[number])
            return shard is not None and not shard.count_damaged()

        with ThreadPoolExecutor(_THREADS) as pool:
            intact = {number for number, good in zip(shards, pool.map(is_whole, shards), strict=True) if good}
        self._unverified -= intact
        self.damaged.update(self.shards[number] for number in intact.symmetric_difference(shards))
        self.remember(self.shards[number] for number in intact)

    def remember(self, names: Iterable[str]) -> None:
        """Count shards that were just verified or written as whole: the next start does not read them."""
        remember_whole(self.folder, {Path(name).name: file_state(self.root / name) for name in names})

    def fetched(self, keys: Keys) -> dict[str, npt.NDArray[np.intp]]:
        """Return the places in `keys` of entries that were never compared with the model, by their URL."""
        entries, stops = self._index.locate(keys)
        found = np.flatnonzero(entries < stops)
        urls, of_shard = np.unique(self.origins(), return_inverse=True)
        origins = of_shard[self._index.shards[entries[found]]]
        return {str(urls[each]): found[origins == each] for each in np.unique(origins) if urls[each]}

    def settle(self, urls: Collection[str], *, are_right: bool) -> None:
        """Count what was fetched from these URLs as compared with the model, or remove it."""
        with suppress(OSError):  # a store that is read-only keeps it as it is
            for name, url in zip(self.shards, self.origins(), strict=True):
                if url in urls:
                    shard = self.root / name
                    if not are_right:
                        shard.unlink(missing_ok=True)
                    shard.with_suffix(FETCHED).unlink(missing_ok=True)

    def origins(self) -> list[str]:
        """Return the URL of each shard that was fetched and never compared, "" of others."""
        urls = [""] * len(self.shards)
        for mark in self.root.glob(f"*/*{FETCHED}"):
            with suppress(OSError, ValueError):  # settled by another job at this moment, or not opened here
                urls[self.shards.index(f"{mark.parent.name}/{mark.stem}.safetensors")] = mark.read_text()
        return urls

    def read(self, keys: Keys) -> list[StoredLogps]:
        """Return the log-probs of each key, float32 [completion tokens]; a missing key is an error."""
        entries = []
        for key, values in zip(keys, self._find(keys), strict=True):
            if values is None:
                damaged = f"; damaged: {', '.join(sorted(self.damaged))}" if self.damaged else ""
                remedy = "start the same command again: missing log-probs are computed before training"
                if self.damaged and not forget_whole(self.folder):
                    remedy = "restore the damaged file, or set another reference.store: this one is read-only"
                raise ReferenceModelError(
                    "a reference log-prob that this run needs is missing or damaged",
                    where=str(self.folder),
                    got=f"entry {key[0]:016x}{key[1]:016x}{damaged}",
                    remedy=remedy,
                )
            entries.append(values)
        return entries

    def wrong_entry(self, key: Sequence[int], fault: str) -> ReferenceModelError:
        """Return the error of an entry that is whole, so that no start computes it again."""
        place = shlex.join([str(self.root), "--drop", self.fingerprint.name])
        return ReferenceModelError(
            "a stored entry is no answer of this model",
            where=str(self.folder),
            got=f"entry {key[0]:016x}{key[1]:016x} has {fault}",
            remedy=f"remove this model's entries, and start again: dpo-dist store gc {place} --yes",
        )

    def write(self, keys: Keys, entries: Sequence[StoredLogps], url: str = "") -> str:
        """Write entries as one shard, and return its name; a store sees the shard when it is opened again.

        Entries that were fetched from `url` are marked until they are compared with the model.
        """
        bad_entries = sum(not np.isfinite(values).all() for values in entries)
        if bad_entries:
            is_teacher = self.fingerprint.width > 1
            model = "teacher" if is_teacher else "reference model"
            raise ReferenceModelError(
                f"the {model} computes log-probs that are not finite",
                where="teacher.path" if is_teacher else "reference.path (if null, model.path)",
                got=f"{bad_entries} of {len(entries)} responses",
                remedy="check the model's weights, and whether it needs model.dtype=fp32",
            )
        # Sorted: the same entries make the same file, whichever job writes it.
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        entries = [np.ascontiguousarray(entries[i], dtype=np.float32).reshape(-1) for i in order]
        keys = np.ascontiguousarray(keys[order])
        ends = np.cumsum(list(map(len, entries)), dtype=np.int64)
        checks = np.array([zlib.crc32(entry.data) for entry in entries], dtype=np.int64)
        name = _shard_name(self.folder, keys, ends, checks)
        tensors = {
            "keys": ("U64", keys.shape),
            "ends": ("I64", ends.shape),
            "checks": ("I64", checks.shape),
            "values": ("F32", (int(ends[-1]),)),
        }
        try:
            if url:  # first: a kill leaves no shard without its mark
                write_text((self.folder / name).with_suffix(FETCHED), url)
            with staged_file(self.folder / name) as temporary, temporary.open("wb") as opened:
                opened.write(safetensors_header(tensors))
                opened.writelines([keys.data, ends.data, checks.data, *(entry.data for entry in entries)])
        except OSError as error:
            raise ReferenceModelError(
                "a shard of reference log-probs cannot be written",
                where="reference.store",
                got=f"{self.folder}: {error}",
                remedy="free disk space or set another reference.store; finished shards are kept",
            ) from error
        return f"{self.folder.name}/{name}"


def _record_use(folder: Path, fingerprint: ReferenceFingerprint) -> None:
    """Set a folder's time of last use, and write its `space.json` if missing."""
    try:
        if read_fingerprint(folder) is not None:
            os.utime(folder / FINGERPRINT_FILE)
        else:
            write_text(folder / FINGERPRINT_FILE, json.dumps(fingerprint.as_dict(), indent=1))
    except OSError as error:
        if not folder.is_dir():
            raise
        log.warning("the reference store can be read, but not written: %s", error)
