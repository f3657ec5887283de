"""Environments of launchers and machines in which a run cannot start."""

import fcntl
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
LOCAL = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# fmt: off
CASES = [
    *(
        Case(f"variables of a launcher: {place}", "", "do not describe one process", "environment", got,
             to_do="torchrun", place=place)
        for got, place in (
            ("RANK=0, WORLD_SIZE=,", {"RANK": "0"}),
            ("RANK=one", RANK_0 | LOCAL | {"RANK": "one"}),
            ("LOCAL_RANK=3", RANK_0 | LOCAL | {"LOCAL_RANK": "3"}),
            ("LOCAL_RANK=,", {"RANK": "0", "WORLD_SIZE": "2"} | LOCAL),
        )
    ),
    Case("attention kernel without a GPU", "model.dtype=bf16 model.attention=varlen", "runs only on CUDA",
         "model.attention", "varlen on cpu", "sdpa", "model.attention=auto", joins=True),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_environment_that_does_not_fit_gets_one_block(case: Case, check: Check) -> None:
    check(case)


def test_a_taken_port_gets_one_block(check: Check) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place, used = RANK_0 | LOCAL | {"MASTER_PORT": port}, "address already in use"
        leaves = (r"run(/logs(/.*)?)?",)
        case = Case(
            "",
            "run.dir=run",
            "have joined",
            port,
            used,
            to_do="--main_process_port",
            code=69,
            joins=True,
        )
        check(replace(case, place=place, leaves=leaves))


def test_two_runs_in_one_folder_get_one_block(check: Check, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        what = "another process is training in this run directory"
        check(
            Case("", "run.dir=run", what, "run", to_do="wait until", joins=True, leaves=("run/logs(/.*)?",))
        )
