"""Trackers get every row once over all starts, and never stop, block or prompt a run."""

import gzip
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pytest
import wandb

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import FolderConfig, ModelConfig, RunConfig, TrackingConfig
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.files import write_text
from dpo_dist.tools.report.recorder import sent_samples
from dpo_dist.tools.sampling.keys import SamplingConfig
from dpo_dist.training.reporting.metrics_log import MetricsLog, log_position
from dpo_dist.training.reporting.recorder import tracked_run
from dpo_dist.training.reporting.trackers import InBackground, Trackers, open_trackers
from dpo_dist.training.reporting.wandb_run import (
    TrackedRun,
    WandbRun,
    end_service,
    open_wandb,
    wandb_names,
    wanted_mode,
)
from dpo_dist.training.start.open_run import Run
from tests.support.alone import ALONE
from tests.support.sample_files import write_samples
from tests.support.wandb_file import all_rows, history_rows, media_rows, numbers_of, records_of

pytestmark = pytest.mark.slow

SECRET = "0123456789abcdef" * 2 + "01234567"
ROWS = [
    {"step": 1, "loss": 0.2, "rewards/margins": 0.0},
    {"step": 2, "loss": 0.65, "rewards/margins/a (b)": 0.2},
    {"step": 2, "eval_loss": 0.66},
    {"step": 3, "loss": 0.5},
    {"step": 4, "loss": float("nan")},
]


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide the credentials of the person who runs the tests; leave no service for the next test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()


def config_of(**tracking: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(path="org/model"), tracking=TrackingConfig(**tracking))


def tracked(
    run_dir: Path,
    config: RunConfig | None = None,
    environment: Mapping[str, Any] | None = None,
    stop: Callable[[], None] = lambda: None,
) -> TrackedRun:
    config = replace(config or config_of(), run=FolderConfig(dir=str(run_dir)))
    return tracked_run(Run(config, ALONE, Console(None)), environment or {}, stop, sent_samples(config))


def stored(run_dir: Path, rows: Sequence[Mapping[str, float]]) -> float:
    """Write the rows that training has logged so far; return the position of the last one."""
    log = MetricsLog.open(RunFolder(run_dir), None, lambda _: None)
    for row in rows:
        log.append(row)
    return log_position(rows[-1]) if rows else -1.0


def open_in(
    run_dir: Path,
    config: RunConfig | None = None,
    rows: Sequence[Mapping[str, float]] = (),
    say: Callable[[str], None] = print,
    **options: Any,
) -> WandbRun:
    run_dir.mkdir(exist_ok=True)
    tracker = open_wandb(tracked(run_dir, config, **options), stored(run_dir, rows), Console(LineScreen(say)))
    assert tracker is not None
    return tracker


def services() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [each for each in children if "wandb-core" in each.name() and each.status() != "zombie"]


def kill_service() -> None:
    [service] = services()
    service.kill()
    service.wait()


def wait_for_rows(run_dir: Path, count: int) -> None:
    """Wait until wandb has written so many rows, which it does once a second."""
    deadline = time.monotonic() + 10
    while len(history_rows(run_dir)) < count:
        assert time.monotonic() < deadline, "rows that a killed run would lose"
        time.sleep(0.02)


def rename_last(run_dir: Path, number: int) -> None:
    """Rename the folder of the last start: wandb names its folders by the second."""
    last = (run_dir / "wandb" / "latest-run").resolve()
    last.rename(last.with_name(f"offline-run-20260102_00000{number}-x"))


class Stuck:
    def __init__(self) -> None:
        self.network, self.sent, self.outcome = threading.Event(), list[float](), ""

    def log(self, row: Mapping[str, float], margins: object = None) -> None:
        assert self.network.wait(60)
        self.sent.append(row["step"])

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        self.outcome = outcome


def background(run: Any, folder: Path, say: Callable[[str], None] = print) -> InBackground:
    return InBackground("wandb", lambda: run, Console(LineScreen(say)), RunFolder(folder))


def test_rows_wait_for_a_dead_network_and_the_caller_does_not(tmp_path: Path) -> None:
    stuck = Stuck()
    tracker = background(stuck, tmp_path)
    for step in range(1000):
        tracker.log({"step": step})
    assert stuck.sent == []
    stuck.network.set()
    tracker.finish("completed", {})
    tracker.wait(60)
    assert (stuck.sent, stuck.outcome) == (list(range(1000)), "completed")


def test_an_interrupt_closes_the_trackers_with_their_rows(tmp_path: Path) -> None:
    stuck = Stuck()
    stuck.network.set()
    trackers = Trackers([background(stuck, tmp_path)])
    trackers.log({"step": 1})
    with pytest.raises(KeyboardInterrupt), trackers.finish_on_error():
        raise KeyboardInterrupt
    assert (stuck.sent, stuck.outcome) == ([1], "failed")


def test_a_run_has_tables_histograms_its_verdict_and_values_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    variables = {"PROJECT": "theirs", "ENTITY": "team", "NAME": "name", "TAGS": "one,two", "NOTES": "notes"}
    for name, value in {**variables, "DIR": "/elsewhere"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    responses = {"reference": {"text": f"by hf_{SECRET}"}, "policy": {"text": "p" * 5000, "tokens": 3}}
    row = {"prompt": "a prompt", "responses": responses}
    write_samples(tmp_path, 2, [row | {"images": ["data:image/jpeg;base64,AA"]}, *[row] * 8])
    config = replace(config_of(), sampling=SamplingConfig(prompts=3))
    tracker = open_trackers(tracked(tmp_path, config), -1.0, Console(LineScreen(print)))
    assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path))
    tracker.log({"step": 1, "loss": 0.7})
    margins = np.array([0.0, 1.0, 1.0, np.nan, np.inf], dtype=np.float32)
    tracker.log({"step": 2, "eval_loss": 0.6, "eval_samples/length": 3.0}, margins)
    tracker.finish("completed", {"steps": 2, "verdict": {"sentence": "learnt little", "findings": []}})
    steps, evaluation = media_rows(tmp_path)
    assert steps == {}
    histogram = evaluation["eval/margins_histogram"]
    assert (sum(histogram["values"]), histogram["bins"][0], histogram["bins"][-1]) == (3, 0.0, 1.0)
    (table,) = tmp_path.glob(f"wandb/latest-run/files/{evaluation['eval/samples_table']['path']}")
    content = json.loads(table.read_text())
    names = [f"responses.{name}" for name in ("reference.text", "policy.text", "policy.tokens")]
    assert (content["columns"], len(content["data"])) == (["prompt", *names], 8)
    prompt, reference, policy, _ = content["data"][0]
    assert (prompt, reference, len(policy) < 4100) == ("a prompt", "by ***", True)
    first, *_, last = records_of(tmp_path, "run")
    assert (first.project, first.entity, first.display_name) == ("theirs", "team", "name")
    assert (list(first.tags), first.notes) == (["one", "two"], "notes")
    assert last.notes == "notes\n\nVerdict: learnt little"
    artifacts = {record.type: record.manifest.contents for record in records_of(tmp_path, "artifact")}
    staged = [entry.local_path for entries in artifacts.values() for entry in entries]
    assert all(Path(path).is_relative_to(tmp_path) for path in staged)


def test_texts_of_samples_that_nobody_asked_for_are_not_sent(tmp_path: Path) -> None:
    write_samples(tmp_path, 2, [{"prompt": "a private prompt", "policy": "p"}])
    tracker = open_in(tmp_path)
    tracker.log({"step": 2, "eval_samples/length": 3.0})
    tracker.finish("completed", {})
    assert all_rows(tmp_path)[0]["eval/samples/length"] == 3.0
    assert media_rows(tmp_path) == [{}]


def test_starts_of_a_run_are_one_run_with_every_row_once(tmp_path: Path) -> None:
    run_dir, run_ids, said = tmp_path / "a-run-12345678", set(), list[str]()
    killed_at_once = run_dir / "wandb" / "offline-run-20260101_000000-x" / "run-x.wandb"
    write_text(killed_at_once, ":W&B   ")
    for known, computed, end in ((0, 2, "preempted"), (1, 4, "killed"), (3, 5, "completed")):
        tracker = open_in(run_dir, rows=ROWS[:known], environment={"torch": "2.13.0"}, say=said.append)
        run_ids.add(tracker.run.id)
        for row in ROWS[known:computed]:
            tracker.log(row)
        if end == "killed":
            wait_for_rows(run_dir, computed)
            kill_service()
            end_service(is_dead=True)
        else:
            tracker.finish(end, {"steps": 4, "reference": {"mode": "cached"}})
        rename_last(run_dir, known)
    assert f"upload with: wandb sync {run_dir / 'wandb'}" in said[0]
    assert not killed_at_once.exists(), "wandb sync would upload nothing"
    assert run_ids == {(run_dir / "wandb" / "run_id.txt").read_text()}
    assert [row["_step"] for row in all_rows(run_dir)] == [0, 1, 2, 3, 4]
    assert history_rows(run_dir)[:4] == [wandb_names(row) for row in ROWS[:4]]
    assert history_rows(run_dir)[4]["train/global_step"] == 4
    assert [record.exit_code for record in records_of(run_dir, "exit")] == [75, 0]
    assert len(records_of(run_dir, "preempting")) == 1
    run = records_of(run_dir, "run")[0]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["model"]["path"], config["environment"]) == ("org/model", {"torch": "2.13.0"})
    assert (run.project, run.display_name) == ("dpo_dist", "a-run-12345678 sigmoid beta=0.1 lr=1e-06")
    metrics = {metric.glob_name or metric.name: metric for metric in records_of(run_dir, "metric")}
    axes = {metric.step_metric for name, metric in metrics.items() if name != "train/global_step"}
    assert axes == {"train/global_step"}
    items = [item for record in records_of(run_dir, "summary") for item in record.update]
    found = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    best = ("best/train/loss", "best/eval/loss", "eval/loss", "train/global_step", "steps")
    assert [found[name] for name in best] == [0.2, 0.66, 0.66, 4, 4]


@pytest.mark.parametrize(
    ("mode", "key", "reason"),
    [("", SECRET, "cannot start online"), ("online", "", "no usable key")],
)
def test_without_a_server_or_a_key_the_run_is_offline(
    mode: str, key: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"MODE": mode, "API_KEY": key, "BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "1"}
    monkeypatch.delenv("WANDB_MODE")
    for name, value in variables.items():
        if value:
            monkeypatch.setenv(f"WANDB_{name}", value)
    said: list[str] = []
    tracker = open_in(tmp_path, say=said.append)
    assert reason in said[0]
    assert "wandb sync" in said[1]
    tracker.log(ROWS[0])
    tracker.finish("completed", {})
    assert history_rows(tmp_path) == [wandb_names(ROWS[0])]


BUCKET = {
    "id": "1",
    "name": "run",
    "displayName": "run",
    "config": "{}",
    "historyLineCount": 0,
    "project": {"id": "1", "name": "project", "entity": {"id": "1", "name": "entity"}},
}
ANSWER = {
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "viewer": {"id": "1", "entity": "entity", "flags": "{}"},
    "serverInfo": {"features": []},
    "project": None,
    "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
}


class Handler(BaseHTTPRequestHandler):
    """What an online run asks of a wandb server, which receives its rows and stops it."""

    server: "WandbServer"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.server.history += [json.loads(line) for line in history.get("content", [])]
        data = {**ANSWER, **self._known_run()}
        variables = (json.loads(body).get("variables") or {}) if self.path.endswith("/graphql") else {}
        if name := variables.get("name"):
            data["upsertBucket"] = {"bucket": {**BUCKET, "name": name}, "inserted": True}
        self._answer({"data": data, "stopped": True})

    def _known_run(self) -> dict[str, Any]:
        """The run as a resumed one asks for it, from the rows received."""
        history = self.server.history
        if not history:
            return {"model": {"bucket": None}}
        bucket = {
            **BUCKET,
            "summaryMetrics": json.dumps({name: value for row in history for name, value in row.items()}),
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(history[-1])]),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"bucket": bucket, "entity": {"id": "1", "name": "entity"}}}

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class WandbServer(ThreadingHTTPServer):
    """A server on a free local port, for the time of a `with` block, and the rows that it has received."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


def test_online_runs_send_what_the_server_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_in(tmp_path).finish("preempted", {})
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    stop = threading.Event()
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.delenv("WANDB_MODE")
        for known, computed in ((ROWS[:1], ROWS[1:3]), (ROWS[:2], ROWS[2:4])):
            online = open_in(tmp_path, rows=known, stop=stop.set)
            assert not online.run.offline
            assert stop.wait(timeout=240)
            for row in computed:
                online.log(row)
            online.finish("preempted", {})
        assert [numbers_of(row) for row in server.history] == [wandb_names(row) for row in ROWS[:4]]


def test_a_server_lost_during_training_delays_the_end_by_a_timeout_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    said: list[str] = []
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.delenv("WANDB_MODE")
        tracker = background(open_in(tmp_path), tmp_path, said.append)
    tracker.log(ROWS[0])
    tracker.finish("completed", {})
    tracker.wait(2.0)
    (warning,) = said
    assert f"wandb sync {tmp_path / 'wandb'}" in warning
    assert history_rows(tmp_path) == [wandb_names(ROWS[0])]
    assert services() == [], "the service does not start again"


def test_rows_logged_while_wandb_opens_are_sent_once_in_their_turn(tmp_path: Path) -> None:
    """They are in the file already, without their histograms."""
    before = stored(tmp_path, ROWS[:1])
    stored(tmp_path, ROWS[:3])
    tracker = open_wandb(tracked(tmp_path), before, Console(LineScreen(print)))
    assert tracker is not None
    assert tracker.run.step == 1
    tracker.log(ROWS[1])
    tracker.log(ROWS[2], np.array([0.0, 1.0], dtype=np.float32))
    tracker.finish("preempted", {})
    assert history_rows(tmp_path) == [wandb_names(row) for row in ROWS[:3]]
    assert [list(media) for media in media_rows(tmp_path)] == [[], [], ["eval/margins_histogram"]]
    assert [row["_step"] for row in all_rows(tmp_path)] == [0, 1, 2]


def test_a_killed_service_loses_no_later_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_in(tmp_path)
    tracker.log(ROWS[0])
    wait_for_rows(tmp_path, 1)
    kill_service()
    stored(tmp_path, ROWS[:2])
    tracker.log(ROWS[1], np.array([0.0, 1.0], dtype=np.float32))
    tracker.finish("preempted", {"steps": 2})
    assert [row["train/global_step"] for row in history_rows(tmp_path)] == [1, 2]
    assert [list(media) for media in media_rows(tmp_path)] == [[], ["eval/margins_histogram"]]
    assert [row["_step"] for row in all_rows(tmp_path)] == [0, 1]
    assert [record.exit_code for record in records_of(tmp_path, "exit")] == [75]
    assert [record for record in caplog.records if record.name.startswith("dpo_dist")] == []


def test_tracking_may_be_off_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for config in (config_of(to=[]), config_of()):
        trackers = open_trackers(tracked(tmp_path, config), -1.0, Console(LineScreen(pytest.fail)))
        trackers.log(ROWS[0])
        trackers.finish("completed", {})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb").write_text("a file in the way")
    assert open_wandb(tracked(tmp_path), -1.0, Console(LineScreen(said.append))) is None
    assert "cannot start offline" in said[0]


@pytest.mark.parametrize(
    ("value", "mode"),
    [("", "auto"), ("online", "online"), ("dryrun", "offline"), ("disabled", None), ("shared", "auto")],
)
def test_modes(monkeypatch: pytest.MonkeyPatch, value: str, mode: str | None) -> None:
    monkeypatch.setenv("WANDB_MODE", value)
    assert wanted_mode() == mode
