"""Rewards by source: exact means over the pairs of each source, however a global batch was divided."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.data.collate import RankBatch, shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.objective.metrics import ENTROPIES, GROUP_METRICS, PAIR_METRICS, MetricSums
from dpo_dist.reference.scoring import NoReference
from dpo_dist.training.loss import Objective
from dpo_dist.training.state import LogWindow
from dpo_dist.training.step import evaluate
from tests.support.cache import opened
from tests.support.one_process import Fixed
from tests.support.packing import COSTS
from tests.support.records import jsonl

WORLD = World(None, 0, 1, torch.device("cpu"), ())
SIZES = {"one": 5, "two": 3, "three": 4}
POLICY = Fixed(lambda targets: -0.5 - torch.frac(targets * 0.37))
FREE = LossConfig(beta=0.5, reference_free=True)


def sources_of(folder: Path) -> list[SourceConfig]:
    """Return three sources, of which the first and the last have the same label."""
    sources = []
    for name, size in SIZES.items():
        (folder / name).mkdir()
        rows = [
            {"prompt": f"{name} {n}", "chosen": f"good {name} " * (n + 1), "rejected": f"bad {n} " * (5 - n)}
            for n in range(size)
        ]
        sources.append(SourceConfig(jsonl(folder / name, *rows), label="two" if name == "two" else "shared"))
    return sources


@pytest.fixture
def data(tmp_path: Path) -> PreferenceDataset:
    return opened(tmp_path, *sources_of(tmp_path))


def plan_of(
    data: PreferenceDataset, indices: Any, rank: int = 0, ranks: int = 1, budget: int = 64
) -> RankBatch:
    return shard_batch(data, np.array(indices), rank, ranks, budget, COSTS)


def sums_of(loss: LossConfig, plan: RankBatch) -> MetricSums:
    return evaluate(POLICY, Objective(loss, NoReference()), plan, WORLD, RunningMeans()).sums  # type: ignore[arg-type]


def wanted(data: PreferenceDataset, indices: Any) -> dict[str, float]:
    """Return the metrics of each source from one evaluation of each pair."""
    found: dict[str, list[dict[str, float]]] = {"shared": [], "two": []}
    for index in indices:
        is_two = 5 <= index < 8
        found["two" if is_two else "shared"].append(sums_of(FREE, plan_of(data, [index])).means())
    return {
        f"{name}/{label}": float(np.mean([row[name] for row in rows]))
        for name in ("rewards/accuracies", "rewards/margins")
        for label, rows in found.items()
        if rows
    }


def by_source(means: dict[str, float]) -> dict[str, float]:
    """Return the rewards by source."""
    return {name: value for name, value in means.items() if name.rpartition("/")[0] in GROUP_METRICS}


@pytest.mark.parametrize("indices", [range(12), [6, 0, 11, 6, 3], [1, 2, 9], [5, 6]], ids=str)
def test_metrics_of_a_source_are_means_over_its_pairs(data: PreferenceDataset, indices: Any) -> None:
    expected = wanted(data, indices)
    assert 2 <= len(expected) <= 4
    whole = sums_of(FREE, plan_of(data, indices, budget=8192))
    assert by_source(whole.means()) == pytest.approx(expected)
    for loss in (FREE, LossConfig(LossKind.aot, beta=0.5, reference_free=True)):
        small = sums_of(loss, plan_of(data, indices))
        assert by_source(small.means()) == pytest.approx(expected)
    parts = [sums_of(FREE, plan_of(data, indices, rank, 3)) for rank in range(3)]
    assert len({part.names for part in parts}) == 1
    assert by_source((parts[0] + parts[1] + parts[2]).means()) == pytest.approx(expected)


def test_an_evaluation_has_every_metric_of_a_source(data: PreferenceDataset) -> None:
    """The same as in an evaluation of the source's pairs alone, per token too."""
    means = sums_of(FREE, plan_of(data, range(12))).means()
    for label, own in (("two", range(5, 8)), ("shared", [*range(5), *range(8, 12)])):
        alone = sums_of(FREE, plan_of(data, own)).means()
        expected = {name: alone[name] for name in PAIR_METRICS + ENTROPIES if name in alone}
        assert {"loss", "logps/chosen_per_token", "tokens/rejected", "entropy/chosen"} <= set(expected)
        of_label = {name: value for name, value in means.items() if name.endswith(f"/{label}")}
        assert of_label == pytest.approx({f"{name}/{label}": value for name, value in expected.items()})


def test_a_row_has_the_sources_of_its_steps(data: PreferenceDataset) -> None:
    """Means over the window, also of a source that is not in every step; the sums survive a checkpoint."""
    window, rows = LogWindow(), []
    for indices in ([0, 1, 8], [5, 2], [3, 4]):
        sums = sums_of(FREE, plan_of(data, indices))
        totals, counts = sums.named(sums.values.tolist())
        window.add(LogWindow(1, totals, counts, {}, 0.1, len(indices), 10, 1.0, 1.0))
        rows.append(by_source(window.row(1.0)))
        window = LogWindow(**vars(window))
    assert [sorted(row) for row in rows] == [
        ["rewards/accuracies/shared", "rewards/margins/shared"],
        *[sorted(wanted(data, range(12)))] * 2,
    ]
    assert rows[-1] == pytest.approx(wanted(data, [0, 1, 8, 5, 2, 3, 4]))
