"""Datasets of the Hub: requests are repeated, and unpaired responses refused before anything is encoded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionResolutionError

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data import folders
from dpo_dist.data.build import no_progress, prepare_dataset
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.records import TEXT, jsonl

COMMIT = "0123456789012345678901234567890123456789"
SOURCE = SourceConfig(path="org/pairs", name="subset", revision="v1")


class Resolved:
    resolved = COMMIT


def answer(monkeypatch: pytest.MonkeyPatch, *outcomes: Any) -> None:
    """Let the Hub give these, an exception or a commit, one for each request."""
    given: Iterator[Any] = iter(outcomes)

    def resolve_revision(*_args: Any, **_options: Any) -> Any:
        outcome = next(given)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(HfApi, "resolve_revision", resolve_revision)


def test_a_known_commit_is_used_if_the_hub_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, Resolved(), RevisionResolutionError("no"), RevisionResolutionError("no"))
    assert folders.pinned(SOURCE, tmp_path).revision == COMMIT
    assert folders.pinned(SOURCE, tmp_path).revision == COMMIT
    with pytest.raises(DataError):
        folders.pinned(SourceConfig(path="org/other"), tmp_path)


def test_unpaired_responses_are_refused_before_another_source_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, *[Resolved()] * 3)
    records: list[dict[str, Any]] = [{"prompt": "q", "completion": "a", "label": True}] * 30
    monkeypatch.setattr(folders, "hub_records", lambda _source: iter(records))
    config = DataConfig(cache=str(tmp_path / "cache"), max_bad_share=1.0)
    sources = [SourceConfig(jsonl(tmp_path, TEXT)), SOURCE]

    def prepared(**options: Any) -> int:
        return len(prepare_dataset(sources, config, tiny.qwen(), "qwen", encoding, **options))

    encoded: list[str] = []

    def encoding(path: str) -> Any:
        encoded.append(path)
        return no_progress(path)

    with pytest.raises(DataError, match="single responses with a good/bad label"):
        prepared()
    assert not encoded
    # The doctor counts them.
    assert prepared(needs_pairs=False) == 2
    assert len(encoded) == 2
    # Encoded data need no Hub.
    records.clear()
    assert prepared() == 2
    assert len(encoded) == 2
