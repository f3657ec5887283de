"""The metrics log keeps every row through kills and resumes, as JSON and CSV."""

import csv
import json
import math
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight.metrics.log import COLUMNS, MetricsLog, final_and_best, metrics_by_source


def row_of(step: int) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 0.7 - 0.01 * step,
        "rewards/accuracies": 0.5 + 0.01 * step,
    }


def evaluation_of(step: int, loss: float, accuracy: float) -> dict[str, float]:
    return {"step": step, "eval_loss": loss, "eval_rewards/accuracies": accuracy}


def files_of(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in RunFolder(run_dir).metrics.iterdir()}


def csv_rows(run_dir: Path) -> list[dict[str, str]]:
    with RunFolder(run_dir).metrics_table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_columns_of_a_new_csv_file_are_those_that_users_read(tmp_path: Path) -> None:
    log = MetricsLog.open(RunFolder(tmp_path), None)
    names = (
        "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins rewards/both_fall"
        " logps/chosen logps/rejected logps/chosen_per_token logps/rejected_per_token"
        " kl/chosen kl/rejected tokens/chosen tokens/rejected"
    )
    cost = (
        "grad_norm learning_rate pairs tokens step_seconds pairs_per_second tokens_per_second time/data"
        " time/reference time/forward time/backward time/optimizer time/checkpoint time/other mfu"
        " mfu/datasheet memory/peak_allocated_bytes bad_steps loss_spikes"
    )
    columns = ["step", "epoch", *names.split(), *cost.split(), *(f"eval_{name}" for name in names.split())]
    assert log.folder.metrics_table.read_text() == ",".join(columns) + "\n"


def test_the_csv_file_grows_with_every_row(tmp_path: Path) -> None:
    log = MetricsLog.open(RunFolder(tmp_path), None)
    log.append(row_of(1))
    log.append(evaluation_of(1, 0.6, 0.5))
    first, second = csv_rows(tmp_path)
    assert tuple(first) == COLUMNS
    assert float(first["loss"]) == row_of(1)["loss"]
    assert first["eval_loss"] == ""
    assert (second["step"], second["loss"], second["eval_loss"]) == ("1", "", "0.6")


def test_a_new_key_becomes_a_column(tmp_path: Path) -> None:
    log = MetricsLog.open(RunFolder(tmp_path), None)
    log.append(row_of(1))
    log.append({**row_of(2), "eval_hard/loss": 0.25})
    log.append(row_of(3))
    assert [row["eval_hard/loss"] for row in csv_rows(tmp_path)] == ["", "0.25", ""]
    assert [row["step"] for row in csv_rows(tmp_path)] == ["1", "2", "3"]


def test_final_values_include_those_of_sources() -> None:
    rows = [
        {"step": 1, "loss": 0.7, "rewards/accuracies/hh": 0.5, "rewards/margins/hh": 0.1},
        {"step": 2, "loss": 0.6, "rewards/accuracies/uf": 0.75},
        {"step": 2, "eval_loss": 0.5, "eval_rewards/accuracies/hh": 0.25, "eval_rewards/margins/p05": -1.0},
    ]
    assert final_and_best(rows)["final"] == {
        "step": 2,
        "loss": 0.6,
        "rewards/accuracies/uf": 0.75,
        "eval_step": 2,
        "eval_loss": 0.5,
        "eval_rewards/accuracies/hh": 0.25,
        "eval_rewards/margins/p05": -1.0,
    }
    assert metrics_by_source(rows).keys() == {"hh", "uf"}, "a percentile is no source"


def test_saving_changes_no_row(tmp_path: Path) -> None:
    log = MetricsLog.open(RunFolder(tmp_path), None)
    for step in range(1, 4):
        log.append({**row_of(step), "new": 1 / 3})
    appended = (tmp_path / "dpo_metrics" / "training_metrics.csv").read_bytes()
    log.save()
    assert (tmp_path / "dpo_metrics" / "training_metrics.csv").read_bytes() == appended
    assert json.loads((tmp_path / "dpo_metrics" / "log_history.json").read_text()) == log.rows


def test_files_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = MetricsLog.open(RunFolder(tmp_path / "whole"), None)
    for step in range(1, 11):
        whole.append(row_of(step))
    whole.append(evaluation_of(10, 0.5, 0.6))
    whole.save()

    killed = MetricsLog.open(RunFolder(tmp_path / "killed"), None)
    for step in range(1, 9):
        killed.append({**row_of(step), **({"seen only before the kill": 1.0} if step == 8 else {})})
        if step == 6:
            killed.save()
    killed.save()
    resumed = MetricsLog.open(RunFolder(tmp_path / "killed"), 6)
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4, 5, 6]
    assert len(csv_rows(tmp_path / "killed")) == 6
    for step in range(7, 11):
        resumed.append(row_of(step))
    resumed.append(evaluation_of(10, 0.5, 0.6))
    resumed.save()
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_an_evaluation_that_is_made_again_has_one_row(tmp_path: Path) -> None:
    """A stop has interrupted it; the next start has saved its row, and was killed before its checkpoint."""
    log = MetricsLog.open(RunFolder(tmp_path), None)
    kept = [row_of(1), evaluation_of(1, 0.8, 0.4), row_of(2)]
    for row in (*kept, evaluation_of(2, 0.5, 0.6)):
        log.append(row)
    log.save()
    assert len(MetricsLog.open(RunFolder(tmp_path), 2).rows) == 4
    assert MetricsLog.open(RunFolder(tmp_path), 2, owes_evaluation=True).rows == kept


def test_a_run_directory_that_was_moved_away_is_not_created_again(tmp_path: Path) -> None:
    log = MetricsLog.open(RunFolder(tmp_path / "run"), None)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        log.save()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path) -> None:
    log = MetricsLog.open(RunFolder(tmp_path), None)
    log.folder.metrics_table.unlink()
    log.folder.metrics_table.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        log.append(row_of(1))
    assert caught.value.filename == str(log.folder.metrics_table)


def test_a_fresh_start_deletes_the_rows_of_an_earlier_one(tmp_path: Path) -> None:
    earlier = MetricsLog.open(RunFolder(tmp_path), None)
    earlier.append(row_of(1))
    earlier.save()
    MetricsLog.open(RunFolder(tmp_path), None)
    assert csv_rows(tmp_path) == []
    assert json.loads((tmp_path / "dpo_metrics" / "log_history.json").read_text()) == []


@pytest.mark.parametrize("content", [None, "[{"])
def test_an_unreadable_file_is_a_warning_and_training_continues(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "dpo_metrics").mkdir()
        (tmp_path / "dpo_metrics" / "log_history.json").write_text(content)
    warnings: list[str] = []
    log = MetricsLog.open(RunFolder(tmp_path), 6, warnings.append)
    assert "up to step 6" in warnings[0]
    log.append(row_of(7))
    log.save()
    assert json.loads((tmp_path / "dpo_metrics" / "log_history.json").read_text()) == [row_of(7)]


def test_values_that_are_not_finite_give_valid_json_and_survive_a_resume(tmp_path: Path) -> None:
    log = MetricsLog.open(RunFolder(tmp_path), None)
    log.append({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    log.save()
    log.write_summary({"final": {"loss": math.nan}, "losses": [math.inf, 1.0], "exit": "diverged"})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = json.loads((tmp_path / "dpo_metrics" / "log_history.json").read_text(), parse_constant=refuse)
    assert rows == [{"step": 1, "loss": None, "grad_norm": None}]
    summary = json.loads((tmp_path / "dpo_metrics" / "summary.json").read_text(), parse_constant=refuse)
    assert summary == {"final": {"loss": None}, "losses": [None, 1.0], "exit": "diverged"}
    assert math.isnan(MetricsLog.open(RunFolder(tmp_path), 1).rows[0]["loss"])


def test_final_and_best_values() -> None:
    rows = [
        evaluation_of(0, 0.10, 0.99),  # of the untrained policy
        row_of(1),
        evaluation_of(1, 0.60, 0.55),
        row_of(2),
        evaluation_of(2, 0.40, 0.70),
        row_of(3),
        evaluation_of(3, math.nan, 0.70),
    ]
    values = final_and_best(rows)
    assert values["final"]["step"] == 3
    assert values["final"]["loss"] == row_of(3)["loss"]
    assert values["final"]["eval_step"] == 3
    assert math.isnan(values["final"]["eval_loss"])
    assert values["best"] == {
        "eval_loss": {"value": 0.40, "step": 2},
        "eval_rewards/accuracies": {"value": 0.70, "step": 2},
    }


def test_a_run_without_rows_or_evaluations_has_no_final_or_best_values() -> None:
    assert final_and_best([]) == {"final": {}, "best": {}}
    assert final_and_best([row_of(1)])["best"] == {}
