"""Micro-batches fit the token budget in the rows of a live reference, too."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.schema import AttentionBackend, TrainerConfig
from dpo_dist.model.flops import StepFlops
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.run import balance_costs
from dpo_dist.training.start.inputs import Inputs
from tests.support.packing import dataset_of, random_pairs

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
