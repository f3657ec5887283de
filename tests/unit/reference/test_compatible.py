"""Entries of other numerics: which are compatible, which are used, and which pairs are audited."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_dist.batching.pack import Sequences
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import Peer, World
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.reference.digest import Profile, agree_on_numerics, difference, find_compatible
from dpo_dist.reference.fill import count_reused
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from tests.support.packing import dataset_of

PROFILE = {
    "dtype": "bf16",
    "matmul_precision": "highest",
    "attention": "varlen",
    "torch": "2.13",
    "gpu": "H200",
}
OWN = ReferenceFingerprint("weights", PROFILE)
SDPA = ReferenceFingerprint("weights", {**PROFILE, "attention": "sdpa"})
OLD_SDPA = ReferenceFingerprint("weights", {**PROFILE, "attention": "sdpa", "torch": "2.12"})


@pytest.fixture
def dataset() -> PreferenceDataset:
    """Four pairs of one prompt token and two responses of one token; the last two pairs are the same."""
    keys = np.array([(0, n) for n in (0, 1, 2, 3, 4, 5, 4, 5)], dtype=np.uint64)
    token = np.zeros(1, dtype=np.int32)
    return replace(dataset_of([Sequences(token, (token, token))] * 4), keys=keys)


def write(root: Path, fingerprint: ReferenceFingerprint, names: list[int]) -> None:
    keys = np.array([(0, name) for name in names], dtype=np.uint64).reshape(-1, 2)
    LogpStore.open(root, fingerprint).write(
        keys, [np.array([-float(name)], dtype=np.float32) for name in names]
    )


@pytest.mark.parametrize(
    ("parts", "is_compatible"),
    [
        ("attention torch transformers gpu cuda device compile liger flash_attn", True),
        ("dtype matmul_precision bf16_reduction quantization anything_new", False),
    ],
)
def test_fields_that_only_change_rounding_order_are_compatible(
    parts: str, is_compatible: bool, tmp_path: Path
) -> None:
    for part in parts.split():
        write(tmp_path, ReferenceFingerprint("weights", {**PROFILE, part: "other"}), [1])
    found = {difference(OWN, other) for other in find_compatible(tmp_path, OWN)}
    assert found == {f"{part} other" for part in parts.split() if is_compatible}


def test_other_weights_scoring_code_and_foreign_folders_are_not_compatible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_compatible(tmp_path / "none", OWN) == []
    begun = tmp_path / "begun" / ("a" * 32)  # by a start that was killed, or goes on
    begun.mkdir(parents=True)
    assert find_compatible(begun.parent, OWN) == []
    write(tmp_path, OWN, [1])
    write(tmp_path, replace(SDPA, reference="others"), [1])
    with monkeypatch.context() as patch:
        patch.setattr("dpo_dist.reference.store.LOGP_PATH_VERSION", 0)
        write(tmp_path, SDPA, [1])
    (tmp_path / ("0" * 32)).mkdir()
    (tmp_path / ("1" * 32)).write_text("")
    assert find_compatible(tmp_path, OWN) == []


def test_the_most_similar_fingerprint_is_first(tmp_path: Path) -> None:
    write(tmp_path, OLD_SDPA, [1])
    write(tmp_path, SDPA, [1])
    assert find_compatible(tmp_path, OWN) == [SDPA, OLD_SDPA]
    assert difference(OWN, OLD_SDPA) == "attention sdpa, torch 2.12"


def test_reused_entries_are_counted_and_their_pairs_audited(
    tmp_path: Path, dataset: PreferenceDataset
) -> None:
    write(tmp_path, OWN, [0, 1, 2])
    write(tmp_path, SDPA, [2, 3, 4])
    write(tmp_path, OLD_SDPA, [4, 5])
    store = LogpStore.open(tmp_path, OWN, compatible=[SDPA, OLD_SDPA])
    reused = count_reused(store, [(dataset, np.array([0])), (dataset, np.array([0, 1, 2, 3]))])
    assert reused.entries == {"own": 2 + 3, "attention sdpa": 2, "attention sdpa, torch 2.12": 1}
    assert reused.audited is not None
    number, indices = reused.audited
    assert (number, indices.tolist()) == (1, [1, 2, 3])
    both = count_reused(store, [(dataset, np.array([1])), (dataset, np.array([3]))])
    assert both.audited is not None
    assert (both.audited[0], both.audited[1].tolist()) == (0, [1])
    alone = count_reused(store, [(dataset, np.array([0]))])
    assert (alone.entries, alone.audited) == ({"own": 2}, None)


@pytest.fixture
def on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Profile], World]:
    """Return a world of two ranks: this one, and one with the given numerics profile."""

    def make(other: Profile) -> World:
        monkeypatch.setattr(World, "gather", lambda _self, profile: [profile, other])
        peers = (Peer(0, "host-a", 1), Peer(1, "host-b", 2))
        return World(None, 0, 2, torch.device("cpu"), peers)

    return make


def test_tolerant_ranks_share_a_profile_with_the_values_of_both(
    on_two_ranks: Callable[[Profile], World],
) -> None:
    world = on_two_ranks({**PROFILE, "gpu": "H100", "torch": "2.12"})
    agreed = agree_on_numerics(PROFILE, True, world)
    assert agree_on_numerics(PROFILE, False, on_two_ranks(dict(PROFILE))) == PROFILE
    assert agreed == {**PROFILE, "gpu": "H100 or H200", "torch": "2.12 or 2.13"}


@pytest.mark.parametrize(
    ("is_tolerant", "other", "remedy"),
    [
        (False, {"gpu": "H100"}, "reference.numerics=tolerant"),
        (False, {"dtype": "fp32"}, "one installation"),
        (True, {"dtype": "fp32"}, "one installation"),
        (True, {"gpu": "H100", "dtype": "fp32"}, "one installation"),
    ],
)
def test_ranks_with_other_numerics_are_an_error(
    is_tolerant: bool, other: Profile, remedy: str, on_two_ranks: Callable[[Profile], World]
) -> None:
    with pytest.raises(ReferenceModelError, match="different numerics") as raised:
        agree_on_numerics(PROFILE, is_tolerant, on_two_ranks({**PROFILE, **other}))
    assert raised.value.remedy.endswith(remedy)
    for name, value in other.items():
        assert f"{name}: {PROFILE[name]} on rank 0 (host-a), {value} on rank 1 (host-b)" in raised.value.got
