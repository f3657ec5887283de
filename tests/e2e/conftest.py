"""One small model and its pairs for all command-line tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.invented import write_pairs
from tests.support.tiny_model import write_model

Overrides = Callable[..., list[str]]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    write_model(folder / "model")
    write_pairs(folder / "train.jsonl", 23, seed=1)
    write_pairs(folder / "eval.jsonl", 5, seed=2)
    return folder


@pytest.fixture
def overrides(assets: Path, tmp_path: Path) -> Overrides:
    """The command line of a small run in `tmp_path`/run, with its own store, and whatever is added."""

    def make(*extra: str) -> list[str]:
        return [
            f"model.path={assets}/model",
            "model.dtype=fp32",
            f"data.train=[{assets}/train.jsonl]",
            f"data.cache={assets}/encoded",
            f"reference.store={tmp_path}/store",
            f"run.dir={tmp_path}/run",
            "optim.lr=1e-4",
            "trainer.global_batch_pairs=6",
            "trainer.save_every=0",
            "tracking.wandb=off",
            *extra,
        ]

    return make
