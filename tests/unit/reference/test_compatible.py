"""Rows of other numerics: which may serve at all, who served what, and what is audited."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.config.check_store import check_store
from dpo_dist.config.schema import Numerics, ReferenceConfig, ReferenceMode
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.errors import ConfigError
from dpo_dist.reference import fingerprint as fingerprint_module
from dpo_dist.reference.compatible import count_reused, count_unused, difference, find_compatible
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.store import LogpStore

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
    return PreferenceDataset(
        fingerprint="",
        counts={},
        source_paths=("",),
        source_pairs=(4,),
        largest_id=0,
        ids=np.zeros(12, dtype=np.int32),
        piece_starts=np.arange(12),
        piece_tokens=np.ones(12, dtype=np.int32),
        pair_pieces=np.arange(3, 13, 3),
        keys=keys,
        scores=np.full(len(keys), np.nan),
        origins=np.zeros((4, 2), dtype=np.int64),
    )


def write(root: Path, space: ReferenceFingerprint, names: list[int]) -> None:
    keys = np.array([(0, name) for name in names], dtype=np.uint64).reshape(-1, 2)
    LogpStore.open(root, space).write(keys, [np.array([-float(name)], dtype=np.float32) for name in names])


@pytest.mark.parametrize(
    "part", ["attention", "torch", "transformers", "gpu", "cuda", "device", "compile", "liger", "flash_attn"]
)
def test_what_only_reorders_sums_is_kin(part: str, tmp_path: Path) -> None:
    write(tmp_path, ReferenceFingerprint("weights", {**PROFILE, part: "other"}), [1])
    assert [difference(OWN, kin) for kin in find_compatible(tmp_path, OWN)] == [f"{part} other"]


@pytest.mark.parametrize(
    "part", ["dtype", "matmul_precision", "bf16_reduction", "quantization", "anything new"]
)
def test_what_changes_the_precision_is_not(part: str, tmp_path: Path) -> None:
    write(tmp_path, ReferenceFingerprint("weights", {**PROFILE, part: "other"}), [1])
    assert find_compatible(tmp_path, OWN) == []


def test_other_weights_other_scoring_code_and_foreign_folders_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_compatible(tmp_path / "none", OWN) == []
    write(tmp_path, OWN, [1])
    write(tmp_path, replace(SDPA, reference="others"), [1])
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint_module, "LOGP_PATH_VERSION", 0)
        write(tmp_path, SDPA, [1])
    (tmp_path / ("0" * 32)).mkdir()
    (tmp_path / ("1" * 32)).write_text("")
    assert find_compatible(tmp_path, OWN) == []


def test_the_nearest_kin_is_first(tmp_path: Path) -> None:
    write(tmp_path, OLD_SDPA, [1])
    write(tmp_path, SDPA, [1])
    assert find_compatible(tmp_path, OWN) == [SDPA, OLD_SDPA]
    assert difference(OWN, OLD_SDPA) == "attention sdpa, torch 2.12"


def test_a_strict_run_is_told_what_it_leaves_unused(tmp_path: Path, dataset: PreferenceDataset) -> None:
    visited = [(dataset, np.array([0, 1])), (dataset, np.array([2, 3]))]
    write(tmp_path, OWN, [0])
    assert count_unused(tmp_path, OWN, [], visited).rows == 0
    write(tmp_path, SDPA, [0, 1, 9])
    write(tmp_path, OLD_SDPA, [1, 5])
    unused = count_unused(tmp_path, OWN, [SDPA, OLD_SDPA], visited)
    assert (unused.rows, unused.differences) == (2, ["attention sdpa", "attention sdpa, torch 2.12"])


def test_it_is_told_who_served_and_which_pairs_to_audit(tmp_path: Path, dataset: PreferenceDataset) -> None:
    write(tmp_path, OWN, [0, 1, 2])
    write(tmp_path, SDPA, [2, 3, 4])
    write(tmp_path, OLD_SDPA, [4, 5])
    store = LogpStore.open(tmp_path, OWN, compatible=[SDPA, OLD_SDPA])
    served = count_reused(store, [(dataset, np.array([0])), (dataset, np.array([0, 1, 2, 3]))])
    assert served.rows == {"own": 2 + 3, "attention sdpa": 2, "attention sdpa, torch 2.12": 1}
    assert served.audited is not None
    number, rows = served.audited
    assert (number, rows.tolist()) == (1, [1, 2, 3])
    alone = count_reused(store, [(dataset, np.array([0]))])
    assert (alone.rows, alone.audited) == ({"own": 2}, None)


@pytest.mark.parametrize(("mode", "audit_pairs"), [(ReferenceMode.live, 16), (ReferenceMode.cached, 0)])
def test_tolerance_without_a_store_or_an_audit_is_refused(mode: ReferenceMode, audit_pairs: int) -> None:
    reference = ReferenceConfig(mode=mode, numerics=Numerics.tolerant, audit_pairs=audit_pairs)
    with pytest.raises(ConfigError) as raised:
        check_store(reference)
    assert "reference.numerics" in raised.value.where
    check_store(replace(reference, numerics=Numerics.strict))
    check_store(replace(reference, mode=ReferenceMode.cached, audit_pairs=1))
