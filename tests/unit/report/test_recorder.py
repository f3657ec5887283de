"""Alarms about sampled responses: once on the screen and in W&B, and counted in the row."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.report import recorder as recorder_module
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.recorder import Recorder
from dpo_dist.report.trackers import Trackers


@dataclass(frozen=True)
class Alerts(Trackers):
    """Trackers that keep their alerts."""

    titles: list[str] = field(default_factory=list)

    def alert(self, title: str, text: str) -> None:
        self.titles.append(title)


def sampled(step: int, **values: float) -> dict[str, float]:
    found = {"length": 20.0, "finished": 1.0, "reference_length": 20.0, "prompts": 8.0} | values
    return {"step": step, "eval_loss": 0.5} | {f"eval_samples/{name}": one for name, one in found.items()}


def test_an_alarm_is_raised_when_samples_begin_to_degrade(tmp_path: Path) -> None:
    tracker, said = Alerts(), []
    recorder = Recorder(MetricsLog.open(RunFolder(tmp_path), None, print), tracker, said.append)
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
    assert tracker.titles == ["over-optimised"] * 2
    alarms = [row.get("eval_samples/alarms") for row in recorder.metrics.rows]
    assert alarms == [None, 0, 1, 1, 0, 1]


def test_a_fault_of_a_page_or_picture_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object) -> None:
        raise KeyError("eval_loss")

    monkeypatch.setattr(recorder_module, "draw_curves", faulty)
    monkeypatch.setattr(recorder_module, "write_page", faulty)
    said: list[str] = []
    folder = RunFolder(tmp_path)
    recorder = Recorder(MetricsLog.open(folder, None, print), Alerts(), said.append)
    recorder.record({"step": 1, "loss": 0.6})
    recorder.close({"exit": "completed"})
    assert json.loads(folder.summary.read_text())["exit"] == "completed"
    assert [line.split(":")[1] for line in said] == [
        " training_curves.png cannot be written",
        " report.html cannot be written",
    ]
    assert recorder.described(lambda: 1, "x") == 1


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError("no space left")

    recorder = Recorder(MetricsLog.open(RunFolder(tmp_path), None, print), Alerts(), print)
    with pytest.raises(OSError, match="no space"):
        recorder.described(full, "report.html")
