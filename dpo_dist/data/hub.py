"""Datasets of the Hugging Face hub, pinned to one commit and read from the hub's local cache."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import SourceConfig
from dpo_dist.digests import recall, remember
from dpo_dist.errors import DataError

log = logging.getLogger(__name__)

_COMMITS = "hub_commits"


def pinned(source: SourceConfig, cache: Path | None) -> SourceConfig:
    """Replace the `revision` of a hub source (null: main) by the commit that it names now.

    Where the hub cannot be asked (HF_HUB_OFFLINE, no network), it is the commit that it named last, kept by
    the hub's own cache or in `cache`.

    Raises:
        DataError: the hub has no such dataset or revision, or cannot be asked and nothing is kept.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # only needed here
    from huggingface_hub.errors import RevisionResolutionError  # noqa: PLC0415

    key = f"{source.path}@{source.revision or 'main'}"
    memo = None if cache is None else cache / _COMMITS
    with _errors_told(source):
        try:
            found = HfApi().resolve_revision(source.path, repo_type="dataset", revision=source.revision)
            commit = found.resolved
        except RevisionResolutionError:
            kept = recall(memo, key)
            if kept is None:
                raise
            commit = kept
            log.warning("the hub cannot be asked for %s; it was %s when it was read last", key, commit)
    if recall(memo, key) != commit:
        remember(memo, key, commit)
    return replace(source, revision=commit)


def hub_records(source: SourceConfig) -> Iterator[Any]:
    """Rows of a hub dataset; what the hub's cache does not have yet is downloaded first.

    Raises:
        DataError: it cannot be downloaded or read, or has no such configuration or split; raised by this
            call, except for damage that is met while reading.
    """
    from datasets import load_dataset  # noqa: PLC0415  # slow to import, and only needed here
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    wanted = ["*.md", "*.yaml", f"{source.data_dir}/**"] if source.data_dir else None
    with _errors_told(source):
        folder = snapshot_download(
            source.path, repo_type="dataset", revision=source.revision, allow_patterns=wanted
        )
        rows = load_dataset(
            folder, source.name, data_dir=source.data_dir, split=source.split or "train", streaming=True
        )
    return _read(source, rows)


def _read(source: SourceConfig, rows: Any) -> Iterator[Any]:
    with _errors_told(source):
        yield from rows


@contextlib.contextmanager
def _errors_told(source: SourceConfig) -> Iterator[None]:
    """Raise DataError for whatever the hub's libraries raise: their errors have no base in common."""
    try:
        yield
    except Exception as fault:
        first_lines = f"{type(fault).__name__}: {fault}".splitlines()[:2]
        raise DataError(
            "neither a local file nor a dataset that the Hugging Face hub gives",
            where=_described(source),
            got=" ".join(first_lines),
            remedy="check the name, its configuration (name, data_dir), revision and split, the network, and "
            "access rights of a gated dataset; with HF_HUB_OFFLINE=1 only what was downloaded before is read",
        ) from fault


def _described(source: SourceConfig) -> str:
    options = {
        "name": source.name,
        "data_dir": source.data_dir,
        "revision": source.revision,
        "split": source.split or "train",
    }
    return f"{source.path} ({', '.join(f'{key} {value}' for key, value in options.items() if value)})"
