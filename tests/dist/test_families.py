"""Two ranks train models of many families as plain PyTorch does in float64, one response per row."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    ModelConfig,
    ParallelismConfig,
    ParallelismKind,
    RunConfig,
)
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.architectures import UNPACKABLE
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.reference.engine import ReferenceProvider, run_start_check
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import (
    LOSS,
    Assets,
    RowsAtHand,
    all_steps,
    entries_of,
    load_policy,
    load_reference,
    plain_steps,
)
from tests.dist.test_engine import write_whole
from tests.support import tiny
from tests.support.families import FAMILIES, tiny_causal_lm, tiny_config, tiny_family, with_rope
from tests.support.multimodal import IMAGE_MODELS, write_multimodal
from tests.support.own_code import ship_code
from tests.support.packing import COSTS
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

ZERO3, ZERO2, DDP = ParallelismKind
PACKED, PADDED, SINGLE = Arrangement
# Indices of each global batch with the token budget: several micro-batches, and a rank without a pair.
STEPS = (((0, 1, 2), 160), ((5,), 8192))
# One of each kind of layer that cannot be packed; of those that can, all are in the table below. Unit tests
# compare all families in one process.
SHARDED = "bloom jamba minimax recurrent_gemma zamba"
# Their weights for images have no gradient: plain AdamW does not change them.
READ_IMAGES = "gemma3 llama4 mistral3 qwen3_5 qwen3_vl_moe"
# transformers cannot load RWKV and xLSTM sharded: their initialization reads the shapes of whole weights.
UNSHARDED = "deepseek_v4 mixtral rwkv xlstm"
# Code that comes with a model; `own_refusing` raises an error in the middle of a packed forward.
OWN_CODE = {"own_rows": "rows", "own_refusing": "refusing"}
# Of models that are no family of the table.
ARRANGEMENTS = dict.fromkeys(IMAGE_MODELS, PACKED) | {
    "qwen3_5": PACKED,
    "longrope": SINGLE,
    "own_rows": SINGLE,
    "own_refusing": PADDED,
}


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
        run_start_check(policy, 512, world, trains=True)
        costs = replace(COSTS, arrangement=policy.model.arrangement)
        norms = all_steps(policy, objective, dataset, world, STEPS, costs=costs)
        write_whole(policy, folder / f"{name}.safetensors")
        found[name] = {
            "arrangement": policy.model.arrangement,
            "own_logits": policy.model.own_logits,
            "norms": norms,
        }
        forget(policy, world)
    return found


def forget(policy: PolicyEngine, world: World) -> None:
    """Make room for the next model of these processes."""
    policy.free()
    world.accelerator._models.clear()
    world.accelerator._optimizers.clear()
    gc.collect()
    gc.freeze()  # each engine collects, among the modules of all models so far


def write_families(names: str, folder: Path) -> dict[str, Path]:
    """Write tiny models of these families in `folder`; return the folder of each."""
    for name in names.split():
        if name in IMAGE_MODELS:
            write_multimodal(folder / name, name, len(tiny.qwen()))
        else:
            tiny_family(name, len(tiny.qwen())).save_pretrained(folder / name)
    return {name: folder / name for name in names.split()}


@dataclass(frozen=True)
class Row:
    """A model whose training does not depend on how it is sharded."""

    family: str
    arrangement: Arrangement
    own: dict[str, Any] = field(default_factory=dict)
    """Options of its configuration."""
    model: dict[str, Any] = field(default_factory=dict)
    """Options of `ModelConfig`."""


HRM = {"head_dim": 8, "H_cycles": 2, "L_cycles": 2, "prefix_lm": False, "embedding_scale": 2.0}
CHECKPOINTED = {"gradient_checkpointing": "full"}
ADAPTED = {"adapter": AdapterConfig(r=2, alpha=4.0, target_modules=["q_proj", "v_proj"])}
TABLE = {
    name: Row(name, arrangement) for name, (_, arrangement) in FAMILIES.items() if name not in UNPACKABLE
} | {
    # Layers that share weights.
    "zamba2-checkpointed": Row("zamba2", PACKED, model=CHECKPOINTED),
    "zamba2-adapted": Row("zamba2", PACKED, model=ADAPTED),
    "zamba2-two-blocks": Row(
        "zamba2",
        PACKED,
        {"num_mem_blocks": 2, "num_hidden_layers": 4, "layers_block_type": ["hybrid"] * 4},
    ),
    "zamba-checkpointed": Row("zamba", PADDED, model=CHECKPOINTED),
    "zamba-adapted": Row("zamba", PADDED, model=ADAPTED),
    # Each layer is called several times in a forward.
    "qwen3-by-response": Row("qwen3", SINGLE, {"num_hidden_layers": 1}),
    "qwen3-by-response-adapted": Row("qwen3", SINGLE, model=ADAPTED),
    "hrm_text": Row("hrm_text", PADDED, HRM),
    "hrm_text-checkpointed-adapted": Row("hrm_text", PADDED, HRM, CHECKPOINTED | ADAPTED),
}


# A short pair for each of two ranks, then one for both: a rank has a dummy.
SHORT_STEPS = (((1, 10), 64), ((4,), 8192))


def two_steps(
    assets: Assets, models: Path, reference: Sequence[np.ndarray], world: World, folder: Path
) -> None:
    """Train each model of `TABLE`, and write its weights."""
    dataset = assets.dataset()
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    for name, row in TABLE.items():
        config = ModelConfig(str(models / name), dtype=Dtype.fp32, **row.model)
        policy = load_policy(config, world, max_length=512)
        policy.model.arrange(row.arrangement, own_logits=False)
        costs = replace(COSTS, arrangement=row.arrangement)
        all_steps(policy, objective, dataset, world, SHORT_STEPS, costs=costs)
        policy.check_gradients()
        write_whole(policy, folder / f"{name}.safetensors")
        forget(policy, world)


def test_every_family_trains_alike_sharded_by_two_ranks_and_by_one(
    assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    for name, row in TABLE.items():
        model = tiny_causal_lm(tiny_config(row.family, len(tiny.qwen()), **row.own))
        model.save_pretrained(tmp_path / "models" / name)
    scenario = partial(two_steps, assets, tmp_path / "models", plain_entries)
    both, alone = tmp_path / "both", tmp_path / "alone"
    run_ranks(scenario, 2, both, ZERO3, seconds=900)
    run_ranks(scenario, 1, alone, DDP, seconds=900)
    for name in TABLE:
        weights, expected = (load_file(ranks / f"{name}.safetensors") for ranks in (both, alone))
        assert weights.keys() == expected.keys()
        # Sums of gradients over ranks round in float32, a step is 1e-2, and the weights of most are below 1.
        largest = max(float((weights[each] - expected[each]).abs().max()) for each in weights)
        assert largest < 1e-6, name


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_families_train_as_in_plain_float64(
    assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    models = write_families(f"{SHARDED} {READ_IMAGES}", tmp_path)
    models["longrope"] = tmp_path / "longrope"  # pairs are shorter and longer than the limit
    longrope = with_rope(tiny_config("phi3", len(tiny.qwen())), "longrope", 40)
    tiny_causal_lm(longrope).save_pretrained(models["longrope"])
    for name, hidden in OWN_CODE.items():
        models[name] = ship_code(write_model(tmp_path / name), hidden)
    assert_trained_as_plain(models, assets, plain_entries, tmp_path, ZERO3)


SEQUENCE = ParallelismConfig(ZERO3, sequence_parallel=2)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param(ZERO2, UNSHARDED, id="zero2"),
        pytest.param(DDP, UNSHARDED, id="ddp"),
        pytest.param(SEQUENCE, "deepseek_v3 gemma2 gpt_oss llama4_text qwen3_moe qwen3_vl", id="sequence"),
    ],
)
def test_families_train_in_other_ways(
    kind: ParallelismKind | ParallelismConfig,
    names: str,
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
) -> None:
    """As the error of ZeRO-3 advises; short sequences use some weights of DeepSeek-V4's compressors only."""
    assert_trained_as_plain(write_families(names, tmp_path), assets, plain_entries, tmp_path, kind)


def assert_trained_as_plain(
    models: dict[str, Path],
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
    kind: ParallelismKind | ParallelismConfig,
) -> None:
    """Two ranks train each model, and PyTorch alone does."""
    scenario = partial(walk, assets, models, plain_entries)
    first, second = run_ranks(scenario, 2, tmp_path / "ranks", kind, seconds=900)
    arrangements = {name: arrangement for name, (_, arrangement) in FAMILIES.items()} | ARRANGEMENTS
    for name, path in models.items():
        plain = load_plain(name, path)
        norms = plain_steps(plain, assets.dataset(), plain_entries, STEPS)
        ours = first[name]
        assert ours["norms"] == second[name]["norms"], name
        assert ours["norms"] == pytest.approx(norms, rel=5e-4), name
        trained = load_file(tmp_path / "ranks" / f"{name}.safetensors")
        weights = dict(plain.named_parameters())
        assert not any("visual" in each or "vision" in each for each in trained), name  # not in memory
        common = trained.keys() & weights.keys()
        assert max(float((trained[each] - weights[each].detach()).abs().max()) for each in common) < 5e-5, (
            name
        )
        assert (ours["arrangement"], ours["own_logits"]) == (arrangements[name], False), name


def load_plain(name: str, path: Path) -> Any:
    kind = AutoModelForImageTextToText if name in IMAGE_MODELS else AutoModelForCausalLM
    plain = kind.from_pretrained(path, dtype=torch.float64, trust_remote_code=name.startswith("own")).eval()
    plain.set_experts_implementation("eager")  # the default has no float64
    return plain


def train_beside(own: ModelConfig, other: ModelConfig, assets: Assets, world: World, _folder: Path) -> Any:
    """Arrangements of a policy and its reference, and gradient norms of `STEPS`."""
    policy = load_policy(own, world, max_length=512)
    run_start_check(policy, 512, world)
    reference = load_reference(Path(other.path), RunConfig(model=other), world)
    objective = Objective(LOSS, ReferenceProvider(engine=reference))
    norms = all_steps(policy, objective, assets.dataset(), world, STEPS)
    return [[policy.model.arrangement, reference.model.arrangement], norms]


def test_a_live_reference_is_arranged_by_itself(assets: Assets, tmp_path: Path) -> None:
    """Its ranks make a forward per response, of micro-batches planned for a packed policy."""
    rows = ship_code(write_model(tmp_path / "rows", seed=2), "rows")
    configs = model_config("plain", assets.policy), model_config("own_rows", rows)
    by_rank = run_ranks(partial(train_beside, *configs, assets), 2, tmp_path / "ranks")
    values = entries_of(load_plain("own_rows", rows), assets.dataset())
    norms = plain_steps(load_plain("plain", assets.policy), assets.dataset(), values, STEPS)
    for arrangements, found in by_rank:
        assert arrangements == [PACKED, SINGLE]
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
    folder = write_families("qwen2_moe", tmp_path)["qwen2_moe"]
    config = ModelConfig(str(folder), dtype=Dtype.fp32, adapter=SHARED_EXPERTS)
    results = run_ranks(partial(adapted_steps, assets, config, plain_entries), 2, tmp_path / "ranks")
    loaded = load_packed(folder, config, 1024, torch.device("cpu"))
    add_adapter(loaded, config, 0)
    loaded.causal_lm.config._attn_implementation = "sdpa"
    norms = plain_steps(loaded.causal_lm, assets.dataset(), plain_entries)
    for of_rank in results:
        assert of_rank == pytest.approx(norms, rel=5e-5)
