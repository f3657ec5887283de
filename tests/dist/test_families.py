"""Two ranks train models of many families as plain PyTorch does in float64, one response per row."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from dpo_dist.batching.pack import Sequences
from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import ModelConfig, ParallelismKind
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import RunningMeans, preference_loss
from dpo_dist.reference.engine import settle_engine
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, train_step
from tests.dist.scenario import Assets
from tests.dist.test_engine import LOSS, RowsAtHand
from tests.support import tiny
from tests.support.families import FAMILIES, tiny_family
from tests.support.multimodal import write_multimodal
from tests.support.own_code import ship_code
from tests.support.packing import COSTS
from tests.support.ranks import OPTIM, run_ranks
from tests.support.tiny_model import write_model
from tests.support.written import whole_weights

# Indices of each global batch with the token budget: several micro-batches, and a rank without a pair.
STEPS = (((0, 1, 2, 3, 4), 160), ((5,), 8192))


# transformers cannot load them sharded: their initialization reads the shapes of whole weights.
NOT_SHARDED = {"rwkv", "xlstm"}


# Rows that are not padded, as the plain model is not exact then: code that couples rows; in float64 rows of
# padding without any key in the window.
ALONE = {"gemma2", "own_rows"}
# Code that comes with a model; `own_refusing` raises an error in the middle of a packed forward.
OWN_CODE = {"own_state": "state", "own_rows": "rows", "own_refusing": "refusing"}
# Their own code has no float64.
NO_FLOAT64 = {"xglm"}


def row_logps(model: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Tensor]:
    """Log-probs of each response behind its prompt, from one padded batch, in the dtype of `model`."""
    ids = [torch.from_numpy(np.concatenate(row).astype(np.int64)) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    return [
        of_row[len(prompt) - 1 : len(prompt) + len(response) - 1]
        for of_row, (prompt, response) in zip(logps, rows, strict=True)
    ]


def plain_steps(
    model: Any, pairs: Sequence[Sequences], values: Sequence[np.ndarray], alone: bool
) -> list[float]:
    """Gradient norms of `STEPS` with a response per row, by PyTorch alone; `alone`: one row at a time."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, eps=OPTIM.eps)
    norms = []
    for indices, _ in STEPS:
        batch = [pairs[index] for index in indices]
        rows = [(pair.prompt_ids, response) for pair in batch for response in pair.responses]
        batches = [[row] for row in rows] if alone else [rows]
        scored = torch.cat([logps for of_batch in batches for logps in row_logps(model, of_batch)])
        lengths = torch.tensor([len(response) for _, response in rows])
        reference = np.concatenate([values[2 * index + which] for index in indices for which in (0, 1)])
        reference_sums = sum_by_response(torch.from_numpy(reference).to(scored.dtype), lengths)
        preference_loss(sum_by_response(scored, lengths), reference_sums, LOSS).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def walk(
    assets: Assets, models: dict[str, Path], reference: Sequence[np.ndarray], world: World, folder: Path
) -> dict[str, Any]:
    """Arrangement and gradient norms of `STEPS` of each model; writes the trained weights."""
    dataset, found = assets.dataset(), {}
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    for name, path in models.items():
        config = assets.config(path)
        own = ModelConfig(str(path), dtype=config.model.dtype, trust_remote_code=name.startswith("own"))
        policy = PolicyEngine(load_packed(path, own, 512, world.device), OPTIM, world)
        settle_engine(policy, 512, world, trains=True)
        costs = replace(COSTS, arrangement=policy.model.arrangement)
        norms = []
        for indices, budget in STEPS:
            plan = shard_batch(dataset, np.array(indices), world.rank, world.size, budget, costs)
            ready = objective.ready_step(plan, world.device)
            clock, running = StepClock(world.device), RunningMeans()
            norms.append(train_step(policy, objective, ready, OPTIM.lr, world, clock, running)[1].item())
        weights = whole_weights(policy)
        if weights is not None:
            save_file({n: w.contiguous().clone() for n, w in weights.items()}, folder / f"{name}.safetensors")
        found[name] = {
            "arrangement": policy.model.arrangement,
            "own_logits": policy.model.own_logits,
            "norms": norms,
        }
        policy.free()
        world.accelerator._models.clear()
        world.accelerator._optimizers.clear()
        gc.collect()
    return found


def write_families(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Write tiny models of these families in `folder`; return the folder of each."""
    for name in sorted(names):
        tiny_family(name, len(tiny.qwen())).save_pretrained(folder / name)
    return {name: folder / name for name in sorted(names)}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A folder for each family, and for families that no table has."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    found = write_families(FAMILIES.keys() - NOT_SHARDED, tmp_path)
    # Its weights for images have no gradient: plain AdamW does not change them.
    found["gemma3"] = write_multimodal(tmp_path / "gemma3", "gemma3", len(tiny.qwen()))
    for name, hidden in OWN_CODE.items():
        found[name] = ship_code(write_model(tmp_path / name), hidden)
    return found


def test_families_train_as_in_plain_float64(
    models: dict[str, Path], assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    assert_trained_as_plain(models, assets, plain_entries, tmp_path, ParallelismKind.zero3)


@pytest.mark.parametrize("kind", [ParallelismKind.zero2, ParallelismKind.ddp])
def test_families_train_whole(
    kind: ParallelismKind, assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    """As the error of ZeRO-3 advises; short sequences use some weights of DeepSeek-V4's compressors only."""
    models = write_families(NOT_SHARDED | {"deepseek_v4"}, tmp_path)
    assert_trained_as_plain(models, assets, plain_entries, tmp_path, kind)


def assert_trained_as_plain(
    models: dict[str, Path],
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
    kind: ParallelismKind,
) -> None:
    """Two ranks train each model, and PyTorch alone does."""
    scenario = partial(walk, assets, models, plain_entries)
    first, second = run_ranks(scenario, 2, tmp_path / "ranks", kind, seconds=500)
    dataset = assets.dataset()
    pairs = [dataset.sequences(index) for index in range(len(dataset))]
    arrangements = {name: arrangement for name, (_, arrangement) in FAMILIES.items()}
    arrangements |= {"gemma3": Arrangement.packed, "own_state": Arrangement.padded}
    arrangements |= {"own_rows": Arrangement.single, "own_refusing": Arrangement.padded}
    for name, path in models.items():
        dtype = torch.float32 if name in NO_FLOAT64 else torch.float64
        plain = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=name.startswith("own")
        ).eval()
        plain.set_experts_implementation("eager")  # the default has no float64
        norms = plain_steps(plain, pairs, plain_entries, name in ALONE)
        ours = first[name]
        assert ours["norms"] == second[name]["norms"], name
        assert ours["norms"] == pytest.approx(norms, rel=5e-4), name
        trained = load_file(tmp_path / "ranks" / f"{name}.safetensors")
        assert _difference(trained, dict(plain.named_parameters())) < 5e-5, name
        assert (ours["arrangement"], ours["own_logits"]) == (arrangements[name], False), name


def _difference(trained: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight."""
    common = trained.keys() & plain.keys()
    return max(float((trained[name] - plain[name].detach()).abs().max()) for name in common)
