"""The files of a source and their records: a file, a pattern or a folder, also at a URL; a Hub dataset."""

import contextlib
import glob
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.counts import DataCounts
from dpo_dist.data.read.dataset_info import is_saved, resolve_source
from dpo_dist.data.read.files import (
    SUFFIXES,
    check_kind,
    file_kind,
    read_file,
)
from dpo_dist.data.read.reading import Reading, parse_prompt, parse_record
from dpo_dist.data.read.shapes import FIRST_RECORDS, declared
from dpo_dist.data.records import BadRecord, RawRecord, Record
from dpo_dist.foundation.errors import ConfigError, DataError, dead_link, in_one_line
from dpo_dist.foundation.files import (
    check_readable,
    locked,
    remembered_digest,
    remove_abandoned,
    similar_path,
    staged_file,
    temporary_folder,
    text_digest,
)
from dpo_dist.foundation.remote import is_url, open_file_system, remote_errors
from dpo_dist.foundation.text import without_secrets
from dpo_dist.foundation.user_code import find_function, user_function

T = TypeVar("T")
READER = "reader"

_GLOB = re.compile(r"[*?\[]")
_DATA_NAME = re.compile(
    r"\.(jsonl|json|csv|parquet|ndjson|jsonlines|tsv|arrow|feather)(\.(gz|zst|bz2|xz|zip|lz4|7z|br))?$",
    re.IGNORECASE,
)
# Files that describe a dataset beside its data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "config.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_OF_FOLDERS: Sequence[str] = ("data_dir", "name", "revision", "split")
"""Keys of a source that have no effect on a file."""


class DataSource:
    """An entry of `data.train`, `data.eval` or `evaluation.data`: its files and their records.

    `config` is the source that an entry of a dataset_info.json describes, or the given one.

    Raises:
        ConfigError: the entry of the dataset_info.json cannot be read, or asks for what is not supported.
        DataError: this user may not read the source.
    """

    def __init__(self, source: SourceConfig | str, key: str = "data.train"):
        """Args: the source, or its path; the key that has it, for errors."""
        if isinstance(source, str):
            source = SourceConfig(path=source)
        self.config = resolve_source(source)
        self._key = key
        # Of a pinned source at a URL: a digest of what its file system said of its files.
        self._listing = ""
        # How its records are read: known when the first of them has been.
        self._reading: Reading | None = None

    @property
    def path(self) -> str:
        """The path of the source."""
        return self.config.path

    # Its records.

    def records(self) -> Iterator[Record]:
        """Read the records in their order; only a .json is read whole.

        One item per record: a pair, a ranking, a completion, or the reason why the record cannot be used. The
        call itself raises the DataError or ConfigError of a source with wrong keys.
        """
        return map(self.parse, self.raw_records())

    def prompts(self) -> Iterator[Record]:
        """Read the records for their prompts; a record without usable responses has none."""
        return (self.parse(raw, parse_prompt) for raw in self.raw_records(of_prompts=True))

    def parse(self, raw: RawRecord, parse: Callable[..., Record] = parse_record) -> Record:
        """Return the preference in one of the `raw_records`."""
        record, origin = raw
        return record if isinstance(record, BadRecord) else parse(record, self._reading, origin)

    def raw_records(self, copies: Path | None = None, *, of_prompts: bool = False) -> Iterator[RawRecord]:
        """Return the first `limit` records, after the source's `reader`.

        `copies`: a folder for the files of a URL, shared by the processes that read them; None: a temporary
        one.
        """
        config = self.config
        local = Path(self.path).expanduser()
        files = self.files()
        names: Iterable[str] = map(str, files or ())
        folders = self.image_folders()
        if files is None and not is_url(self.path):
            folder = self._snapshot()
            files = _data_files(folder, config)
            names = [f"{self.path}/{file.relative_to(folder)}" for file in files]
            folders += [
                folder,
                folder.parents[1],
            ]  # whose files are links to others of the Hub's cache
        elif files == [local]:
            names = [self.path]
        if is_url(self.path):
            records = self._remote_records(folders, copies)
        else:
            read = partial(read_file, folders=folders)
            records = itertools.chain.from_iterable(map(read, files or (), names))
        records = itertools.islice(records, config.limit)
        if config.reader is not None:
            records = _by_reader(records, user_function(config.reader, READER))
        return self._declared(records, of_prompts=of_prompts)

    def _declared(self, records: Iterator[RawRecord], *, of_prompts: bool) -> Iterator[RawRecord]:
        self._reading, records = declared(records, self.config, key=self._key, of_prompts=of_prompts)
        yield from records

    def _snapshot(self) -> Path:
        """Return the folder of a dataset of the Hub; files that the Hub's cache has are not downloaded."""
        from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import

        config = self.config
        patterns = ["*.md", "*.yaml", f"{config.data_dir}/**"] if config.data_dir else None
        with _as_data_error(config):
            return Path(
                snapshot_download(
                    self.path, repo_type="dataset", revision=config.revision, allow_patterns=patterns
                )
            )

    def _remote_records(self, folders: Sequence[Path], copies: Path | None) -> Iterator[RawRecord]:
        """Yield the records of a source at a URL; each file is downloaded before it is read."""
        system, _ = open_file_system(self.path)
        files = remote_files(self.config)
        if self._listing and self._listing != _listing(files):
            raise self.changed_error()
        with contextlib.ExitStack() as stack:
            is_own = copies is None
            if copies is None:
                temporary = Path(tempfile.gettempdir())
                remove_abandoned(temporary)
                copies = stack.enter_context(temporary_folder(temporary / "download"))
            remove_abandoned(copies)  # downloads that a kill ended
            for number, file in enumerate(files):
                copy = copies / f"{number}{''.join(PurePath(file.path).suffixes[-2:])}"
                with locked(copies / f"{number}.lock", "downloads this file", waits=True):
                    if not copy.exists():
                        with remote_errors(file.name), staged_file(copy) as staged:
                            system.get_file(file.path, str(staged))
                            system.invalidate_cache()
                            # Not by a list of all files for each one: a source can have thousands. A list
                            # decides where it and the file itself are described differently.
                            is_same = _state(system.info(file.path)) == file.state
                            if not is_same and remote_files(self.config) != files:
                                raise self.changed_error()
                yield from read_file(copy, file.name, folders)
                if is_own:
                    copy.unlink()

    def check(self, data: DataConfig | None = None, *, of_prompts: bool = False) -> None:
        """Check the source's keys and the columns of its first records; with `data`, that some are usable.

        `of_prompts`: records need no responses. Sends no request. Raises DataError or ConfigError.
        """
        if self.files() is None:
            return
        counts = DataCounts()
        # Sorted data can begin with many records without a response.
        for record in self.prompts() if of_prompts else self.records():
            counts.add(record)
            if counts.read > FIRST_RECORDS and (data is None or counts.kept):
                return
        if data is not None and not counts.kept:
            counts.check(self.path, data)

    # Its files.

    def files(self) -> list[Path] | None:
        """Return the files of a local source; None for one at a URL, and for a dataset on the Hub.

        Raises DataError: the source does not exist, or has a file that cannot be read; ConfigError: a key has
        no effect on this source, or a URL or its package is wrong. Sends no request.
        """
        config = self.config
        if is_url(self.path):
            open_file_system(self.path)
            return None
        local = Path(self.path).expanduser()
        check_readable(local, self.path, DataError)
        if not (local.exists() or _GLOB.search(self.path) or _looks_local(self.path)):
            return None
        unused = ("revision",) if local.is_dir() else _OF_FOLDERS
        if is_saved(local):
            unused = ("name", "data_dir", "revision")
        _check_unused(config, unused)
        if local.is_dir() and is_saved(local):
            files = _saved_files(local, config)
        elif local.is_dir():
            files = _folder_files(local, config)
        elif local.is_file() or _GLOB.search(self.path):
            files = [local] if local.is_file() else _globbed_files(str(local))
            for file in files:
                check_kind(file, self.path)
        else:
            raise _missing(local)
        for file in files:
            check_readable(file, self.path, DataError)
        return files

    def image_folders(self) -> list[Path]:
        """Return the folders for image files. Raises DataError: the one that the source names is missing."""
        root = _root_folder(self.path).expanduser()
        folders = [root] if root.is_dir() else []
        if self.config.images is None:
            return folders
        folder = Path(self.config.images).expanduser()
        if not folder.is_dir():
            raise DataError(
                "the folder of image files does not exist",
                where=f"images of {self.path}",
                got=str(folder),
                remedy="correct images of the source",
            )
        return [folder, *folders]

    def relative_name(self, name: str) -> str:
        """Return the name of a file relative to the source, which may be moved; `full_name` undoes it."""
        return os.path.relpath(Path(name).expanduser(), _root_folder(self.path).expanduser())

    # Its content.

    def pinned(self) -> "DataSource":
        """Return the source with fixed content: a Hub dataset by its commit, a URL by what its server says.

        The commit is that of `revision` (null: main), from the Hub's cache if the Hub cannot be reached.
        Raises DataError: the source or the commit is not found.
        """
        from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import

        config = self.config
        if is_url(self.path):
            pinned = DataSource(config, self._key)
            pinned._listing = _listing(remote_files(config))
            return pinned
        if self.files() is not None:
            return self
        with _as_data_error(config):
            commit = HfApi().resolve_revision(self.path, repo_type="dataset", revision=config.revision)
        return DataSource(replace(config, revision=commit.resolved), self._key)

    def encoding_identity(self, memo: Path) -> dict[str, Any]:
        """Return what decides, of a pinned source, the token ids of its records, but the files of images.

        The folder `memo` caches digests of files. Raises DataError: the source does not exist.
        """
        reader = self.config.reader
        return {
            "content": self.content_identity(memo),
            "kinds": list(map(file_kind, self.files() or [])),
            **{name: getattr(self.config, name) for name in ("split", "fields", "ignore")},
            "reader": reader and find_function(reader, READER).digest,
        }

    def content_identity(self, memo: Path | None = None) -> str:
        """Return a digest of a pinned source's content: of its files, a URL's listing, or the Hub's commit.

        The folder `memo` caches digests of files. Raises DataError: the source does not exist.
        """
        config = self.config
        files = self.files()
        if self._listing:
            return self._listing
        if files is None:
            return f"hub commit {config.revision}, name {config.name}, data_dir {config.data_dir}"
        digests = [remembered_digest(file, memo) for file in files]
        if Path(self.path).expanduser().is_file():
            return digests[0]
        # Names decide format, split and origins; the folder may be moved.
        names = [self.relative_name(str(file)) for file in files]
        parts = (f"{name} {digest}" for name, digest in zip(names, digests, strict=True))
        return text_digest("\n".join(parts))

    def changed_error(self) -> DataError:
        """Return the error of a source that is not what it was when the program started to read it."""
        return DataError(
            "the data changed while they were read",
            where=self.path,
            remedy="start again when no other program writes to the files",
        )


def _by_reader(records: Iterator[RawRecord], read: Callable[..., Any]) -> Iterator[RawRecord]:
    for record, origin in records:
        if isinstance(record, BadRecord):
            yield record, origin
            continue
        try:
            fields = read(dict(record))  # a reader may change it
        except Exception as fault:  # the user's code can raise anything
            fields = BadRecord("reader_failed", origin, f"reader raised {type(fault).__name__}")
        if not isinstance(fields, Mapping | BadRecord):
            fields = BadRecord("reader_failed", origin, f"reader returned a {type(fields).__name__}")
        yield fields, origin


def _looks_local(path: str) -> bool:
    """Return whether a path is rather that of a missing file than the name of a dataset on the Hub."""
    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return True
    return local.suffix in (*SUFFIXES, ".txt", ".xls", ".xlsx") or _DATA_NAME.search(local.name) is not None


def _check_unused(source: SourceConfig, unused: Iterable[str]) -> None:
    """Raise ConfigError for a key that is set, but has no effect on this source."""
    for key in sorted(unused):
        value = getattr(source, key)
        if value is not None:
            raise ConfigError(
                f"{key} has no effect on this source",
                where=f"{key} of {source.path}",
                got=value,
                expected="null",
                remedy=f"remove {key}: a source of this kind has none",
            )


def _missing(file: Path) -> DataError:
    similar = similar_path(file)
    return DataError(
        "the path is neither a file nor a folder" if file.exists() else "the file does not exist",
        where=str(file),
        got=dead_link(file) or ("" if file.parent.is_dir() else f"no folder {file.parent}"),
        remedy=f"did you mean {similar}?" if similar else "check the path of the source",
    )


# Patterns and folders.


def _root_folder(path: str) -> Path:
    """Return the folder to which a source's file names are relative: for a pattern, the part before it."""
    return Path(*itertools.takewhile(lambda part: not _GLOB.search(part), Path(path).parts))


def full_name(path: str, relative: str) -> str:
    """Return a file's full name, given `DataSource.relative_name`, its name relative to the source's path."""
    if relative == ".":
        return path
    name = str(_root_folder(path) / relative)
    return name.replace(":/", "://", 1) if is_url(path) else name  # a path has no empty parts


def _globbed_files(pattern: str) -> list[Path]:
    """Return the files that match, sorted by path; hidden ones only if the pattern names the dot."""
    for above in Path(pattern).parents:  # folders that `glob` would pass over
        if above.is_relative_to(_root_folder(pattern)):
            names = glob.glob(str(above), recursive=True)  # noqa: PTH207
            # Resolved: `**` follows a link to a folder above as often as the system allows.
            for folder in set(map(os.path.realpath, names)):  # `resolve` raises for a link to itself
                check_readable(Path(folder), pattern, DataError)
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
    every = [*folder.rglob("*")]
    for inner in filter(Path.is_dir, every):  # which `rglob` would pass over
        check_readable(inner, source.path, DataError)
    below = (file for file in every if file.is_file() and _DATA_NAME.search(file.name))
    visible = (file for file in below if "/." not in f"/{file.relative_to(folder)}")
    files = _data_files(folder, source, [file for file in visible if file.name not in _DESCRIPTIONS])
    names = (str(file.relative_to(folder)) for file in files)
    shards = Counter(shard.groups() for shard in map(_SHARD.match, names) if shard is not None)
    for (name, total), present in shards.items():
        if present != int(total):
            raise DataError(
                "shards of the source are missing",
                where=f"{source.path}/{name}",
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
    root = folder.resolve()
    splits = dict[str, list[Path]]()
    for split, names in (builder.config.data_files or {}).items():
        files = sorted(Path(os.path.normpath(name)) for name in names)
        _check_below(root, files, source, "the card of the dataset")
        splits[str(split)] = [folder / file.relative_to(root) for file in files]
    of_splits = set(itertools.chain(*splits.values()))
    unread = [file for file in every if file not in of_splits]
    selects_part = bool(source.name or source.data_dir)
    if unread and not selects_part:
        raise DataError(
            "files of the folder are in no split, or of another kind",
            where=source.path,
            got=", ".join(str(file.relative_to(folder)) for file in unread[:5]),
            expected="files of one kind, with a split in every name or in none",
            remedy="convert or rename them, or select files by a pattern, for example path/*.jsonl",
        )
    files = _chosen_split(source, splits)
    for file in files:
        check_kind(file, f"{source.path}/{file.relative_to(folder)}")
    return files


def _check_below(root: Path, files: Iterable[Path], source: SourceConfig, what: str) -> None:
    """Check that a dataset's card or description, which strangers write, names no file outside the folder."""
    outside = [file for file in files if not file.is_relative_to(root)]
    if outside:
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
            got=source.split or "train (the default)",
            expected=", ".join(sorted(splits)),
            remedy="set the source's split",
        )
    return splits[split]


def _saved_files(folder: Path, source: SourceConfig) -> list[Path]:
    """Return the files of a split in a folder written by `Dataset.save_to_disk`."""
    splits = {"train": folder}
    if (folder / "dataset_dict.json").is_file():
        splits = {below.name: below for below in folder.iterdir() if below.is_dir()}
    return sorted(_chosen_split(source, splits).glob("*.arrow"))


# The Hugging Face Hub.


@contextlib.contextmanager
def _as_data_error(source: SourceConfig) -> Iterator[None]:
    """Raise DataError for all errors of the Hub's libraries, which share no base class."""
    try:
        yield
    except Exception as fault:
        raise DataError(
            "no data are found at this path, nor on the Hugging Face Hub",
            where=source.path,
            got=in_one_line(fault),
            remedy="check path, name, data_dir, revision, split, the network, and access rights of a gated "
            "dataset; HF_HUB_OFFLINE=1 allows only datasets that were downloaded before",
        ) from fault


# URLs.

# What file systems say of a file: a checksum of its content, else a time of its change.
_STATES = (
    *("ETag", "etag", "md5Hash", "crc32c", "blob_id", "content_md5", "Content-MD5", "Digest"),
    *("LastModified", "last_modified", "Last-Modified", "modified", "mtime", "created"),
)


class RemoteFile(NamedTuple):
    """A file at a URL: its name, its path on the file system, and a text that changes with its content."""

    name: str
    path: str
    state: str


def _listing(files: Sequence[RemoteFile]) -> str:
    """Return a digest of the names and states of files."""
    return "listed " + text_digest("\n".join(f"{file.name} {file.state}" for file in files))


def remote_files(source: SourceConfig) -> list[RemoteFile]:
    """Ask for the files of a source at a URL, in order.

    Raises DataError: none is found, or one cannot be read; ConfigError: a key has no effect.
    """
    system, path = open_file_system(source.path)
    _check_unused(source, _OF_FOLDERS)
    with remote_errors(source.path):
        if _GLOB.search(path):
            entries = system.glob(path, detail=True)
            if not entries:  # `glob` hides faults
                system.info(_GLOB.split(path)[0].rpartition("/")[0])
        else:
            entries = {path: system.info(path)}
        visible = [name for name in sorted(entries) if "/." not in name or "/." in path]
        files = [name for name in visible if entries[name]["type"] == "file"]
        if not files:
            raise DataError(
                "no file is there, or none matches the pattern",
                where=source.path,
                remedy=f"check it; the files of a folder are {source.path.rstrip('/')}/*.parquet or *.jsonl",
            )
        listed = []
        for name in files:
            url = name if is_url(name) else f"{source.path.partition('://')[0]}://{name.lstrip('/')}"
            check_kind(PurePath(name), url)
            state = _state(entries[name]) or _state(system.info(name))
            if state is None:
                raise DataError(
                    "this server says nothing by which a changed file is noticed",
                    where=url,
                    expected="a server that says a checksum, an ETag or the time of the last change",
                    remedy="download the file, and set its path",
                )
            listed.append(RemoteFile(url, name, state))
        return listed


def _state(info: Mapping[str, Any]) -> str | None:
    """Return a text that changes with a file's content, of what a file system says of it."""
    for key in _STATES:
        value = info.get(key)
        if value:
            # A list and a single file may differ in how they give a time.
            seconds = value.timestamp() if isinstance(value, datetime) else value
            return f"{info.get('size')} {key} {seconds}"
    return None


# Labels, by which metrics, tables and reports name a source.


# Names of files and folders that need the folder above to say what they are.
_USUAL_NAMES = frozenset({"data", "dev", "eval", "test", "train", "training", "val", "validation"})


def source_labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return a label for each source: its `label`, or its name, numbered where names are equal.

    Sources with the same `label` share it. Secrets are hidden: metrics, files and pages have the labels.
    """
    taken = {source.label for source in sources}
    labels = list[str]()
    for source in sources:
        name = without_secrets(_label(source))
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        own = without_secrets(source.label)
        labels.append(own or next(name for name in names if name not in taken))
        taken.add(labels[-1])
    return labels


def _label(source: SourceConfig) -> str:
    """Return the name of a source's file, with subset, folder and split."""
    if source.name is not None and DataSource(source).config is not source:
        return _safe(source.name)
    file = PurePath(without_secrets(source.path))
    while file.suffix in SUFFIXES:
        file = file.with_suffix("")
    parts = [*filter(None, map(_safe, file.parts))] or ["source"]
    names = parts[-2:] if parts[-1] in _USUAL_NAMES else parts[-1:]
    options = [_safe(option) for option in (source.name, source.data_dir, source.split) if option]
    return "-".join(filter(None, [*names, *options]))


def _safe(text: str) -> str:
    """Return `text` without characters that separate parts of a metric's name or of a path."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")
