"""Micro-batches fit the token budget in the rows of a live reference, too."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.sampler import SourceSpan, make_sampler
from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import AttentionBackend, TrainerConfig
from dpo_dist.data.example import Example
from dpo_dist.model.flops import StepFlops
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.run import balance_costs, describe_prefixes, planned_steps
from dpo_dist.training.start.inputs import Inputs
from tests.support.packing import SHARING, dataset_of, random_pairs

BUDGET = 200
# Much longer prompts than responses, and one pair that would pad the rows of all others.
SHAPES = [(20, 3, 4)] * 6 + [(90, 4, 4)] + [(10, 5, 5, 2)] * 5


def live(arrangement: Arrangement) -> ReferenceProvider:
    engine: Any = SimpleNamespace(model=SimpleNamespace(arrangement=arrangement))
    return ReferenceProvider(engine=engine)


@pytest.mark.parametrize(
    "reference", [ReferenceProvider(), live(Arrangement.padded), live(Arrangement.single)]
)
def test_a_live_reference_in_padded_rows_stays_in_the_budget(reference: ReferenceProvider) -> None:
    facts: dict[str, Any] = dict.fromkeys(Inputs.__dataclass_fields__) | {"flops": StepFlops(1.0, 1.0, 1.0)}
    policy: Any = SimpleNamespace(
        model=SimpleNamespace(
            arrangement=Arrangement.packed, backend=AttentionBackend.sdpa, forks_states=False
        )
    )
    provided: Any = SimpleNamespace(provider=reference)
    run: Any = SimpleNamespace(
        say=print,
        config=SimpleNamespace(trainer=TrainerConfig()),
        world=SimpleNamespace(device=torch.device("cpu")),
    )
    costs = balance_costs(run, Inputs(**facts), policy, provided)
    assert costs.is_masked  # by SDPA
    dataset = dataset_of(random_pairs(SHAPES))
    plan = shard_batch(dataset, np.arange(len(SHAPES)), 0, 1, BUDGET, costs)
    assert plan.tokens == sum(sum(shape) - (len(shape) - 1) for shape in SHAPES)
    most = {
        arrangement: max(batch.computed_tokens(arrangement) for batch in plan.batches())
        for arrangement in Arrangement
    }
    pads = reference == live(Arrangement.padded)
    assert most[Arrangement.packed] <= BUDGET
    assert (most[Arrangement.padded] <= BUDGET) is pads


def alike(of_system: int, of_responses: int) -> list[Example]:
    """Eight pairs of 100 computed tokens with shared prompts; their first tokens as all, or as both sides."""
    pairs = random_pairs([(40, 21, 41)] * 8)
    system = pairs[0].prompt_ids[:of_system]
    return [
        Example(
            np.concatenate((system, pair.prompt_ids[of_system:])),
            (best, np.concatenate((best[:of_responses], worst[of_responses:]))),
        )
        for pair in pairs
        for best, worst in [pair.responses]
    ]


@pytest.mark.parametrize(
    ("shares", "loss", "budget", "said"),
    [
        ((0, 0), LossConfig(), 1000, None),
        ((20, 0), LossConfig(), 1000, 15),  # of each batch of four pairs, three times 20 of 400 tokens
        ((20, 0), LossConfig(), 250, 10),  # two micro-batches of two pairs
        ((20, 0), LossConfig(), 100, None),  # a pair in each
        ((0, 20), LossConfig(), 1000, 20),  # in each pair
        ((20, 20), LossConfig(), 1000, 35),
        ((20, 0), LossConfig(LossKind.sft), 1000, 25),  # of 240
        ((20, 0), LossConfig(LossKind.kto), 1000, 21),  # and with the partners, of 320
    ],
)
def test_the_header_says_how_many_tokens_less_the_planned_steps_have(
    shares: tuple[int, int], loss: LossConfig, budget: int, said: int | None
) -> None:
    dataset, run = dataset_of(alike(*shares)), cast(Any, SimpleNamespace())
    run.shard = lambda dataset, indices, costs: shard_batch(dataset, indices, 0, 1, budget, costs, loss)
    sampler = make_sampler([SourceSpan(0, 8, 1.0)], TrainerConfig(global_batch_pairs=4, epochs=3))
    words = f"prefixes: {said} % fewer tokens than by sharing prompts only" if said else None
    assert describe_prefixes(planned_steps(run, dataset, sampler, SHARING)) == words
    for none in ({"beyond_prompts": False}, {"arrangement": Arrangement.padded}):
        assert describe_prefixes(planned_steps(run, dataset, sampler, replace(SHARING, **none))) is None
