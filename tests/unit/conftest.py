"""Configurations of all tests in one process are composed once."""

import hydra
import pytest

from tests.support.composed import compose_once


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal parts."""
    monkeypatch.setattr(hydra, "compose", compose_once)
