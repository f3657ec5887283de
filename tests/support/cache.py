"""Encode input records into a cache in a test's folder."""

from pathlib import Path

from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.encoded.store import EncodedSource
from dpo_dist.foundation.files import MEMO_FOLDER
from tests.support import tiny

PLAIN: dict[str, object] = {"text_as_messages": False}
"""Tests of encoded data have texts, which are not rendered unless a test says so."""


def prepare_all(
    folder: Path,
    *sources: str | SourceConfig,
    tokenizer_digest: str = "qwen",
    kind: type[DataConfig] = DataConfig,
    **data: object,
) -> tuple[EncodedSource, ...]:
    config = kind(cache=str(folder / "cache"), **PLAIN | data)
    configs = [SourceConfig(source) if isinstance(source, str) else source for source in sources]
    return Preparation(configs, config, tiny.qwen(), tokenizer_digest).whole()


def prepare(folder: Path, source: str | SourceConfig, **data: object) -> Path:
    """Encode one source and return its file."""
    [encoded] = prepare_all(folder, source, **data)
    return encoded.file


def opened(
    folder: Path, *sources: str | SourceConfig, kind: type[DataConfig] = DataConfig, **data: object
) -> PreferenceDataset:
    return open_dataset(prepare_all(folder, *sources, kind=kind, **data), kind(**PLAIN | data))


def encoded_folders(folder: Path, cache: str = "cache") -> list[str]:
    return sorted(below.name for below in (folder / cache).iterdir() if below.name != MEMO_FOLDER)
