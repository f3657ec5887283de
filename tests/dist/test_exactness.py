"""Log-probs and gradients of ZeRO-3 on two ranks equal those of the plain padded forward, in fp32."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.pack import Sequences
from dpo_dist.config.losses import LossConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.objective.losses import BatchFacts
from dpo_dist.reference.scoring import StoredReference
from dpo_dist.reference.store import LogpStore
from dpo_dist.training.loss import Objective
from tests.dist.scenario import FINGERPRINT, PAIRS, Assets, fill
from tests.support.packing import COSTS
from tests.support.padded import BETA, assert_same_gradients, gradients_of, padded_logps, plain_loss
from tests.support.ranks import OPTIM, run_ranks

STEP = range(8)


def pairs_of(dataset: PreferenceDataset) -> list[Sequences]:
    return [dataset.sequences(index) for index in range(len(dataset))]


def score_and_train(assets: Assets, store: Path, world: World, folder: Path) -> dict[str, Any]:
    """Fill a store and return log-probs of one global batch; write its gradients, before any update."""
    fill(assets, store, PAIRS, world, folder)
    config, dataset = assets.config(assets.policy), assets.dataset()
    model = load_packed(assets.policy, config.model, 1024, world.device)
    policy = PolicyEngine(model, OPTIM, world)
    policy.train()
    objective = Objective(LossConfig(beta=BETA), StoredReference(LogpStore.open(store, FINGERPRINT)))
    plan = shard_batch(dataset, np.array(STEP), world.rank, world.size, 256, COSTS)
    logps: dict[str, list[float]] = {}
    last, batches = len(plan.micro_batches) - 1, objective.ready_batches(plan, world.device)
    for number, (indices, batch) in enumerate(zip(plan.micro_batches, batches, strict=True)):
        reference = objective.reference.token_logps(batch)
        pairs = objective.score(policy, batch, reference, BatchFacts(plan.mean_chosen_tokens))
        loss, _ = objective.measure(pairs)
        policy.backward(loss / plan.pairs, is_last=number == last)
        with torch.no_grad():
            values = torch.split(policy.token_logps(batch), batch.response_tokens.tolist())
        logps |= {
            f"{index} {which}": values[2 * i + which].tolist()
            for i, index in enumerate(indices)
            for which in range(2)
        }
    gradients = {name: safe_get_full_grad(p) for name, p in policy.causal_lm.named_parameters()}
    if world.is_main:
        save_file({n: g.float().contiguous() for n, g in gradients.items()}, folder / "gradients.safetensors")
    return {"logps": logps, "micro_batches": len(plan.micro_batches)}


def test_store_engine_and_gradients_equal_the_padded_forward(assets: Assets, tmp_path: Path) -> None:
    store = tmp_path / "store"
    by_rank = run_ranks(partial(score_and_train, assets, store), 2, tmp_path / "ranks")
    pairs = pairs_of(assets.dataset())

    with torch.no_grad():
        reference = padded_logps(
            AutoModelForCausalLM.from_pretrained(assets.reference, dtype=torch.float32), pairs
        )
    stored = LogpStore.open(store, FINGERPRINT).read(assets.dataset().keys)
    for logps, plain in zip(stored, reference, strict=True):
        np.testing.assert_allclose(logps, plain.numpy(), rtol=0, atol=1e-4)

    policy = AutoModelForCausalLM.from_pretrained(assets.policy, dtype=torch.float32)
    logps = padded_logps(policy, [pairs[index] for index in STEP])
    computed: dict[str, list[float]] = {}
    for of_rank in by_rank:
        assert of_rank["micro_batches"] > 1
        assert of_rank["logps"]
        computed |= of_rank["logps"]
    for i, plain in enumerate(logps):
        ours = torch.tensor(computed.pop(f"{i // 2} {i % 2}"))
        torch.testing.assert_close(ours, plain.detach(), rtol=0, atol=1e-4)
    assert not computed

    expected: dict[str, Tensor] = gradients_of(policy, plain_loss(logps, reference[: 2 * len(STEP)]))
    assert_same_gradients(load_file(tmp_path / "ranks" / "gradients.safetensors"), expected)
