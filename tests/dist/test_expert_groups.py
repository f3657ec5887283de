"""Ranks that share experts train like one process, and their checkpoints are those of any other world."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from transformers import AutoModelForCausalLM

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import ReferenceFreeLossConfig
from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    ModelConfig,
    Offload,
    OptimConfig,
    ParallelismConfig,
    ParallelismKind,
    Quantization,
    ReferenceConfig,
)
from dpo_dist.distributed.checkpoint.saver import (
    CheckpointSaver,
    SavedSlices,
    latest_checkpoint,
)
from dpo_dist.distributed.checkpoint.slices import SHARDS
from dpo_dist.distributed.deepspeed_config import unsharded_loading
from dpo_dist.distributed.deepspeed_internals import shard_of
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import load_to_train
from dpo_dist.model.experts import ExpertShare, expert_weights
from dpo_dist.model.files.load import check_contents, load_config, load_weights
from dpo_dist.model.files.own_experts import OwnExperts
from dpo_dist.model.files.stored import open_plain
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import LOSS, Assets, all_steps, load_policy, load_reference
from tests.dist.test_families import forget
from tests.support import tiny
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import OPTIM, run_ranks
from tests.support.stored import quantize_mxfp4, spoil

SECONDS = 90
STEPS = [((0, 1, 2, 3, 4), 256), ((5,), 256), ((6, 7, 8), 8192), ((9, 10, 0), 256)]
OF_EXPERTS = AdapterConfig(
    r=2, alpha=4.0, target_modules=["q_proj", "experts.gate_up_proj", "experts.down_proj"]
)
OF_ATTENTION = AdapterConfig(r=2, alpha=4.0, target_modules=["q_proj", "v_proj"])
FAMILIES = (
    *("qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "mixtral", "olmoe", "granitemoe"),
    *("granitemoehybrid", "nemotron_h", "deepseek_v3", "glm4_moe", "gpt_oss"),
)


OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
}


def family(model_type: str, folder: Path, **sizes: int) -> Path:
    """A small mixture of four experts a layer."""
    config = tiny_config(model_type, len(tiny.qwen()), **OWN.get(model_type, {}), **sizes)
    tiny_causal_lm(config).save_pretrained(folder)
    tiny.qwen().save_pretrained(folder)
    return folder


def train(
    assets: Assets,
    model: ModelConfig,
    root: Path,
    steps: int,
    live: bool,
    optim: OptimConfig,
    world: World,
    _folder: Path,
) -> dict[str, Any]:
    """Train the next steps after the last checkpoint, and save one."""
    provider = ReferenceProvider()
    loss = ReferenceFreeLossConfig()
    if live:
        engine = load_reference(Path(model.path), assets.config(Path(model.path)), world)
        provider = ReferenceProvider(engine=engine)
        loss = LOSS
    policy = load_policy(model, world, optim, max_length=256)
    policy.train()
    assert policy.is_synchronised is (world.size > 1), "ranks that generate wait for each other"
    done = 0
    saved = latest_checkpoint(root, world)
    if saved is not None:
        policy.load_shards(saved.folder)
        done = saved.state["step"]
    objective = Objective(loss, provider)
    norms = all_steps(policy, objective, assets.dataset(), world, STEPS[done : done + steps])
    saver = CheckpointSaver(root, 2, [policy], world)
    saver.save(done + steps, {"step": done + steps})
    saver.commit()
    forget(policy, world)
    return {"norms": norms}


def train_each(
    assets: Assets, models: dict[str, ModelConfig], root: Path, world: World, folder: Path
) -> dict[str, list[float]]:
    """Train each model beside a live reference; return the gradient norms, and save checkpoints in `root`."""
    norms = {}
    for name, model in models.items():
        norms[name] = train(assets, model, root / name, len(STEPS), True, OPTIM, world, folder)["norms"]
    return norms


def weights_of(root: Path, step: int = 4) -> dict[str, torch.Tensor]:
    saved = SavedSlices.find(root / f"step-{step:06d}", SHARDS)
    return {name: saved.whole(name) for name in saved.shapes}


def compare(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(
            ours[name], weight, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name} {text}"
        )


ONE = ParallelismConfig()
PAIR = ParallelismConfig(experts=2)
FOUR = ParallelismConfig(experts=4)
IN_NODES = ParallelismConfig(experts=2, shard_size=2)


def train_in(
    worlds: list[tuple[int, ParallelismConfig]],
    model: ModelConfig,
    assets: Assets,
    root: Path,
) -> list[float]:
    """Train four steps in these worlds, one after the other; return the gradient norms."""
    norms = []
    for number, (ranks, parallelism) in enumerate(worlds):
        scenario = partial(train, assets, model, root, len(STEPS) // len(worlds), False, OPTIM)
        results = run_ranks(
            scenario, ranks, root.with_name(f"{root.name}-{number}"), parallelism, seconds=SECONDS
        )
        assert all(result == results[0] for result in results)
        norms += results[0]["norms"]
    return norms


def gathered(assets: Assets, model: Path, world: World, _folder: Path) -> int:
    """Elements that one forward of the reference gathers from other ranks."""
    engine = load_reference(model, assets.config(model), world)
    [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
    elements = 0
    gather = comm.cdb.all_gather_into_tensor

    def count(**options: Any) -> Any:
        nonlocal elements
        elements += options["output_tensor"].numel() * (dist.get_world_size(options["group"]) > 1)
        return gather(**options)

    engine.token_logps(batch)  # keeps small weights
    with mock.patch.object(comm.cdb, "all_gather_into_tensor", count):
        engine.token_logps(batch)
    return elements


def test_no_rank_gathers_experts_of_a_reference(assets: Assets, tmp_path: Path) -> None:
    path = family("qwen3_moe", tmp_path / "model")
    weights = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    others = sum(weight.numel() for name, weight in weights.items() if ".experts." not in name)
    for elements in run_ranks(partial(gathered, assets, path), 4, tmp_path / "ranks", PAIR, seconds=SECONDS):
        assert 0 < elements <= 1.01 * others


def own_weights(models: Path, world: World, _folder: Path) -> list[str]:
    """The names of the weights whose values are not those of this rank's experts in an unspoiled folder."""
    assert world.share_of_experts is not None
    config = ModelConfig(dtype=Dtype.fp32, adapter=OF_ATTENTION)
    whole_folder = models / "whole"
    with unsharded_loading(world):
        expected = load_weights(whole_folder, load_config(whole_folder, config), config, world.device)
    packed = load_to_train(models / f"rank-{world.rank}", config, 256, world, 0)
    others = []
    for name in expert_weights(expected):
        whole = expected.get_parameter(name)
        own = whole[world.share_of_experts.of(len(whole))]
        kept = shard_of(packed.causal_lm.get_parameter(name))
        if kept is None or not torch.equal(kept, own.flatten()):
            others.append(name)
    return others


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_rank_reads_its_own_experts_only(model_type: str, tmp_path: Path) -> None:
    """In the files of each rank, the experts of the other one are spoiled."""
    config = ModelConfig(dtype=Dtype.fp32)
    for rank in range(2):
        folder = family(model_type, tmp_path / "models" / f"rank-{rank}")
        described = check_contents(folder, load_config(folder, config), config)
        open_file = open_plain(folder, torch.float32)
        names = expert_weights(described)
        spoil(folder, OwnExperts(described, folder, open_file, names, ExpertShare(rank, 2)).rows)
    family(model_type, tmp_path / "models" / "whole")
    scenario = partial(own_weights, tmp_path / "models")
    assert run_ranks(scenario, 2, tmp_path / "ranks", PAIR, seconds=SECONDS) == [[], []]


def test_two_ranks_that_share_experts_train_like_one_process(assets: Assets, tmp_path: Path) -> None:
    models = {
        name: ModelConfig(str(family(name, tmp_path / "models" / name)), dtype=Dtype.fp32)
        for name in FAMILIES
    }
    for name in ("one", "shared"):
        (tmp_path / name).mkdir()
    scenarios = [partial(train_each, assets, models, tmp_path / name) for name in ("one", "shared")]
    [one] = run_ranks(scenarios[0], 1, tmp_path / "one rank", ONE)
    first, second = run_ranks(scenarios[1], 2, tmp_path / "two ranks", PAIR)
    assert first == second
    for name in FAMILIES:
        assert first[name] == pytest.approx(one[name], rel=5e-5), name
        compare(tmp_path / "shared" / name, tmp_path / "one" / name)


@pytest.mark.parametrize(
    ("worlds", "adapter", "checkpointing"),
    [
        pytest.param([(4, PAIR)], None, "full", id="experts twice"),
        pytest.param([(4, FOUR)], None, "none", id="an expert each"),
        pytest.param([(4, IN_NODES)], None, "full", id="in nodes"),
        pytest.param(
            [(2, ParallelismConfig(experts=2, offload_parameters=Offload.cpu))], None, "none", id="offloaded"
        ),
        pytest.param([(2, PAIR), (3, ONE)], None, "none", id="to three ranks without"),
        pytest.param([(1, ONE), (4, IN_NODES)], None, "none", id="from one rank to nodes"),
        pytest.param([(4, FOUR), (2, PAIR)], OF_EXPERTS, "none", id="adapter on experts"),
        pytest.param([(4, IN_NODES)], OF_ATTENTION, "full", id="adapter beside frozen experts"),
    ],
)
def test_a_run_is_the_same_in_any_groups_and_goes_on_in_others(
    worlds: list[tuple[int, ParallelismConfig]],
    adapter: AdapterConfig | None,
    checkpointing: Literal["none", "full"],
    assets: Assets,
    tmp_path: Path,
) -> None:
    path = str(family("qwen3_moe", tmp_path / "model"))
    model = ModelConfig(path, dtype=Dtype.fp32, adapter=adapter, gradient_checkpointing=checkpointing)
    one = train_in([(1, ONE)] * len(worlds), model, assets, tmp_path / "one")
    assert train_in(worlds, model, assets, tmp_path / "shared") == pytest.approx(one, rel=5e-5)
    compare(tmp_path / "shared", tmp_path / "one")


DDP = ParallelismConfig(ParallelismKind.ddp)
# The scales of NF4 have scales of their own, over more experts than a process has.
PACKED = {"qwen3_moe in int8": 5e-5, "qwen3_moe in nf4": 1e-2, "gpt_oss in MXFP4": 5e-5}


@pytest.mark.parametrize("case", PACKED)
def test_processes_share_the_experts_of_a_quantized_base(case: str, assets: Assets, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model_type, _, kind = case.partition(" in ")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
    folder = family(model_type, tmp_path / "model", **sizes, head_dim=16)
    if kind == "MXFP4":
        quantize_mxfp4(folder)
    quantization = Quantization.int8 if kind == "int8" else Quantization.nf4
    model = ModelConfig(str(folder), dtype=Dtype.fp32, adapter=OF_EXPERTS, quantization=quantization)
    one = train_in([(1, DDP)], model, assets, tmp_path / "one")
    shared = train_in([(2, replace(DDP, experts=2))], model, assets, tmp_path / "shared")
    assert shared == pytest.approx(one, rel=PACKED[case])


def quantized_scores(assets: Assets, model: Path, world: World, _folder: Path) -> list[float]:
    """Log-probs of a reference in 4 bits."""
    config = assets.config(model, ReferenceConfig(quantization=Quantization.nf4))
    engine = load_reference(model, config, world)
    [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
    return engine.token_logps(batch).tolist()


def in_nf4(weight: torch.Tensor) -> torch.Tensor:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = functional.quantize_4bit(weight.flatten(), quant_type="nf4", compress_statistics=True)
    numbers: torch.Tensor = functional.dequantize_4bit(*packed)
    return numbers.view(weight.shape)


def test_a_quantized_reference_has_the_experts_of_each_process_packed_alone(
    assets: Assets, tmp_path: Path
) -> None:
    """As the store's name for its log-probs says."""
    twin = AutoModelForCausalLM.from_pretrained(assets.mixture, dtype=torch.float32)
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = in_nf4(module.weight.data)
        if name.endswith(".experts"):
            for weight in module.parameters():
                weight.data = torch.cat([in_nf4(half) for half in weight.data.chunk(2)])
    with torch.no_grad():
        expected = plain_logps(twin, [assets.dataset().example(row) for row in range(4)]).tolist()
    scenario = partial(quantized_scores, assets, assets.mixture)
    pair = replace(DDP, experts=2)
    for logps in run_ranks(scenario, 2, tmp_path / "ranks", pair, seconds=SECONDS):
        assert logps == pytest.approx(expected, abs=1e-5)
