"""One small model and its pairs for all command-line tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.data.example import Example
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from tests.support import tiny
from tests.support.invented import write_pairs
from tests.support.launch import history
from tests.support.packing import plain_logps
from tests.support.pairs import encode
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
        "data.text_as_messages=false",
        f"reference.store={folder}/store",
        f"run.dir={folder}/run",
        "trainer.global_batch_pairs=6",
        "tracking=off",
        "sampling.prompts=0",
    ]


@pytest.fixture
def overrides(assets: Path, tmp_path: Path) -> Overrides:
    """The command line of a small run in `tmp_path`/run, with its own store, and whatever is added."""

    def make(*extra: str) -> list[str]:
        return [*small_run(assets, tmp_path), "optim.lr=1e-4", "trainer.save_every=0", *extra]

    return make


def last_evaluation(run: Path) -> dict[str, float]:
    return [row for row in history(run) if "eval_loss" in row][-1]


@torch.no_grad()
def mean_logp(causal_lm: Any, assets: Path, which: int) -> float:
    """The mean log-prob of chosen (0) or rejected (1) responses of the evaluation data, by plain forwards."""
    logps = []
    for record in read_records(f"{assets}/eval.jsonl"):
        assert isinstance(record, PreferenceRecord)
        pair = encode(record, tiny.qwen())
        logps.append(plain_logps(causal_lm, [Example(pair.prompt_ids, (pair.responses[which],))]).sum())
    return torch.stack(logps).mean().item()


def assert_last_log_probs(causal_lm: Any, assets: Path, run: Path) -> None:
    """A model has the log-probs of the last evaluation of a run, by plain forwards."""
    for which, name in enumerate(("chosen", "rejected")):
        evaluated = last_evaluation(run)[f"eval_logps/{name}"]
        assert mean_logp(causal_lm, assets, which) == pytest.approx(evaluated, rel=1e-4)
