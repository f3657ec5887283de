"""Steps of models with windows, sinks, caps and RoPE by length equal plain PyTorch with sharded weights."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismConfig, ParallelismKind
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, train_step
from tests.dist.scenario import Assets
from tests.dist.test_engine import LOSS, STEPS, RowsAtHand, plain_steps, write_whole
from tests.support import tiny
from tests.support.packing import COSTS
from tests.support.ranks import OPTIM, run_ranks

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 40,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    "gemma2": {"sliding_window": 8, "head_dim": 8, "final_logit_softcapping": 3.0},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokenizer, written = tiny.qwen(), {}
    for model_type, own in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            model_type,
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            **own,
        )
        written[model_type] = tmp_path_factory.mktemp(model_type)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(written[model_type])
    return written


def norms_of(
    assets: Assets, folders: dict[str, Path], reference: Sequence[np.ndarray], world: World, folder: Path
) -> dict[str, list[float]]:
    """Gradient norms of `STEPS` for each model; the weights after them go to `folder`."""
    dataset, found = assets.dataset(), {}
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    for name, model in folders.items():
        config = ModelConfig(str(model), dtype=Dtype.fp32)
        packed = load_packed(model, config, 1024, world.device, sequence=world.sequence)
        policy = PolicyEngine(packed, OPTIM, world)
        found[name] = []
        for rows, budget in STEPS:
            plan = shard_batch(dataset, np.array(rows), world.replica, world.replicas, budget, COSTS)
            ready, clock = objective.ready_step(plan, world.device), StepClock(world.device)
            norm = train_step(policy, objective, ready, OPTIM.lr, world, clock, RunningMeans())[1]
            found[name].append(norm.item())
        write_whole(policy, folder / f"{name}.safetensors")
    return found


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(ParallelismKind.zero3, id="zero3"),
        pytest.param(ParallelismConfig(ParallelismKind.zero3, sequence_parallel=2), id="sequence"),
    ],
)
def test_steps_equal_plain_pytorch(
    kind: ParallelismKind | ParallelismConfig,
    assets: Assets,
    folders: dict[str, Path],
    plain_entries: list[np.ndarray],
    tmp_path: Path,
) -> None:
    lengths = [
        len(p.prompt_ids) + len(r) for p in map(assets.dataset().sequences, range(11)) for r in p.responses
    ]
    assert min(lengths) <= 40 < max(lengths)
    if isinstance(kind, ParallelismConfig):  # responses of such models are computed one by one
        folders = {name: folder for name, folder in folders.items() if name != "phi3"}
    results = run_ranks(partial(norms_of, assets, folders, plain_entries), 2, tmp_path / "ranks", kind)
    for name, folder in folders.items():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        norms = plain_steps(loaded, assets.dataset(), plain_entries)
        assert results[0][name] == results[1][name]
        assert results[0][name] == pytest.approx(norms, rel=5e-5), name
        after = load_file(tmp_path / "ranks" / f"{name}.safetensors")
        for parameter, tensor in loaded.state_dict().items():
            assert (after[parameter] - tensor).abs().max() <= 2e-5, f"{name}: {parameter}"
