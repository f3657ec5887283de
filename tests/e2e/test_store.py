"""A run on a damaged store reports the damage, computes lost entries again and trains on the same values."""

import shutil
from pathlib import Path

import numpy as np

from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, open_shard, read_fingerprint
from tests.e2e.conftest import Overrides
from tests.support.launch import assert_same_history, constants, history, run_verb, summary, train
from tests.support.read_only import read_only
from tests.support.tiny_model import write_model

STEPS = ("trainer.max_steps=2",)


def all_keys(shards: list[Path]) -> np.ndarray:
    opened = [shard for file in shards if (shard := open_shard(file)) is not None]
    return np.concatenate([shard.keys for shard in opened])


def fingerprint_of(folder: Path) -> ReferenceFingerprint:
    fingerprint = read_fingerprint(folder)
    assert fingerprint is not None
    return fingerprint


def move(source: Path, to: ReferenceFingerprint, add: float) -> Path:
    """Move the entries in the folder `source` to another fingerprint, changed by `add`; return its folder."""
    store = LogpStore.open(source.parent, fingerprint_of(source))
    keys = all_keys(sorted(source.glob("*.safetensors")))
    values = [values + np.float32(add) for values in store.read(keys)]
    shutil.rmtree(source)
    LogpStore.open(source.parent, to).write(keys, values)
    return source.parent / to.name


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if (path / "space.json").is_file())


def test_damage_is_reported_and_only_lost_entries_are_computed_again(
    overrides: Overrides, tmp_path: Path
) -> None:
    """A flipped value; a cut, an empty, a missing and a copied shard; a damaged space.json."""
    small_shards = constants(**{"dpo_dist.training.reference.ENTRIES_PER_SHARD": 4})
    # Another model than the policy: the sign of a margin that is rounding alone differs between batches.
    write_model(tmp_path / "reference", seed=2)
    steps = (*STEPS, f"reference.path={tmp_path}/reference")
    assert run_verb("train", overrides(*steps), prepare=small_shards).code == 0
    [own] = folders(tmp_path / "store")
    flipped, cut, emptied, missing = sorted(own.glob("*.safetensors"))[:4]
    keys, foreign = all_keys([missing]), ReferenceFingerprint("ab" * 16, {}, "another model")
    values = LogpStore.open(own.parent, fingerprint_of(own)).read(keys)
    other = LogpStore.open(own.parent, foreign)
    other.write(keys, values)
    [copied] = other.folder.glob("*.safetensors")
    shutil.copy(copied, own)
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1  # the last value of its last entry
    flipped.write_bytes(content)
    lost = 1 + len(all_keys([cut, emptied, missing]))
    cut.write_bytes(cut.read_bytes()[:-1])
    emptied.write_bytes(b"")
    missing.unlink()
    (own / "space.json").write_text("{")

    verified = run_verb("store", ["verify", str(tmp_path / "store")])
    assert verified.code == 2, verified.output
    named = [flipped.name, cut.name, emptied.name, copied.name]
    assert all(name in verified.output for name in [*named, "space.json"]), verified.output

    screen = train(overrides(*steps, f"run.dir={tmp_path}/again")).output
    reference = summary(tmp_path / "again")["reference"]
    assert (reference["hits"], reference["computed"]) == (24 - lost, lost)
    assert {Path(name).name for name in reference["damaged"]} == set(named)
    assert all(name in screen for name in named)
    assert_same_history(history(tmp_path / "again"), history(tmp_path / "run"), 1e-6)


def test_a_complete_store_and_cache_on_a_read_only_disk_are_used(
    overrides: Overrides, tmp_path: Path
) -> None:
    steps = (*STEPS, f"data.cache={tmp_path}/encoded")
    assert run_verb("precompute", overrides(*steps, f"run.dir={tmp_path}/scored")).code == 0
    with read_only(tmp_path / "store"), read_only(tmp_path / "encoded"):
        train(overrides(*steps))
        refused = run_verb("train", overrides(*steps, f"run.dir={tmp_path}/other", "data.max_length=99"))
    assert refused.code == 2
    assert "where:    data.cache" in refused.output
    assert "Read-only file system" in refused.output
    assert summary(tmp_path / "run")["reference"]["computed"] == 0


def test_entries_of_other_numerics_are_not_used_and_those_of_another_model_are_an_error(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    assert run_verb("precompute", overrides(*STEPS, f"run.dir={tmp_path}/scored")).code == 0
    [folder] = folders(root)
    own = fingerprint_of(folder)
    older = ReferenceFingerprint(own.reference, {**own.profile, "torch": "2.0"}, own.label)
    folder = move(folder, older, add=1e-2)

    screen = run_verb("precompute", overrides(*STEPS, f"run.dir={tmp_path}/again")).output
    assert "reference: 24 log-probs computed, 0 reused" in screen
    listed = run_verb("store", ["info", str(root)]).output
    assert all(path.name in listed for path in folders(root))
    assert (listed.count(f"{assets}/model "), listed.count(" 24 entries")) == (2, 2), listed

    shutil.rmtree(root / own.name)
    move(folder, own, add=0.0)
    wrong = run_verb("train", overrides(*STEPS))
    assert wrong.code == 2, wrong.output
    assert "differ from a fresh computation" in wrong.output
    assert "train.jsonl:" in wrong.output
