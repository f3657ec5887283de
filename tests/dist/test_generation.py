"""The policy generates on any number of ranks what transformers generates from its saved weights."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import ReferenceFreeLossConfig
from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig, ParallelismKind
from dpo_dist.distributed import zero
from dpo_dist.distributed.processes.world import Stops, World
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.model import generation
from dpo_dist.model.generation import NotFiniteError, WrongGenerationError
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.tools.sampling.generate import Request, Sample, generate_together
from dpo_dist.tools.sampling.settings import Sampling
from dpo_dist.training.steps.step import Objective, evaluate
from tests.dist.scenario import Assets, load_policy, one_step
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.packing import COSTS
from tests.support.ranks import run_ranks
from tests.support.written import write_model

LENGTHS = (3, 11, 1, 6, 24, 2, 7)
STOPS = tuple(range(60, 90))
GREEDY = Sampling(12, temperature=0)
DRAWN = Sampling(12, temperature=1.2, seed=4)
BUDGET = 40
ROWS = np.arange(6)


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [random.integers(100, 250, length).astype(np.int32) for length in LENGTHS]
    return [Request(ids, f"key {at}", 0) for at, ids in enumerate(prompts)]


def scenario(model: ModelConfig, assets: Assets, world: World, folder: Path) -> dict[str, Any]:
    """Train with and without generation between the steps."""
    runs = [train(model, assets, speaks, world, folder) for speaks in (True, False)]
    return {**runs[0], "quiet": runs[1]["norms"], "same": runs[0]["scores"] == runs[1]["scores"]}


def train(model: ModelConfig, assets: Assets, speaks: bool, world: World, folder: Path) -> dict[str, Any]:
    policy = load_policy(model, world)
    objective, dataset = Objective(ReferenceFreeLossConfig(), ReferenceProvider()), assets.dataset()

    def step() -> float:
        plan = shard_batch(dataset, ROWS, world.rank, world.size, 64, COSTS)
        norm = one_step(policy, objective, dataset, ROWS, 64, world)[1]
        _, values = evaluate(policy, objective, plan, world, RunningMeans())
        scores.append(values.logp_chosen.tolist())
        return norm.item()

    def speak(sampling: Sampling, without_adapter: bool = False) -> list[Any]:
        stops = Stops(StopRequest(), world)
        samples = generate_together(
            policy, requests(), sampling, STOPS, BUDGET, stops, without_adapter=without_adapter
        )
        return [(sample.ids, sample.is_finished) for sample in samples]

    scores: list[Any] = []
    norms, result = [step()], {}
    if speaks:
        result = {"early": speak(GREEDY)}
    norms.append(step())
    if speaks:
        result |= {"greedy": speak(GREEDY), "drawn": speak(DRAWN)}
        result |= {"base": speak(GREEDY, without_adapter=True)} if model.adapter is not None else {}
        write_model(policy, folder / "model", world)
    norms.append(step())
    policy.free()
    return {**result, "norms": norms, "scores": scores}


def plain(model: Any) -> list[Any]:
    """Return transformers' own greedy responses, each prompt alone."""
    found = []
    for request in requests():
        ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        sample = Sample.from_tokens(output[0, ids.shape[1] :].tolist(), STOPS)
        found.append([sample.ids, sample.is_finished])
    return found


@pytest.mark.parametrize(
    ("kind", "adapter", "checkpointing"),
    [
        pytest.param(ParallelismKind.zero3, AdapterConfig(r=4, alpha=32), "full", id="zero3, adapter"),
        pytest.param(ParallelismKind.ddp, None, "none", id="ddp"),
    ],
)
def test_two_ranks_generate_what_transformers_does_and_train_on_as_if_they_had_not(
    kind: ParallelismKind, adapter: AdapterConfig | None, checkpointing: str, assets: Assets, tmp_path: Path
) -> None:
    model = ModelConfig(
        str(assets.policy), dtype=Dtype.fp32, adapter=adapter, gradient_checkpointing=checkpointing
    )
    work = partial(scenario, model, assets)
    first, second = run_ranks(work, 2, tmp_path / "ranks", kind, seconds=300)
    (alone,) = run_ranks(work, 1, tmp_path / "alone", kind, seconds=300)
    spoken = [name for name in first if name in ("early", "greedy", "drawn", "base")]
    assert [first[name] for name in spoken] == [second[name] for name in spoken]
    assert [first[name] for name in spoken] == [alone[name] for name in spoken]
    for of_rank in (first, second, alone):
        assert of_rank["norms"] == of_rank["quiet"]
        assert of_rank["same"]

    base = AutoModelForCausalLM.from_pretrained(assets.policy, dtype=torch.float32).eval()
    before, folder = plain(base), tmp_path / "ranks" / "model"
    if adapter is None:
        trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        assert first["base"] == before
        trained = PeftModel.from_pretrained(base, str(folder)).eval()
    assert first["greedy"] == plain(trained) != before
    assert first["greedy"] != first["drawn"]
    assert {finished for _, finished in first["greedy"]} == {True, False}


def fewer_prompts(assets: Assets, world: World, _folder: Path) -> dict[str, Any]:
    """Generate for one prompt on all ranks; then with logits that are not finite on rank 0 alone."""
    policy, stops = load_policy(assets.policy, world), Stops(StopRequest(), world)
    one = generate_together(policy, requests()[:1], GREEDY, STOPS, BUDGET, stops)
    none = generate_together(policy, [], GREEDY, STOPS, BUDGET, stops)
    mode = policy._engine.training
    head = policy.causal_lm.get_output_embeddings()
    spoil = head.register_forward_hook(lambda _module, _inputs, logits: logits + torch.nan)
    if world.rank:
        spoil.remove()
    try:
        generate_together(policy, requests(), GREEDY, STOPS, BUDGET, stops)
        broken = False
    except NotFiniteError:
        broken = True
    return {"one": one[0].ids, "none": none, "mode": mode, "broken": broken}


def test_ranks_without_prompts_take_part_and_faults_of_one_rank_reach_all(
    assets: Assets, tmp_path: Path
) -> None:
    ranks = run_ranks(partial(fewer_prompts, assets), 3, tmp_path / "ranks")
    base = AutoModelForCausalLM.from_pretrained(assets.policy, dtype=torch.float32).eval()
    for of_rank in ranks:
        assert of_rank["one"] == plain(base)[0][0]
        assert of_rank["none"] == []
        assert of_rank["mode"]
        assert of_rank["broken"]


def sizes_of_weights(assets: Assets, room: list[int], world: World, _folder: Path) -> list[list[int]]:
    """Sizes of the weights here while samples are generated, and afterwards."""
    policy = load_policy(ModelConfig(str(assets.policy), dtype=Dtype.fp32), world)
    weights, found = [*policy.causal_lm.parameters()], []
    with (
        mock.patch.object(zero, "free_memory", return_value=room[world.rank]),
        policy.ready_to_generate() as causal_lm,
    ):
        for _ in range(3):  # DeepSpeed records an order in the first ones
            causal_lm(torch.tensor([[5, 6]]))
        found.append([weight.numel() for weight in weights])
    return [*found, [weight.numel() for weight in weights]]


@pytest.mark.parametrize("room", [(10**9, 10**9), (10**9, 0)])
def test_sharded_weights_are_gathered_once_for_all_tokens_where_every_rank_has_room(
    room: tuple[int, int], assets: Assets, tmp_path: Path
) -> None:
    for inside, after in run_ranks(partial(sizes_of_weights, assets, [*room]), 2, tmp_path / "ranks"):
        assert (min(inside) > 0) is all(room)
        assert max(after) == 0 or not all(room)


def without_padding(folder: Path, spoiled: int | None, world: World, _folder: Path) -> Any:
    """Generate with a model whose cache is wrong after padding; rank `spoiled` finds any batch wrong."""
    policy, stops = (
        load_policy(ModelConfig(str(folder), dtype=Dtype.fp32), world),
        Stops(StopRequest(), world),
    )
    own = generation.changes

    def changes(logps: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        is_spoiled = world.rank == spoiled and logps.dim() == 3  # of a batch
        return own(logps, others) + float(is_spoiled)

    with mock.patch.object(generation, "changes", changes):
        try:
            samples = generate_together(policy, requests(), GREEDY, STOPS, 10**6, stops)
        except WrongGenerationError as fault:
            return str(fault)
    return [[sample.ids, sample.is_finished] for sample in samples]


def test_ranks_agree_whether_rows_are_padded_and_whether_there_are_samples(tmp_path: Path) -> None:
    config = tiny_config("minimax", 256, layer_types=["linear_attention", "full_attention"])
    model = tiny_causal_lm(config)
    model.save_pretrained(tmp_path / "model")
    for kind in (ParallelismKind.zero3, ParallelismKind.ddp):
        work = partial(without_padding, tmp_path / "model", None)
        first, second = run_ranks(work, 2, tmp_path / f"{kind}", kind, seconds=300)
        assert first == second == plain(model)
    faults = run_ranks(partial(without_padding, tmp_path / "model", 1), 2, tmp_path / "spoiled", seconds=90)
    assert faults[0] == faults[1]
    assert "minimax does not generate" in faults[0]
