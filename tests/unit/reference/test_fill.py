"""A fill computes what the store lacks and nothing else, each row under the key of its own response."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.encode import response_key
from dpo_dist.data.packing import PackedBatch, pack
from dpo_dist.distributed.world import World
from dpo_dist.errors import DataError, ReferenceModelError
from dpo_dist.reference import fill as fill_module
from dpo_dist.reference.fill import FillReport, check_complete, fill_store, missing_responses, open_filled
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.scoring import keys_of_ids
from dpo_dist.reference.store import LogpStore
from tests.support.packing import COSTS
from tests.support.read_only import read_only

SPACE = ReferenceFingerprint("weights", {"dtype": "fp32"})
RESPONSES = [2, 1, 3, 2, 2, 2]
# Two pairs with the same content, as data sets have them.
TWINS = (1, 4)


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(None, 0, 1, torch.device("cpu"), ())
    dist.destroy_process_group()


@pytest.fixture
def dataset(tmp_path: Path) -> PreferenceDataset:
    generator = np.random.default_rng(0)
    pairs = [
        [generator.integers(3, 90, generator.integers(1, 9)).astype(np.int32) for _ in range(1 + count)]
        for count in RESPONSES
    ]
    first, second = TWINS
    pairs[second][:2] = pairs[first]
    keys = [response_key(prompt, response) for prompt, *responses in pairs for response in responses]
    pieces = [piece for pair in pairs for piece in pair]
    lengths = np.array([len(piece) for piece in pieces])
    return PreferenceDataset(
        fingerprint="",
        counts={},
        source_paths=("",),
        source_pairs=(len(pairs),),
        largest_id=int(np.concatenate(pieces).max()),
        ids=np.concatenate(pieces),
        piece_starts=np.cumsum(lengths) - lengths,
        piece_tokens=lengths,
        pair_pieces=np.cumsum([len(pair) for pair in pairs]),
        keys=np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2),
        scores=np.full(len(keys), np.nan),
        origins=np.zeros((len(pairs), 2), dtype=np.int64),
    )


def logps_of(ids: Tensor) -> Tensor:
    """Log-probs that tell which tokens they are of."""
    return -ids.float() / 7


class Scorer:
    """Scores with `logps_of`, and counts."""

    def __init__(self) -> None:
        self.responses = 0
        self.progress: list[tuple[int, int]] = []

    def __call__(self, batch: PackedBatch) -> Tensor:
        self.responses += len(batch.keys)
        return logps_of(batch.targets)


def fill(
    root: Path,
    dataset: PreferenceDataset,
    rows: list[int],
    world: World,
    rows_per_shard: int = 4,
    scorer: Scorer | None = None,
) -> tuple[FillReport, Scorer]:
    scorer = scorer or Scorer()
    report = fill_store(
        lambda names: LogpStore.open(root, SPACE, names),
        dataset,
        np.array(rows),
        lambda: scorer,
        world,
        micro_batch_tokens=30,
        costs=COSTS,
        rows_per_shard=rows_per_shard,
        progress=lambda done, total: scorer.progress.append((done, total)),
    )
    return report, scorer


def assert_filled(root: Path, dataset: PreferenceDataset, rows: list[int]) -> None:
    store = LogpStore.open(root, SPACE)
    for row in rows:
        values = store.read(dataset.keys[list(dataset.response_range(row))])
        for value, response in zip(values, dataset.sequences(row).responses, strict=True):
            assert value.tolist() == logps_of(torch.from_numpy(response)).tolist()


@pytest.mark.parametrize("rows_per_shard", [1, 4, 4096])
def test_every_response_gets_its_own_values(
    tmp_path: Path, dataset: PreferenceDataset, world: World, rows_per_shard: int
) -> None:
    rows = list(range(len(RESPONSES)))
    report, scorer = fill(tmp_path, dataset, rows, world, rows_per_shard)
    assert (report.hits, report.computed) == (0, sum(RESPONSES) - 1)
    assert scorer.responses == report.computed
    assert scorer.progress[-1] == (len(rows), len(rows))
    assert_filled(tmp_path, dataset, rows)


def test_only_what_is_missing_is_computed(tmp_path: Path, dataset: PreferenceDataset, world: World) -> None:
    keys = dataset.keys[[0, 4]]  # the first response of row 0, the second of row 2
    responses = dataset.sequences(0).responses[0], dataset.sequences(2).responses[1]
    LogpStore.open(tmp_path, SPACE).write(
        keys, [logps_of(torch.from_numpy(ids)).numpy() for ids in responses]
    )
    report, scorer = fill(tmp_path, dataset, [0, 2, 5], world)
    assert (report.hits, report.computed, scorer.responses) == (2, 5, 5)
    assert_filled(tmp_path, dataset, [0, 2, 5])
    assert fill(tmp_path, dataset, [0, 2, 5], world)[0] == FillReport(hits=7)


def test_a_response_that_comes_twice_is_missing_once(tmp_path: Path, dataset: PreferenceDataset) -> None:
    store = LogpStore.open(tmp_path, SPACE)
    missing, held = missing_responses(store, dataset, np.array([1, 3, 4]))
    starts = np.cumsum(RESPONSES) - RESPONSES
    assert missing.tolist() == [starts[1], starts[3], starts[3] + 1, starts[4] + 1]
    assert held == 0


def test_a_round_is_written_before_the_next_but_one_is_scored(
    tmp_path: Path, dataset: PreferenceDataset, world: World
) -> None:
    """A killed fill loses two shards at most."""
    shards: list[int] = []

    class Watching(Scorer):
        def __call__(self, batch: PackedBatch) -> Tensor:
            shards.append(len(list(tmp_path.glob("*/*.safetensors"))))
            return super().__call__(batch)

    fill(tmp_path, dataset, list(range(len(RESPONSES))), world, rows_per_shard=2, scorer=Watching())
    assert len(shards) == len(RESPONSES)
    assert all(round_ - 1 <= written <= round_ for round_, written in enumerate(shards))


class OtherJob(Scorer):
    """While it scores its first batch, another job computes what `rows` need, or all that is left of it."""

    def __init__(self, root: Path, dataset: PreferenceDataset, rows: list[int], world: World) -> None:
        super().__init__()
        self._start = lambda: fill(root, dataset, rows, world, rows_per_shard=2)[0]
        self.report = FillReport()

    def __call__(self, batch: PackedBatch) -> Tensor:
        if not self.responses:
            self.report = self._start()
        return super().__call__(batch)


@pytest.mark.parametrize("theirs", [[0, 1, 2, 3, 4, 5], [2, 5], [1]])
def test_what_another_job_stores_meanwhile_is_not_computed(
    tmp_path: Path, dataset: PreferenceDataset, world: World, theirs: list[int]
) -> None:
    rows = list(range(len(RESPONSES)))
    other = OtherJob(tmp_path, dataset, theirs, world)
    report, scorer = fill(tmp_path, dataset, rows, world, rows_per_shard=2, scorer=other)
    distinct = sum(RESPONSES) - 1
    assert report.hits + report.computed == distinct
    assert report.computed == scorer.responses
    first_round = max(RESPONSES)
    assert distinct <= report.computed + other.report.computed <= distinct + first_round
    assert scorer.progress[-1] == (len(rows), len(rows))
    assert_filled(tmp_path, dataset, rows)


def test_of_a_round_only_what_nobody_else_stored_is_computed(
    tmp_path: Path, dataset: PreferenceDataset, world: World
) -> None:
    """The other job has stored one response of a pair."""
    [place] = dataset.response_indices(np.array([2]))[1:2]

    class Neighbour(Scorer):
        def __call__(self, batch: PackedBatch) -> Tensor:
            if not self.responses:
                values = logps_of(torch.from_numpy(dataset.sequences(2).responses[1])).numpy()
                LogpStore.open(tmp_path, SPACE).write(dataset.keys[[place]], [values])
            return super().__call__(batch)

    for _ in range(2):
        report, _ = fill(tmp_path, dataset, [0, 2], world, rows_per_shard=2, scorer=Neighbour())
        assert report.hits + report.computed == 5
        assert_filled(tmp_path, dataset, [0, 2])


def test_what_is_damaged_is_named_and_computed_anew(
    tmp_path: Path, dataset: PreferenceDataset, world: World
) -> None:
    rows = list(range(len(RESPONSES)))
    fill(tmp_path, dataset, rows, world, rows_per_shard=4)
    first, second, third = sorted(tmp_path.glob("*/*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    (third.parent / "x.safetensors").write_bytes(b"")
    left = len(LogpStore.open(tmp_path, SPACE)) - 1  # the index of the first is whole, but not its last row
    report, scorer = fill(tmp_path, dataset, rows, world)
    assert report.damaged == {f"{SPACE.name}/{name}" for name in (first.name, second.name, "x.safetensors")}
    assert report.computed == sum(RESPONSES) - 1 - left
    assert scorer.responses == report.computed
    assert_filled(tmp_path, dataset, rows)


def test_a_store_that_cannot_be_written_is_told_before_anything_is_computed(
    tmp_path: Path, dataset: PreferenceDataset, world: World
) -> None:
    fill(tmp_path, dataset, [0], world)
    with read_only(tmp_path):
        assert fill(tmp_path, dataset, [0], world)[0] == FillReport(hits=2)
        scorer = Scorer()
        with pytest.raises(ReferenceModelError, match="cannot be written"):
            fill(tmp_path, dataset, [0, 1], world, scorer=scorer)
        assert not scorer.responses


@pytest.mark.parametrize("broken", [0, 3, len(RESPONSES) - 1])
def test_a_round_that_cannot_be_written_is_told(
    tmp_path: Path, dataset: PreferenceDataset, world: World, broken: int
) -> None:
    """The last one too, which has no round after it."""

    class Broken(Scorer):
        calls = 0

        def __call__(self, batch: PackedBatch) -> Tensor:
            self.calls += 1
            return super().__call__(batch) / (0 if self.calls == broken + 1 else 1)

    with pytest.raises(ReferenceModelError, match="not finite"):
        fill(tmp_path, dataset, list(range(len(RESPONSES))), world, rows_per_shard=2, scorer=Broken())
    assert len(LogpStore.open(tmp_path, SPACE).names) == broken


def test_progress_has_a_total_at_once_and_moves_within_a_round(
    tmp_path: Path, dataset: PreferenceDataset, world: World
) -> None:
    rows = list(range(len(RESPONSES)))
    _, scorer = fill(tmp_path, dataset, rows, world, rows_per_shard=4096)
    assert scorer.progress[0] == (0, len(rows))
    assert scorer.progress == sorted(scorer.progress)
    assert len({done for done, _ in scorer.progress}) > 3


@pytest.mark.parametrize("flipped", [1, 1 << 30])
@pytest.mark.parametrize("piece", [0, 1])
def test_ids_that_changed_since_they_were_encoded_are_not_scored(
    tmp_path: Path, dataset: PreferenceDataset, world: World, piece: int, flipped: int
) -> None:
    """Their values would be stored under the key of the ids that were encoded."""
    damaged = dataclasses.replace(dataset, ids=dataset.ids.copy())
    damaged.ids[dataset.piece_starts[piece]] ^= flipped

    class Vocabulary(Scorer):
        def __call__(self, batch: PackedBatch) -> Tensor:
            assert batch.input_ids.max() < 1 << 20, "no embedding has this id"
            return super().__call__(batch)

    with pytest.raises(DataError, match="not those that their content key") as raised:
        fill(tmp_path, damaged, [0, 1, 2], world, rows_per_shard=1 << 12, scorer=Vocabulary())
    assert str(dataset.origin(0)) in raised.value.where
    assert not LogpStore.open(tmp_path, SPACE).names
    fill(tmp_path, dataset, [0, 1, 2], world)
    assert_filled(tmp_path, dataset, [0, 1, 2])


def test_keys_follow_from_the_ids_of_a_batch(dataset: PreferenceDataset) -> None:
    rows = range(len(RESPONSES))
    batch = pack([dataset.sequences(row) for row in rows], dataset.keys)
    assert np.array_equal(keys_of_ids(batch), dataset.keys)


def test_the_data_set_is_searched_once_however_many_jobs_share_the_rounds(
    tmp_path: Path, dataset: PreferenceDataset, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []
    search = PreferenceDataset.locate_responses

    def counted(self: PreferenceDataset, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        searches.append(len(places))
        return search(self, places)

    class Neighbour(Scorer):
        """Before each batch another job stores one response of the third pair and of the last."""

        def __call__(self, batch: PackedBatch) -> Tensor:
            for row in (2, 5):
                place = dataset.response_indices(np.array([row]))[0]
                values = logps_of(torch.from_numpy(dataset.sequences(row).responses[0])).numpy()
                LogpStore.open(tmp_path, SPACE).write(dataset.keys[[place]], [values])
            return super().__call__(batch)

    monkeypatch.setattr(PreferenceDataset, "locate_responses", counted)
    rows = list(range(len(RESPONSES)))
    report, _ = fill(tmp_path, dataset, rows, world, rows_per_shard=2, scorer=Neighbour())
    assert report.hits, "a round was shared"
    assert len(searches) == 1
    assert_filled(tmp_path, dataset, rows)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(fill_module, "_RETRY_SECONDS", 0.05)


def open_at(root: Path) -> Callable[..., LogpStore]:
    return partial(LogpStore.open, root, SPACE)


def test_a_listing_that_is_behind_loses_no_shard(
    tmp_path: Path, dataset: PreferenceDataset, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system gives it, right after another node wrote."""
    monkeypatch.setattr("dpo_dist.reference.store.list_shards", lambda _folder: [])
    report, _ = fill(tmp_path, dataset, [0, 1, 2], world, rows_per_shard=2)
    assert len(report.shards) == len(list(tmp_path.glob("*/*.safetensors"))) == 3
    store = open_filled(open_at(tmp_path), report.shards, world)
    check_complete(store, dataset, np.arange(3), world)
    again = fill_store(
        open_at(tmp_path),
        dataset,
        np.arange(2, 4),
        Scorer,
        world,
        30,
        COSTS,
        4,
        lambda _done, _total: None,
        report.shards,
    )
    assert (again.hits, again.computed) == (3, 2)
    both = report + again
    check_complete(open_filled(open_at(tmp_path), both.shards, world), dataset, np.arange(4), world)


def test_a_shard_that_comes_late_or_in_part_is_waited_for(
    tmp_path: Path, dataset: PreferenceDataset, world: World, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    report, _ = fill(tmp_path, dataset, [0, 1], world)
    [name] = report.shards
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-4])
    look = LogpStore.list_now

    def arrive(self: LogpStore) -> list[str]:
        (tmp_path / name).write_bytes(content)
        return look(self)

    with monkeypatch.context() as patched:
        patched.setattr(LogpStore, "list_now", arrive)
        check_complete(open_filled(open_at(tmp_path), report.shards, world), dataset, np.arange(2), world)
    for damage in (lambda: (tmp_path / name).write_bytes(content[:-4]), (tmp_path / name).unlink):
        damage()
        with pytest.raises(ReferenceModelError, match="cannot be read") as raised:
            open_filled(open_at(tmp_path), report.shards, world)
        assert name in raised.value.got


def test_completeness_is_judged_without_reading_values(
    tmp_path: Path, dataset: PreferenceDataset, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = fill(tmp_path, dataset, [0, 1, 2, 3], world, rows_per_shard=2)
    store = open_filled(open_at(tmp_path), report.shards, world)
    monkeypatch.setattr(fill_module, "_KEYS_AT_ONCE", 3)
    with monkeypatch.context() as patched:
        patched.setattr(LogpStore, "_load", lambda *_: pytest.fail("values were read"))
        check_complete(store, dataset, np.arange(4), world)
    keys = dataset.keys[dataset.response_indices(np.arange(len(dataset)))]
    assert store.indexed(keys).tolist() == store.contains(keys).tolist()
    # Keys of one first word.
    other = np.stack([keys[:, 0], keys[:, 1] ^ np.uint64(1)], axis=1)
    assert not store.indexed(other).any()
    values = [np.array([-1.0], dtype=np.float32)] * 2
    LogpStore.open(tmp_path, SPACE).write(np.stack([other[0], other[1]]), values)
    both = LogpStore.open(tmp_path, SPACE)
    assert both.indexed(np.concatenate([other[:2], keys[:2]])).all()
    assert not LogpStore.open(tmp_path / "empty", SPACE).indexed(keys).any()


def test_what_is_missing_after_a_fill_is_told_before_training(
    tmp_path: Path, dataset: PreferenceDataset, world: World
) -> None:
    report, _ = fill(tmp_path, dataset, [0, 1], world)
    store = open_filled(open_at(tmp_path), report.shards, world)
    check_complete(store, dataset, np.array([0, 1]), world)
    with pytest.raises(ReferenceModelError, match="lacks log-probs") as raised:
        check_complete(store, dataset, np.array([1, 2]), world)
    assert "3 of 4" in raised.value.got
    assert "rank 0" in raised.value.where
