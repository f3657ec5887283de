"""Read the records of a source: a file, a pattern, a folder, or a dataset on the Hugging Face Hub."""

import contextlib
import difflib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data.columns import is_saved, resolved, with_columns
from dpo_dist.data.read import KINDS, Meter, check_kind, file_kind, read_file, table_records
from dpo_dist.data.records import RawRecord, shown_key
from dpo_dist.foundation.errors import ConfigError, DataError, dead_link, first_line
from dpo_dist.foundation.files import is_absent_offline, recall, remember, remembered_digest, text_digest

log = logging.getLogger(__name__)

_SUFFIXES = (*KINDS, ".gz", ".zst")
_GLOB = re.compile(r"[*?\[]")
_DATA_NAME = re.compile(
    r"\.(jsonl|json|csv|parquet|ndjson|jsonlines|tsv|arrow|feather)(\.(gz|zst|bz2|xz|zip|lz4|7z|br))?$",
    re.IGNORECASE,
)
# Files that describe a dataset beside its data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "config.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_NOT_FOUND = "neither a local file nor a dataset found on the Hugging Face Hub"


def raw_records(
    source: SourceConfig, meter: Meter | None = None, *, of_first: bool = False
) -> Iterator[RawRecord]:
    """Return the first `limit` records of a source, each with its origin; see `formats.read_records`.

    Its `reader` and `columns` have been applied; `of_first` is that of `with_columns`.
    """
    source = resolved(source)
    written = itertools.islice(_written(source, meter or Meter()), source.limit)
    return with_columns(written, source, of_first=of_first)


def _written(source: SourceConfig, meter: Meter) -> Iterator[RawRecord]:
    files, local = local_files(source), Path(source.path).expanduser()
    if files is not None and local.is_dir() and is_saved(local):
        return _saved_records(local, source)
    names: Iterable[str] = map(str, files or ())
    if files is None:
        folder = _download(source)
        files = _data_files(folder, source)
        names = [f"{source.path}/{file.relative_to(folder)}" for file in files]
    meter.total = sum(file.stat().st_size for file in files)
    if files == [local]:
        return read_file(local, source.path, meter)
    return itertools.chain.from_iterable(
        read_file(file, name, meter) for file, name in zip(files, names, strict=True)
    )


def check_has_evaluation_data(data: DataConfig, use: str, form: str = "with both responses") -> None:
    """Check that there is a source of evaluation data, to `use` ("compare models on"). Raises ConfigError."""
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

    Raises DataError: the source does not exist, or has a file of a kind that cannot be read; ConfigError: a
    key has no effect on it.
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
    _check_path(local)
    looks_local = path.endswith(_SUFFIXES) or path.startswith((".", "/", "~")) or path.count("/") > 1
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
                remedy=f"remove {key}: it is of Hub datasets" + (" and folders" * (key != "revision")),
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
    """Return a digest of a source's content: of its files, or the commit of a `pinned` Hub dataset.

    Digests of files are remembered in the folder `memo`. Raises DataError: the source does not exist.
    """
    files = local_files(source)
    if files is None:
        return f"hub commit {source.revision}, name {source.name}, data_dir {source.data_dir}"
    digests = [remembered_digest(file, memo) for file in files]
    if Path(source.path).expanduser().is_file():
        return digests[0]
    # Kind, split and origins follow from names; the location of the folder does not matter.
    root = root_of(source.path).expanduser()
    names = [os.path.relpath(file, root) for file in files]
    return text_digest("\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True)))


def _check_path(local: Path) -> None:
    """Check that the system can look for the path. Raises DataError."""
    try:
        local.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as fault:
        raise DataError(
            "the path cannot be opened",
            where=shown_key(local),
            got=str(getattr(fault, "strerror", fault)),
            remedy="check the path and its permissions",
        ) from fault


def _missing(file: Path) -> DataError:
    if file.exists():
        return DataError(
            "the path is neither a file nor a folder",
            where=str(file),
            remedy="write the records to a file: data are read several times",
        )
    names = [] if dead_link(file) or not file.parent.is_dir() else [one.name for one in file.parent.iterdir()]
    near = difflib.get_close_matches(file.name, names, n=3)
    return DataError(
        "the file does not exist",
        where=str(file),
        got=dead_link(file) or ("" if names else f"no folder {file.parent}"),
        remedy=f"did you mean {' or '.join(near)}?" if near else "check the path of the source",
    )


# Patterns and folders.


def root_of(path: str) -> Path:
    """Return the folder to which names of a source's files are relative; of a pattern the part before it."""
    return Path(*itertools.takewhile(lambda part: not _GLOB.search(part), Path(path).parts))


def _globbed_files(pattern: str) -> list[Path]:
    """Return the files that match, sorted by path; `**` follows no links to folders."""
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


def _folder_files(folder: Path, source: SourceConfig) -> list[Path]:
    """Return the data files of a folder's split. Raises DataError: none, or others would not be read."""
    below = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not _is_hidden(folder, file) and file.name not in _DESCRIPTIONS
    )
    if not any(map(file_kind, below)):
        raise DataError(
            "the folder has no data files",
            where=str(folder),
            got=", ".join(file.name for file in below[:5]) or "an empty folder",
            expected=f"{', '.join(KINDS)} files, or a folder written by Dataset.save_to_disk",
            remedy="check the path; a file with another ending is named itself, or by a pattern",
        )
    files = _data_files(folder, source, [file for file in below if _DATA_NAME.search(file.name)])
    shards = Counter(found.groups() for file in files if (found := _SHARD.match(str(file))))
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

    None of `every` may be outside of all splits, unless the source selects a part of the folder.
    """
    from datasets import load_dataset_builder  # noqa: PLC0415  # slow to import

    with _as_data_error(source):
        builder = load_dataset_builder(str(folder), source.name, data_dir=source.data_dir)
    root, splits = folder.resolve(), dict[str, list[Path]]()
    for split, found in (builder.config.data_files or {}).items():
        files = sorted(Path(os.path.normpath(file)) for file in found)
        # Strangers write the card of a dataset: it names no files of this machine.
        if outside := [file for file in files if not file.is_relative_to(root)]:
            raise DataError(
                "the card of the dataset names a file outside its folder",
                where=source.path,
                got=str(outside[0]),
                remedy="set path of the source to this file, if you want it to be read",
            )
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
    if (source.split or "train") not in splits:
        raise _no_split(source, splits)
    files = splits[source.split or "train"]
    for file in files:
        check_kind(file, str(file))
    return files


def _no_split(source: SourceConfig, names: Iterable[str]) -> DataError:
    return DataError(
        "the source has no such split",
        where=_described(source),
        got=source.split or "train (the default)",
        expected=", ".join(sorted(map(str, names))),
        remedy="set split of this source",
    )


def _saved_records(folder: Path, source: SourceConfig) -> Iterator[RawRecord]:
    """Return the records of a folder written by `Dataset.save_to_disk`."""
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
    splits = {"train": saved} if isinstance(saved, Dataset) else saved
    if (source.split or "train") not in splits:
        raise _no_split(source, splits)
    return table_records(splits[source.split or "train"], source.path)


# The Hugging Face Hub.


def pinned(source: SourceConfig, cache: Path | None) -> SourceConfig:
    """Return the source that an entry of a dataset_info.json describes, or the source itself.

    A Hub dataset has its commit as `revision` (null: main); if the Hub cannot be reached, the last known one,
    from the Hub's own cache or from `cache`. Raises DataError: there is none, or no such dataset.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import
    from huggingface_hub.errors import RevisionResolutionError  # noqa: PLC0415

    source = resolved(source)
    if local_files(source) is not None:
        return source
    key = f"{source.path}@{source.revision or 'main'}"
    memo = None if cache is None else cache / "hub_commits"
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
    except Exception as fault:
        is_folder = Path(source.path).expanduser().is_dir()
        raise DataError(
            "the data files of the folder cannot be found" if is_folder else _NOT_FOUND,
            where=_described(source),
            got=" ".join(f"{type(fault).__name__}: {fault}".splitlines()[:2]),
            remedy="check path, name, data_dir, revision, split, the network, and access rights of a gated "
            "dataset; HF_HUB_OFFLINE=1 allows only datasets that were downloaded before",
        ) from fault


def _described(source: SourceConfig) -> str:
    keys = ("name", "data_dir", "revision", "split")
    options = [f"{key} {getattr(source, key)}" for key in keys if getattr(source, key)]
    return f"{source.path} ({', '.join(options) or 'split train'})"


# Labels.

# Names of files and folders that say nothing without the folder above.
_USUAL_NAMES = frozenset({"data", "dev", "eval", "test", "train", "training", "val", "validation"})


def source_labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return a label for each source: its own `label`, or its name, with the folder where names are equal.

    Names that are equal then too are numbered. Sources with the same own `label` share it.
    """
    names = list(map(_name, sources))
    taken, labels = {source.label for source in sources}, list[str]()
    for source, short in zip(sources, names, strict=True):
        name = short if names.count(short) == 1 else _name(source, folders=1)
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        labels.append(
            source.label or next(one for one in itertools.chain([name], numbered) if one not in taken)
        )
        taken.add(labels[-1])
    return labels


def _name(source: SourceConfig, folders: int = 0) -> str:
    """Return the name of a source's file, after so many `folders` above, with subset, folder and split."""
    if source.name is not None and resolved(source) is not source:
        return _safe(source.name)
    file = PurePath(source.path)
    while file.suffix in _SUFFIXES:
        file = file.with_suffix("")
    parts = [*filter(None, map(_safe, file.parts))] or ["source"]
    shown = parts[-1 - folders - (parts[-1] in _USUAL_NAMES) :]
    options = [_safe(each) for each in (source.name, source.data_dir, source.split) if each]
    return "-".join(filter(None, [*shown, *options]))


def _safe(text: str) -> str:
    """Return `text` without characters that separate parts of a metric's name or of a path."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")
