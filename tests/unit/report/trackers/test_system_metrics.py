"""System metrics of every rank reach W&B by files in the run directory, and never stop or delay a run."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig, TrackingConfig, WandbMode
from dpo_dist.distributed.world import World
from dpo_dist.insight.metrics.system import system_metrics
from dpo_dist.insight.metrics.trackers import Trackers, open_trackers, sampled_system
from dpo_dist.insight.metrics.wandb_file import read_records
from tests.support.wandb_file import history_rows

CONFIG = RunConfig(tracking=TrackingConfig(wandb=WandbMode.offline))
RANK_1 = """
import sys, time
from pathlib import Path
from tests.unit.report.trackers.test_system_metrics import system_metrics, world_of
with system_metrics(Path(sys.argv[1]), world_of(1), None, seconds=0.1):
    sys.stdin.read()
"""


def world_of(rank: int, size: int = 2) -> World:
    return World(accelerator=None, rank=rank, size=size, device=torch.device("cpu"), peers=())


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 240
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("own_wandb")
def test_values_of_both_ranks_are_in_wandbs_file_and_are_no_rows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    trackers = open_trackers(CONFIG, folder, lambda: None, rows=[], environment={}, say=print)
    sent: list[Mapping[str, float]] = []

    def send(values: Mapping[str, float]) -> None:
        trackers.system(values)
        sent.append(values)

    command = [sys.executable, "-c", RANK_1, str(folder.system_metrics)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as other,
        system_metrics(folder.system_metrics, world_of(0), send, seconds=0.1),
    ):
        trackers.log({"step": 1, "loss": 0.7})
        wait_for(lambda: any("cpu/l:rank-1" in values for values in sent))
        assert other.stdin is not None
        other.stdin.close()
    trackers.finish("completed", {})

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    stats = [record.stats for record in read_records(file) if record.WhichOneof("record_type") == "stats"]
    values = [{item.key: json.loads(item.value_json) for item in record.item} for record in stats]
    ours = [row for row in values if any("/l:rank-" in name for name in row)]
    assert ours == sent[: len(ours)]
    assert len(ours) == len(sent)
    assert any(row.get("proc.memory.rssMB/l:rank-1", 0) > 50 for row in ours)
    assert all(row["proc.memory.rssMB/l:rank-0"] > 50 for row in ours)
    assert history_rows(tmp_path) == [{"train/global_step": 1, "train/loss": 0.7}]
    assert not folder.system_metrics.exists()


def test_a_sample_is_sent_once_and_none_of_an_earlier_start(tmp_path: Path) -> None:
    (tmp_path / "rank-1.json").write_text('{"time": 1, "values": {"cpu": 7}}')
    (tmp_path / "rank-2.json").write_text("damaged")
    sent: list[Mapping[str, float]] = []
    with system_metrics(tmp_path, world_of(0, 4), sent.append, seconds=0.01):
        wait_for(lambda: len(sent) > 3)
        (tmp_path / "rank-1.json").write_text('{"time": 2, "values": {"cpu": 8}}')
        (tmp_path / "rank-2.json").write_text("damaged again")
        wait_for(lambda: any("cpu/l:rank-1" in values for values in sent))
        known = len(sent)
        wait_for(lambda: len(sent) > known + 3)
    assert [values["cpu/l:rank-1"] for values in sent if "cpu/l:rank-1" in values] == [8]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a file"
    folder.write_text("in the way")
    sent: list[Mapping[str, float]] = []
    with system_metrics(folder, world_of(rank), sent.append if rank == 0 else None, seconds=0.01):
        wait_for(lambda: sent or caplog.records)
        time.sleep(0.1)
    assert len(caplog.records) == rank


def test_a_run_without_wandb_samples_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = RunConfig(tracking=TrackingConfig(wandb=WandbMode.auto))
    with sampled_system(config, world_of(1), None):
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_no_tracker_is_no_error(tmp_path: Path) -> None:
    Trackers().system({"cpu/l:rank-0": 1.0})
