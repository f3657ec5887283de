"""A forward of the check at start that fails on one rank ends all; one that fails on all is not the last."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismConfig, ParallelismKind
from dpo_dist.distributed import processes
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference import engine
from dpo_dist.reference.engine import settle_engine
from tests.support.ranks import OPTIM, Outcome, start_ranks
from tests.support.tiny_model import write_model

# Of the forward that fails: by the model's own code, or packed.
OWN, PACKED = Arrangement.single, Arrangement.packed


def settle(
    folder: Path, fails: Arrangement, on: range, world: World, _folder: Path, late_seconds: float = 0.0
) -> str:
    """Settle a model of which layer 1 fails in one arrangement on the ranks of `on`; rank 1 begins late."""
    processes.FAREWELL_SECONDS = processes.GRACE_SECONDS = 1.0
    engine.FAULT_SECONDS = 1.0
    config = ModelConfig(str(folder), dtype=Dtype.fp32)
    model = load_packed(folder, config, 512, world.device, sequence=world.sequence)
    policy = PolicyEngine(model, OPTIM, world)
    if world.rank in on:
        model.causal_lm.model.layers[1].register_forward_pre_hook(partial(refuse, model, fails))
    time.sleep(late_seconds * world.rank)
    settle_engine(policy, 512, world, trains=True)
    return policy.model.arrangement.value


def refuse(model: PackedCausalLM, fails: Arrangement, _layer: nn.Module, _inputs: Any) -> None:
    if model.arrangement is fails:
        raise RuntimeError("layer 1 is broken")


def settled(
    fails: Arrangement, on: range, size: int, folder: Path, kind: ParallelismKind = ParallelismKind.zero3
) -> list[Outcome]:
    work = partial(settle, write_model(folder / "model"), fails, on)
    return start_ranks(work, size, folder / "ranks", kind).finish(60)  # a tenth of timeout_seconds


@pytest.mark.parametrize(("fails", "size"), [(OWN, 3), (PACKED, 2)])
def test_a_forward_that_fails_on_one_rank_ends_all(fails: Arrangement, size: int, tmp_path: Path) -> None:
    """The others wait for that rank in a collective call of the same forward, which it has left."""
    outcomes = settled(fails, range(1, 2), size, tmp_path)
    failing, *others = outcomes[1], outcomes[0], *outcomes[2:]
    assert (failing.error, failing.reporting_rank) == ("ConfigError", 1), failing.log
    assert "fails on one rank" in failing.message
    assert "RuntimeError: layer 1 is broken" in failing.message
    for other in others:
        assert (other.error, other.exit_code) in [("PeerLostError", 0), ("", 2)], other.log
        assert other.reporting_rank in (None, processes.NOBODY)


@pytest.mark.parametrize("kind", [ParallelismKind.zero3, ParallelismKind.zero2])
def test_an_error_of_all_ranks_or_of_whole_models_is_one_error(kind: ParallelismKind, tmp_path: Path) -> None:
    """Ranks with whole weights finish the forward, and print the error of the one that failed."""
    on = range(2) if kind is ParallelismKind.zero3 else range(1, 2)
    for outcome in settled(OWN, on, 2, tmp_path, kind):
        assert outcome.error == "ConfigError", outcome.log
        assert "own forward cannot score" in outcome.message
        assert "layer 1 is broken" in outcome.message


def test_an_arrangement_that_fails_on_all_ranks_is_followed_by_the_next(tmp_path: Path) -> None:
    outcomes = settled(PACKED, range(2), 2, tmp_path)
    assert [outcome.result for outcome in outcomes] == [Arrangement.padded.value] * 2, outcomes[0].log


def test_ranks_that_begin_at_unequal_times_fail_together(tmp_path: Path) -> None:
    """With whole weights and shared tokens, nothing in the model's own forward waits for the other rank."""
    work = partial(settle, write_model(tmp_path / "model"), OWN, range(2), late_seconds=2.0)
    kind = ParallelismConfig(ParallelismKind.zero2, sequence_parallel=2)
    for outcome in start_ranks(work, 2, tmp_path / "ranks", kind).finish(60):
        assert "own forward cannot score" in outcome.message, outcome.log
