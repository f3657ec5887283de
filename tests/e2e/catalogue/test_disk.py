"""Run directories, caches and stores that cannot be written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check
from tests.support.read_only import read_only


def file(name: str) -> Callable[[Path], object]:
    """Make a file where a folder is expected."""
    return lambda work: (work / name).write_text("a file")


def of_another_configuration(work: Path) -> None:
    """Make a run with a checkpoint."""
    (work / "other/checkpoints/step-000001").mkdir(parents=True)
    (work / "other/checkpoints/step-000001/state.json").write_text('{"run_digest": "of-another"}')


# fmt: off
CASES = [
    Case("file as run directory", "run.dir=occupied", "run.dir cannot be written", "run.dir", "occupied",
         before=file("occupied"), to_do="set run.dir to another folder"),
    Case("model as run directory", "run.dir=model", "files that no run has written", "run.dir", "config.json",
         to_do="set run.dir to a new folder"),
    Case("folder of a project as run directory", "run.dir=.", "files that no run has written", "run.dir",
         "config.yaml", to_do="set run.dir to a new folder", before=file("config.yaml")),
    Case("link in a circle", "run.dir=circle", "run.dir", "run.dir", "circle",
         before=lambda work: (work / "circle").symlink_to("circle"), to_do="set run.dir to another folder"),
    Case("name of the run directory too long", f"run.dir={'a' * 300}", "cannot be written",
         "a" * 300, "too long", to_do="correct the path"),
    Case("file as cache", "data.cache=occupied", "data.cache cannot be written", "data.cache", "occupied",
         before=file("occupied"), to_do="set data.cache to another folder"),
    Case("run directory of another configuration", "run.dir=other", "belongs to another configuration",
         "other", "digest", "digest of-another", "remove run.dir", before=of_another_configuration),
]
READ_ONLY = [
    Case("run directory on a read-only disk", "run.dir=locked/run", "run.dir cannot be written", "run.dir",
         "locked", to_do="set run.dir to another folder"),
    Case("cache on a read-only disk", "data.cache=locked", "data.cache cannot be written", "data.cache",
         "locked", to_do="set data.cache to another folder"),
    Case("store on a read-only disk", "reference.store=locked/store", "reference.store cannot be written",
         "reference.store", "locked", to_do="set reference.store to another folder"),
    Case("read-only working folder for pairs",
         "run.dir=locked/pairs pairs.method=scores data.train=[train.jsonl]",
         "a file cannot be written or read", "locked/pairs", "Read-only", verb="pairs", run="",
         to_do="make room"),
    Case("read-only folder for the doctor", "run.dir=locked/doctor data.train=[train.jsonl]",
         "run.dir cannot be written", "run.dir", "locked", verb="doctor", run="",
         to_do="set run.dir to another folder"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_that_cannot_be_used_gets_one_block(case: Case, check: Check) -> None:
    check(case)


@pytest.mark.parametrize("case", READ_ONLY, ids=str)
def test_a_read_only_disk_gets_one_block(case: Case, check: Check, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    with read_only(tmp_path / "locked"):
        check(case)
