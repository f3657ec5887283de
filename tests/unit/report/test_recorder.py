"""Alarms about sampled responses: once on the screen and in W&B, and counted in the row."""

from pathlib import Path

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.recorder import Recorder
from dpo_dist.report.tracking import Tracker
from dpo_dist.report.wandb_media import RunMedia


class Alerts(Tracker):
    """A tracker that keeps its alerts."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(None, RunMedia(folder, most_samples=0))
        self.titles: list[str] = []

    def alert(self, title: str, text: str) -> None:
        self.titles.append(title)


def sampled(step: int, **values: float) -> dict[str, float]:
    found = {"length": 20.0, "finished": 1.0, "reference_length": 20.0, "prompts": 8.0} | values
    return {"step": step, "eval_loss": 0.5} | {f"eval_samples/{name}": one for name, one in found.items()}


def test_an_alarm_is_raised_when_samples_begin_to_degrade(tmp_path: Path) -> None:
    tracker, said = Alerts(RunFolder(tmp_path)), []
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
