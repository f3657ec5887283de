"""Read datasets of the Hugging Face Hub, pinned to one commit, through the Hub's local cache."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.digests import recall, remember
from dpo_dist.errors import DataError

log = logging.getLogger(__name__)

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
    with _as_data_error(source):
        try:
            found = HfApi().resolve_revision(source.path, repo_type="dataset", revision=source.revision)
            commit = found.resolved
        except RevisionResolutionError:
            known = recall(memo, key)
            if known is None:
                raise
            commit = known
            log.warning("the Hub cannot be reached for %s; its last known commit %s is used", key, commit)
    if recall(memo, key) != commit:
        remember(memo, key, commit)
    return replace(source, revision=commit)


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
        records = load_dataset(
            folder, source.name, data_dir=source.data_dir, split=source.split or "train", streaming=True
        )
    return _read(source, records)


def _read(source: SourceConfig, records: Any) -> Iterator[Any]:
    with _as_data_error(source):
        yield from records


@contextlib.contextmanager
def _as_data_error(source: SourceConfig) -> Iterator[None]:
    """Raise DataError for all errors of the Hub's libraries, which share no base class."""
    try:
        yield
    except Exception as fault:
        first_lines = f"{type(fault).__name__}: {fault}".splitlines()[:2]
        raise DataError(
            "neither a local file nor a dataset found on the Hugging Face Hub",
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
