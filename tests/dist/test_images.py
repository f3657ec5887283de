"""Ranks with and without images train as plain PyTorch does on the whole class, from pixels, row by row."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import dummy_batch, pack
from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    ImagesConfig,
    ModelConfig,
    ParallelismKind,
    TrainedImageParts,
)
from dpo_dist.data.example import Example
from dpo_dist.data.images import ImageProcessor
from dpo_dist.distributed.checkpoint.saver import CheckpointSaver, latest_checkpoint
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.reference.engine import run_start_check
from tests.dist.scenario import load_policy, plain_training
from tests.dist.test_engine import write_whole
from tests.support.invented_images import image_examples, image_reader, invented_images, row_logps
from tests.support.packing import SHARING
from tests.support.ranks import OPTIM, run_ranks

ZERO3, ZERO2, DDP = ParallelismKind
NONE, PROJECTOR, TOWER = TrainedImageParts
STEPS = 3
# By number of ranks, the examples of each micro-batch of each rank: an empty one, a rank without an image
# (example 2 has none), a dummy beside a micro-batch with an image.
SHARES: dict[int, list[list[list[int]]]] = {
    2: [[[0, 3], [1]], [[2], []]],
    3: [[[1]], [[0, 3]], [[2]]],
}


@dataclass(frozen=True)
class Case:
    """A model of a family, and what is trained of it."""

    family: str
    train: TrainedImageParts = TOWER
    adapter: AdapterConfig | None = None
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        return f"{self.family}-{self.train}-{'lora' if self.adapter else self.checkpointing}"

    def config(self, models: Path) -> ModelConfig:
        return ModelConfig(
            str(models / self.family),
            dtype=Dtype.fp32,
            images=ImagesConfig(self.train),
            adapter=self.adapter,
            gradient_checkpointing=self.checkpointing,  # type: ignore[arg-type]
        )


LORA = AdapterConfig(r=2, alpha=4, target_modules=["q_proj", "gate_proj"], modules_to_save=["merger"])
ON_TOWER = AdapterConfig(r=2, alpha=4, target_modules=["q_proj", "fc1", "multi_modal_projector.linear_1"])


class Invented:
    """The invented images of a family, as its processor returns them."""

    def __init__(self, family: str):
        self.invented = invented_images(family)


def examples_of(family: str) -> list[Example]:
    """Pairs; with one image, with two, with none, and one that begins like the first, image included."""
    one, two, none, _, alike, _ = image_examples(invented_images(family))
    return [replace(each, responses=each.responses[:2]) for each in (one, two, none, alike)]


def loss_of(logps: Tensor, examples: Sequence[Example]) -> Tensor:
    lengths = [len(response) for example in examples for response in example.responses]
    means = torch.stack([part.mean() for part in torch.split(logps, lengths)]).view(-1, 2)
    return -logsigmoid(means[:, 0] - means[:, 1]).sum() / 4


def step(policy: PolicyEngine, family: str, world: World) -> float:
    """Train on all four examples of a family; the gradient norm."""
    every, dummy = examples_of(family), invented_images(family)[1]
    shares = SHARES[world.size][world.rank]
    for number, share in enumerate(shares):
        mine = [every[index] for index in share]
        keys = np.zeros((2 * len(mine), 2), dtype=np.uint64)
        batch = pack(mine, keys, dummy_image=dummy, costs=SHARING) if mine else dummy_batch(dummy)
        logps = policy.token_logps(batch)
        loss = loss_of(logps, mine) if mine else 0.0 * logps.sum()
        policy.backward(loss, is_last=number == len(shares) - 1)
    return policy.step(OPTIM.lr).item()


def free(policy: PolicyEngine, world: World) -> None:
    policy.free()
    world.accelerator._models.clear()
    world.accelerator._optimizers.clear()
    gc.collect()


def walk(cases: Sequence[Case], models: Path, world: World, folder: Path) -> dict[str, list[float]]:
    """Gradient norms; the first case's last step, taken again from a checkpoint, leaves the same bits."""
    norms = {}
    for case in cases:
        config = case.config(models)
        policy = load_policy(config, world, max_length=64)
        run_start_check(policy, 64, world, processor=cast(ImageProcessor, Invented(case.family)), trains=True)
        found = [step(policy, case.family, world) for _ in range(STEPS - 1)]
        saver = CheckpointSaver(folder / f"{case.name}-checkpoints", 1, [policy], world)
        saver.save(STEPS - 1, {"step": STEPS - 1}, is_last=True)
        saver.commit()
        found.append(step(policy, case.family, world))
        write_whole(policy, folder / f"{case.name}.safetensors")
        free(policy, world)
        norms[case.name] = found
        if case is not cases[0]:
            continue
        again = load_policy(config, world, max_length=64)
        again.model.arrange(policy.model.arrangement, own_logits=policy.model.own_logits)
        again.model.train()
        checkpoint = latest_checkpoint(folder / f"{case.name}-checkpoints", world)
        assert checkpoint is not None
        again.load_shards(checkpoint.folder)
        assert step(again, case.family, world) == found[-1]
        write_whole(again, folder / f"{case.name}-resumed.safetensors")
        free(again, world)
    return norms


def plain_model(case: Case, models: Path) -> Any:
    """The whole class, with the attention of transformers, and with the same weights trained."""
    config = case.config(models)
    packed = load_packed(Path(config.path), config, 64, torch.device("cpu"))
    if config.adapter is not None:
        add_adapter(packed, config, 0)
    packed.arrange(Arrangement.single, own_logits=False)
    return packed.causal_lm


QWEN, LLAVA = Case("qwen2_5_vl"), Case("llava")
CASES = {
    (ZERO3, 2): [
        QWEN,
        Case("gemma3", PROJECTOR),
        Case("qwen3_vl", NONE, LORA, "full"),
        replace(LLAVA, train=NONE, adapter=ON_TOWER),
    ],
    (ZERO3, 3): [Case("qwen3_vl", checkpointing="full"), Case("qwen3_5", checkpointing="full")],
    (ZERO2, 2): [QWEN, Case("gemma3", NONE), LLAVA],
    (DDP, 3): [QWEN, Case("gemma3", PROJECTOR)],
}


@pytest.mark.parametrize(("kind", "size"), CASES, ids=[f"{kind}-{size}" for kind, size in CASES])
def test_ranks_with_and_without_images_train_as_one_plain_process(
    kind: ParallelismKind, size: int, tmp_path: Path
) -> None:
    cases, models, ranks = CASES[kind, size], tmp_path / "models", tmp_path / "ranks"
    for family in {case.family for case in cases}:
        image_reader(family).save_pretrained(models / family)
    by_rank = run_ranks(partial(walk, cases, models), size, ranks, kind)
    for case in cases:
        plain, examples = plain_model(case, models), examples_of(case.family)
        before = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
        trained = {name for name, weight in plain.named_parameters() if weight.requires_grad}
        losses = [lambda: loss_of(row_logps(plain, examples), examples)] * STEPS  # noqa: B023
        norms = plain_training(plain, losses)
        for found in by_rank:
            assert found[case.name] == pytest.approx(norms, rel=5e-4), case.name
        written = load_file(ranks / f"{case.name}.safetensors")
        assert written.keys() >= trained
        if case is cases[0]:
            resumed = load_file(ranks / f"{case.name}-resumed.safetensors")
            assert resumed.keys() == written.keys()
            assert all(torch.equal(resumed[name], weight) for name, weight in written.items())
        weights = {name: weight.detach() for name, weight in plain.named_parameters()}
        for name in trained:
            is_moved = not torch.equal(weights[name], before[name])  # Qwen3-VL's last deepstack bias is not
            assert torch.equal(written[name], before[name]) is not is_moved, name
            torch.testing.assert_close(written[name], weights[name], rtol=0, atol=5e-5)
        for name in written.keys() & before.keys() - trained:
            assert torch.equal(written[name], before[name]), name
        [*saved] = (ranks / f"{case.name}-checkpoints").rglob("*.safetensors")
        kept = {name for file in saved for name in load_file(file)}
        assert all(any(own in name for own in trained) for name in kept)
