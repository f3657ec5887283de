"""Sources of several local files: globs, folders of shards, folders saved by `datasets`."""

import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_dist.data.files import KINDS, file_kind
from dpo_dist.errors import ConfigError, DataError

_GLOB = re.compile(r"[*?\[]")
_SAVED = ("state.json", "dataset_dict.json")
# What `datasets` writes beside data files, not data itself.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", *_SAVED)
_SHARD_OF_SPLIT = re.compile(r"(.+?)-(\d{5})-of-(\d{5})")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def is_glob(path: str) -> bool:
    """Whether `path` has a character of a glob pattern."""
    return _GLOB.search(path) is not None


def root_of(path: str) -> Path:
    """What files of a source are named relative to: the source, or of a pattern the folder before it."""
    return Path(*itertools.takewhile(lambda part: not is_glob(part), Path(path).parts))


def globbed_files(pattern: str) -> list[Path]:
    """The files that match, sorted by path; `**` reaches into folders.

    Raises:
        DataError: no file matches.
    """
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207  # a Path's glob takes no absolute pattern
    files = sorted(file for file in map(Path, found) if file.is_file())
    if not files:
        raise DataError(
            "no file matches the pattern",
            where=pattern,
            remedy="check the pattern; `**` reaches into folders",
        )
    return files


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with `save_to_disk`."""
    return any((folder / name).is_file() for name in _SAVED)


def saved_records(folder: Path, split: str | None) -> Iterator[Any]:
    """Rows of a folder for which `is_saved` holds.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    from datasets import Dataset, load_from_disk  # noqa: PLC0415  # slow to import, and only needed here

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as fault:
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
    """The data files below a folder that belong to `split`, sorted by path.

    The split of a file is told by its name, as `datasets` does: `NAME-00000-of-00004.parquet`, or one of the
    words train, validation, test and their synonyms in its path below `folder`. Where no file tells one, all
    belong to the only split.

    Raises:
        DataError: there is no data file, there are files of several kinds, some that tell no split beside
            others that do, or none of the split; or a shard of it is missing.
        ConfigError: a split is asked for and no file tells one.
    """
    below = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_beside_data(folder, file))
    files = [file for file in below if file_kind(file)]
    if not files:
        raise DataError(
            "the folder has no data files",
            where=str(folder),
            got=", ".join(file.name for file in below[:5]) or "an empty folder",
            expected=f"{', '.join(KINDS)} files, or what Dataset.save_to_disk writes",
        )
    kinds = {file_kind(file) for file in files}
    if len(kinds) > 1:
        raise DataError(
            "the folder has data files of several kinds",
            where=str(folder),
            got=", ".join(file.name for file in files[:5]),
            expected="files of one kind",
            remedy="name the files by a pattern, for example path/*.jsonl",
        )
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    told = sorted(name for name in set(splits.values()) if name)
    if not told:
        check_no_split(str(folder), split)
        return files
    untold = [file for file in files if splits[file] is None]
    if untold:
        raise DataError(
            "the folder has files whose names tell no split, beside others that do",
            where=str(folder),
            got=", ".join(str(file.relative_to(folder)) for file in untold[:5]),
            expected=f"names that tell one, as others do: {', '.join(told)}",
            remedy="name the files that are wanted by a pattern, for example path/*.jsonl, or rename these",
        )
    found = [file for file in files if splits[file] == (split or "train")]
    if not found:
        raise _no_split(folder, split, told)
    _check_all_shards(folder, found)
    return found


def _check_all_shards(folder: Path, files: list[Path]) -> None:
    numbers: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if shard := _SHARD_OF_SPLIT.match(file.name):
            numbers.setdefault((file.parent, shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (_, name, total), there in numbers.items():
        if missing := sorted(set(range(total)) - there):
            raise DataError(
                "shards of the source are missing",
                where=str(folder),
                got=f"{len(missing)} of {total}: {name}-{missing[0]:05d}-of-{total:05d}"
                + (" and others" if missing[1:] else ""),
                remedy="copy or download the folder again; a part of it is named by a pattern, for example "
                f"path/{name}-*",
            )


def check_no_split(path: str, split: str | None) -> None:
    """Refuse a split for a source that has none. Raises ConfigError."""
    if split is not None:
        raise ConfigError(
            "a split has no effect on a source without splits",
            where=f"split of {path}",
            got=split,
            expected="null",
            remedy="remove split, or use limit to take the first records only",
        )


def _is_beside_data(folder: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return hidden or file.name in _DESCRIPTIONS


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
