"""A second machine finds in a published store what the first one computed."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.batching.content_keys import Keys
from dpo_dist.reference.fill import StoreFiller
from dpo_dist.reference.store import LogpStore, StoredLogps, open_shard, read_fingerprint
from tests.e2e.conftest import Overrides
from tests.support.launch import assert_same_history, constants, history, run_verb, summary, train
from tests.support.tiny_model import write_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "larger", seed=5, hidden_size=48, layers=3)


def second(tmp_path: Path, name: str, public: Path) -> list[str]:
    """The keys of a run with a store of its own behind which is the published one."""
    return [
        f"reference.store={tmp_path}/{name}-store",
        f"run.dir={tmp_path}/{name}",
        f"reference.behind=[{public}]",
    ]


def counts(run: Path, *, of_teacher: bool = False) -> tuple[int, int, int]:
    """How many were computed, reused and fetched."""
    report: dict[str, Any] = summary(run)["reference"]
    report = report["teacher"] if of_teacher else report
    return report["computed"], report["hits"], sum(each["entries"] for each in report["fetched"].values())


def test_a_second_machine_computes_nothing(overrides: Overrides, tmp_path: Path) -> None:
    write_model(tmp_path / "reference", seed=2)
    command = ("trainer.max_steps=2", f"reference.path={tmp_path}/reference")
    train(overrides(*command))
    public = tmp_path / "public"
    pushed = run_verb("store", ["push", str(tmp_path / "store"), str(public)])
    assert pushed.code == 0, pushed.output
    assert f"reference.behind=[{public}]" in pushed.output
    rows = history(tmp_path / "run")

    screen = train(overrides(*command, *second(tmp_path, "one", public))).output
    assert counts(tmp_path / "one") == (0, 0, 24)
    assert f"0 log-probs computed, 0 reused, 24 from {public} (" in screen
    assert "fetched log-probs are not compared with the model" in screen
    assert_same_history(history(tmp_path / "one"), rows, 0)
    # Its entries are its own now: nothing is asked again.
    shutil.move(public, tmp_path / "gone")
    train(overrides(*command, *second(tmp_path, "one", public), f"run.dir={tmp_path}/again"))
    assert counts(tmp_path / "again") == (0, 24, 0)

    train(overrides(*command, *second(tmp_path, "two", tmp_path / "gone")), processes=2)
    assert counts(tmp_path / "two") == (0, 0, 24)
    assert_same_history(history(tmp_path / "two"), rows, 2e-5)

    refused = run_verb("train", overrides(*command, *second(tmp_path, "none", public)))
    assert refused.code == 2
    assert "nothing is at the URL" in refused.output
    assert str(public) in refused.output


def test_a_teacher_that_was_asked_elsewhere(overrides: Overrides, teacher: Path, tmp_path: Path) -> None:
    command = (f"teacher.path={teacher}", "loss=distill", "trainer.max_steps=2", "teacher.k=20")
    train(overrides(*command))
    public = tmp_path / "public"
    assert run_verb("store", ["push", str(tmp_path / "store"), str(public)]).code == 0
    train(overrides(*command, *second(tmp_path, "one", public)))
    assert counts(tmp_path / "one", of_teacher=True) == (0, 0, 12)
    assert_same_history(history(tmp_path / "one"), history(tmp_path / "run"), 0)
    # A shard that is cut: its entries are computed, and said.
    for shard in public.glob("*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    screen = train(overrides(*command, *second(tmp_path, "cut", public))).output
    computed, _, fetched = counts(tmp_path / "cut", of_teacher=True)
    assert computed == 1
    assert fetched == 11
    assert f"1 entry of {public} left out" in screen
    assert_same_history(history(tmp_path / "cut"), history(tmp_path / "run"), 1e-6)


def test_wrong_entries_of_others_are_found_by_the_policy_that_starts_from_the_reference(
    overrides: Overrides, tmp_path: Path
) -> None:
    train(overrides("trainer.max_steps=2"))
    [folder] = (path.parent for path in (tmp_path / "store").glob("*/space.json"))
    fingerprint = read_fingerprint(folder)
    assert fingerprint is not None
    shards = [shard for shard in map(open_shard, sorted(folder.glob("*.safetensors"))) if shard]
    keys = np.concatenate([shard.keys for shard in shards])
    values = [entry - np.float32(0.01) for entry in LogpStore.open(folder.parent, fingerprint).read(keys)]
    (tmp_path / "wrong" / folder.name).mkdir(parents=True)
    LogpStore.open(tmp_path / "wrong", fingerprint).write(keys, values)
    assert run_verb("store", ["push", str(tmp_path / "wrong"), str(tmp_path / "public")]).code == 0
    keys_of_run = second(tmp_path, "one", tmp_path / "public")
    refused = run_verb("train", overrides("trainer.max_steps=2", *keys_of_run))
    assert refused.code == 2
    assert "differ from a fresh computation" in refused.output


def test_what_differs_is_said(overrides: Overrides, tmp_path: Path) -> None:
    train(overrides("trainer.max_steps=2"))
    assert run_verb("store", ["push", str(tmp_path / "store"), str(tmp_path / "public")]).code == 0
    keys = second(tmp_path, "one", tmp_path / "public")
    command = ("trainer.max_steps=2", "reference.system=Answer in French.")
    screen = train(overrides(*command, *keys)).output
    assert "other there: reference.system None (here Answer in French.)" in screen
    assert counts(tmp_path / "one")[0] > 0


def _killed_after_a_shard() -> None:
    """Let the process be killed after its first shard of five entries."""
    constants(**{"dpo_dist.training.reference.ENTRIES_PER_SHARD": 5})()
    write = StoreFiller._write_shard

    def killed(self: StoreFiller, keys: Keys, entries: list[StoredLogps]) -> set[str]:
        write(self, keys, entries)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    setattr(StoreFiller, "_write_shard", killed)  # noqa: B010  (mypy)


def test_a_killed_download_goes_on_where_it_was(overrides: Overrides, tmp_path: Path) -> None:
    write_model(tmp_path / "reference", seed=2)
    command = ("trainer.max_steps=2", f"reference.path={tmp_path}/reference")
    train(overrides(*command))
    public = tmp_path / "public"
    assert run_verb("store", ["push", str(tmp_path / "store"), str(public)]).code == 0
    keys = second(tmp_path, "one", public)
    assert run_verb("train", overrides(*command, *keys), prepare=_killed_after_a_shard).code != 0
    train(overrides(*command, *keys))
    assert counts(tmp_path / "one") == (0, 5, 19)
    assert_same_history(history(tmp_path / "one"), history(tmp_path / "run"), 0)
