"""Tracking sends rows to wandb, online or offline, and never stops or prompts a run."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import wandb

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ModelConfig, RunConfig, TrackingConfig, WandbMode
from dpo_dist.foundation.files import plain
from dpo_dist.insight.metrics.log import MetricsLog
from dpo_dist.insight.metrics.names import Histogram, wandb_names
from dpo_dist.insight.metrics.trackers import open_trackers
from dpo_dist.insight.metrics.wandb import Tracker, open_tracker
from dpo_dist.insight.metrics.wandb_file import read_records, read_rows
from tests.support.sample_files import write_samples
from tests.support.wandb_file import history_rows, media_rows
from tests.support.wandb_server import WandbServer

SECRET = "0123456789abcdef" * 2 + "01234567"


pytestmark = pytest.mark.usefixtures("own_wandb")


def config_of(mode: WandbMode) -> RunConfig:
    return RunConfig(model=ModelConfig(path="org/model"), tracking=TrackingConfig(wandb=mode))


def open_in(run_dir: Path, mode: WandbMode, **options: Any) -> Tracker:
    run_dir.mkdir(exist_ok=True)
    options.setdefault("request_stop", lambda: None)
    tracker = open_tracker(config_of(mode), RunFolder(run_dir), **options)
    assert tracker is not None
    return tracker


def records_of(run_dir: Path, kind: str) -> list[Any]:
    paths = sorted(run_dir.glob("wandb/*run-*/run-*.wandb"))
    records = [record for path in paths for record in read_records(path)]
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of the package; users do not see those of wandb."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("dpo_dist") and record.levelno >= logging.WARNING
    ]


ROWS = [
    {"step": 1, "loss": 0.2, "rewards/margins": 0.0},
    {"step": 2, "loss": 0.65, "rewards/margins": 0.2},
    {"step": 2, "eval_loss": 0.66},
    {"step": 3, "loss": 0.5},
    {"step": 4, "loss": float("nan")},
]


def test_an_offline_run_has_the_rows_the_configuration_and_the_outcome(tmp_path: Path) -> None:
    run_dir = tmp_path / "a-run-12345678"
    said: list[str] = []
    tracker = open_in(run_dir, WandbMode.offline, environment={"torch": "2.13.0"}, say=said.append)
    (line,) = said
    assert f"upload with: wandb sync {run_dir / 'wandb'}" in line
    for row in ROWS[:3]:
        tracker.log(row)
    tracker.finish("completed", {"steps": 2, "reference": {"mode": "cached", "hits": 7}})

    assert history_rows(run_dir) == [
        {"train/global_step": 1, "train/loss": 0.2, "train/rewards/margins": 0.0},
        {"train/global_step": 2, "train/loss": 0.65, "train/rewards/margins": 0.2},
        {"train/global_step": 2, "eval/loss": 0.66, "eval/global_step": 2},
    ]
    (run,) = records_of(run_dir, "run")[:1]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["model"]["path"], config["tracking"]["wandb"]) == ("org/model", "offline")
    assert config["environment"] == {"torch": "2.13.0"}
    assert run.display_name == "a-run-12345678 sigmoid beta=0.1 lr=1e-06"
    metrics = {metric.glob_name or metric.name: metric for metric in records_of(run_dir, "metric")}
    axes = {metric.step_metric for name, metric in metrics.items() if name != "train/global_step"}
    assert axes == {"train/global_step"}
    summary = summary_of(run_dir)
    losses = {name: value for name, value in summary.items() if "loss" in name}
    assert losses == {"train/loss": 0.65, "best/train/loss": 0.2, "eval/loss": 0.66, "best/eval/loss": 0.66}
    assert summary["steps"] == 2
    assert [record.exit_code for record in records_of(run_dir, "exit")] == [0]


def summary_of(run_dir: Path) -> dict[str, Any]:
    items = [item for record in records_of(run_dir, "summary") for item in record.update]
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_a_run_has_tables_histograms_its_verdict_and_its_model_by_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    folder = RunFolder(tmp_path)
    row = {"prompt": "a prompt", "reference": f"by hf_{SECRET}", "policy": "p" * 5000, "policy_tokens": 3}
    write_samples(tmp_path, 2, [row, row, row])
    folder.model.mkdir()
    (folder.model / "model.safetensors").write_text("w" * 100)
    tracking = TrackingConfig(wandb=WandbMode.offline, samples=2)
    config = RunConfig(model=ModelConfig(path="org/model"), tracking=tracking)
    tracker = open_trackers(config, folder, lambda: None, rows=[], environment={}, say=print)
    assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path))
    tracker.log({"step": 1, "loss": 0.7})
    margins = Histogram.of(np.array([0.0, 1.0, 1.0], dtype=np.float32))
    tracker.log({"step": 2, "eval_loss": 0.6, "eval_samples/length": 3.0}, margins)
    tracker.finish("completed", {"steps": 2, "verdict": {"sentence": "learnt little", "findings": []}})
    assert "WANDB_DATA_DIR" not in os.environ

    steps, evaluation = media_rows(tmp_path)
    assert steps == {}
    histogram = evaluation["eval/margins_histogram"]
    assert (sum(histogram["values"]), histogram["bins"][0], histogram["bins"][-1]) == (3, 0.0, 1.0)
    (table,) = tmp_path.glob(f"wandb/latest-run/files/{evaluation['eval/samples_table']['path']}")
    content = json.loads(table.read_text())
    assert content["columns"] == list(row)
    assert len(content["data"]) == 2
    prompt, reference, policy, _ = content["data"][0]
    assert (prompt, reference, len(policy) < 4100) == ("a prompt", "by ***", True)
    assert [run.notes for run in records_of(tmp_path, "run")][-1] == "Verdict: learnt little"
    assert "learnt little" in str(records_of(tmp_path, "summary"))
    artifacts = {record.type: record.manifest.contents for record in records_of(tmp_path, "artifact")}
    (model,) = artifacts.pop("model")
    assert (model.path, model.ref) == (
        "model/model.safetensors",
        f"{folder.model.as_uri()}/model.safetensors",
    )
    staged = [entry.local_path for entries in artifacts.values() for entry in entries]
    assert all(Path(path).is_relative_to(tmp_path) for path in staged)


@pytest.mark.parametrize(("outcome", "code"), [("preempted", 75), ("diverged", 3), ("failed", 1)])
def test_the_outcome_is_the_exit_code(tmp_path: Path, outcome: str, code: int) -> None:
    open_in(tmp_path, WandbMode.offline).finish(outcome, {})
    assert [record.exit_code for record in records_of(tmp_path, "exit")] == [code]
    assert len(records_of(tmp_path, "preempting")) == (outcome == "preempted")


def test_a_run_that_the_caller_has_open_stays_the_callers(tmp_path: Path) -> None:
    callers = wandb.init(project="other", mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    tracker = open_in(tmp_path / "run", WandbMode.offline)
    assert tracker.run.id == (tmp_path / "run" / "wandb" / "run_id.txt").read_text()
    tracker.log({"step": 1, "loss": 0.7})
    tracker.finish("completed", {})
    assert wandb.run is callers
    callers.log({"own": 1})
    callers.finish()
    wandb.teardown()  # writes its file
    assert history_rows(tmp_path / "run") == [{"train/global_step": 1, "train/loss": 0.7}]
    assert [row["own"] for row in read_rows(tmp_path / "wandb", callers.id)] == [1]


def test_a_resumed_job_continues_the_same_run(tmp_path: Path) -> None:
    first = open_in(tmp_path, WandbMode.offline)
    run_id = first.run.id
    for row in ROWS[:2]:
        first.log(row)
    first.alert("empty", "of step 2")
    first.finish("preempted", {})
    assert (tmp_path / "wandb" / "run_id.txt").read_text() == run_id

    time.sleep(1.0)  # wandb names its folders by the second
    said: list[str] = []
    second = open_in(tmp_path, WandbMode.offline, rows=ROWS[:1], say=said.append)
    assert second.run.id == run_id
    assert "wandb has the rows up to step 2" in said[0]
    second.log(ROWS[1])
    second.alert("empty", "of step 2")
    for row in ROWS[2:]:
        second.log(row)
    second.alert("long", "of step 3")
    second.finish("completed", {})
    assert [alert.text for alert in records_of(tmp_path, "alert")] == ["of step 2", "of step 3"]
    assert [row["train/global_step"] for row in history_rows(tmp_path)] == [1, 2, 2, 3, 4]
    assert [row["_step"] for row in read_rows(tmp_path / "wandb", run_id)] == [0, 1, 2, 3, 4]
    assert {run.run_id for run in records_of(tmp_path, "run")} == {run_id}
    found = summary_of(tmp_path)
    assert (found["best/train/loss"], found["eval/loss"], found["train/global_step"]) == (0.2, 0.66, 4)


KILLED = """
import json, sys, time
from pathlib import Path
import psutil
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.schema import TrackingConfig, WandbMode
from dpo_dist.insight.metrics.log import MetricsLog
from dpo_dist.insight.recorder import Recorder
from dpo_dist.insight.metrics.trackers import open_trackers
from dpo_dist.insight.metrics.wandb_file import read_rows

folder = RunFolder(Path(sys.argv[1]))
config = RunConfig(tracking=TrackingConfig(wandb=WandbMode.offline))

def steps_on_disk():
    rows = read_rows(folder.wandb_id.parent, folder.wandb_id.read_text())
    return [row["train/global_step"] for row in rows]

def train(checkpoint, last, end):
    said = []
    metrics = MetricsLog.open(folder, checkpoint or None)
    options = {"rows": metrics.rows, "environment": {}, "say": said.append}
    recorder = Recorder(metrics, open_trackers(config, folder, lambda: None, **options), said.append)
    for step in range(checkpoint + 1, last + 1):
        norm = float("inf" if step == 4 else step)
        recorder.record({"step": step, "loss": 1 / 3**step, "grad_norm": norm})
        if step % 2 == 0:
            recorder.record({"step": step, "eval_loss": 2 / 3**step})
        if step % 4 == 0:
            metrics.save()
    if end == "well":
        recorder.metrics.save()
        recorder.trackers.finish("completed", {"steps": last})
        return
    deadline = time.monotonic() + 240
    while end == "kept" and last not in steps_on_disk():
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    for process in (*psutil.Process().children(recursive=True), psutil.Process()):
        process.kill()

train(*json.loads(sys.argv[2]))
"""


def test_a_run_killed_twice_is_one_run_with_every_row_once_and_uploads_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run of a user"
    (run_dir / "dpo_metrics").mkdir(parents=True)
    starts = [(0, 6, "kept"), (4, 10, "lost"), (8, 13, "well")]
    for start in starts:  # each in a process of its own: wandb has threads, which a fork does not survive
        command = [sys.executable, "-c", KILLED, str(run_dir), json.dumps(start)]
        outcome = subprocess.run(command, check=False, capture_output=True, text=True)
        assert outcome.returncode == (0 if start[-1] == "well" else -9), outcome.stderr

    rows = [dict(row) for row in MetricsLog.open(RunFolder(run_dir), 13).rows]
    sent = history_rows(run_dir)
    assert [(row["train/global_step"], "eval/loss" in row) for row in sent] == [
        (row["step"], "eval_loss" in row) for row in rows
    ]
    expected = [wandb_names(row) for row in rows]
    assert [plain(row) for row in sent] == [plain(row) for row in expected]
    (run_id,) = {run.run_id for run in records_of(run_dir, "run")}
    numbers = [row["_step"] for row in read_rows(run_dir / "wandb", run_id)]
    assert numbers == list(range(len(rows)))

    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        program = Path(sys.executable).with_name("wandb")
        subprocess.run([program, "sync", "wandb"], cwd=run_dir, check=True, capture_output=True)
        assert server.history_rows() == sent


def test_wandb_gets_no_secret_of_the_command_line_or_of_its_own_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B adds the command line itself, unless it has a secret."""
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    monkeypatch.setattr(
        sys, "argv", ["train", f"tracking.project={SECRET}", "data.train=[ftp://me:word@host/a]"]
    )
    typed = list(sys.argv)
    monkeypatch.setenv("WANDB_NOTES", f"of {SECRET}")
    tracking = TrackingConfig(wandb=WandbMode.offline, project=SECRET)
    config = RunConfig(model=ModelConfig(path="org/model"), tracking=tracking)
    tracker = open_tracker(config, RunFolder(tmp_path), lambda: None)
    assert tracker is not None
    tracker.finish("completed", {})
    assert records_of(tmp_path, "environment") == []
    assert sys.argv == typed
    assert_no_secret_below(tmp_path)


def test_off_neither_writes_nor_imports_wandb(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig, TrackingConfig, WandbMode
from dpo_dist.insight.metrics.wandb import open_tracker
config = RunConfig(tracking=TrackingConfig(wandb=WandbMode.off))
assert open_tracker(config, RunFolder(Path({str(tmp_path / "run")!r})), lambda: None) is None
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [WandbMode.auto, WandbMode.online])
def test_without_a_key_the_run_is_offline_without_a_prompt(
    tmp_path: Path, mode: WandbMode, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_in(tmp_path / "run", mode)
    assert tracker.run.offline
    tracker.finish("completed", {})
    assert ("no usable key" in caplog.text) == (mode is WandbMode.online)


def assert_no_secret_below(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_unreachable_server_leaves_an_offline_run_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    said: list[str] = []
    tracker = open_in(tmp_path / "run", WandbMode.auto, init_seconds=2.0, say=said.append)
    why, where = said
    assert "cannot start online" in why
    assert "wandb sync" in where
    tracker.log(ROWS[0])
    tracker.finish("completed", {})
    assert history_rows(tmp_path / "run") == [wandb_names(ROWS[0])]
    assert "cannot start online" in caplog.text
    assert_no_secret_below(tmp_path)


def test_online_runs_send_what_the_server_lacks_and_its_stop_button_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three starts the first is offline, and the third computes steps again."""
    open_in(tmp_path / "run", WandbMode.offline).finish("preempted", {})
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    stop = threading.Event()
    with WandbServer(stops_the_run=True) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for known, computed in ((ROWS[:1], ROWS[1:3]), (ROWS[:2], ROWS[2:4])):
            online = open_in(tmp_path / "run", WandbMode.auto, rows=known, request_stop=stop.set)
            assert not online.run.offline
            assert stop.wait(timeout=240)
            for row in computed:
                online.log(row)
            online.finish("preempted", {})
        assert server.history_rows() == [wandb_names(row) for row in ROWS[:4]]


def test_a_server_lost_during_training_delays_the_end_by_a_timeout_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        tracker = open_in(tmp_path / "run", WandbMode.auto, finish_seconds=1.0)
    tracker.log(ROWS[0])
    tracker.finish("completed", {})
    (warning,) = warnings(caplog)
    assert f"wandb sync {tmp_path / 'run' / 'wandb'}" in warning
    assert history_rows(tmp_path / "run") == [wandb_names(ROWS[0])]


def test_a_service_killed_by_a_preemption_loses_no_later_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_in(tmp_path, WandbMode.offline)
    tracker.log(ROWS[0])
    time.sleep(1.0)
    (service,) = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
    service.terminate()
    psutil.wait_procs([service], timeout=120)
    tracker.log(ROWS[1])
    tracker.finish("preempted", {"steps": 2})
    assert [row["train/global_step"] for row in history_rows(tmp_path)] == [1, 2]
    assert [record.exit_code for record in records_of(tmp_path, "exit")] == [75]
    assert warnings(caplog) == []


def test_a_run_directory_that_cannot_be_written_ends_only_tracking(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").write_text("a file in the way")
    assert open_tracker(config_of(WandbMode.offline), RunFolder(tmp_path), lambda: None) is None
    assert "cannot start offline" in caplog.text
