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
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    ModelConfig,
    ParallelismConfig,
    ParallelismKind,
    RunConfig,
)
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import preference_loss
from dpo_dist.reference.engine import ReferenceProvider, load_reference, settle_engine
from dpo_dist.training.step import Objective
from tests.dist.scenario import (
    LOSS,
    Assets,
    RowsAtHand,
    all_steps,
    files_of,
    load_policy,
    plain_training,
    reference_values,
)
from tests.dist.scenario import plain_steps as plain_packed_steps
from tests.dist.test_engine import write_whole
from tests.support import tiny
from tests.support.families import COMMON, FAMILIES, tiny_family
from tests.support.multimodal import write_multimodal
from tests.support.own_code import ship_code
from tests.support.packing import COSTS
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

ZERO3, ZERO2, DDP = ParallelismKind
PACKED, PADDED, SINGLE = Arrangement
# Indices of each global batch with the token budget: several micro-batches, and a rank without a pair.
STEPS = (((0, 1, 2, 3, 4), 160), ((5,), 8192))
# transformers cannot load them sharded: their initialization reads the shapes of whole weights.
NOT_SHARDED = {"rwkv", "xlstm"}
# Rows that are not padded, as the plain model is not exact then: code that couples rows; in float64 rows of
# padding without any key in the window.
ALONE = {"gemma2", "own_rows", "longrope"}
# Code that comes with a model; `own_refusing` raises an error in the middle of a packed forward.
OWN_CODE = {"own_state": "state", "own_rows": "rows", "own_refusing": "refusing"}
# Their own code has no float64.
NO_FLOAT64 = {"xglm"}
MOE = {"mixtral", "qwen3_moe", "glm4_moe"}
# Of models that are no family of the table.
ARRANGEMENTS = {"gemma3": PACKED, "own_state": PADDED, "own_rows": SINGLE, "own_refusing": PADDED}
ARRANGEMENTS["longrope"] = SINGLE
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 40,
}


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
    model: Any, dataset: PreferenceDataset, values: Sequence[np.ndarray], alone: bool
) -> list[float]:
    """Gradient norms of `STEPS` with a response per row, by PyTorch alone; `alone`: one row at a time."""

    def loss(indices: Sequence[int]) -> Tensor:
        pairs = [dataset.sequences(index) for index in indices]
        rows = [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
        batches = [[row] for row in rows] if alone else [rows]
        scored = torch.cat([logps for of_batch in batches for logps in row_logps(model, of_batch)])
        reference, lengths = reference_values(dataset, values, indices)
        sums = (sum_by_response(logps, lengths) for logps in (scored, reference.to(scored.dtype)))
        return preference_loss(*sums, LOSS).mean()

    return plain_training(model, [partial(loss, indices) for indices, _ in STEPS])


def model_config(name: str, path: Path) -> ModelConfig:
    return ModelConfig(str(path), dtype=Dtype.fp32, trust_remote_code=name.startswith("own"))


def walk(
    assets: Assets, models: dict[str, Path], reference: Sequence[np.ndarray], world: World, folder: Path
) -> dict[str, Any]:
    """Arrangement and gradient norms of `STEPS` of each model; writes the trained weights."""
    dataset, found = assets.dataset(), {}
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    for name, path in models.items():
        policy = load_policy(model_config(name, path), world, max_length=512)
        settle_engine(policy, 512, world, trains=True)
        costs = replace(COSTS, arrangement=policy.model.arrangement)
        norms = all_steps(policy, objective, dataset, world, STEPS, costs=costs)
        write_whole(policy, folder / f"{name}.safetensors")
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


def write_longrope(folder: Path) -> Path:
    """RoPE by length: pairs are shorter and longer than the original one."""
    torch.manual_seed(0)
    rope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}
    config = AutoConfig.for_model("phi3", **COMMON | rope, vocab_size=len(tiny.qwen()), initializer_range=0.1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_families_train_as_in_plain_float64(
    assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    models = write_families(FAMILIES.keys() - NOT_SHARDED, tmp_path)
    # Its weights for images have no gradient: plain AdamW does not change them.
    models["gemma3"] = write_multimodal(tmp_path / "gemma3", "gemma3", len(tiny.qwen()))
    models["longrope"] = write_longrope(tmp_path / "longrope")
    for name, hidden in OWN_CODE.items():
        models[name] = ship_code(write_model(tmp_path / name), hidden)
    assert_trained_as_plain(models, assets, plain_entries, tmp_path, ZERO3)


SHARED = ParallelismConfig(ZERO3, sequence_parallel=2)


@pytest.mark.parametrize("kind", [ZERO2, DDP, SHARED], ids=["zero2", "ddp", "sequence"])
def test_families_train_in_other_ways(
    kind: ParallelismKind | ParallelismConfig,
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
) -> None:
    """As the error of ZeRO-3 advises; short sequences use some weights of DeepSeek-V4's compressors only."""
    names = {"gpt_oss", "gemma2"} if kind == SHARED else NOT_SHARDED | {"deepseek_v4"}
    models = write_families(names | MOE, tmp_path)
    assert_trained_as_plain(models, assets, plain_entries, tmp_path, kind)


def assert_trained_as_plain(
    models: dict[str, Path],
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
    kind: ParallelismKind | ParallelismConfig,
) -> None:
    """Two ranks train each model, and PyTorch alone does."""
    scenario = partial(walk, assets, models, plain_entries)
    first, second = run_ranks(scenario, 2, tmp_path / "ranks", kind, seconds=800)
    arrangements = {name: arrangement for name, (_, arrangement) in FAMILIES.items()} | ARRANGEMENTS
    for name, path in models.items():
        plain = load_plain(name, path)
        norms = plain_steps(plain, assets.dataset(), plain_entries, name in ALONE)
        ours = first[name]
        assert ours["norms"] == second[name]["norms"], name
        assert ours["norms"] == pytest.approx(norms, rel=5e-4), name
        trained = load_file(tmp_path / "ranks" / f"{name}.safetensors")
        weights = dict(plain.named_parameters())
        common = trained.keys() & weights.keys()
        assert max(float((trained[each] - weights[each].detach()).abs().max()) for each in common) < 5e-5, (
            name
        )
        assert (ours["arrangement"], ours["own_logits"]) == (arrangements[name], False), name


def load_plain(name: str, path: Path) -> Any:
    dtype = torch.float32 if name in NO_FLOAT64 else torch.float64
    plain = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=name.startswith("own")
    ).eval()
    plain.set_experts_implementation("eager")  # the default has no float64
    return plain


# Of a policy and its reference.
PAIRINGS = {("jamba", "plain"): (PADDED, PACKED), ("plain", "own_rows"): (PACKED, SINGLE)}


def train_beside(assets: Assets, models: dict[str, Path], world: World, _folder: Path) -> list[Any]:
    """Arrangements and gradient norms of `STEPS` of each pairing."""
    dataset, found = assets.dataset(), []
    for names in PAIRINGS:
        own, other = (model_config(name, models[name]) for name in names)
        policy = load_policy(own, world, max_length=512)
        settle_engine(policy, 512, world)
        reference = load_reference(files_of(models[names[1]]), RunConfig(model=other), world)
        objective = Objective(LOSS, ReferenceProvider(engine=reference))
        costs = replace(COSTS, arrangement=policy.model.arrangement)
        norms = all_steps(policy, objective, dataset, world, STEPS, costs=costs)
        found.append([[policy.model.arrangement, reference.model.arrangement], norms])
        reference.free()
        policy.free()
        world.accelerator._models.clear()
        world.accelerator._optimizers.clear()
    return found


def test_a_live_reference_is_arranged_by_itself(assets: Assets, tmp_path: Path) -> None:
    """Also one whose ranks make a forward per response, of micro-batches planned for a packed policy."""
    models = write_families(["jamba"], tmp_path) | {"plain": write_model(tmp_path / "plain")}
    models["own_rows"] = ship_code(write_model(tmp_path / "rows", seed=2), "rows")
    by_rank = run_ranks(partial(train_beside, assets, models), 2, tmp_path / "ranks")
    dataset = assets.dataset()
    pairs = [dataset.sequences(index) for index in range(len(dataset))]
    rows = [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
    plain = {name: load_plain(name, path) for name, path in models.items()}
    for number, ((policy, reference), arrangements) in enumerate(PAIRINGS.items()):
        with torch.no_grad():
            values = [row_logps(plain[reference], [row])[0].numpy() for row in rows]
        norms = plain_steps(plain[policy], dataset, values, alone=True)
        for of_rank in by_rank:
            arranged, found = of_rank[number]
            assert arranged == list(arrangements)
            assert found == pytest.approx(norms, rel=5e-4)


SHARED_EXPERTS = AdapterConfig(r=4, alpha=8.0, target_modules=["gate_proj", "up_proj", "down_proj"])


def adapted_steps(
    assets: Assets, model: ModelConfig, reference: Sequence[np.ndarray], world: World, _folder: Path
) -> list[float]:
    dataset = assets.dataset()
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    return all_steps(load_policy(model, world), objective, dataset, world)


def test_an_adapter_of_shared_experts_only_gets_its_whole_gradient(
    assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    """The first one's input has no gradient."""
    folder = write_families(["qwen2_moe"], tmp_path)["qwen2_moe"]
    config = ModelConfig(str(folder), dtype=Dtype.fp32, adapter=SHARED_EXPERTS)
    results = run_ranks(partial(adapted_steps, assets, config, plain_entries), 2, tmp_path / "ranks")
    loaded = load_packed(folder, config, 1024, torch.device("cpu"))
    add_adapter(loaded, config, 0)
    loaded.causal_lm.config._attn_implementation = "sdpa"
    norms = plain_packed_steps(loaded.causal_lm, assets.dataset(), plain_entries)
    for of_rank in results:
        assert of_rank == pytest.approx(norms, rel=5e-5)
