"""Read the records of a source: a file, a pattern, a folder, or a dataset on the Hugging Face Hub."""

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data import folders
from dpo_dist.data.columns import check_columns, check_first_columns, resolved, with_columns
from dpo_dist.data.counts import UNPAIRED_REMEDY, no_records
from dpo_dist.data.folders import (
    check_unused,
    globbed_files,
    is_glob,
    is_saved,
    root_of,
    saved_records,
    shards,
)
from dpo_dist.data.read import KINDS, Meter, check_kind, read_file, table_records
from dpo_dist.data.records import BadRecord, RawRecord, shown_key
from dpo_dist.data.responses import is_labelled
from dpo_dist.foundation.errors import ConfigError, DataError, dead_link
from dpo_dist.foundation.files import remembered_digest, text_digest

_FIRST_RECORDS = 20


def raw_records(source: SourceConfig, meter: Meter | None = None) -> Iterator[RawRecord]:
    """Return the first `limit` records of a source, each with its origin; see `formats.read_records`.

    Fields have the names that `columns` of the source gives them.
    """
    source = resolved(source)
    written = _written(source, meter or Meter())
    return with_columns(itertools.islice(written, source.limit), source)


def _written(source: SourceConfig, meter: Meter) -> Iterator[RawRecord]:
    files = local_files(source)
    if files is None:
        return table_records(folders.hub_records(source), source.path)
    local = Path(source.path).expanduser()
    if local.is_dir() and is_saved(local):
        return table_records(saved_records(local, source.split), source.path)
    meter.total = sum(file.stat().st_size for file in files)
    if files == [local]:
        return read_file(local, source.path, meter)
    return itertools.chain.from_iterable(read_file(file, str(file), meter) for file in files)


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


def check_source(source: SourceConfig, *, needs_pairs: bool = True) -> None:
    """Check that a local source exists and can be read; sends no request for a Hub dataset.

    With `needs_pairs`, no record, or unpaired responses with a good/bad label (KTO), are an error.

    Raises:
        DataError: it cannot be read, or its first records have not the columns of the source.
        ConfigError: as `read_records`.
    """
    source = resolved(source)
    check_columns(source)
    if local_files(source):
        check_first_records(source, needs_pairs=needs_pairs)


def check_first_records(source: SourceConfig, *, needs_pairs: bool = True) -> None:
    """Check that there are records, with the source's columns, and not responses with a label (KTO).

    A Hub dataset is downloaded. `needs_pairs` is that of `check_source`. Raises DataError.
    """
    most = min(_FIRST_RECORDS, source.limit or _FIRST_RECORDS)
    first = list(itertools.islice(_written(source, Meter()), most))
    if needs_pairs and not first:
        raise no_records(source.path)
    check_first_columns([record for record, _ in first if not isinstance(record, BadRecord)], source)
    renamed = itertools.islice(with_columns(iter(first), source), len(first))
    records = [record for record, _ in renamed if not isinstance(record, BadRecord)]
    if needs_pairs and records and all(map(is_labelled, records)):
        raise DataError(
            "the source has single responses with a good/bad label, not pairs",
            where=source.path,
            got=f"a label and no second response in each of the first {len(records)} records",
            expected="pairs, rankings or completions",
            remedy=UNPAIRED_REMEDY,
        )


def pinned(source: SourceConfig, cache: Path | None) -> SourceConfig:
    """Return the source that an entry of a dataset_info.json describes, or the source itself.

    A Hub dataset has its commit as `revision`; see `folders.pinned`.
    """
    source = resolved(source)
    return source if local_files(source) is not None else folders.pinned(source, cache)


def local_files(source: SourceConfig) -> list[Path] | None:
    """Return the files of a local source; None for a dataset on the Hugging Face Hub.

    Raises:
        DataError: the source does not exist, or has a file of a kind that cannot be read.
        ConfigError: `split`, `name`, `data_dir` or `revision` is set and has no effect.
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
    if not (local.exists() or is_glob(path) or looks_local):
        return None
    check_unused(path, name=source.name, data_dir=source.data_dir, revision=source.revision)
    if local.is_dir():
        if is_saved(local):
            return sorted(below for below in local.rglob("*") if below.is_file())
        return shards(local, source.split)
    check_unused(path, split=source.split)
    if not local.is_file() and not is_glob(path):
        raise _missing(local)
    files = [local] if local.is_file() else globbed_files(str(local))
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


_SUFFIXES = (*KINDS, ".gz", ".zst")
# Names of files and folders that say nothing without the folder above.
_USUAL_NAMES = frozenset({"data", "dev", "eval", "test", "train", "training", "val", "validation"})


def source_labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return a label for each source: its own `label`, or the shortest name that no other has.

    Derived names are unique in the list: the name of file, folder, dataset or entry, then with subset, folder
    and split, then with the folders above; equal sources are numbered. Sources with the same own `label`
    share it.
    """
    own = {source.label for source in sources if source.label is not None}
    candidates = [[] if source.label is not None else _candidates(source) for source in sources]
    labels: list[str] = []
    for source, here in zip(sources, candidates, strict=True):
        if source.label is not None:
            labels.append(source.label)
            continue
        others = {name for names in candidates if names != here for name in names}
        name = next((name for name in here if name not in others | own), here[-1])
        taken = {*own, *labels, *(others - {name})}
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        labels.append(name if name not in taken else next(one for one in numbered if one not in taken))
    return labels


def _candidates(source: SourceConfig) -> list[str]:
    """Return names of a source, short ones first; at least one."""
    file = PurePath(source.path)
    while file.suffix in _SUFFIXES:
        file = file.with_suffix("")
    *above, last = [*filter(None, map(_safe, file.parts))] or ["source"]
    qualifiers = [_safe(each) for each in (source.name, source.data_dir, source.split) if each]
    names = [_safe(source.name)] if source.name is not None and resolved(source) is not source else []
    if last not in _USUAL_NAMES or not above:
        names += ["-".join([last, *qualifiers[:count]]) for count in range(len(qualifiers) + 1)]
    return names + ["-".join([*above[at:], last, *qualifiers]) for at in reversed(range(len(above)))]


def _safe(text: str) -> str:
    """Return `text` without characters that separate parts of a metric's name or of a path."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")
