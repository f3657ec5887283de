"""An error of the user: exit code 2, one block, no traceback, nothing lost."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_dist.config.verbs import VERBS
from tests.e2e.conftest import Overrides
from tests.support.launch import constants, environment, run_verb, train
from tests.support.warm import ENVIRONMENT, run_warm_apart


def test_a_broken_line_is_dropped_counted_and_shown(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    lines = (assets / "train.jsonl").read_text().splitlines()
    broken_line = tmp_path / "broken.jsonl"
    broken_line.write_text("\n".join([*lines[:3], lines[3][:40], *lines[4:]]) + "\n")
    data = f"data.train=[{broken_line}]", f"data.eval=[{broken_line}]"
    ended = run_verb("train", overrides(*data, "trainer.max_steps=1", "trainer.global_batch_pairs=22"))
    assert ended.code == 0, ended.output
    assert "1 dropped (unparsable)" in ended.output
    assert "22 also_in_train: pairs with the same tokens as a training pair" in ended.output
    assert "the whole run is 1 step" in ended.output
    data_summary = json.loads((tmp_path / "run/dpo_metrics/summary.json").read_text())["data"]
    assert data_summary["eval"]["also_in_train"] == 22
    counts = data_summary["train"]
    assert counts["duplicates"] == 0
    assert (counts["read"], counts["kept"], counts["dropped"]) == (23, 22, {"unparsable": 1})
    assert counts["examples"][0].startswith(f"{broken_line}:4 unparsable")


def test_two_processes_print_one_block(overrides: Overrides, assets: Path) -> None:
    ended = run_verb("train", overrides(f"data.train=[{assets}/absent.jsonl]"), processes=2)
    assert ended.code == 2, ended.output
    assert ended.output.count("to do:") == 1, ended.output
    assert "absent.jsonl" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("words", ["convert gone.yaml", "report gone", "store info gone", "chat gone"])
def test_a_program_of_one_process_prints_its_error_at_once_whatever_rank_the_shell_has(
    words: str, tmp_path: Path
) -> None:
    verb, *arguments = words.split()
    variables = environment() | ENVIRONMENT | {"RANK": "1"}
    code, output, errors = run_warm_apart(VERBS[verb].module, arguments, variables, tmp_path, 240)
    assert code == 2, errors
    assert errors.count("to do:") == 1
    assert "Traceback" not in errors + output


def _unchecked(*_: object) -> None:
    """In place of the check."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB; only root can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("free_kib", "is_checked", "text"),
    [
        (200, True, "the disk has no room for the checkpoints and the model of this run"),
        (480, False, "the trained model cannot be written"),
    ],
)
def test_a_disk_too_small_for_the_result_is_one_block(
    free_kib: int, is_checked: bool, text: str, overrides: Overrides, small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes((600 - free_kib) * 1024))
    command = overrides(f"run.dir={small_disk}/run", "trainer.max_steps=1")
    without = constants(**{"dpo_dist.training.run.check_disk_room": _unchecked})
    ended = run_verb("train", command, prepare=None if is_checked else without)
    assert ended.code == 2, ended.output
    assert ended.output.count(text) == 1, ended.output
    assert "Traceback" not in ended.output
    assert not (small_disk / "run/model").exists()
    left = [path.name for path in small_disk.rglob("*")]
    assert not [name for name in left if ".tmp-" in name]
    assert not is_checked or left == ["filler"], "a start that fails before its first step leaves nothing"
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    train(command)
    assert (small_disk / "run/model/config.json").is_file()


def test_a_disk_too_small_for_the_store_is_one_block(overrides: Overrides, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(590 * 1024))
    ended = run_verb("train", overrides(f"reference.store={small_disk}/store", "trainer.max_steps=3"))
    assert ended.code == 2, ended.output
    assert ended.output.count("to do:") == 1, ended.output
    assert "Traceback" not in ended.output
    assert not list(small_disk.glob("store/*/*.safetensors"))
