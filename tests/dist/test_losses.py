"""Losses train the same for any world size and packing, also rankings and coupled losses (law L1)."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import (
    BcoDelta,
    BcoPairOptions,
    DistillOptions,
    Divergence,
    LossConfig,
    LossKind,
    LossTermConfig,
    RewardOptions,
    Weighting,
)
from dpo_dist.config.schema import ParallelismConfig, ParallelismKind, RewardModelConfig, RunConfig
from dpo_dist.data.config import DataConfig, ScoredDataConfig, SourceConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.encoded.partners import with_partners
from dpo_dist.encoded.store import EncodedSource
from dpo_dist.objective.distillation import SparseRows
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.objective.metrics import BATCH_MARGIN, MetricSums, PairValues
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.reference.teacher import Teacher
from dpo_dist.training.steps.step import Objective, evaluate, train_step
from tests.dist.scenario import Assets, load_policy, load_reference
from tests.support import tiny
from tests.support.masks import add_masks
from tests.support.packing import COSTS
from tests.support.ranks import OPTIM, run_ranks

RECORDS = 11
# Odd sizes, fewer pairs than ranks, an example twice in a batch.
BAD = (5, 7, 8, 10)  # of the labelled records; the last two steps have one side only, and both
STEPS = ((1, 3, 5, 7, 9, 10, 0), (5,), (2, 9, 2))

# What kinds need of a step: pairs alone, the whole batch, one side, no reference, means of earlier steps,
# scores, weights and masks of tokens, statistics of the head, rankings. Unit tests have every kind by hand.
CASES = {
    "sigmoid, forward_kl": LossConfig(beta=0.5, divergence=Divergence.forward_kl),
    "sigmoid, ld_alpha, wpo": LossConfig(beta=0.5, ld_alpha=0.3, weighting=Weighting.wpo),
    "bco_pair, shifted": LossConfig(LossKind.bco_pair, 0.5, options=BcoPairOptions(BcoDelta.running_mean)),
    "beta_dpo, js, wpo": LossConfig(
        LossKind.beta_dpo, 0.5, divergence=Divergence.js, weighting=Weighting.wpo
    ),
    "aot_unpaired": LossConfig(LossKind.aot_unpaired, 1.0),
    "aot, odpo and sft, ld_alpha": LossConfig(
        beta=0.5,
        ld_alpha=0.5,
        terms=[
            LossTermConfig(LossKind.aot, 1.0),
            LossTermConfig(LossKind.odpo, 0.5),
            LossTermConfig(LossKind.sft, 0.1),
        ],
    ),
    "masked ipo, ld_alpha": LossConfig(LossKind.ipo, 0.5, ld_alpha=0.4),
    "masked simpo": LossConfig(LossKind.simpo, 1.0),
    "masked sft": LossConfig(LossKind.sft),
    "masked plackett_luce": LossConfig(LossKind.plackett_luce, 0.5),
    "kto": LossConfig(LossKind.kto, 0.5, desirable_weight=1.5),
    "masked kto": LossConfig(LossKind.kto, 0.5, undesirable_weight=2.0),
    "beta_dpo, soft labels": LossConfig(LossKind.beta_dpo, 0.5),
    "simpo, margins, none weighs": LossConfig(LossKind.simpo, 1.0),
    "masked distill": LossConfig(LossKind.distill, options=DistillOptions(temperature=2.0)),
    "aot and distill, ld_alpha": LossConfig(
        beta=0.5,
        ld_alpha=0.5,
        terms=[
            LossTermConfig(LossKind.aot, 1.0),
            LossTermConfig(LossKind.distill, 0.5, options=DistillOptions(temperature=1.5)),
        ],
    ),
    "masked plackett_luce and distill": LossConfig(
        beta=0.5, terms=[LossTermConfig(LossKind.plackett_luce, 1.0), LossTermConfig(LossKind.distill, 2.0)]
    ),
    "reward, centred": LossConfig(LossKind.reward, options=RewardOptions(centre=0.1)),
    "reward, of rankings": LossConfig(LossKind.reward),
}
WEIGHTED = {
    "sigmoid and sft, wpo": LossConfig(
        beta=0.5,
        weighting=Weighting.wpo,
        terms=[LossTermConfig(LossKind.sft, 0.0), LossTermConfig(LossKind.sigmoid, 2.0)],
    ),
    "sigmoid, wpo": LossConfig(beta=0.5, weighting=Weighting.wpo),
    "masked sft": LossConfig(LossKind.sft),
    "masked plackett_luce": LossConfig(LossKind.plackett_luce, 0.5),
    "masked apo_zero_unpaired": LossConfig(LossKind.apo_zero_unpaired, 0.5, undesirable_weight=2.0),
}
"""Cases that are the same with weights and with repeated records."""
for _name, _loss in WEIGHTED.items():
    CASES |= {f"{_name}, weights": _loss, f"{_name}, repeated": _loss}
WEIGHTS = np.array([1, 2, 0, 3, 1, 2, 1, 0, 2, 1, 3])
NUMBERS = {
    "weights": {"loss_weight": WEIGHTS.astype(float)},
    "soft labels": {"soft_label": np.linspace(0.5, 1, RECORDS)},
    "none weighs": {  # in the second step
        "loss_weight": WEIGHTS * (np.arange(RECORDS) != STEPS[1]).astype(float),
        "margin": np.linspace(-1, 2, RECORDS),
    },
}
Data = dict[str, tuple[EncodedSource, ...]]
"""Of two sources each: pairs with scores, plain and masked, masked rankings of 2 to 5 responses, and labelled
records, of which the first source has good ones only; pairs and rankings also for a reward model."""


def dataset_of(case: str, data: Data) -> PreferenceDataset:
    loss, name = CASES[case], "masked" if case.startswith("masked") else "pairs"
    if loss.is_unpaired:
        name = f"labelled {name}"
    if loss.of_scores:
        return open_dataset(data["scored rankings" if "rankings" in case else "scored pairs"], DataConfig())
    dataset = open_dataset(data["rankings" if "plackett_luce" in case else name], DataConfig())
    if loss.needs_partners:
        return with_partners(dataset, max_length=40)
    return replace(dataset, numbers=NUMBERS.get(case.rpartition(", ")[2], {}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder, source = tmp_path_factory.mktemp("ranked"), random.Random(0)

    def record(number: int, responses: int) -> dict[str, Any]:
        prompt = f"{number} " + " ".join(source.choices(["sea", "story", "write"], k=source.randint(1, 30)))
        texts = [
            f"{rank} " + " ".join(source.choices(["yes", "weather", "Paris"], k=source.randint(1, 20)))
            for rank in range(responses)
        ]
        if responses == 1:
            return {"prompt": prompt, "completion": texts[0], "label": number not in BAD}
        return {
            "prompt": prompt,
            "responses": texts,
            "scores": [9.0 - 1.5 * rank for rank in range(responses)],
        }

    def written(name: str, counts: list[int]) -> list[SourceConfig]:
        lines = [json.dumps(record(*item)) + "\n" for item in enumerate(counts)]
        files = folder / f"{name}.jsonl", folder / f"more_{name}.jsonl"
        for file, part in zip(files, (lines[:4], lines[4:]), strict=True):
            file.write_text("".join(part))
        return [SourceConfig(str(file)) for file in files]

    def encoded(
        sources: list[SourceConfig], cache: str, kind: type[DataConfig] = DataConfig
    ) -> tuple[EncodedSource, ...]:
        return Preparation(sources, kind(cache=str(folder / cache)), tiny.qwen(), "qwen").whole()

    pairs = written("pairs", [2] * RECORDS)
    labelled = written("labelled", [1] * RECORDS)
    rankings = written("rankings", [2 + n % 4 for n in range(RECORDS)])
    plain, of_labels = encoded(pairs, "encoded"), encoded(labelled, "encoded")
    scored = {
        "scored pairs": encoded(pairs, "encoded", ScoredDataConfig),
        "scored rankings": encoded(rankings, "encoded", ScoredDataConfig),
    }
    with pytest.MonkeyPatch.context() as patch:
        add_masks(patch)
        return scored | {
            "pairs": plain,
            "masked": encoded(pairs, "masks"),
            "rankings": encoded(rankings, "masks"),
            "labelled pairs": of_labels,
            "labelled masked": encoded(labelled, "masks"),
        }


FORGOTTEN = "loss without running means"
# Coupled and one-sided losses, statistics of the head, weights and masks of tokens, rankings, partners.
WITH_SHARED_TOKENS = ("beta_dpo, js, wpo", "sigmoid, ld_alpha, wpo", "masked sft")
WITH_SHARED_TOKENS += ("masked plackett_luce", "masked kto", "masked plackett_luce and distill")
WITH_SHARED_TOKENS += ("reward, of rankings",)


def trajectories(
    assets: Assets, data: Data, budget: int, names: Sequence[str], world: World, _folder: Path
) -> dict[str, Any]:
    """Return for each case the metrics and gradient norm of each step, and an evaluation at the end."""
    config = assets.config(assets.policy)
    reference = ReferenceProvider(engine=load_reference(assets.reference, config, world))
    return {name: list(_trajectory(config, reference, name, data, budget, world)) for name in names}


def _trajectory(
    config: RunConfig, reference: ReferenceProvider, name: str, data: Data, budget: int, world: World
) -> Iterator[dict[str, float]]:
    loss, times = CASES[name], WEIGHTS if name.endswith("repeated") else np.ones_like(WEIGHTS)
    dataset = dataset_of(name, data)
    objective = Objective(loss, reference if loss.needs_reference else ReferenceProvider())
    if loss.needs_teacher:
        kept = SparseRows(5, 3, loss.options_of(DistillOptions).temperature, vocabulary=2**20)
        objective = replace(objective, teacher=Teacher(kept, engine=reference.engine))
    model = RewardModelConfig(**vars(config.model)) if loss.of_scores else config.model
    running, policy = RunningMeans(), load_policy(model, world)

    def plan(indices: Any) -> Any:
        indices = np.repeat(indices, times[np.array(indices)])
        return shard_batch(dataset, indices, world.replica, world.replicas, budget, COSTS, loss)

    def means(sums: MetricSums) -> dict[str, float]:
        return replace(sums, values=world.sum_replicas(sums.values)).means()

    for indices in STEPS:
        ready = objective.ready_step(plan(indices), world.device)
        sums, norm = train_step(policy, objective, ready, OPTIM.lr, world, running)
        metrics = means(sums)
        if loss.compares_pairs:
            reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            running = running.after(loss, metrics.get(BATCH_MARGIN, 0.0), reward, len(indices))
        yield {**metrics, "grad_norm": norm.item()}
    policy.train(False)
    evaluated, values = evaluate(policy, objective, plan(range(RECORDS)), world, running)
    if running != RunningMeans():  # a loss that uses them is another without
        evaluated[FORGOTTEN] = evaluate(policy, objective, plan(range(RECORDS)), world, RunningMeans())[0][
            "loss"
        ]
    yield evaluated | of_each_pair(values)


def of_each_pair(values: PairValues) -> dict[str, float]:
    """Return the values that no pair lacks, by name and position."""
    return {
        f"{name} of {position}": float(value)
        for name, column in values.by_name.items()
        if not name.startswith("reference") and np.isfinite(column).all()
        for position, value in enumerate(column)
    }


def assert_labelled(evaluation: dict[str, float]) -> None:
    """Check the means of both sides, their margin and the AUC, by the rewards of all records."""
    good, bad = (
        np.array([evaluation[f"margin of {i}"] for i in range(RECORDS) if (i in BAD) is (side < 0)]) * side
        for side in (1, -1)
    )
    assert evaluation["rewards/chosen"] == pytest.approx(good.mean(), rel=1e-4, abs=1e-6)
    assert evaluation["rewards/rejected"] == pytest.approx(bad.mean(), rel=1e-4, abs=1e-6)
    assert evaluation["rewards/margins"] == pytest.approx(good.mean() - bad.mean(), rel=1e-4, abs=1e-6)
    assert evaluation["rewards/auc"] == np.mean([(g > b) + 0.5 * (g == b) for g in good for b in bad])
    assert "rewards/rejected/labelled" not in evaluation, "the first source has good records only"


def test_losses_train_the_same_on_one_rank_and_on_two(assets: Assets, data: Data, tmp_path: Path) -> None:
    every, some = list(CASES), WITH_SHARED_TOKENS
    (alone,) = run_ranks(partial(trajectories, assets, data, 8192, every), 1, tmp_path / "one", seconds=900)
    pair = run_ranks(partial(trajectories, assets, data, 128, every), 2, tmp_path / "two", seconds=900)
    shared = ParallelismConfig(ParallelismKind.zero2, sequence_parallel=2)
    pair += run_ranks(partial(trajectories, assets, data, 128, some), 2, tmp_path / "shared", shared)
    assert set(alone) == set(CASES)
    for of_rank in pair:
        for name, steps in of_rank.items():
            for step, (got, expected) in enumerate(zip(steps, alone[name], strict=True)):
                assert got == pytest.approx(expected, rel=2e-4, abs=2e-5), (name, step)
    remembers = {name for name, steps in alone.items() if steps[-1].get(FORGOTTEN) != steps[-1]["loss"]}
    assert {name for name in CASES if name.startswith("beta_dpo")} <= remembers
    assert all(alone["simpo, margins, none weighs"][1][key] == 0 for key in ("loss", "grad_norm"))
    for name, steps in alone.items():
        assert all(np.isfinite(list(step.values())).all() for step in steps), name
        assert steps[-1]["loss"] != steps[0]["loss"], name
        if terms := CASES[name].terms:
            of_terms = [
                sum(term.weight * step[f"loss/terms/{term.kind}"] for term in terms) for step in steps
            ]
            assert of_terms == pytest.approx([step["loss"] for step in steps], rel=1e-5), name
        if name.endswith("repeated"):
            names = ("loss", "grad_norm")
            got, expected = (
                [[step[key] for key in names if key in step] for step in alone[case]]
                for case in (name.replace("repeated", "weights"), name)
            )
            assert np.concatenate(got) == pytest.approx(np.concatenate(expected), rel=1e-5, abs=1e-7), name
            continue
        if CASES[name].compares_pairs:
            margins = [steps[-1][f"margin of {position}"] for position in range(RECORDS)]
            assert np.mean(margins) == pytest.approx(steps[-1]["rewards/margins"], rel=1e-4, abs=1e-6), name
        by_source = [key for key in steps[-1] if key.startswith("rewards/margins/")]
        if CASES[name].is_unpaired:
            assert_labelled(steps[-1])
            continue
        assert len(by_source) == (0 if CASES[name].is_one_sided else 2), name
        if by_source:  # the first source has the first four records
            assert np.mean(margins[:4]) == pytest.approx(steps[-1][by_source[0]], rel=1e-4, abs=1e-6), name
