"""A quantized reference is whole on every rank beside a sharded policy, and its entries are its own."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Quantization, ReferenceConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.insight.console import Console
from dpo_dist.reference.engine import QuantizedReference, load_reference
from dpo_dist.training.inputs import load_inputs
from dpo_dist.training.reference import prepare_reference
from dpo_dist.training.start import Run
from tests.dist.scenario import Assets, files_of
from tests.support.invented import write_pairs
from tests.support.packing import COSTS
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def score_both(assets: Assets, model: Path, quantization: str, world: World, _folder: Path) -> dict[str, Any]:
    """Return the mean drift of a quantized reference from the unquantized one, and whether it is whole."""
    [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
    in_full = load_reference(files_of(model), assets.config(model), world).token_logps(batch)
    quantized = ReferenceConfig(quantization=Quantization(quantization))
    engine = load_reference(files_of(model), assets.config(model, quantized), world)
    drift = (engine.token_logps(batch) - in_full).abs().mean()
    return {"drift": float(drift), "whole": isinstance(engine, QuantizedReference)}


@pytest.mark.parametrize("quantization", Quantization)
def test_its_log_probs_are_close_to_the_unquantized_ones(
    quantization: str, assets: Assets, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", hidden_size=64)
    first, second = run_ranks(partial(score_both, assets, model, quantization), 2, tmp_path / "ranks")
    assert first == second
    assert first["whole"]
    assert 1e-4 < first["drift"] < 0.5


def fill_twice(overrides: list[str], world: World, _folder: Path) -> list[Any]:
    """Return the computed log-probs of a quantized reference, an unquantized one, and the first again."""
    results = []
    for quantization in ("nf4", "null", "nf4"):
        config = load_run_config([*overrides, f"reference.quantization={quantization}"])
        console = Console(None)
        run = Run(config, world, console)
        reference = prepare_reference(run, load_inputs(run))
        results.append([reference.report["computed"], reference.is_policys_start])
    return results


def test_its_entries_are_its_own(tmp_path: Path) -> None:
    overrides = [
        f"model.path={write_model(tmp_path / 'model', hidden_size=64)}",
        "model.dtype=fp32",
        f"data.train=[{write_pairs(tmp_path / 'pairs.jsonl', 8)}]",
        f"data.cache={tmp_path / 'encoded'}",
        f"reference.store={tmp_path / 'store'}",
    ]
    for results in run_ranks(partial(fill_twice, overrides), 2, tmp_path / "ranks"):
        assert results == [[16, False], [16, True], [0, False]]
