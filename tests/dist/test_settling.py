"""A forward of the check at start that fails on one rank ends all; one that fails on all is not the last."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismKind
from dpo_dist.data.arrangement import Arrangement
from dpo_dist.distributed import failures, monitor
from dpo_dist.distributed import world as world_module
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.settling import settle_engine
from dpo_dist.distributed.world import World
from dpo_dist.model import exactness, trial
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import load_packed
from tests.support.ranks import OPTIM, Outcome, start_ranks
from tests.support.tiny_model import write_model

# Of the forward that fails: by the model's own code, or packed.
OWN, PACKED = Arrangement.single, Arrangement.packed


def settle(folder: Path, fails: Arrangement, on: range, world: World, _folder: Path) -> str:
    """Settle a model of which layer 1 fails in one arrangement on the ranks of `on`."""
    failures.FAREWELL_SECONDS = world_module.FAREWELL_SECONDS = monitor._GRACE_SECONDS = 1.0
    exactness.LAST_SECONDS = trial.LADDER_SECONDS = 1.0
    config = ModelConfig(str(folder), dtype=Dtype.fp32)
    model = load_packed(folder, config, 512, world.device)
    policy = PolicyEngine(model, OPTIM, world)
    if world.rank in on:
        model.causal_lm.model.layers[1].register_forward_pre_hook(partial(refuse, model, fails))
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
        assert other.reporting_rank in (None, failures.NOBODY)


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
