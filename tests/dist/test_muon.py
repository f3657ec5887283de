"""Muon on several ranks, which have parts of some matrices."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Dtype, OptimizerKind, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.deepspeed_internals import flat_masters
from dpo_dist.distributed.processes.world import World
from dpo_dist.model.files.load import TORCH_DTYPES
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import LOSS, Assets, RowsAtHand, all_steps, load_policy, plain_steps
from tests.support.ranks import OPTIM, run_ranks
from tests.support.written import whole_weights

MUON = replace(OPTIM, kind=OptimizerKind.muon)
# PyTorch's Muon rounds to bf16, which would make much of other rounding in the gradients.
IN_FLOAT32 = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float)
ZERO2, DDP = ParallelismKind.zero2, ParallelismKind.ddp
WAYS = [
    pytest.param(1, DDP, Dtype.fp32, False, id="1 rank"),
    pytest.param(2, ZERO2, Dtype.fp32, True, id="2 ranks, zero2"),
    pytest.param(3, ZERO2, Dtype.fp32, False, id="3 ranks, zero2, untied"),
    pytest.param(3, DDP, Dtype.fp32, True, id="3 ranks, ddp"),
    pytest.param(2, DDP, Dtype.bf16, True, id="2 ranks, ddp, bf16"),
    pytest.param(2, ParallelismConfig(ZERO2, sequence_parallel=2), Dtype.fp32, True, id="2 share tokens"),
]


def steps(
    assets: Assets, model: Path, reference: Sequence[np.ndarray], dtype: Dtype, world: World, folder: Path
) -> dict[str, Any]:
    dataset = assets.dataset()
    policy = load_policy(assets.config(model, dtype=dtype).model, world, MUON)
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    with IN_FLOAT32:
        norms = all_steps(policy, objective, dataset, world)
    if (weights := whole_weights(policy)) is not None:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "after.st"
        )
    names = {weight: name for name, weight in policy.causal_lm.named_parameters()}
    (_, ranges), *_ = flat_masters(policy._engine)
    cut = [names[weight] for weight, *_, length in ranges if length < weight.numel()]
    return {"norms": norms, "cut": cut}


@pytest.mark.parametrize(("size", "kind", "dtype", "tied"), WAYS)
def test_steps_equal_those_of_pytorch_on_whole_matrices(
    size: int,
    kind: ParallelismKind | ParallelismConfig,
    dtype: Dtype,
    tied: bool,
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
) -> None:
    model = assets.policy if tied else assets.untied_policy
    scenario = partial(steps, assets, model, plain_entries, dtype)
    results = run_ranks(scenario, size, tmp_path / "ranks", kind, dtype)
    rounded = TORCH_DTYPES[dtype]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=rounded)
    with IN_FLOAT32:
        norms = plain_steps(loaded.float(), assets.dataset(), plain_entries, optim=MUON)
    after = load_file(tmp_path / "ranks" / "after.st")
    of_weights, of_norms = (2e-5, 5e-5) if dtype is Dtype.fp32 else (0.02, 0.1)
    for name, tensor in loaded.state_dict().items():
        assert after[name].dtype is rounded
        assert torch.allclose(after[name].float(), tensor, atol=of_weights, rtol=of_weights), name
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(norms, rel=of_norms)
    on_two = [name for of_rank in results for name in of_rank["cut"]]
    assert size < 3 or len(on_two) > len({*on_two}) > 0, "no matrix is cut, so that none is joined"
