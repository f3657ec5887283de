"""The start of a run: lock, resume point, length, room on the disk; and the last files of a killed run."""

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.run_folder import RunFolder, checkpoint_name
from dpo_dist.config.schema import (
    AdapterConfig,
    FolderConfig,
    MetricsConfig,
    ModelConfig,
    ReferenceConfig,
    Resume,
    RunConfig,
    TrainerConfig,
)
from dpo_dist.data.config import DataConfig
from dpo_dist.distributed.checkpoint.saver import Checkpoint, CheckpointSaver
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import CheckpointError, ConfigError, RunOutcome
from dpo_dist.foundation.files import staged_file, temporary_name
from dpo_dist.model.files.manifest import MODEL_MANIFEST, write_manifest
from dpo_dist.tools.report.recorder import reporting
from dpo_dist.tools.report.run import write_page
from dpo_dist.training import run as ending
from dpo_dist.training.reporting.metrics_log import MetricsLog
from dpo_dist.training.reporting.recorder import Recorder
from dpo_dist.training.run import find_start, finish, lock_directory, record_start, run_to_its_end
from dpo_dist.training.start.dry_run import start_in_words
from dpo_dist.training.start.environment import describe_run
from dpo_dist.training.start.footprint import check_disk_room
from dpo_dist.training.start.open_run import Run, say_header
from dpo_dist.training.start.run_state import (
    RunState,
    check_identity,
    describe_changes,
    read_state,
    write_state,
)
from dpo_dist.training.steps.state import BestCheckpoint, Position
from tests.support.alone import ALONE
from tests.support.one_weight import Run as Saves
from tests.support.own_loss import OWN
from tests.support.own_metrics import OWN as OWN_METRICS

pytestmark = pytest.mark.slow

CONFIG = RunConfig(
    model=ModelConfig("somewhere"),
    data=DataConfig(cache="encoded"),
    reference=ReferenceConfig(store="reference"),
)
IDENTITY = {
    "run_digest": CONFIG.identity.digest,
    "data": "d",
    "eval_data": None,
    "model": "m",
    "reference": None,
}
SUMMARY: dict[str, Any] = {"final": {"loss": 0.5}, "best": {}, "steps": 4, "pairs_seen": 24}
Usage = namedtuple("Usage", "total used free")
GIB = 2**30


class Screen(Console):
    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def say(self, text: str, level: str = "info") -> None:
        self.lines.append(f"{level}: {text}")

    def result(self, _kind: str, _content: Any, lines: Sequence[str]) -> None:
        self.lines += lines


def run_in(folder: Path, keep_last: int = 2, resume: Resume = Resume.auto) -> Run:
    place, trainer = FolderConfig(str(folder), resume=resume), TrainerConfig(keep_last=keep_last)
    return Run(replace(CONFIG, run=place, trainer=trainer), ALONE, Screen())


def lines_of(run: Run) -> list[str]:
    assert isinstance(run.console, Screen)
    return run.console.lines


def save_checkpoint(folder: RunFolder, step: int, **state: Any) -> None:
    saver = CheckpointSaver(folder.checkpoints, 2, [], ALONE)
    saver.save(step, {"step": step, **(state or IDENTITY)})
    saver.commit()


def state_of(outcome: RunOutcome) -> RunState:
    return RunState(outcome, 4, dict(IDENTITY), SUMMARY if outcome is RunOutcome.exported else None)


def step_of(found: Any) -> int:
    """The step of the checkpoint that a start continues from."""
    assert isinstance(found, Checkpoint)
    return int(found.state["step"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path)


def write_result(folder: RunFolder) -> None:
    """Write a model with a manifest."""
    folder.model.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, folder.model / "model.safetensors")
    (folder.model / "config.json").write_text("{}")
    write_manifest(folder.model, None)


def recorder_of(run: Run) -> Recorder:
    return Recorder(run, MetricsLog.open(run.folder, 4), reporting())


@pytest.mark.parametrize("content", ["{", '{"outcome": "won", "step": 1, "identity": {}}'])
def test_an_unreadable_state_is_an_error_and_no_fresh_start(content: str, folder: RunFolder) -> None:
    folder.state.write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_start(run_in(folder.path))


@pytest.mark.parametrize(
    ("outcome", "resume"), [(RunOutcome.exported, Resume.auto), (RunOutcome.completed, Resume.must)]
)
def test_a_run_with_a_written_model_is_finished_even_without_checkpoints(
    outcome: RunOutcome, resume: Resume, folder: RunFolder
) -> None:
    write_state(folder, state_of(outcome))
    write_result(folder)
    assert find_start(run_in(folder.path, resume=resume)) == state_of(outcome)


def test_a_complete_run_without_its_model_resumes_from_a_checkpoint_or_is_an_error(folder: RunFolder) -> None:
    write_state(folder, state_of(RunOutcome.completed))
    folder.model.mkdir()
    with pytest.raises(CheckpointError, match="checkpoints are missing"):
        find_start(run_in(folder.path))
    save_checkpoint(folder, 4)
    assert step_of(find_start(run_in(folder.path))) == 4


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: (model / MODEL_MANIFEST).unlink(), f"{MODEL_MANIFEST} is missing"),
        (lambda model: (model / MODEL_MANIFEST).write_text("{"), f"{MODEL_MANIFEST} cannot be read"),
        (lambda model: save_file({"weight": torch.zeros(2)}, model / "model.safetensors"), "another content"),
        (lambda model: (model / "config.json").write_text("{ }"), "config.json has another content"),
        (lambda model: (model / "config.json").unlink(), "config.json is missing"),
        (lambda model: (model / "model.safetensors").unlink(), "it has no weights"),
    ],
)
def test_a_complete_run_whose_model_is_not_as_it_was_written_writes_it_again(
    damage: Callable[[Path], object], said: str, folder: RunFolder
) -> None:
    write_state(folder, state_of(RunOutcome.completed))
    save_checkpoint(folder, 4)
    write_result(folder)
    assert find_start(run_in(folder.path)) == state_of(RunOutcome.completed)
    damage(folder.model)
    run = run_in(folder.path)
    assert step_of(find_start(run)) == 4
    (line,) = lines_of(run)
    assert line.startswith(f"warning: {folder.model} is damaged and written again: ")
    assert said in line
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(CheckpointError, match="checkpoints are missing") as refused:
        find_start(run_in(folder.path))
    assert said in refused.value.got


def test_a_file_that_was_added_to_a_model_is_not_lost(folder: RunFolder) -> None:
    write_state(folder, state_of(RunOutcome.completed))
    save_checkpoint(folder, 4)
    write_result(folder)
    added = folder.model / "gguf" / "model.gguf"
    added.parent.mkdir()
    added.write_text("{}")
    with pytest.raises(CheckpointError, match="files that were added") as refused:
        find_start(run_in(folder.path))
    assert refused.value.got == "gguf/model.gguf"
    added.unlink()
    assert find_start(run_in(folder.path)) == state_of(RunOutcome.completed)


def test_a_dry_run_counts_checkpoints_as_a_start_does(folder: RunFolder) -> None:
    checkpoint = folder.checkpoints / checkpoint_name(10)
    temporary_name(checkpoint).mkdir(parents=True)  # of a save that was killed
    config = run_in(folder.path).config
    assert start_in_words(config) == "new"
    checkpoint.mkdir()
    assert "resumes" in start_in_words(config)


def test_checkpoints_on_a_disk_that_is_not_mounted_are_an_error(folder: RunFolder, tmp_path: Path) -> None:
    folder.checkpoints.symlink_to(disk := tmp_path / "disk")
    with pytest.raises(CheckpointError, match=f"a link to {disk}, which does not exist"):
        find_start(run_in(folder.path))
    disk.mkdir()
    assert find_start(run_in(folder.path)) is None


def test_changed_inputs_are_refused_by_name(folder: RunFolder) -> None:
    check_identity({**IDENTITY, "step": 4}, IDENTITY, folder.state)
    titles = {
        "data": "training data",
        "eval_data": "evaluation data",
        "model": "model",
        "reference": "reference",
    }
    for name, title in titles.items():
        with pytest.raises(CheckpointError, match=f"the {title}.* of this run has changed"):
            check_identity({**IDENTITY, name: "former"}, IDENTITY, folder.state)


def test_a_start_removes_the_summary_of_an_earlier_one(folder: RunFolder) -> None:
    run = run_in(folder.path)
    recorder_of(run).close(SUMMARY, RunOutcome.preempted)
    assert ">preempted<" in folder.report.read_text()
    record_start(run, {"packages": {}}, state_of(RunOutcome.started), write_page)
    assert read_state(folder) == state_of(RunOutcome.started)
    assert not folder.summary.exists()
    assert ">preempted<" not in folder.report.read_text()


@pytest.mark.parametrize("step", [0, 4])
def test_a_start_at_step_0_removes_the_samples_of_an_earlier_one(step: int, folder: RunFolder) -> None:
    """They may be of another model."""
    folder.samples.mkdir()
    folder.samples_reference.touch()
    record_start(run_in(folder.path), {}, replace(state_of(RunOutcome.started), step=step), write_page)
    assert folder.samples_reference.exists() == (step > 0)


def test_a_step_below_0_is_an_error(folder: RunFolder) -> None:
    write_state(folder, replace(state_of(RunOutcome.preempted), step=-1))
    with pytest.raises(CheckpointError, match="state of this run cannot be read"):
        find_start(run_in(folder.path))


def test_the_report_of_a_complete_run_is_written(folder: RunFolder) -> None:
    save_checkpoint(folder, 4)
    run = run_in(folder.path, keep_last=0)
    recorder, completed = recorder_of(run), state_of(RunOutcome.completed)
    recorder.row({"step": 4, "loss": 0.5})
    finish(run, completed, recorder, SUMMARY)
    summary = json.loads(folder.summary.read_text())
    assert summary.pop("verdict")["findings"] == []
    assert summary == {**SUMMARY, "exit": "completed"}
    assert folder.report.is_file()
    assert read_state(folder) == completed
    assert list(folder.checkpoints.iterdir()) == []


def test_a_run_that_diverges_again_keeps_the_step_that_the_same_command_starts_from(
    folder: RunFolder,
) -> None:
    write_state(folder, replace(state_of(RunOutcome.started), step=2))
    run = run_in(folder.path)
    finish(run, state_of(RunOutcome.diverged), recorder_of(run), SUMMARY)
    assert read_state(folder) == replace(state_of(RunOutcome.diverged), step=2)


def loop_of(run: Run) -> Any:
    """A loop that has trained 4 steps."""
    return SimpleNamespace(
        run=run,
        identity=IDENTITY,
        recorder=Recorder(run, MetricsLog.open(run.folder, None), reporting()),
        train=lambda _position: True,
        policy=SimpleNamespace(loss_scale=None),
        inputs=SimpleNamespace(
            sampler=SimpleNamespace(steps=4, global_batch_pairs=2),
            eval_set="examples",
            tokenizer="tokens",
            counts={},
        ),
        reference_report={},
    )


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a run has its card only."""
    monkeypatch.setattr(ending, "unsharded_loading", nullcontext)
    monkeypatch.setattr(ending, "export_checkpoint", lambda *given, **_is_new: given[3]("loader"))


@pytest.mark.usefixtures("without_weights")
def test_a_model_whose_report_cannot_be_written_is_finished_by_the_next_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_of(run_in(folder.path))
    save_checkpoint(folder, 4, pairs_seen=24, **IDENTITY)
    monkeypatch.setattr(Recorder, "close", mock.Mock(side_effect=OSError("a full disk")))
    with pytest.raises(OSError, match="a full disk"):
        run_to_its_end(loop, Position(4, pairs_seen=24), mock.Mock())
    found = read_state(folder)
    assert found is not None
    assert (found.outcome, found.step) == (RunOutcome.exported, 4)
    assert found.summary is not None
    assert found.summary["pairs_seen"] == 24


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize(
    ("metric", "steps", "pairs", "is_evaluated"),
    [("eval_loss", [1, 2], 12, False), (None, [1, 2, 3, 4], 24, True)],
)
def test_the_card_tells_of_the_step_whose_weights_are_the_model(
    metric: str | None,
    steps: list[int],
    pairs: int,
    is_evaluated: bool,
    folder: RunFolder,
) -> None:
    run, cards = run_in(folder.path), mock.Mock()
    run.config = replace(run.config, trainer=TrainerConfig(keep_best=metric, eval_every=1))
    loop, best = loop_of(run), metric and BestCheckpoint(metric, 2, 0.5)
    for step in (1, 2, 3, 4):
        loop.recorder.row({"step": step, "loss": 0.5})
    loop.recorder.metrics.save()
    save_checkpoint(folder, steps[-1], pairs_seen=pairs, **IDENTITY)
    run_to_its_end(loop, Position(4, pairs_seen=24, best=best), cards)
    [(_, rows, summary, *_), options] = cards.call_args
    assert [row["step"] for row in rows] == steps
    assert (summary["steps"], summary["pairs_seen"]) == (steps[-1], pairs)
    assert options == {"is_evaluated": is_evaluated}


def test_the_source_of_a_loss_function_is_recorded(folder: RunFolder) -> None:
    run = run_in(folder.path)
    run.config = replace(CONFIG, loss=LossConfig(LossKind.custom, function=OWN))
    environment, _ = describe_run(run.config, run.world)
    assert environment["loss_function"].startswith(f"custom loss {OWN}")


def test_own_metrics_are_tried_once_where_all_ranks_hear_of_an_error(folder: RunFolder) -> None:
    """The start hands the tried metrics on: another call of the function could raise on one rank only."""
    run = run_in(folder.path)
    run.config = replace(CONFIG, metrics=MetricsConfig(OWN_METRICS))
    environment, custom = describe_run(run.config, run.world)
    assert environment["metrics_function"].startswith(f"{', '.join(custom.names)} by ")
    assert custom.names == ("custom/margin", "custom/likelier")
    assert not hasattr(ending, "custom_metrics")


def test_a_lock_holds_until_the_start_ends_and_files_of_a_killed_one_are_removed(folder: RunFolder) -> None:
    files = folder.state, folder.summary, folder.samples_file(2), folder.bad_step(3), folder.wandb_id
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    of_killed = [temporary_name(file) for file in files]
    for file in of_killed:
        file.touch()
        os.utime(file, (0, 0))
    with staged_file(folder.samples_file(3)) as own, lock_directory(run_in(folder.path)):
        assert own.exists(), "this process still writes it"
        own.touch()
        assert [file.exists() for file in of_killed] == [False] * 5
        with (
            pytest.raises(ConfigError, match="another process is training"),
            lock_directory(run_in(folder.path)),
        ):
            pass
    with lock_directory(run_in(folder.path)):
        pass


# Length


def config_of(folder: Path, *options: str) -> RunConfig:
    return load_run_config(["model.path=m", "data.train=[a.jsonl]", f"run.dir={folder}", *options])


def complete(config: RunConfig, *, has_checkpoint: bool = True) -> None:
    """A complete run of 8 steps."""
    folder = RunFolder(config.run.path)
    identity: dict[str, Any] = dict(config.identity.recorded)
    write_result(folder)
    folder.config.write_text(to_yaml(config))
    write_state(folder, RunState(RunOutcome.completed, 8, identity))
    if has_checkpoint:
        save_checkpoint(folder, 8, steps=8, pairs_seen=500, **identity)


def start_of(config: RunConfig) -> Checkpoint | RunState | None:
    return find_start(Run(config, ALONE, Screen()))


@pytest.mark.parametrize(("former", "new"), [([], "epochs=2"), (["trainer.max_steps=8"], "max_steps=9")])
def test_a_complete_run_continues_to_another_length(former: list[str], new: str, tmp_path: Path) -> None:
    config, longer = config_of(tmp_path, *former), config_of(tmp_path, f"trainer.{new}")
    complete(config)
    assert isinstance(start_of(config), RunState)
    assert step_of(start_of(longer)) == 8
    # The config.yaml and the state of a start that was killed before its first checkpoint.
    RunFolder(longer.run.path).config.write_text(to_yaml(longer))
    write_state(
        RunFolder(longer.run.path), RunState(RunOutcome.started, 8, {"run_digest": longer.identity.digest})
    )
    assert step_of(start_of(longer)) == 8


@pytest.mark.parametrize("kinds", [("adamw", "adamw_bf16"), ("adamw_bf16", "adamw")], ids=" to ".join)
def test_a_run_continues_by_the_other_adamw_alone(kinds: tuple[str, str], tmp_path: Path) -> None:
    words = ["model.dtype=bf16", "trainer.max_steps=9"]
    first, other = (config_of(tmp_path, *words, f"optim.kind={kind}") for kind in kinds)
    complete(first)
    assert isinstance(start_of(other), RunState), "all steps are done"
    longer = replace(other, trainer=replace(other.trainer, max_steps=10))
    checkpoint = start_of(longer)
    assert step_of(checkpoint) == 8
    assert isinstance(checkpoint, Checkpoint)
    changes = describe_changes(checkpoint.state, longer, 10, 64)
    assert changes[0] == f"optim.kind={kinds[1]} continues from the states of {kinds[0]}"
    assert changes[1].startswith("training longer: 10 steps in place of 8; ")
    assert not describe_changes(checkpoint.state, first, 8, 64)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        start_of(config_of(tmp_path, *words, f"optim.kind={kinds[1]}", "optim.lr=0.5"))


def test_another_key_is_refused_beside_a_greater_length(tmp_path: Path) -> None:
    complete(config_of(tmp_path))
    other = config_of(tmp_path, "trainer.epochs=2", "optim.lr=0.5", "optim.max_grad_norm=null")
    for _ in ("a complete run", "a run with a checkpoint"):
        with pytest.raises(CheckpointError, match="belongs to another configuration") as error:
            start_of(other)
        assert "optim.lr=0.5, optim.max_grad_norm=null" in error.value.got
        assert "optim.lr=1e-06" in error.value.expected
        RunFolder(other.run.path).state.unlink(missing_ok=True)


# Room on the disk: checkpoints of 12 GiB, and a model of 2 GiB, of 2^30 weights in bf16.


def check_room(
    run_dir: Path, steps_done: int = 0, steps: int = 100, adapter: AdapterConfig | None = None, **trainer: Any
) -> None:
    place, model = FolderConfig(dir=str(run_dir)), ModelConfig(path="m", adapter=adapter)
    config = RunConfig(run=place, model=model, trainer=TrainerConfig(**trainer))
    check_disk_room(Run(config, ALONE, Screen()), GIB, steps_done, steps)


@pytest.mark.parametrize(
    ("trainer", "there", "gib"),
    [
        ({"save_every": 10}, (), 36),  # two kept, and the one that is written beside them
        ({"save_every": 50}, (), 26),  # two in all, and the model beside them
        ({"save_every": 0}, (), 14),
        ({"save_every": 10, "steps": 11, "steps_done": 9}, (), 26),
        ({"save_every": 10, "steps": 100, "steps_done": 100}, (), 2),  # the model alone is missing
        ({"save_every": 0, "keep_best": "eval_loss", "eval_every": 10}, (), 48),
        ({"save_every": 10, "steps_done": 20, "keep_last": 1}, (10, 20), 12),
        ({"save_every": 10, "steps_done": 20, "keep_last": 3}, (10, 20), 24),
    ],
)
def test_the_room_is_that_of_the_checkpoints_at_a_time(
    trainer: dict[str, Any], there: tuple[int, ...], gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    saves = Saves(tmp_path / "checkpoints", keep_last=3)
    saves.start()
    saves.save(*there)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, gib * GIB))
    check_room(tmp_path, **trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, gib * GIB - 1))
    with pytest.raises(ConfigError, match="no room"):
        check_room(tmp_path, **trainer)
    check_room(tmp_path, adapter=AdapterConfig(), **trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    check_room(tmp_path, **trainer)


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["model.adapter={r: 4}"], True),  # the default is a rate for all weights
        (["model.adapter={r: 4}", "optim.lr=1e-6"], True),
        (["model.adapter={r: 4}", "optim.lr=5e-6"], False),
        (["model.adapter={r: 4}", "optim.lr=2e-4"], False),
        (["optim.lr=1e-6"], False),
    ],
)
def test_an_adapter_at_a_rate_for_all_weights_is_said_before_training(words: list[str], warned: bool) -> None:
    said: list[str] = []
    config = load_run_config(["model.path=m", "data.train=[a.jsonl]", *words])
    world: Any = SimpleNamespace(
        peers=[SimpleNamespace(host="here")],
        size=1,
        device=torch.device("cpu"),
        sequence=None,
        experts=None,
        shards=None,
    )
    say_header(Run(config, world, Console(LineScreen(said.append))))
    assert ("optim.lr=1e-4" in "".join(line for line in said if line.startswith("warning: "))) == warned
