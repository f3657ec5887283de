"""Read datasets of the Hugging Face Hub, pinned to one commit, through the Hub's local cache."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.data.files.inside import check_card
from dpo_dist.digests import recall, remember
from dpo_dist.errors import DataError
from dpo_dist.hub_cache import is_absent_offline

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

    for wait in (*_WAITS, None):
        try:
            api = HfApi()
            return api.resolve_revision(source.path, repo_type="dataset", revision=source.revision).resolved
        except RevisionResolutionError as fault:
            if known is not None:
                log.warning(
                    "the Hub cannot be reached for %s; its last known commit %s is used", source.path, known
                )
                return known
            if wait is None or isinstance(fault.__cause__, OfflineModeIsEnabled):
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def hub_records(source: SourceConfig) -> Iterator[Any]:
    """Return the records of a Hub dataset; files missing in the Hub's cache are downloaded first.

    Raises:
        DataError: it cannot be downloaded or read, or has no such configuration or split; raised by this
            call, except for damage found while reading.
    """
    from datasets import load_dataset  # noqa: PLC0415  # slow to import, and only needed here
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    wanted = ["*.md", "*.yaml", f"{source.data_dir}/**"] if source.data_dir else None
    with _as_data_error(source):
        folder = snapshot_download(
            source.path, repo_type="dataset", revision=source.revision, allow_patterns=wanted
        )
        check_card(Path(folder))
        records = load_dataset(
            folder, source.name, data_dir=source.data_dir, split=source.split or "train", streaming=True
        )
    return _read(source, records)


def _read(source: SourceConfig, records: Any) -> Iterator[Any]:
    with _as_data_error(source):
        yield from records


def check_cached_offline(source: SourceConfig) -> None:
    """Check that files of a Hub dataset are in the Hub's cache, if HF_HUB_OFFLINE allows no download.

    Raises:
        DataError: they are not.
    """
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
        first_lines = f"{type(fault).__name__}: {fault}".splitlines()[:2]
        raise DataError(
            _NOT_FOUND,
            where=_described(source),
            got=" ".join(first_lines),
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
