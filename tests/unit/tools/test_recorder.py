"""Alarms about sampled responses: once on the screen, and counted; bugs end no run."""

import json
from pathlib import Path
from unittest import mock

import pytest

from dpo_dist.config.schema import FolderConfig, ModelConfig, RunConfig
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.tools.report import recorder as recorder_module
from dpo_dist.tools.report.recorder import reporting
from dpo_dist.training.reporting.metrics_log import MetricsLog
from dpo_dist.training.reporting.protocols import Reporting
from dpo_dist.training.reporting.recorder import Recorder
from dpo_dist.training.reporting.trackers import Trackers
from dpo_dist.training.start.open_run import Run
from tests.support.alone import ALONE

SUMMARY = {"final": {}, "best": {}, "steps": 2}


class Opened:
    """A recorder with a tracker that keeps its calls."""

    def __init__(self, run: Path, reports: Reporting | None = None) -> None:
        self.tracker, self.said = mock.Mock(), list[str]()
        config = RunConfig(model=ModelConfig("somewhere"), run=FolderConfig(str(run)))
        of_run = Run(config, ALONE, Console(LineScreen(self.said.append)))
        log = MetricsLog.open(of_run.folder, None, print)
        self.recorder = Recorder(of_run, log, reports or reporting(), Trackers([self.tracker]))


def sampled(step: int, **values: float) -> dict[str, float]:
    found = {"longest_repeat": 0.1, "reference_longest_repeat": 0.1, "prompts": 8.0} | values
    return {"step": step, "eval_loss": 0.5} | {f"eval_samples/{name}": one for name, one in found.items()}


def test_an_alarm_is_raised_when_samples_begin_to_degrade(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    opened.recorder.row({"step": 1, "loss": 0.6})
    for step, share in ((2, 0.1), (4, 0.7), (6, 0.8), (8, 0.1), (10, 0.9)):
        opened.recorder.row(sampled(step, longest_repeat=share))
    [first, again] = opened.said
    assert first.startswith(
        "warning: the answers break after step 4: the longest passage that a sampled answer"
    )
    assert again.startswith("warning: the answers break after step 10")
    alarms = [row.get("eval_samples/alarms") for row in opened.recorder.metrics.rows]
    assert alarms == [None, 0, 1, 1, 0, 1]
    opened.recorder.close(SUMMARY, RunOutcome.completed)
    folder = opened.recorder.run.folder
    sentence = json.loads(folder.summary.read_bytes())["verdict"]["sentence"]
    table, verdict = map("\n".join(opened.said).index, (f"report     {folder.report}", sentence))
    assert verdict < table


def test_a_bug_in_a_report_ends_no_run_but_a_full_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("draw_curves", "write_page", "sample_alarm", "verdict", "closing_table"):
        monkeypatch.setattr(recorder_module, name, mock.Mock(side_effect=ZeroDivisionError))
    opened = Opened(tmp_path)
    opened.recorder.row(sampled(2))
    opened.recorder.close(SUMMARY, RunOutcome.completed)
    assert [row["step"] for row in opened.recorder.metrics.rows] == [2]
    assert ["is missing because of a bug" in text for text in opened.said] == [True] * 5
    assert opened.tracker.finish.mock_calls[0].args[0] == "completed"
    monkeypatch.setattr(recorder_module, "write_page", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        opened.recorder.close(SUMMARY, RunOutcome.completed)


def test_a_run_without_a_report_has_its_rows_and_its_summary(tmp_path: Path) -> None:
    rows = list[dict[str, float]]()
    opened = Opened(tmp_path, Reporting(on_row=lambda row: rows.append(row) or row["step"] == 2))
    opened.recorder.row({"step": 1, "loss": 0.6})
    assert not opened.recorder.run.stops.request.is_urgent
    opened.recorder.row(sampled(2))
    assert opened.recorder.run.stops.request.is_urgent
    assert rows == opened.recorder.metrics.rows == [{"step": 1, "loss": 0.6}, sampled(2)]
    opened.recorder.close(SUMMARY, RunOutcome.preempted)
    folder = opened.recorder.run.folder
    assert json.loads(folder.summary.read_bytes()) == {**SUMMARY, "exit": "preempted"}
    assert opened.said == [f"preempted: {folder.summary}"]
    assert not folder.report.exists()
    opened.tracker.finish.assert_called_once_with("preempted", {**SUMMARY, "exit": "preempted"})
