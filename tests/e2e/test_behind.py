"""A second machine finds in a published store what the first one computed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.batching.content_keys import Keys
from dpo_dist.reference.fill import StoreFiller
from dpo_dist.reference.store import (
    LogpStore,
    StoredLogps,
    open_shard,
    read_fingerprint,
    read_fingerprints,
)
from dpo_dist.training import reference as training_reference
from tests.dist.test_network import NODES, Network, network  # noqa: F401  (a fixture)
from tests.e2e.conftest import Overrides, last_evaluation
from tests.support.launch import assert_same_history, constants, history, run_verb, summary, train
from tests.support.launch import command as command_line
from tests.support.parent import ROOT, environment
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
    compared = "reference check passed: stored and newly computed log-probs are"
    assert compared in screen
    assert_same_history(history(tmp_path / "one"), rows, 0)
    # Its entries are its own now: nothing is asked again, nor compared.
    shutil.move(public, tmp_path / "gone")
    screen = train(overrides(*command, *second(tmp_path, "one", public), f"run.dir={tmp_path}/again")).output
    assert counts(tmp_path / "again") == (0, 24, 0)
    assert compared not in screen

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
    screen = train(overrides(*command, *second(tmp_path, "one", public))).output
    assert counts(tmp_path / "one", of_teacher=True) == (0, 0, 12)
    assert "teacher check passed" in screen
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


def test_a_teacher_that_is_not_here(
    overrides: Overrides, teacher: Path, assets: Path, tmp_path: Path
) -> None:
    command = ("loss=distill", "trainer.max_steps=2", "teacher.k=20", f"data.eval=[{assets}/eval.jsonl]")
    train(overrides(*command, f"teacher.path={teacher}"))
    public = tmp_path / "public"
    assert run_verb("store", ["push", str(tmp_path / "store"), str(public)]).code == 0
    [digest] = (each.reference for each in read_fingerprints(tmp_path / "store"))
    bare = shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    absent = (*command, f"teacher.path={bare}", f"teacher.digest={digest}")
    screen = train(overrides(*absent, *second(tmp_path, "one", public))).output
    assert counts(tmp_path / "one", of_teacher=True) == (0, 0, 17)
    assert_same_history(history(tmp_path / "one"), history(tmp_path / "run"), 0)
    report = summary(tmp_path / "one")["reference"]["teacher"]
    assert (report["digest"], report["not_compared"]) == (digest, [str(public)])
    assert 1 < report["mean_entropy"] < 10
    assert f"nothing here can compare these answers with the model {digest}" in screen
    card = (tmp_path / "one" / "model" / "README.md").read_text()
    assert (
        f"the digest `{digest}`, were computed elsewhere, and nothing compared them with the teacher" in card
    )
    agreement = last_evaluation(tmp_path / "one")["eval_teacher/agreement"]
    assert f"is the teacher's at {100 * agreement:.0f} % of the tokens" in card
    # It is said again of the own store's, by two ranks.
    train(overrides(*absent, *second(tmp_path, "one", public), f"run.dir={tmp_path}/again"), processes=2)
    assert counts(tmp_path / "again", of_teacher=True) == (0, 17, 0)
    assert summary(tmp_path / "again")["reference"]["teacher"]["not_compared"] == [str(public)]
    assert_same_history(history(tmp_path / "again"), history(tmp_path / "run"), 2e-5)
    # Answers of another teacher are none of this one.
    other = [*absent[:-1], f"teacher.digest={'ab' * 16}", *second(tmp_path, "other", public)]
    refused = run_verb("train", overrides(*other))
    assert refused.code == 2
    assert "answers of a teacher that is not here are missing" in refused.output
    assert "17 responses without an answer" in refused.output


@pytest.mark.cluster
def test_two_machines_and_what_one_of_them_serves(
    overrides: Overrides,
    teacher: Path,
    tmp_path: Path,
    network: Network,  # noqa: F811
) -> None:
    """The second machine has no weights of the teacher, and only the network to the first one."""
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp")
    command = ("loss=distill", "trainer.max_steps=2", "teacher.k=20")
    train(overrides(*command, f"teacher.path={teacher}"))
    public = tmp_path / "public"
    assert run_verb("store", ["push", str(tmp_path / "store"), str(public)]).code == 0
    [fingerprint] = read_fingerprints(tmp_path / "store")
    bare = shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    absent = (*command, f"teacher.path={bare}", f"teacher.digest={fingerprint.reference}")
    url = f"http://{NODES[0]}:8000"
    serve = [sys.executable, "-m", "http.server", "8000", "--bind", NODES[0], "--directory", str(public)]
    with subprocess.Popen(
        ["ip", "netns", "exec", f"{network.name}0", *serve], stderr=subprocess.DEVNULL
    ) as server:
        try:
            for processes in (1, 2):
                folder = tmp_path / f"of-{processes}"
                keys = [f"reference.store={folder}-store", f"run.dir={folder}", f"reference.behind=[{url}]"]
                on_second = ["ip", "netns", "exec", f"{network.name}1"]
                ended = subprocess.run(
                    [*on_second, *command_line("train", overrides(*absent, *keys), processes)],
                    cwd=ROOT,
                    env=environment(),
                    capture_output=True,
                    text=True,
                    timeout=600,
                    check=False,
                )
                assert ended.returncode == 0, ended.stdout + ended.stderr
                assert counts(folder, of_teacher=True) == (0, 0, 12)
                assert_same_history(history(folder), history(tmp_path / "run"), 2e-5 * (processes - 1))
        finally:
            server.kill()


def publish_wrong(tmp_path: Path) -> Path:
    """Publish what the run's store has, each number another one; the published store."""
    [folder] = (path.parent for path in (tmp_path / "store").glob("*/space.json"))
    fingerprint = read_fingerprint(folder)
    assert fingerprint is not None
    shards = [shard for shard in map(open_shard, sorted(folder.glob("*.safetensors"))) if shard]
    keys = np.concatenate([shard.keys for shard in shards])
    values = [entry - np.float32(0.01) for entry in LogpStore.open(folder.parent, fingerprint).read(keys)]
    (tmp_path / "wrong" / folder.name).mkdir(parents=True)
    LogpStore.open(tmp_path / "wrong", fingerprint).write(keys, values)
    assert run_verb("store", ["push", str(tmp_path / "wrong"), str(tmp_path / "public")]).code == 0
    return tmp_path / "public"


def _killed_before_the_comparison() -> None:
    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(training_reference, "choose_sample", killed)  # noqa: B010  (mypy)


@pytest.mark.parametrize("of_policy", [True, False])
def test_wrong_entries_of_others_are_found_and_not_kept(
    overrides: Overrides, tmp_path: Path, of_policy: bool
) -> None:
    """By the policy that starts from the reference, or by the reference that is loaded for this alone."""
    reference = [] if of_policy else [f"reference.path={write_model(tmp_path / 'reference', seed=2)}"]
    command = ["trainer.max_steps=2", *reference]
    train(overrides(*command))
    public = publish_wrong(tmp_path)
    alone = [each for each in second(tmp_path, "one", public) if "behind" not in each]
    if not of_policy:  # a run that is killed between the two, and one that asks nobody
        fetching = overrides(*command, *second(tmp_path, "one", public))
        assert run_verb("train", fetching, prepare=_killed_before_the_comparison).code != 0
        refused = run_verb("train", overrides(*command, *alone))
    else:
        refused = run_verb("train", overrides(*command, *second(tmp_path, "one", public)))
    assert refused.code == 2
    assert "differ from a fresh computation" in refused.output
    assert f"remove {public} from reference.behind" in refused.output
    train(overrides(*command, *alone))
    assert counts(tmp_path / "one") == (24, 0, 0)
    assert_same_history(history(tmp_path / "one"), history(tmp_path / "run"), 0)


def test_log_probs_of_another_cpu_are_taken_if_they_are_accepted(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without vector instructions torch has other kernels."""
    write_model(tmp_path / "reference", seed=2)
    command = ("trainer.max_steps=2", f"reference.path={tmp_path}/reference")
    with monkeypatch.context() as other_cpu:
        other_cpu.setenv("ATEN_CPU_CAPABILITY", "default")
        train(overrides(*command), cold=True)
    [fingerprint] = read_fingerprints(tmp_path / "store")
    if fingerprint.profile["cpu"] == torch.backends.cpu.get_cpu_capability():
        pytest.skip("this CPU has no vector instructions that torch uses")
    public = tmp_path / "public"
    assert run_verb("store", ["push", str(tmp_path / "store"), str(public)]).code == 0
    screen = train(overrides(*command, *second(tmp_path, "same", public))).output
    assert counts(tmp_path / "same") == (24, 0, 0)
    assert f"other there: cpu {fingerprint.profile['cpu']} (here " in screen
    rows = history(tmp_path / "same")
    for processes, behind in ((1, public), (2, "")):
        keys = [*second(tmp_path, "one", public), f"reference.behind=[{behind}]", "reference.accept=rounding"]
        screen = train(overrides(*command, *keys), processes=processes).output
        report = summary(tmp_path / "one")["reference"]
        assert report["rounded"] == {fingerprint.name: 24}
        assert f"24 of them by other numerics, of the fingerprint {fingerprint.name}" in screen
        assert (report["computed"], "drift" in report) == (0, processes == 1), "compared once"
        assert_same_history(history(tmp_path / "one"), rows, 1e-4)
        shutil.move(tmp_path / "one", tmp_path / f"done-{processes}")
    assert not list((tmp_path / "one-store").glob("[0-9a-f]*/*.fetched"))
    own = {file.parent.name for file in (tmp_path / "one-store").glob("*/*.safetensors")}
    assert own == {fingerprint.name}, "none under the numerics of this run"


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

    def killed(
        self: StoreFiller, store: LogpStore, keys: Keys, entries: list[StoredLogps], url: str
    ) -> set[str]:
        write(self, store, keys, entries, url)
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
