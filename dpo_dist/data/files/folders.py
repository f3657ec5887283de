"""Find the files of a local source: patterns, folders of shards, folders saved by `datasets`."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_dist.data.files.inside import check_saved
from dpo_dist.data.files.read_file import KINDS, file_kind
from dpo_dist.errors import ConfigError, DataError

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
    files = sorted(
        file
        for file in root.glob(str(below))
        if file.is_file() and (shows_hidden or not _is_hidden(root, file))
    )
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
        DataError: it cannot be loaded, has no such split, or names files of another folder.
    """
    from datasets import Dataset, load_from_disk  # noqa: PLC0415  # slow to import

    try:
        check_saved(folder)
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise DataError(
            "the folder saved by datasets cannot be loaded",
            where=str(folder),
            got=f"{type(fault).__name__}: {fault}".splitlines()[0],
            remedy="save it again with Dataset.save_to_disk",
        ) from fault
    if isinstance(saved, Dataset):
        check_no_split(str(folder), split)
        return iter(saved)
    if (split or "train") not in saved:
        raise _no_split(folder, split, map(str, saved))
    return iter(saved[split or "train"])


def shards(folder: Path, split: str | None) -> list[Path]:
    """Return the data files of `split` below a folder, sorted by path.

    The split of a file follows from its name, as in `datasets`: `NAME-00000-of-00004.parquet`, or one of the
    words train, validation, test and their synonyms in its path below `folder`. If no name has a split, all
    files belong to the only split.

    Raises:
        DataError: no data file is found; a data file is of a kind that is not read, or the files are of
            several kinds; only some names have a split; no
            file belongs to the split; or a shard of it is missing.
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
    if unread := [file for file in below if not file_kind(file) and _UNREAD_DATA.search(file.name)]:
        raise DataError(
            "the folder has data files that cannot be read",
            where=str(folder),
            got=", ".join(str(file.relative_to(folder)) for file in unread[:5]),
            expected=f"{', '.join(KINDS)} files",
            remedy="convert or rename them, or select the other files by a pattern, for example path/*.jsonl",
        )
    kinds = {file_kind(file) for file in files}
    if len(kinds) > 1:
        raise DataError(
            "the folder has data files of several kinds",
            where=str(folder),
            got=", ".join(file.name for file in files[:5]),
            expected="files of one kind",
            remedy="select the files by a pattern, for example path/*.jsonl",
        )
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    names = sorted(name for name in set(splits.values()) if name)
    if not names:
        check_no_split(str(folder), split)
        return files
    unnamed = [file for file in files if splits[file] is None]
    if unnamed:
        raise DataError(
            "the names of some files have no split",
            where=str(folder),
            got=", ".join(str(file.relative_to(folder)) for file in unnamed[:5]),
            expected=f"a split in every name or in none; other files have: {', '.join(names)}",
            remedy="select the files by a pattern, for example path/*.jsonl, or rename these",
        )
    found = [file for file in files if splits[file] == (split or "train")]
    if not found:
        raise _no_split(folder, split, names)
    _check_all_shards(folder, found)
    return found


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


def _no_split(folder: Path, split: str | None, names: Any) -> DataError:
    return DataError(
        "the folder has no such split",
        where=str(folder),
        got=split or "train (the default)",
        expected=", ".join(names),
        remedy="set split of this source",
    )
