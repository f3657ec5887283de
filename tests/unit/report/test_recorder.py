"""Alarms about sampled responses: once on the screen and in W&B, and counted in the row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight import recorder as recorder_module
from dpo_dist.insight.metrics.log import MetricsLog
from dpo_dist.insight.metrics.trackers import Trackers
from dpo_dist.insight.recorder import Recorder


@dataclass(frozen=True)
class Kept(Trackers):
    """Trackers that keep alerts and outcomes."""

    titles: list[str] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    def alert(self, title: str, text: str) -> None:
        self.titles.append(title)

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        self.outcomes.append(outcome)


def sampled(step: int, **values: float) -> dict[str, float]:
    found = {"length": 20.0, "finished": 1.0, "reference_length": 20.0, "prompts": 8.0} | values
    return {"step": step, "eval_loss": 0.5} | {f"eval_samples/{name}": one for name, one in found.items()}


def test_an_alarm_is_raised_when_samples_begin_to_degrade(tmp_path: Path) -> None:
    trackers, said = Kept(), list[str]()
    recorder = Recorder(MetricsLog.open(RunFolder(tmp_path), None, print), trackers, said.append)
    recorder.record({"step": 1, "loss": 0.6})
    recorder.record(sampled(2))
    recorder.record(sampled(4, length=70.0))
    recorder.record(sampled(6, length=80.0))
    recorder.record(sampled(8))
    recorder.record(sampled(10, length=90.0))
    [first, again] = said
    assert first.startswith("warning: over-optimised after step 4: sampled responses are 3.5x longer")
    assert first.endswith("a length-normalised loss if responses grow")
    assert again.startswith("warning: over-optimised after step 10")
    assert trackers.titles == ["over-optimised"] * 2
    alarms = [row.get("eval_samples/alarms") for row in recorder.metrics.rows]
    assert alarms == [None, 0, 1, 1, 0, 1]


def test_a_bug_in_a_report_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("draw_curves", "write_page", "sample_alarms"):
        monkeypatch.setattr(recorder_module, name, mock.Mock(side_effect=ZeroDivisionError))
    trackers, said = Kept(), list[str]()
    recorder = Recorder(MetricsLog.open(RunFolder(tmp_path), None, print), trackers, said.append)
    recorder.record(sampled(2))
    recorder.close({"exit": "completed"})
    assert [row["step"] for row in recorder.metrics.rows] == [2]
    assert [text.partition(" is missing")[0] for text in said] == [
        "warning: the comparison of samples with those before",
        "warning: training_curves.png",
        "warning: report.html",
    ]
    assert trackers.outcomes == ["completed"]


def test_a_full_disk_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "write_page", mock.Mock(side_effect=OSError(28, "No space left")))
    recorder = Recorder(MetricsLog.open(RunFolder(tmp_path), None, print), Kept(), print)
    with pytest.raises(OSError, match="No space"):
        recorder.close({"exit": "completed"})


def test_a_name_without_an_encoding_is_drawn(tmp_path: Path) -> None:
    said, run = list[str](), RunFolder(tmp_path / "run\udcff")
    recorder = Recorder(MetricsLog.open(run, None, print), Kept(), said.append)
    recorder.record({"step": 1, "loss": 0.5, "grad_norm": 1.0})
    recorder.close({"exit": "completed", "steps": 1})
    assert said == []
    assert run.curves.exists()
