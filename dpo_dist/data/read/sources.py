"""The files of a source and their records: a file, a pattern, a folder, or a dataset of the Hub."""

import contextlib
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePath
from typing import TypeVar

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.read.columns import is_saved, resolve_source, with_columns
from dpo_dist.data.read.files import SUFFIXES, check_kind, dataset_rows, numbered_records, read_file
from dpo_dist.data.read.values import parse_json
from dpo_dist.data.records import RawRecord
from dpo_dist.foundation.errors import ConfigError, DataError, dead_link, in_one_line
from dpo_dist.foundation.files import remembered_digest, text_digest

T = TypeVar("T")

_GLOB = re.compile(r"[*?\[]")
_DATA_NAME = re.compile(
    r"\.(jsonl|json|csv|parquet|ndjson|jsonlines|tsv|arrow|feather)(\.(gz|zst|bz2|xz|zip|lz4|7z|br))?$",
    re.IGNORECASE,
)
# Files that describe a dataset beside its data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "config.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_NOT_FOUND = "neither a local file nor a dataset found on the Hugging Face Hub"


def raw_records(source: SourceConfig) -> Iterator[RawRecord]:
    """Return the first `limit` records of a resolved source, after its `reader` and `columns`."""
    files, local = local_files(source), Path(source.path).expanduser()
    names: Iterable[str] = map(str, files or ())
    folders = _image_folders(source)
    if files is None:
        folder = _download(source)
        files = _data_files(folder, source)
        names = [f"{source.path}/{file.relative_to(folder)}" for file in files]
        folders += [folder, folder.parents[1]]  # files of the folder are links to others of the Hub's cache
    elif files == [local]:
        names = [source.path]
    if is_saved(local):
        records = _saved_records(local, source, folders)
    else:
        read = partial(read_file, folders=folders)
        records = itertools.chain.from_iterable(map(read, files, names))
    return with_columns(itertools.islice(records, source.limit), source)


def _image_folders(source: SourceConfig) -> list[Path]:
    """Return the folders of a source for image files. Raises DataError: the one that it names is missing."""
    root = root_of(source.path).expanduser()
    folders = [root] * root.is_dir()
    if source.images is None:
        return folders
    folder = Path(source.images).expanduser()
    if not folder.is_dir():
        raise DataError(
            "the folder of image files does not exist",
            where=f"images of {source.path}",
            got=str(folder),
            remedy="correct data.images, or the source's images",
        )
    return [folder, *folders]


def image_folders_digest(source: SourceConfig) -> str:
    """Return a digest of the places of a source's folders for image files."""
    root = root_of(source.path).expanduser()
    folders = [root if root.is_dir() else root.parent, *map(Path, filter(None, [source.images]))]
    return text_digest("\n".join(str(folder.expanduser().resolve()) for folder in folders))[:16]


def check_has_evaluation_data(data: DataConfig, use: str, form: str = "with both responses") -> None:
    """Raise ConfigError if no source has evaluation data; `use`: "compare models on", for its message."""
    if not data.eval_sources:
        raise ConfigError(
            f"there is no evaluation data to {use}",
            where="data.eval",
            got="no source",
            expected=f"held-out records, {form}",
            remedy="set 'data.eval=[held_out.jsonl]', or data.train and data.eval_share as in training",
        )


def local_files(source: SourceConfig) -> list[Path] | None:
    """Return the files of a local source; None for a dataset on the Hugging Face Hub.

    Raises DataError: the source does not exist, or has a file that cannot be read; ConfigError: a key has no
    effect on this source.
    """
    path = source.path
    if "://" in path:
        raise DataError(
            "URLs cannot be read",
            where=path,
            expected="a local path, or the name of a dataset on the Hugging Face Hub",
            remedy="download the file and set its path; write a Hub dataset as organisation/name",
        )
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or _is_like_a_file(local)
    if not (local.exists() or _GLOB.search(path) or looks_local):
        return None
    unused = {"revision"} if local.is_dir() else {"name", "data_dir", "revision", "split"}
    for key in sorted(unused | ({"name", "data_dir"} if is_saved(local) else set())):
        if (value := getattr(source, key)) is not None:
            raise ConfigError(
                f"{key} has no effect on this source",
                where=f"{key} of {path}",
                got=value,
                expected="null",
                remedy=f"remove {key}: it is for Hub datasets" + (" and folders" * (key != "revision")),
            )
    if local.is_dir():
        if is_saved(local):
            return sorted(below for below in local.rglob("*") if below.is_file())
        return _folder_files(local, source)
    if not local.is_file() and not _GLOB.search(path):
        raise _missing(local)
    files = [local] if local.is_file() else _globbed_files(str(local))
    for file in files:
        check_kind(file, path)
    return files


def source_identity(source: SourceConfig, memo: Path | None = None) -> str:
    """Return a digest of a source's content: of its files, or the commit of a pinned Hub dataset.

    The folder `memo` caches digests of files. Raises DataError: the source does not exist.
    """
    files = local_files(source)
    if files is None:
        return f"hub commit {source.revision}, name {source.name}, data_dir {source.data_dir}"
    digests = [remembered_digest(file, memo) for file in files]
    if Path(source.path).expanduser().is_file():
        return digests[0]
    # Names decide format, split and origins; the folder may be moved.
    root = root_of(source.path).expanduser()
    names = [os.path.relpath(file, root) for file in files]
    return text_digest("\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True)))


def _is_like_a_file(path: Path) -> bool:
    """Return whether a name ends like a data file, or like any file (`table.xlsx`) in an existing folder."""
    if path.suffix in SUFFIXES or _DATA_NAME.search(path.name):
        return True
    return re.fullmatch(r"\.[A-Za-z]{2,7}", path.suffix) is not None and path.parent.is_dir()


def _missing(file: Path) -> DataError:
    is_typed = file.parent.is_dir() and not os.path.lexists(file)
    beside = [other.name for other in file.parent.iterdir()] if is_typed else []
    similar = get_close_matches(file.name, beside, 1)
    return DataError(
        "the path is neither a file nor a folder" if file.exists() else "the file does not exist",
        where=str(file),
        got=dead_link(file) or ("" if file.parent.is_dir() else f"no folder {file.parent}"),
        remedy=f"did you mean {file.with_name(similar[0])}?" if similar else "check the path of the source",
    )


# Patterns and folders.


def root_of(path: str) -> Path:
    """Return the folder to which a source's file names are relative: for a pattern, the part before it."""
    return Path(*itertools.takewhile(lambda part: not _GLOB.search(part), Path(path).parts))


def _globbed_files(pattern: str) -> list[Path]:
    """Return the files that match, sorted by path; hidden ones only if the pattern names the dot."""
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207  (a pathlib pattern matches hidden files)
    # `**` may find a file several times through links to folders: read it once.
    ways = {file.parent.resolve() / file.name: file for file in sorted(map(Path, names), reverse=True)}
    files = sorted(file for file in ways.values() if file.is_file())
    if not files:
        raise DataError(
            "no file matches the pattern",
            where=pattern,
            remedy="check the pattern; `**` matches folders at any depth",
        )
    return files


def _folder_files(folder: Path, source: SourceConfig) -> list[Path]:
    """Return the data files of a folder's split. Raises DataError: no file, one is missing or not read."""
    below = (file for file in folder.rglob("*") if file.is_file() and _DATA_NAME.search(file.name))
    visible = (file for file in below if "/." not in f"/{file.relative_to(folder)}")
    files = _data_files(folder, source, [file for file in visible if file.name not in _DESCRIPTIONS])
    shards = Counter(shard.groups() for file in files if (shard := _SHARD.match(str(file))))
    for (name, total), present in shards.items():
        if present != int(total):
            raise DataError(
                "shards of the source are missing",
                where=name,
                got=f"{present} of {int(total)}",
                remedy="copy or download the folder again, or select the shards that exist by a pattern",
            )
    return files


def _data_files(folder: Path, source: SourceConfig, every: Sequence[Path] = ()) -> list[Path]:
    """Return the files of a split, by their names or the folder's card, as `datasets` finds them.

    Each of `every` must be in a split, unless the source selects a part of the folder.
    """
    from datasets import load_dataset_builder  # noqa: PLC0415  # slow to import

    with _as_data_error(source):
        builder = load_dataset_builder(str(folder), source.name, data_dir=source.data_dir)
    root, splits = folder.resolve(), dict[str, list[Path]]()
    for split, names in (builder.config.data_files or {}).items():
        files = sorted(Path(os.path.normpath(name)) for name in names)
        _check_below(root, files, source, "the card of the dataset")
        splits[str(split)] = [folder / file.relative_to(root) for file in files]
    known = set(itertools.chain(*splits.values()))
    if not (source.name or source.data_dir) and (unread := [file for file in every if file not in known]):
        raise DataError(
            "files of the folder are in no split, or of another kind",
            where=str(folder),
            got=", ".join(str(file.relative_to(folder)) for file in unread[:5]),
            expected="files of one kind, with a split in every name or in none",
            remedy="convert or rename them, or select files by a pattern, for example path/*.jsonl",
        )
    files = _chosen_split(source, splits)
    for file in files:
        check_kind(file, str(file))
    return files


def _check_below(root: Path, files: Iterable[Path], source: SourceConfig, what: str) -> None:
    """Check that a dataset's card or description, which strangers write, names no file outside the folder."""
    if outside := [file for file in files if not file.is_relative_to(root)]:
        raise DataError(
            f"{what} names a file outside its folder",
            where=source.path,
            got=str(outside[0]),
            remedy="to read this file, set the source's path to it",
        )


def _chosen_split(source: SourceConfig, splits: Mapping[str, T]) -> T:
    split = source.split or "train"
    if split not in splits:
        raise DataError(
            "the source has no such split",
            where=source.path,
            got=f"{split}{'' if source.split else ' (the default)'}",
            expected=", ".join(sorted(splits)),
            remedy="set the source's split",
        )
    return splits[split]


def _saved_records(folder: Path, source: SourceConfig, folders: Sequence[Path]) -> Iterator[RawRecord]:
    """Return the records of a folder written by `Dataset.save_to_disk`."""
    from datasets import Dataset, load_from_disk  # noqa: PLC0415  # slow to import

    root = folder.resolve()
    with _as_data_error(source):
        names = [
            root / split
            for file in root.glob("dataset_dict.json")
            for split in parse_json(file.read_bytes())["splits"]
        ]
        states = [(file, parse_json(file.read_bytes())["_data_files"]) for file in root.rglob("state.json")]
    names += [file.parent / entry["filename"] for file, entries in states for entry in entries]
    _check_below(root, (Path(os.path.normpath(name)) for name in names), source, "the saved dataset")
    with _as_data_error(source):
        saved = load_from_disk(str(folder))
    splits = {"train": saved} if isinstance(saved, Dataset) else saved
    rows = enumerate(dataset_rows(_chosen_split(source, splits)), start=1)
    return numbered_records(rows, source.path, folders)


# The Hugging Face Hub.


def pin_source(source: SourceConfig) -> SourceConfig:
    """Return the source that an entry of a dataset_info.json describes, or the source itself.

    A Hub dataset gets its commit as `revision` (null: main), from the Hub's cache if the Hub cannot be
    reached. Raises DataError: the dataset or the commit is not found.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import

    source = resolve_source(source)
    if local_files(source) is not None:
        return source
    with _as_data_error(source):
        commit = HfApi().resolve_revision(source.path, repo_type="dataset", revision=source.revision)
    return replace(source, revision=commit.resolved)


def _download(source: SourceConfig) -> Path:
    """Return the folder of a Hub dataset; files missing in the Hub's cache are downloaded."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import

    wanted = ["*.md", "*.yaml", f"{source.data_dir}/**"] if source.data_dir else None
    with _as_data_error(source):
        return Path(
            snapshot_download(
                source.path, repo_type="dataset", revision=source.revision, allow_patterns=wanted
            )
        )


@contextlib.contextmanager
def _as_data_error(source: SourceConfig) -> Iterator[None]:
    """Raise DataError for all errors of the Hub's libraries, which share no base class."""
    try:
        yield
    except Exception as fault:
        is_folder = Path(source.path).expanduser().is_dir()
        raise DataError(
            "the data of the folder cannot be found" if is_folder else _NOT_FOUND,
            where=source.path,
            got=in_one_line(fault),
            remedy="check path, name, data_dir, revision, split, the network, and access rights of a gated "
            "dataset; HF_HUB_OFFLINE=1 allows only datasets that were downloaded before",
        ) from fault


# Labels.

# Names of files and folders that need the folder above to say what they are.
_USUAL_NAMES = frozenset({"data", "dev", "eval", "test", "train", "training", "val", "validation"})


def source_labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return a label for each source: its `label`, or its name, numbered where names are equal.

    Sources with the same `label` share it.
    """
    taken, labels = {source.label for source in sources}, list[str]()
    for source in sources:
        name = _name(source)
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        labels.append(source.label or next(name for name in names if name not in taken))
        taken.add(labels[-1])
    return labels


def _name(source: SourceConfig) -> str:
    """Return the name of a source's file, with subset, folder and split."""
    if source.name is not None and resolve_source(source) is not source:
        return _safe(source.name)
    file = PurePath(source.path)
    while file.suffix in SUFFIXES:
        file = file.with_suffix("")
    parts = [*filter(None, map(_safe, file.parts))] or ["source"]
    shown = parts[-2:] if parts[-1] in _USUAL_NAMES else parts[-1:]
    options = [_safe(each) for each in (source.name, source.data_dir, source.split) if each]
    return "-".join(filter(None, [*shown, *options]))


def _safe(text: str) -> str:
    """Return `text` without characters that separate parts of a metric's name or of a path."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")
