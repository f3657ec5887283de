"""A model and data sets for trainers of TRL, made once for a process."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.utils import logging as bars

from tests.support.tiny_model import write_model

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"What is {number} times {number}{'?' * (number % 4)}"}],
        "chosen": [{"role": "assistant", "content": f"It is {number * number}."}],
        "rejected": [{"role": "assistant", "content": f"No {number}{' never' * (number % 5)}"}],
    }
    for number in range(8)
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy, with another model, the reference, in `reference`."""
    folder = tmp_path_factory.mktemp("trl")
    write_model(folder)
    write_model(folder / "reference", seed=1)
    return folder


@pytest.fixture(scope="session")
def pairs() -> Any:
    """Pairs of messages."""
    bars.disable_progress_bar()
    return Dataset.from_list(PAIRS)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
