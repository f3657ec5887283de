"""A fill computes exactly the missing log-probs and stores each under the key of its own response."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import PackedBatch
from dpo_dist.data.example import Example
from dpo_dist.distributed.processes.world import Stops
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.errors import DataError, ReferenceModelError, StoppedError
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.reference.behind import Behind
from dpo_dist.reference.fill import FillReport, StoreFiller
from dpo_dist.reference.published import push
from dpo_dist.reference.store import LogpStore, list_shards
from tests.support.alone import ALONE
from tests.support.packing import COSTS, dataset_of, random_pairs
from tests.support.read_only import read_only
from tests.unit.reference.test_store import FINGERPRINT

RESPONSES = [2, 1, 3, 2, 2, 2]
# Two pairs with the same content, as datasets have them.
TWINS = (1, 4)


@pytest.fixture
def dataset() -> PreferenceDataset:
    generator = np.random.default_rng(0)
    pairs = [
        [generator.integers(3, 90, generator.integers(1, 9)).astype(np.int32) for _ in range(1 + count)]
        for count in RESPONSES
    ]
    first, second = TWINS
    pairs[second][:2] = pairs[first]
    return dataset_of([Example(prompt, tuple(responses)) for prompt, *responses in pairs])


def logps_of(ids: Tensor) -> Tensor:
    """Log-probs that identify their tokens."""
    return -ids.float() / 7


class Scorer:
    """Scores with `logps_of`, and counts responses and computed tokens."""

    responses = tokens = 0

    def __call__(self, batch: PackedBatch) -> Tensor:
        self.responses += len(batch.keys)
        self.tokens += batch.tokens
        return logps_of(batch.targets)


def no_progress(_done: int, _total: int) -> None:
    pass


def filler_of(
    root: Path,
    entries_per_shard: int = 4,
    scorer: Scorer | None = None,
    tokens: int = 30,
    costs: ComputeCosts = COSTS,
) -> StoreFiller:
    store, stops = LogpStore(root, FINGERPRINT, []), Stops(StopRequest(), ALONE)
    return StoreFiller(store, lambda: scorer or Scorer(), ALONE, tokens, costs, entries_per_shard, stops)


def fill(root: Path, dataset: PreferenceDataset, indices: Iterable[int], **options: Any) -> FillReport:
    return filler_of(root, **options).fill(dataset, np.array([*indices]), no_progress)


def assert_filled(root: Path, dataset: PreferenceDataset, indices: Iterable[int]) -> None:
    store = LogpStore.open(root, FINGERPRINT)
    for index in indices:
        values = store.read(dataset.keys[list(dataset.response_range(index))])
        for value, response in zip(values, dataset.example(index).responses, strict=True):
            assert value.tolist() == logps_of(torch.from_numpy(response)).tolist()


@pytest.mark.parametrize("entries_per_shard", [1, 4])
def test_every_response_gets_its_own_values(
    tmp_path: Path, dataset: PreferenceDataset, entries_per_shard: int
) -> None:
    scorer, progress = Scorer(), list[tuple[int, int]]()
    filler = filler_of(tmp_path, entries_per_shard, scorer)
    report = filler.fill(dataset, np.arange(len(RESPONSES)), lambda *done: progress.append(done))
    assert (report.hits, report.computed) == (0, sum(RESPONSES) - 1)
    assert scorer.responses == report.computed
    assert (progress[0], progress[-1]) == ((0, 6), (6, 6))
    assert progress == sorted(progress)
    assert len({done for done, _ in progress}) > 3, "it advances within a round"
    assert_filled(tmp_path, dataset, range(len(RESPONSES)))


def test_only_missing_responses_are_computed(tmp_path: Path, dataset: PreferenceDataset) -> None:
    keys = dataset.keys[[0, 4]]  # the first response of pair 0, the second of pair 2
    responses = dataset.example(0).responses[0], dataset.example(2).responses[1]
    LogpStore.open(tmp_path, FINGERPRINT).write(
        keys, [logps_of(torch.from_numpy(ids)).numpy() for ids in responses]
    )
    scorer = Scorer()
    report = fill(tmp_path, dataset, [0, 2, 5], scorer=scorer)
    assert (report.hits, report.computed, scorer.responses) == (2, 5, 5)
    assert_filled(tmp_path, dataset, [0, 2, 5])
    assert fill(tmp_path, dataset, [0, 2, 5]) == FillReport(hits=7)


@pytest.mark.parametrize(("prefixes", "definitions"), [(True, 4), (False, 40)])
@pytest.mark.parametrize("chosen_stored", [1, 15])
def test_pairs_that_begin_alike_anywhere_in_the_data_are_scored_together(
    tmp_path: Path, prefixes: bool, definitions: int, chosen_stored: int
) -> None:
    """Four definitions of tools, and in a round as many pairs as have the same one."""
    tools = [pair.prompt_ids for pair in random_pairs([(60, 1)] * 4)]
    pairs = [
        Example(np.concatenate((tools[number % 4], pair.prompt_ids)), pair.responses)
        for number, pair in enumerate(random_pairs([(5, 6, 7)] * 40, seed=1))
    ]
    data, scorer = dataset_of(pairs), Scorer()
    chosen = 2 * np.arange(chosen_stored)
    stored = [logps_of(torch.from_numpy(pair.responses[0])).numpy() for pair in pairs[:chosen_stored]]
    LogpStore.open(tmp_path, FINGERPRINT).write(data.keys[chosen], stored)
    costs = dataclasses.replace(COSTS, beyond_prompts=prefixes)
    report = fill(tmp_path, data, range(40), entries_per_shard=20, scorer=scorer, tokens=300, costs=costs)
    assert (report.hits, report.computed) == (chosen_stored, 80 - chosen_stored)
    own = 40 * (5 + 5 + 6) - chosen_stored * 5
    assert scorer.tokens == pytest.approx(definitions * 60 + own, rel=0.01)
    assert_filled(tmp_path, data, range(40))


def test_a_fill_that_waits_for_another_job_can_be_stopped(tmp_path: Path, dataset: PreferenceDataset) -> None:
    folder, request = LogpStore.open(tmp_path, FINGERPRINT).folder, StopRequest()
    request.ask("SIGTERM")
    filler = dataclasses.replace(filler_of(tmp_path), stops=Stops(request, ALONE))
    with locked(folder / "fill.lock", "fills", ""), pytest.raises(StoppedError, match="while another job"):
        filler.fill(dataset, np.arange(2), no_progress)


def test_fetching_stops_at_a_signal_with_what_was_fetched(tmp_path: Path, dataset: PreferenceDataset) -> None:
    fill(tmp_path / "others", dataset, range(len(RESPONSES)))
    push([tmp_path / "others" / FINGERPRINT.name], str(tmp_path / "public"))
    request, scorer = StopRequest(), Scorer()
    filler = dataclasses.replace(
        filler_of(tmp_path / "own", 1, scorer),
        stops=Stops(request, ALONE),
        behind=[Behind(str(tmp_path / "public"))],
    )
    write = LogpStore.write

    def write_and_signal(*arguments: Any) -> str:
        request.ask("SIGTERM")
        return write(*arguments)

    fetching = mock.patch.object(LogpStore, "write", write_and_signal)
    with fetching, pytest.raises(StoppedError, match="while log-probs were fetched"):
        filler.fill(dataset, np.arange(len(RESPONSES)), no_progress)
    assert len(list_shards(tmp_path / "own" / FINGERPRINT.name)) == 1
    assert scorer.responses == 0


def test_a_read_only_store_is_an_error_before_anything_is_computed(
    tmp_path: Path, dataset: PreferenceDataset
) -> None:
    fill(tmp_path, dataset, [0])
    with read_only(tmp_path):
        assert fill(tmp_path, dataset, [0]) == FillReport(hits=2)
        scorer = Scorer()
        with pytest.raises(ReferenceModelError, match="cannot be written"):
            fill(tmp_path, dataset, [0, 1], scorer=scorer)
        assert not scorer.responses


@pytest.mark.parametrize("broken", [0, len(RESPONSES) - 1])
def test_a_round_that_cannot_be_written_is_an_error(
    tmp_path: Path, dataset: PreferenceDataset, broken: int
) -> None:
    """Also the last round, which no other follows."""

    class Broken(Scorer):
        calls = 0

        def __call__(self, batch: PackedBatch) -> Tensor:
            self.calls += 1
            return super().__call__(batch) * (torch.inf if self.calls == broken + 1 else 1)

    with pytest.raises(ReferenceModelError, match="not finite"):
        fill(tmp_path, dataset, range(len(RESPONSES)), entries_per_shard=2, scorer=Broken())
    assert len(LogpStore.open(tmp_path, FINGERPRINT).shards) == broken


@pytest.mark.parametrize("piece", [0, 1])
def test_ids_that_changed_since_encoding_are_not_stored(
    tmp_path: Path, dataset: PreferenceDataset, piece: int
) -> None:
    """Their values would be stored under the key of the original ids; no embedding may have them."""
    damaged = dataclasses.replace(dataset, ids=dataset.ids.copy())
    damaged.ids[dataset.piece_starts[piece]] ^= 1 << 30
    with pytest.raises(DataError, match="do not match their content key") as raised:
        fill(tmp_path, damaged, [0, 1, 2], entries_per_shard=1 << 12)
    assert str(dataset.origin(0)) in raised.value.where
    assert not LogpStore.open(tmp_path, FINGERPRINT).shards
    fill(tmp_path, dataset, [0, 1, 2])
    assert_filled(tmp_path, dataset, [0, 1, 2])


def test_log_probs_of_other_numerics_are_used_if_asked_for_and_stay_apart(
    tmp_path: Path, dataset: PreferenceDataset
) -> None:
    """The own store has one under another fingerprint, a published store another one; others are computed."""
    other = dataclasses.replace(FINGERPRINT, profile={"dtype": "fp32", "gpu": "other"})
    entries = [logps_of(torch.from_numpy(ids)).numpy() for ids in dataset.example(0).responses]
    LogpStore.open(tmp_path / "own", other).write(dataset.keys[[0]], entries[:1])
    LogpStore.open(tmp_path / "others", other).write(dataset.keys[[0, 1]], entries[:2])
    push([tmp_path / "others" / other.name], str(tmp_path / "public"))
    distinct = sum(RESPONSES) - 1
    before = list_shards(tmp_path / "own" / other.name)

    def filled(root: str, *, rounding: bool) -> tuple[FillReport, LogpStore, int]:
        scorer = Scorer()
        filler = filler_of(tmp_path / root, scorer=scorer)
        filler.behind, filler.rounding = [Behind(str(tmp_path / "public"))], rounding
        report = filler.fill(dataset, np.arange(len(RESPONSES)), no_progress)
        return report, filler.open_filled(), scorer.responses

    report, store, computed = filled("own", rounding=True)
    assert (report.hits, report.computed, computed) == (1, distinct - 2, distinct - 2)
    assert report.rounded == {other.name: 2}
    assert report.fetched[str(tmp_path / "public")]["entries"] == 1
    assert [each.tolist() for each in store.read(dataset.keys[[0, 1]])] == [e.tolist() for e in entries[:2]]
    assert store.fetched(dataset.keys[:2]) == {str(tmp_path / "public"): [1]}
    fetched = set(list_shards(tmp_path / "own" / other.name)).difference(before)
    assert len(fetched) == 1
    own = LogpStore.open(tmp_path / "own", FINGERPRINT)
    assert own.contains(dataset.keys[[0, 1]]).tolist() == [False, False]

    report, _, computed = filled("own", rounding=True)
    assert (report.hits, report.computed, computed, report.rounded) == (distinct, 0, 0, {other.name: 2})
    report, _, computed = filled("own", rounding=False)
    assert (report.hits, report.computed, report.rounded) == (distinct - 2, 2, {})
    report, _, computed = filled("own", rounding=True)
    assert (report.hits, report.rounded) == (distinct, {}), "those of the same numerics come first"
