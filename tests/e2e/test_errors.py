"""Whatever a user gets wrong: exit 2, one block, no traceback, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides
from tests.support.launch import run_verb


def fails_with(overrides: list[str], *told: str, processes: int = 1) -> None:
    ended = run_verb("train", overrides, processes=processes)
    # The launcher of several processes ends with 1 whatever they end with.
    assert ended.code == (2 if processes == 1 else 1), ended.output
    assert ended.output.count("to do:") == 1, ended.output
    own, _, _ = ended.output.partition("torch/distributed/elastic")
    assert "Traceback" not in own, ended.output
    for text in told:
        assert text in ended.output, ended.output


def test_a_typo_is_answered_with_the_nearest_key(overrides: Overrides) -> None:
    fails_with(overrides("loss.betta=0.2"), "loss.betta", "did you mean loss.beta")


def test_an_option_that_no_kind_has_is_refused(overrides: Overrides) -> None:
    fails_with(overrides("+loss.gamma=1"), "loss.gamma")


def test_an_option_of_another_kind_is_refused(overrides: Overrides) -> None:
    fails_with(overrides("loss.simpo_gamma=1"), "loss.simpo_gamma")


def test_a_missing_file_is_named(overrides: Overrides, assets: Path) -> None:
    fails_with(overrides(f"data.train=[{assets}/trian.jsonl]"), "trian.jsonl", "train.jsonl")


def test_a_missing_model_is_named(overrides: Overrides, tmp_path: Path) -> None:
    fails_with(overrides(f"model.path={tmp_path}/nowhere"), "model.path", "nowhere")


def test_a_model_folder_without_weights_is_refused(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weightless"
    shutil.copytree(assets / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    fails_with(overrides(f"model.path={folder}"), "no weights", "weightless")


@pytest.fixture
def broken_line(assets: Path, tmp_path: Path) -> Path:
    lines = (assets / "train.jsonl").read_text().splitlines()
    file = tmp_path / "broken.jsonl"
    file.write_text("\n".join([*lines[:3], lines[3][:40], *lines[4:]]) + "\n")
    return file


def test_a_broken_line_is_an_error_where_that_is_wanted(overrides: Overrides, broken_line: Path) -> None:
    fails_with(
        overrides(f"data.train=[{broken_line}]", "data.on_bad_record=error"), "broken.jsonl:4", "unparsable"
    )


def test_a_broken_line_is_dropped_counted_and_shown(
    overrides: Overrides, broken_line: Path, tmp_path: Path
) -> None:
    ended = run_verb("train", overrides(f"data.train=[{broken_line}]", "trainer.max_steps=1"))
    assert ended.code == 0, ended.output
    assert "1 dropped (unparsable)" in ended.output
    counts = json.loads((tmp_path / "run/dpo_metrics/summary.json").read_text())["data"]["train"]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (23, 22, {"unparsable": 1})
    assert counts["examples"] == [f"{broken_line}:4 unparsable"]


def test_more_bad_records_than_allowed_is_an_error(overrides: Overrides, broken_line: Path) -> None:
    fails_with(
        overrides(f"data.train=[{broken_line}]", "data.max_bad_share=0.01"), "broken.jsonl:4", "1 of 23"
    )


def test_two_processes_print_one_block(overrides: Overrides, assets: Path) -> None:
    fails_with(overrides(f"data.train=[{assets}/absent.jsonl]"), "absent.jsonl", processes=2)
