"""Find the files of a source: patterns, folders of shards, saved datasets, the Hugging Face Hub."""

import contextlib
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.config.data import SourceConfig
from dpo_dist.data.read import KINDS, file_kind
from dpo_dist.foundation.errors import ConfigError, DataError, first_line
from dpo_dist.foundation.files import is_absent_offline, recall, remember

_GLOB = re.compile(r"[*?\[]")
_SAVED = ("state.json", "dataset_dict.json")
# Metadata that `datasets` writes beside the data files.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", *_SAVED)
_SHARD_OF_SPLIT = re.compile(r"(.+?)-(\d{5})-of-(\d{5})")
_UNREAD_DATA = re.compile(
    r"\.(jsonl|json|csv|parquet|ndjson|jsonlines|tsv|arrow|feather)(\.(gz|zst|bz2|xz|zip|lz4|7z|br))?$",
    re.IGNORECASE,
)
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def is_glob(path: str) -> bool:
    """Return whether `path` is a pattern."""
    return _GLOB.search(path) is not None


def root_of(path: str) -> Path:
    """Return the folder to which names of a source's files are relative; of a pattern the part before it."""
    return Path(*itertools.takewhile(lambda part: not is_glob(part), Path(path).parts))


def globbed_files(pattern: str) -> list[Path]:
    """Return the files that match, sorted by path; `**` matches folders, without following links to folders.

    Raises:
        DataError: no file matches.
    """
    root = root_of(pattern)
    parts = [part if part == "**" else re.sub(r"\*\*+", "*", part) for part in Path(pattern).parts]
    below = Path(*parts[len(root.parts) :]) / ("*" if parts[-1] == "**" else "")
    shows_hidden = any(part.startswith(".") for part in below.parts)
    found = (file for file in root.glob(str(below)) if file.is_file())
    files = sorted(file for file in found if shows_hidden or not _is_hidden(root, file))
    if not files:
        raise DataError(
            "no file matches the pattern",
            where=pattern,
            remedy="check the pattern; `**` matches folders at any depth",
        )
    return files


def _is_hidden(root: Path, file: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in _SAVED)


def saved_records(folder: Path, split: str | None) -> Iterator[Any]:
    """Return the records of a folder written by `Dataset.save_to_disk`.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    from datasets import Dataset, load_from_disk  # noqa: PLC0415  # slow to import

    try:
        saved = load_from_disk(str(folder))
    except Exception as fault:  # the library's errors share no base class
        raise DataError(
            "the folder saved by datasets cannot be loaded",
            where=str(folder),
            got=first_line(fault),
            remedy="save it again with Dataset.save_to_disk",
        ) from fault
    if isinstance(saved, Dataset):
        check_no_split(str(folder), split)
        return iter(saved)
    if (split or "train") not in saved:
        raise _no_split(folder, split, list(map(str, saved)))
    return iter(saved[split or "train"])


def shards(folder: Path, split: str | None) -> list[Path]:
    """Return the data files of `split` below a folder, sorted by path.

    The split of a file follows from its name, as in `datasets`: `NAME-00000-of-00004.parquet`, or one of the
    words train, validation, test and their synonyms in its path below `folder`. If no name has a split, all
    files belong to the only split.

    Raises:
        DataError: there are no files of the split, or the folder has others that would not be read: of
            another kind, without a split where others have one, or missing shards.
        ConfigError: `split` is set and no name has a split.
    """
    below = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_metadata(folder, file))
    files = [file for file in below if file_kind(file)]
    if not files:
        raise DataError(
            "the folder has no data files",
            where=str(folder),
            got=", ".join(file.name for file in below[:5]) or "an empty folder",
            expected=f"{', '.join(KINDS)} files, or a folder written by Dataset.save_to_disk",
            remedy="check the path; a file with another ending is named itself, or by a pattern",
        )
    unread = [file for file in below if not file_kind(file) and _UNREAD_DATA.search(file.name)]
    if unread:
        raise _mixed("the folder has data files that cannot be read", folder, unread)
    if len(set(map(file_kind, files))) > 1:
        raise _mixed("the folder has data files of several kinds", folder, files)
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    names = sorted(name for name in set(splits.values()) if name)
    if not names:
        check_no_split(str(folder), split)
        return files
    if unnamed := [file for file in files if splits[file] is None]:
        raise _mixed("the names of some files have no split", folder, unnamed)
    found = [file for file in files if splits[file] == (split or "train")]
    if not found:
        raise _no_split(folder, split, names)
    _check_all_shards(folder, found)
    return found


def _mixed(what: str, folder: Path, files: list[Path]) -> DataError:
    return DataError(
        what,
        where=str(folder),
        got=", ".join(str(file.relative_to(folder)) for file in files[:5]),
        expected="files of one kind, with a split in every name or in none",
        remedy="convert or rename them, or select files by a pattern, for example path/*.jsonl",
    )


def _check_all_shards(folder: Path, files: list[Path]) -> None:
    numbers: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if shard := _SHARD_OF_SPLIT.match(file.name):
            numbers.setdefault((file.parent, shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (_, name, total), present in numbers.items():
        if missing := sorted(set(range(total)) - present):
            raise DataError(
                "shards of the source are missing",
                where=str(folder),
                got=f"{len(missing)} of {total}: {name}-{missing[0]:05d}-of-{total:05d}"
                + (" and others" if missing[1:] else ""),
                remedy="copy or download the folder again, or select the shards that exist by a pattern, for "
                f"example path/{name}-*",
            )


def check_no_split(path: str, split: str | None) -> None:
    """Check that `split` is not set for a source without splits. Raises ConfigError."""
    if split is not None:
        raise ConfigError(
            "a split has no effect on a source without splits",
            where=f"split of {path}",
            got=split,
            expected="null",
            remedy="remove split, or use limit to take the first records only",
        )


def _is_metadata(folder: Path, file: Path) -> bool:
    return _is_hidden(folder, file) or file.name in _DESCRIPTIONS


def _split_of(file: Path) -> str | None:
    if shard := _SHARD_OF_SPLIT.match(file.name):
        return shard.group(1)
    words = [word for word in re.split(r"[^a-z0-9]+", str(file).lower()) if word in _SPLIT_WORDS]
    return _SPLIT_WORDS[words[-1]] if words else None


def _no_split(folder: Path, split: str | None, names: list[str]) -> DataError:
    return DataError(
        "the folder has no such split",
        where=str(folder),
        got=split or "train (the default)",
        expected=", ".join(names),
        remedy="set split of this source",
    )


log = logging.getLogger(__name__)

_NOT_FOUND = "neither a local file nor a dataset found on the Hugging Face Hub"
_COMMITS = "hub_commits"
# Seconds before further requests for a commit; downloads are repeated by huggingface_hub.
_WAITS = (1.0, 4.0)


def pinned(source: SourceConfig, cache: Path | None) -> SourceConfig:
    """Return a Hub source with its `revision` (null: main) resolved to a commit.

    If the Hub cannot be reached (HF_HUB_OFFLINE, no network), the last known commit is used, from the Hub's
    own cache or from `cache`.

    Raises:
        DataError: the Hub has no such dataset or revision, or cannot be reached and no commit is known.
    """
    key = f"{source.path}@{source.revision or 'main'}"
    memo = None if cache is None else cache / _COMMITS
    known = recall(memo, key)
    with _as_data_error(source):
        commit = _commit(source, known)
    if commit != known:
        remember(memo, key, commit)
    return replace(source, revision=commit)


def _commit(source: SourceConfig, known: str | None) -> str:
    """Return the commit of the revision, or `known` if the Hub cannot be reached; asks three times."""
    from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionResolutionError  # noqa: PLC0415

    waits = iter(_WAITS)
    while True:
        try:
            api = HfApi()
            return api.resolve_revision(source.path, repo_type="dataset", revision=source.revision).resolved
        except RevisionResolutionError as fault:
            if known is not None:
                log.warning(
                    "the Hub cannot be reached for %s; its last known commit %s is used", source.path, known
                )
                return known
            wait = None if isinstance(fault.__cause__, OfflineModeIsEnabled) else next(waits, None)
            if wait is None:
                raise
            time.sleep(wait)


def hub_records(source: SourceConfig) -> Iterator[Any]:
    """Return the records of a Hub dataset; files missing in the Hub's cache are downloaded first.

    Raises:
        DataError: it cannot be downloaded or read, or has no such configuration or split; raised by this
            call, except for damage found while reading.
    """
    from datasets import load_dataset_builder  # noqa: PLC0415  # slow to import, and only needed here
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    wanted = ["*.md", "*.yaml", f"{source.data_dir}/**"] if source.data_dir else None
    with _as_data_error(source):
        folder = snapshot_download(
            source.path, repo_type="dataset", revision=source.revision, allow_patterns=wanted
        )
        builder = load_dataset_builder(folder, source.name, data_dir=source.data_dir)
        _check_inside(folder, builder.config.data_files or {}, source)
        records = builder.as_streaming_dataset(split=source.split or "train")
    return _read(source, records)


def _check_inside(folder: str, files: dict[str, list[str]], source: SourceConfig) -> None:
    """Check that a dataset card, which strangers write, names no files of this machine. Raises DataError."""
    for file in itertools.chain.from_iterable(files.values()):
        if not Path(os.path.normpath(file)).is_relative_to(folder):
            raise DataError(
                "the card of the dataset names a file outside its folder",
                where=source.path,
                got=file,
                remedy="set path of the source to this file, if you want it to be read",
            )


def _read(source: SourceConfig, records: Any) -> Iterator[Any]:
    with _as_data_error(source):
        yield from records


def check_cached_offline(source: SourceConfig) -> None:
    """Check that a Hub dataset is cached if HF_HUB_OFFLINE allows no download. Raises DataError."""
    if is_absent_offline("dataset", source.path):
        raise DataError(
            _NOT_FOUND,
            where=_described(source),
            got="nothing in the cache of the Hub, and HF_HUB_OFFLINE=1",
            expected="a local path, or a dataset that was downloaded before",
            remedy="check the path or the name, download the dataset, or unset HF_HUB_OFFLINE",
        )


@contextlib.contextmanager
def _as_data_error(source: SourceConfig) -> Iterator[None]:
    """Raise DataError for all errors of the Hub's libraries, which share no base class."""
    try:
        yield
    except DataError:
        raise
    except Exception as fault:
        raise DataError(
            _NOT_FOUND,
            where=_described(source),
            got=" ".join(f"{type(fault).__name__}: {fault}".splitlines()[:2]),
            remedy="check path, name, data_dir, revision, split, the network, and access rights of a gated "
            "dataset; HF_HUB_OFFLINE=1 allows only datasets that were downloaded before",
        ) from fault


def _described(source: SourceConfig) -> str:
    options = {
        "name": source.name,
        "data_dir": source.data_dir,
        "revision": source.revision,
        "split": source.split or "train",
    }
    return f"{source.path} ({', '.join(f'{key} {value}' for key, value in options.items() if value)})"
