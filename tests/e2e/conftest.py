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


def small_run(assets: Path, folder: Path) -> list[str]:
    """The command line of a small run in `folder`/run, with its own store."""
    return [
        f"model.path={assets}/model",
        "model.dtype=fp32",
        f"data.train=[{assets}/train.jsonl]",
        f"data.cache={assets}/encoded",
        f"reference.store={folder}/store",
        f"run.dir={folder}/run",
        "trainer.global_batch_pairs=6",
        "tracking.wandb=off",
    ]


@pytest.fixture
def overrides(assets: Path, tmp_path: Path) -> Overrides:
    """The command line of a small run in `tmp_path`/run, with its own store, and whatever is added."""

    def make(*extra: str) -> list[str]:
        return [*small_run(assets, tmp_path), "optim.lr=1e-4", "trainer.save_every=0", *extra]

    return make
