"""Find the files of a source: patterns, folders of shards, saved datasets, the Hugging Face Hub."""

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.config.data import SourceConfig
from dpo_dist.data.read import KINDS, file_kind
from dpo_dist.foundation.errors import ConfigError, DataError, first_line
from dpo_dist.foundation.files import is_absent_offline, recall, remember

log = logging.getLogger(__name__)

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


def check_unused(path: str, **options: str | None) -> None:
    """Check that no option is set that has no effect on a source. Raises ConfigError."""
    for key, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{key} has no effect on this source",
                where=f"{key} of {path}",
                got=value,
                expected="null",
                remedy=f"remove {key}: it is of Hub datasets"
                + (" and folders with splits" * (key == "split")),
            )


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
        check_unused(str(folder), split=split)
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
    below = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not _is_hidden(folder, file) and file.name not in _DESCRIPTIONS
    )
    files = [file for file in below if file_kind(file)]
    if not files:
        raise DataError(
            "the folder has no data files",
            where=str(folder),
            got=", ".join(file.name for file in below[:5]) or "an empty folder",
            expected=f"{', '.join(KINDS)} files, or a folder written by Dataset.save_to_disk",
            remedy="check the path; a file with another ending is named itself, or by a pattern",
        )
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    names = sorted(filter(None, set(splits.values())))
    unread = [file for file in below if not file_kind(file) and _UNREAD_DATA.search(file.name)]
    for what, mixed in (
        ("the folder has data files that cannot be read", unread),
        ("the folder has data files of several kinds", files if len(set(map(file_kind, files))) > 1 else []),
        ("the names of some files have no split", [file for file in files if names and not splits[file]]),
    ):
        if mixed:
            raise DataError(
                what,
                where=str(folder),
                got=", ".join(str(file.relative_to(folder)) for file in mixed[:5]),
                expected="files of one kind, with a split in every name or in none",
                remedy="convert or rename them, or select files by a pattern, for example path/*.jsonl",
            )
    if not names:
        check_unused(str(folder), split=split)
        return files
    found = [file for file in files if splits[file] == (split or "train")]
    if not found:
        raise _no_split(folder, split, names)
    _check_all_shards(folder, found)
    return found


def _split_of(file: Path) -> str | None:
    if shard := _SHARD_OF_SPLIT.match(file.name):
        return shard[1]
    words = [word for word in re.split(r"[^a-z0-9]+", str(file).lower()) if word in _SPLIT_WORDS]
    return _SPLIT_WORDS[words[-1]] if words else None


def _check_all_shards(folder: Path, files: list[Path]) -> None:
    present: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if shard := _SHARD_OF_SPLIT.match(str(file.relative_to(folder))):
            present.setdefault((shard[1], shard[3]), set()).add(int(shard[2]))
    for (name, total), numbers in present.items():
        if missing := sorted(set(range(int(total))) - numbers):
            raise DataError(
                "shards of the source are missing",
                where=str(folder),
                got=f"{len(missing)} of {int(total)}, first {name}-{missing[0]:05d}-of-{total}",
                remedy="copy or download the folder again, or select the shards that exist by a pattern",
            )


def _no_split(folder: Path, split: str | None, names: list[str]) -> DataError:
    return DataError(
        "the folder has no such split",
        where=str(folder),
        got=split or "train (the default)",
        expected=", ".join(names),
        remedy="set split of this source",
    )


_NOT_FOUND = "neither a local file nor a dataset found on the Hugging Face Hub"
_COMMITS = "hub_commits"


def pinned(source: SourceConfig, cache: Path | None) -> SourceConfig:
    """Return a Hub source with its `revision` (null: main) resolved to a commit.

    If the Hub cannot be reached (HF_HUB_OFFLINE, no network), the last known commit is used, from the Hub's
    own cache or from `cache`.

    Raises:
        DataError: the Hub has no such dataset or revision, or cannot be reached and no commit is known.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import
    from huggingface_hub.errors import RevisionResolutionError  # noqa: PLC0415

    key = f"{source.path}@{source.revision or 'main'}"
    memo = None if cache is None else cache / _COMMITS
    known = recall(memo, key)
    with _as_data_error(source):
        try:
            found = HfApi().resolve_revision(source.path, repo_type="dataset", revision=source.revision)
        except RevisionResolutionError:
            if known is None:
                raise
            log.warning("the Hub cannot be reached for %s; its commit %s is used", source.path, known)
            return replace(source, revision=known)
    if found.resolved != known:
        remember(memo, key, found.resolved)
    return replace(source, revision=found.resolved)


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
        # Strangers write the card of a dataset: it names no files of this machine.
        for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
            if not Path(os.path.normpath(file)).is_relative_to(folder):
                raise DataError(
                    "the card of the dataset names a file outside its folder",
                    where=source.path,
                    got=file,
                    remedy="set path of the source to this file, if you want it to be read",
                )
        records = builder.as_streaming_dataset(split=source.split or "train")
    return _read(source, records)


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
    keys = ("name", "data_dir", "revision", "split")
    options = [f"{key} {getattr(source, key)}" for key in keys if getattr(source, key)]
    return f"{source.path} ({', '.join(options) or 'split train'})"
