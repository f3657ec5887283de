"""On a GPU a fill copies values while the device computes; each entry is that of its own response."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch, Sequences
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.reference.fill import StoreFiller
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from tests.support.packing import COSTS, dataset_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FINGERPRINT = ReferenceFingerprint("weights", {"dtype": "fp32"})
PAIRS = 200


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(None, 0, 1, torch.device("cuda"), ())
    dist.destroy_process_group()


def distinct_pairs() -> PreferenceDataset:
    """Return pairs whose token ids are all different."""
    lengths = np.random.default_rng(0).integers(1, 40, 3 * PAIRS)
    pieces = np.split(np.arange(lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1])
    return dataset_of([Sequences(pieces[n], tuple(pieces[n + 1 : n + 3])) for n in range(0, 3 * PAIRS, 3)])


def slow_score(batch: PackedBatch) -> Tensor:
    """Occupy the device long after the host has returned, also one without cores."""
    torch.cuda._sleep(4_000_000)  # cycles: about 2 ms
    return -batch.targets.float()


def test_every_response_gets_its_own_values(tmp_path: Path, world: World) -> None:
    dataset = distinct_pairs()
    filler = StoreFiller(LogpStore(tmp_path, [FINGERPRINT], []), lambda: slow_score, world, 256, COSTS, 64)
    filler.fill(dataset, np.arange(PAIRS), lambda _done, _total: None)
    store = LogpStore.open(tmp_path, FINGERPRINT)
    for row in range(PAIRS):
        values = store.read(dataset.keys[list(dataset.response_range(row))])
        for value, response in zip(values, dataset.sequences(row).responses, strict=True):
            np.testing.assert_allclose(value, -response.astype(np.float32), rtol=1e-5)
