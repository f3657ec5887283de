"""The mirror of a run: what is uploaded, restored, refused, and what happens when uploads fail."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Resume, RunConfig
from dpo_dist.distributed.checkpoint.saver import CheckpointSaver, drop_checkpoints, latest_checkpoint
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import CheckpointError, ConfigError, RunOutcome
from dpo_dist.foundation.files import write_text
from dpo_dist.training import mirror as module
from dpo_dist.training.mirror import Mirror
from dpo_dist.training.start.dry_run import start_in_words
from dpo_dist.training.start.run_state import RunState, write_state
from tests.support.alone import ALONE
from tests.support.one_weight import Weights

WORDS = ["model.path=somewhere", "data.train=[pairs.jsonl]"]
CONFIG = load_run_config(WORDS)
OTHER = load_run_config([*WORDS, "loss.beta=0.7"])
IDENTITY = {"data": "d", "eval_data": None, "model": "m", "reference": None, **CONFIG.identity.recorded}


class Bucket(MemoryFileSystem):
    """A bucket in memory that can break, be slow, and have different content at each time."""

    protocol = "bucket"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    async_impl, asynchronous = True, False  # as s3fs: it has no folders
    broken: str | None = None
    gate = threading.Event()
    puts: list[str] = []  # noqa: RUF012

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        assert self.gate.wait(20)
        if self.broken is not None and self.broken in rpath:
            raise OSError(f"no route to https://me:secret@{rpath}")
        self.puts.append(rpath)
        super().put_file(lpath, rpath, **kwargs)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        if recursive:
            raise OSError("a folder is no object")
        super().rm(path)


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    for name, value in (("store", {}), ("puts", []), ("broken", None), ("pseudo_dirs", [""])):
        monkeypatch.setattr(Bucket, name, value)
    Bucket.gate.set()
    MemoryFileSystem.store.clear()
    yield Bucket
    Bucket.gate.set()
    for thread in threading.enumerate():
        if thread.name == "mirror":
            thread.join(20)


class Run:
    """A run of one weight with a mirror, as `training.run` connects them."""

    def __init__(
        self, path: Path, url: str = "bucket://b/run", keep_last: int = 2, config: RunConfig = CONFIG
    ):
        self.folder, self.lines, self.keep_last = RunFolder(path), list[str](), keep_last
        for each in (path, self.folder.metrics, self.folder.logs, self.folder.wandb_id.parent):
            each.mkdir(parents=True, exist_ok=True)
        self.folder.rank_log(0).write_text("the log of this start")
        console = Console(LineScreen(self.lines.append))
        self.mirror = Mirror(url, self.folder, config.identity, keep_last, console)
        self.config = config

    def start(self, resume: Resume = Resume.auto) -> int:
        """Restore and resume; return the step."""
        self.mirror.restore(resume)
        found = latest_checkpoint(self.folder.checkpoints, ALONE)
        write_text(self.folder.environment, "{}")
        write_text(self.folder.config, to_yaml(self.config))
        self.state(RunOutcome.started, 0 if found is None else found.state["step"])
        self.mirror.claim()
        self.weights = Weights()
        self.saver = CheckpointSaver(
            self.folder.checkpoints,
            self.keep_last,
            [self.weights],
            ALONE,
            committed=self.committed,
            in_use=self.mirror.in_use,
        )
        if found is None:
            write_text(self.folder.log_history, "")
            return 0
        self.weights.load_shards(found.folder)
        self.saver.resume(found.folder, found.state["best"])
        assert self.weights.value == found.state["step"] <= len(self.folder.log_history.read_text())
        return self.weights.value

    def committed(self, step: int) -> None:
        self.state(RunOutcome.started, step)
        self.mirror.upload()

    def state(self, outcome: RunOutcome, step: int) -> None:
        write_state(self.folder, RunState(outcome, step, IDENTITY | self.config.identity.recorded))

    def save(self, *steps: int, best: int | None = None, waits: bool = True) -> None:
        for step in steps:
            write_text(self.folder.log_history, "r" * step)
            self.weights.weight.fill_(step)
            state = {"step": step, "best": best, **self.config.identity.recorded}
            self.saver.save(step, state, best_step=best)
            self.saver.commit()
            if waits:
                self.wait()

    def wait(self) -> None:
        while (thread := self.mirror._thread) is not None:
            thread.join(20)
        self.saver._end_deleting()

    def end(self) -> None:
        """Write the model and the report, as `finish` does."""
        write_text(self.folder.model / "model.safetensors", "weights")
        write_text(self.folder.report, "page")
        self.state(RunOutcome.completed, self.weights.value)
        if not self.keep_last:
            drop_checkpoints(self.folder.checkpoints)
        self.mirror.finish(lambda: False)
        self.saver.close()


def files(folder: RunFolder) -> dict[str, bytes]:
    """The files of a run but its logs."""
    every = ((file.relative_to(folder.path).as_posix(), file) for file in folder.path.rglob("*"))
    return {name: file.read_bytes() for name, file in every if file.is_file() and "logs/" not in name}


def there() -> list[str]:
    """The checkpoints of the bucket that have a manifest."""
    return sorted(name.split("/")[-2] for name in Bucket.store if name.endswith("/manifest.json"))


def test_a_lost_run_resumes_from_its_last_checkpoint_with_its_rows(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    assert run.start() == 0
    write_text(run.folder.wandb_id, "id")
    write_text(run.folder.samples_file(3), "sampled")
    run.save(1, 2, 3)
    assert there() == ["step-000002", "step-000003"]
    again = Run(tmp_path / "b")
    assert again.start() == 3
    assert again.folder.rank_log(0).read_text() == "the log of this start"
    older = "checkpoints/step-000002/"
    kept = {name: content for name, content in files(run.folder).items() if not name.startswith(older)}
    assert files(again.folder) == kept
    again.save(4)
    assert there() == ["step-000003", "step-000004"]
    assert Run(tmp_path / "c").start(Resume.must) == 4


@pytest.mark.parametrize("url", ["memory://run", "file://{}/mirror", "{}/mirror"])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_a_complete_run_is_whole_there(url: str, keep_last: int, tmp_path: Path) -> None:
    url = url.format(tmp_path)
    run = Run(tmp_path / "a", url, keep_last)
    run.start()
    run.save(1, 2, best=1)
    run.save(3, best=1)
    run.end()
    assert "has the whole run" in run.lines[-1]
    again = Run(tmp_path / "b", url, keep_last)
    again.mirror.restore(Resume.auto)
    assert files(again.folder) == files(run.folder)
    steps = ["step-000001"] if keep_last == 0 else ["step-000001", "step-000003"]
    assert sorted(path.name for path in again.folder.checkpoints.glob("step-*")) == steps
    system, path = fsspec.url_to_fs(url)
    left = {name.split("/run/")[-1].split("/mirror/")[-1] for name in system.find(path)}
    assert {name for name in left if not name.startswith("logs/")} == set(files(run.folder))


@pytest.mark.parametrize("lost", ["model.safetensors", "step-000002/manifest.json"])
def test_a_download_of_a_complete_run_that_is_killed_is_begun_again(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, get = Run(tmp_path / "a"), Bucket.get_file
    run.start()
    run.save(1, 2)
    write_text(run.folder.model / "another.safetensors", "weights")
    run.end()

    def die(self: Bucket, name: str, *rest: Any, **options: Any) -> None:
        if name.endswith(lost):
            raise KeyboardInterrupt
        get(self, name, *rest, **options)

    again = Run(tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "get_file", die)
        with pytest.raises(KeyboardInterrupt):
            again.mirror.restore(Resume.auto)
    again.mirror.restore(Resume.auto)
    older = "checkpoints/step-000001/"
    assert files(again.folder) == {n: c for n, c in files(run.folder).items() if not n.startswith(older)}


def test_the_newest_checkpoint_is_next_and_the_one_in_use_is_not_deleted(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", keep_last=1)
    run.start()
    Bucket.gate.clear()
    run.save(1, waits=False)
    deadline = time.monotonic() + 20
    while not run.mirror.in_use():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.save(2, 3, 4, waits=False)
    run.saver._end_deleting()
    assert sorted(path.name for path in run.folder.checkpoints.glob("step-*")) == [
        "step-000001",
        "step-000004",
    ]
    assert there() == []
    Bucket.gate.set()
    run.wait()
    assert not any("step-000002" in name or "step-000003" in name for name in Bucket.puts)
    assert there() == ["step-000004"]
    run.save(5)
    assert [path.name for path in run.folder.checkpoints.glob("step-*")] == ["step-000005"]
    assert there() == ["step-000005"]
    assert run.lines == []


def test_a_checkpoint_is_there_when_all_its_files_and_rows_are(tmp_path: Path) -> None:
    """Whenever the upload ends, what is there resumes: the last checkpoint, or the new one."""
    run, ends = Run(tmp_path / "a", keep_last=1), []
    run.start()
    run.save(1)
    before = dict(Bucket.store)
    Bucket.puts.clear()
    run.save(2)
    names = list(Bucket.puts)
    assert len(set(names)) == len(names)
    assert [name for name in names if "/step-" in name][-1].endswith("manifest.json")
    for number, name in enumerate(names):
        Bucket.store.clear()
        Bucket.store.update(before)
        Bucket.broken = None
        other = Run(tmp_path / f"other-{number}", keep_last=1)
        assert other.start() == 1
        Bucket.broken = name
        other.save(2)
        Bucket.broken = None
        ends.append(Run(tmp_path / f"again-{number}", keep_last=1).start())
    assert ends == sorted(ends)
    assert set(ends) == {1, 2}


def test_a_failed_upload_is_one_warning_without_secrets_and_is_made_good(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.start()
    Bucket.broken = "b/run"
    run.save(1, 2)
    (line,) = run.lines
    assert line.startswith("warning: the mirror bucket://b/run fails")
    assert "no route to" in line
    assert "secret" not in line
    run.mirror.finish(lambda: False)
    assert "is behind the run" in run.lines[-1]
    Bucket.broken = None
    run.save(3)
    assert "complete again" in run.lines[-1]
    assert there() == ["step-000003"]


@pytest.mark.parametrize(("must_stop", "bound"), [(True, "_STOP_SECONDS"), (False, "_SILENT_SECONDS")])
def test_an_upload_that_hangs_does_not_hold_the_end_of_a_run(
    must_stop: bool, bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, bound, 0.3)
    run = Run(tmp_path / "a")
    run.start()
    Bucket.gate.clear()
    run.save(1, waits=False)
    started = time.monotonic()
    run.mirror.finish(lambda: must_stop)
    assert time.monotonic() - started < 5
    assert re.search(r"is behind the run: 0 of \d+ files are there", run.lines[-1])


def test_an_upload_that_is_slow_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lasts four times as long as no byte may come, and each byte comes in time."""
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.5)
    run, put = Run(tmp_path / "a"), Bucket.put_file
    run.start()

    def slow(self: Bucket, local: str, remote: str, callback: Callback, **options: Any) -> None:
        for _ in range(10 if remote.endswith("manifest.json") else 0):
            time.sleep(0.2)
            callback.relative_update(1)
        put(self, local, remote, **options)

    monkeypatch.setattr(Bucket, "put_file", slow)
    run.save(1, waits=False)
    run.mirror.finish(lambda: False)
    assert "has the whole run" in run.lines[-1]


def test_a_file_that_a_mounted_disk_takes_slowly_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system of folders says nothing while it copies a file."""
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.3)
    copy = LocalFileSystem.cp_file

    def slow(self: LocalFileSystem, source: str, target: str, **options: Any) -> None:
        time.sleep(1 if "manifest.json" in target else 0)
        copy(self, source, target, **options)

    monkeypatch.setattr(LocalFileSystem, "cp_file", slow)
    run = Run(tmp_path / "a", url=f"{tmp_path}/disk")
    run.start()
    run.save(1, waits=False)
    run.mirror.finish(lambda: False)
    assert "has the whole run" in run.lines[-1]


def damage(name: str) -> None:
    Bucket.store[name].seek(0)
    Bucket.store[name].write(b"x")


def test_a_damaged_checkpoint_is_not_restored_nor_ignored(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.start()
    run.save(1, 2)
    damage("bucket://b/run/checkpoints/step-000002/engine/rank-00000-00000.safetensors")
    again = Run(tmp_path / "b")
    again.mirror.restore(Resume.auto)
    assert [path.name for path in again.folder.checkpoints.glob("step-*")] == ["step-000001"]
    damage("bucket://b/run/checkpoints/step-000001/state.json")
    with pytest.raises(CheckpointError, match="damaged"):
        Run(tmp_path / "c").start()


def test_the_run_directory_counts_if_it_is_not_behind(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.start()
    run.save(1, 2)
    Bucket.broken = "b/run"
    run.save(3)
    Bucket.broken = None
    assert Run(tmp_path / "a").start() == 3
    other = Run(tmp_path / "b")
    other.start()
    other.save(4)
    assert Run(tmp_path / "a").start() == 4


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_dry_run_says_what_a_start_restores_and_downloads_nothing(resume: str, tmp_path: Path) -> None:
    place = [f"run.dir={tmp_path}/b", f"run.resume={resume}", "run.mirror=bucket://b/run"]
    run, config = Run(tmp_path / "a"), load_run_config([*WORDS, *place])
    run.start()
    if resume == "auto":
        assert start_in_words(config) == "new"
    run.save(4)
    assert start_in_words(config) == "step 4 is restored from run.mirror"
    assert not (tmp_path / "b").exists()
    other = load_run_config([*WORDS, *place, "loss.beta=0.7"])
    with pytest.raises(CheckpointError, match="the mirror has another run"):
        start_in_words(other)


def test_another_run_and_foreign_files_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.start()
    run.save(1)
    with pytest.raises(CheckpointError, match=r"another run(.|\n)*loss.beta=0.7(.|\n)*loss.beta=0.1"):
        Run(tmp_path / "b", config=OTHER).start()
    with pytest.raises(CheckpointError, match=r"run\.resume=never"):
        Run(tmp_path / "c").start(Resume.never)
    fsspec.filesystem("bucket").pipe_file("bucket://b/base/config.json", b"{}")
    with pytest.raises(CheckpointError, match="no run has written"):
        Run(tmp_path / "d", "bucket://b/base").start()
    with pytest.raises(ConfigError, match="password"):
        Run(tmp_path / "f", "s3://me:secret@b/run")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError):
        Run(tmp_path / "g", f"{tmp_path}/file")


class Plain(Bucket):
    """A bucket that cannot refuse a second file of one name."""

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if options:
            raise NotImplementedError
        super().pipe_file(path, value)


@pytest.mark.parametrize("kind", [Bucket, Plain])
def test_of_two_runs_that_start_with_one_mirror_the_second_stops(kind: type[Bucket], tmp_path: Path) -> None:
    """Each finds the mirror empty, loads its data, and then writes its state there."""
    fsspec.register_implementation("bucket", kind, clobber=True)
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two", config=OTHER)
    same = Run(tmp_path / "same")
    for run in (one, two, same):
        run.mirror.restore(Resume.auto)
        write_text(run.folder.environment, "{}")
        write_text(run.folder.config, to_yaml(run.config))
        run.state(RunOutcome.started, 0)
    one.mirror.claim()
    with pytest.raises(CheckpointError, match=r"another run, that of output/run-(.|\n)*0\.7(.|\n)*0\.1"):
        two.mirror.claim()
    same.mirror.claim()
    two.mirror.upload()
    two.mirror.finish(lambda: False)
    assert "another run, that of output/run-" in two.lines[-1]
    assert sorted(Bucket.store) == ["bucket://b/run/config.yaml", "bucket://b/run/run_state.json"]


def test_of_two_runs_that_write_at_the_same_moment_one_gets_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two", config=OTHER)
    pipe_file = Bucket.pipe_file

    def after_the_other(self: Bucket, path: str, value: bytes, **options: Any) -> None:
        if options:
            monkeypatch.setattr(Bucket, "pipe_file", pipe_file)
            one.start()
        pipe_file(self, path, value, **options)

    monkeypatch.setattr(Bucket, "pipe_file", after_the_other)
    with pytest.raises(CheckpointError, match="another run, that of output/run-"):
        two.start()
    assert Run(tmp_path / "again").start() == 0


def test_a_state_there_that_is_damaged_is_named_with_a_way_to_resume(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.start()
    run.save(1, 2)
    damage("bucket://b/run/run_state.json")
    with pytest.raises(CheckpointError, match="state of this run cannot be read") as raised:
        Run(tmp_path / "b").start()
    assert raised.value.where == "bucket://b/run/run_state.json"
    assert "but config.yaml to run.dir, and set run.mirror to an empty folder" in raised.value.remedy
    fsspec.filesystem("bucket").get("bucket://b/run", f"{tmp_path}/c", recursive=True)
    for name in ("run_state.json", "config.yaml"):
        (tmp_path / "c" / name).unlink()
    again = Run(tmp_path / "c", "bucket://b/new")
    assert again.start() == 2
