"""The metrics log keeps every row through kills and resumes; environment.json has no secret."""

import csv
import json
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

import dpo_dist
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.reporting.metrics_log import (
    MetricsLog,
    final_and_best,
    stored_rows,
)
from dpo_dist.training.start.environment import describe_environment


def row_of(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 10, "loss": 0.7 - 0.01 * step}


def evaluation_of(step: int, loss: float, accuracy: float) -> dict[str, float]:
    return {"step": step, "eval_loss": loss, "eval_rewards/accuracies": accuracy}


def log_of(run_dir: Path, *rows: dict[str, float]) -> MetricsLog:
    """The log of a new run that has ended after these rows."""
    log = MetricsLog.open(RunFolder(run_dir), None)
    for row in rows:
        log.append(row)
    log.close({})
    return log


def csv_rows(run_dir: Path) -> list[dict[str, str]]:
    with RunFolder(run_dir).metrics_table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_is_a_list_after_each_row_and_the_table_is_written_at_the_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = MetricsLog.open(folder, None)
    rows = [row_of(1), {**evaluation_of(1, 0.6, 0.5), "eval_hard, too/loss": 0.25}, row_of(3)]
    for number, row in enumerate(rows, start=1):
        log.append(row)
        assert json.loads(folder.log_history.read_text()) == rows[:number]
        assert list(stored_rows(folder)) == log.rows == rows[:number]
    assert not folder.metrics_table.exists(), "until the run ends"
    log.close({"steps": 3})
    assert json.loads(folder.summary.read_text()) == {"steps": 3}
    assert folder.log_history.read_text() == "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
    found = csv_rows(tmp_path)
    assert list(found[0]) == list(dict.fromkeys([*rows[0], *rows[1]]))
    assert [row["step"] for row in found] == ["1", "1", "3"]
    assert [row["eval_hard, too/loss"] for row in found] == ["", "0.25", ""]
    assert [row["loss"] for row in found] == ["0.69", "", "0.6699999999999999"]
    assert json.loads(log_of(tmp_path / "empty").folder.log_history.read_text()) == []


def test_files_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    rows = [*map(row_of, range(1, 11)), evaluation_of(10, 0.5, 0.6)]
    whole = log_of(tmp_path / "whole", *rows)
    log_of(tmp_path / "killed", *rows[:7], {**rows[7], "seen only before the kill": 1.0})
    resumed = MetricsLog.open(RunFolder(tmp_path / "killed"), 6)
    assert resumed.rows == rows[:6]
    assert not resumed.folder.metrics_table.exists(), "it would lack the rows of this start"
    for row in rows[6:]:
        resumed.append(row)
    resumed.close({})
    files = [[file.read_bytes() for file in sorted(log.folder.metrics.iterdir())] for log in (whole, resumed)]
    assert files[0] == files[1]
    said = list[str]()
    assert MetricsLog.open(RunFolder(tmp_path / "killed"), None, said.append).rows == []
    assert "its rows are replaced" in said.pop(), "a fresh start"
    whole.folder.log_history.unlink()
    assert MetricsLog.open(whole.folder, 6, said.append).rows == []
    assert "metrics up to step 6 are lost" in said.pop()


@pytest.mark.parametrize("torn", ["", '{"step": 9, "lo', "\0" * 50], ids=["whole", "cut", "zeros"])
def test_a_killed_process_loses_no_row(tmp_path: Path, torn: str) -> None:
    """What a crash of the machine leaves behind the last whole line is cut."""
    folder, rows = RunFolder(tmp_path), list(map(row_of, range(1, 9)))

    def train() -> None:
        log = MetricsLog.open(folder, None)
        for row in rows:
            log.append(row)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole = folder.log_history.read_text()
    if torn:
        folder.log_history.write_text(whole.removesuffix("\n]\n") + ",\n" + torn)
    assert list(stored_rows(folder)) == rows
    resumed = MetricsLog.open(folder, 8)
    resumed.append(row_of(9))
    assert list(stored_rows(folder)) == resumed.rows == [*rows, row_of(9)]


def test_rows_are_on_the_disk_before_a_checkpoint_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, log = list[Path](), MetricsLog.open(RunFolder(tmp_path), None)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").resolve()))
    log.append(row_of(1))
    log.save()
    assert synced == [log.folder.log_history.resolve()]
    tmp_path.joinpath("dpo_metrics").rename(tmp_path / "moved")
    for lost in (log.save, lambda: log.append(row_of(2))):
        with pytest.raises(FileNotFoundError):
            lost()


def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = log_of(tmp_path, row_of(1), row_of(2)).folder
    folder.log_history.write_text(folder.log_history.read_text().replace("}", "", 1))
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        MetricsLog.open(folder, 1)
    assert raised.value.where == f"{folder.log_history}:2"


def test_an_evaluation_that_is_made_again_has_one_row(tmp_path: Path) -> None:
    """A stop has interrupted it; the next start has saved its row, and was killed before its checkpoint."""
    kept = [row_of(1), evaluation_of(1, 0.8, 0.4), row_of(2)]
    log_of(tmp_path, *kept, evaluation_of(2, 0.5, 0.6))
    assert len(MetricsLog.open(RunFolder(tmp_path), 2).rows) == 4
    assert MetricsLog.open(RunFolder(tmp_path), 2, evaluation_is_due=True).rows == kept


def test_values_that_are_not_finite_give_valid_json_and_survive_a_resume(tmp_path: Path) -> None:
    log = log_of(tmp_path, {"step": 1, "loss": math.nan, "grad_norm": math.inf})
    log.close({"final": {"loss": math.nan}, "losses": [math.inf, 1.0], "exit": "diverged"})
    rows = json.loads(log.folder.log_history.read_text(), parse_constant=pytest.fail)
    assert rows == [{"step": 1, "loss": None, "grad_norm": None}]
    summary = json.loads(log.folder.summary.read_text(), parse_constant=pytest.fail)
    assert summary == {"final": {"loss": None}, "losses": [None, 1.0], "exit": "diverged"}
    assert math.isnan(MetricsLog.open(RunFolder(tmp_path), 1).rows[0]["loss"])


def test_final_and_best_values() -> None:
    evaluations = [(0, 0.10, 0.99), (1, 0.60, 0.55), (2, 0.40, 0.70), (3, math.nan, 0.70)]
    term = {"loss/terms/sft": 0.3}
    rows = [row_of(1), row_of(2), row_of(3) | term, *(evaluation_of(*each) for each in evaluations)]
    values = final_and_best(rows)
    assert values["final"] | {"eval_loss": 0} == {
        **{"step": 3, "loss": row_of(3)["loss"], **term},
        **{"eval_step": 3, "eval_loss": 0, "eval_rewards/accuracies": 0.7},
    }
    assert math.isnan(values["final"]["eval_loss"])
    assert values["best"] == {
        "eval_loss": {"value": 0.40, "step": 2},
        "eval_rewards/accuracies": {"value": 0.70, "step": 2},
    }
    assert final_and_best([]) == {"final": {}, "best": {}}


@pytest.mark.parametrize(
    ("argument", "world", "command"),
    [
        ("data.train=[a b]", 1, "python -m dpo_dist.train 'data.train=[a b]'"),
        ("loss.beta=0.2", 4, "accelerate launch --num_processes 4 -m dpo_dist.train loss.beta=0.2"),
        ("run.name=ab'cd efgh", 1, "python -m dpo_dist.train 'run.name=***'"),
    ],
)
def test_the_command_of_a_verb_is_that_of_a_shell_without_secrets(
    argument: str, world: int, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "ab'cd efgh")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(Path(dpo_dist.__file__).parent / "train.py"), argument])
    found = describe_environment(world)
    assert found["command"] == command
    assert (found["git_commit"], found["git_changed_files"]) == (None, None), "outside of a checkout"
    assert {"torch", "transformers"} <= found["packages"].keys()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/notebook", "--token=x"])
    assert describe_environment(1)["command"] is None, "of another program"
