"""A full disk, of which wandb says nothing, is one warning; training goes on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig, TrackingConfig, WandbMode
from dpo_dist.insight.metrics.system import FileGrowth
from dpo_dist.insight.metrics.wandb import open_tracker
from tests.support.wandb_file import history_rows


def test_a_file_that_stops_to_grow_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "run-1.wandb"
    file.write_text("header")
    growth = FileGrowth(tmp_path, seconds=0)
    assert growth.fault() is None  # nothing was sent
    growth.note_sent()
    file.write_text("header and a row")
    assert growth.fault() is None
    growth.note_sent()
    fault = growth.fault()
    assert fault is not None
    assert "does not grow" in fault
    growth.note_sent()
    assert growth.fault() is None


def test_a_row_has_time_to_be_written(tmp_path: Path) -> None:
    growth = FileGrowth(tmp_path, seconds=1000)
    growth.note_sent()
    assert growth.fault() is None
    assert growth.fault(is_closed=True) is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder for 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.usefixtures("own_wandb")
def test_a_full_disk_is_one_warning(small_disk: Path) -> None:
    said: list[str] = []
    config = RunConfig(tracking=TrackingConfig(wandb=WandbMode.offline))
    tracker = open_tracker(config, RunFolder(small_disk), lambda: None, say=said.append)
    for step in range(1, 60):
        tracker.log({"step": step, **{f"a-metric-{number}": step / 7 for number in range(40)}})
    tracker.finish("completed", {})
    upload, warning = said
    assert "wandb sync" in upload
    assert "No space left on device; training continues" in warning
    assert 0 < len(history_rows(small_disk)) < 59
