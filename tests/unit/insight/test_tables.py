"""The closing table of a run: it shows what rows and summary have."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight.tables import closing_table

FOLDER = RunFolder(Path("out/run"))
ROWS = [
    {"step": 5, "loss": 0.6931, "rewards/accuracies": 0.5, "mfu": 0.4, "step_seconds": 2.0},
    {"step": 5, "eval_loss": 0.6, "eval_rewards/accuracies": 0.75},
    {"step": 60, "loss": 0.04123, "rewards/accuracies": 0.98, "mfu": 0.5, "step_seconds": 1.0},
    {"step": 60, "eval_loss": 0.7, "eval_rewards/accuracies": 0.75},
]
SUMMARY: dict[str, Any] = {
    "exit": "completed",
    "best": {"eval_loss": {"value": 0.6, "step": 5}},
    "steps": 60,
    "pairs_seen": 3840,
    "train_seconds": 303.0,
    "pairs_per_second": 12.67,
    "peak_memory_bytes": 3 * 2**30,
    "world_size": 2,
    "data": {"train": {"kept": 6403, "read": 6410}, "eval": {"kept": 1, "read": 1}},
    "reference": {"mode": "cached", "computed": 6403, "hits": 0},
}
WORDS = (
    *("training loss        0.6931  0.0412", "0.7000  0.6000 at step 5", "completed 60 steps"),
    *("5 min 03 s of training, 3,840 pairs", "6,403 of 6,410 records kept", "out/run/report.html"),
)


def test_the_table_of_a_complete_run() -> None:
    table = "\n".join(closing_table(FOLDER, ROWS, SUMMARY))
    assert [words for words in WORDS if words not in table] == []


@pytest.mark.parametrize(
    ("outcome", "beginning"),
    [
        ("preempted", "stopped after 1 step; the same command resumes from there"),
        ("diverged", "diverged after 1 step"),
    ],
)
def test_a_run_that_ends_early_has_no_model(outcome: str, beginning: str) -> None:
    files = ["report     out/run/report.html", "metrics    out/run/dpo_metrics"]
    lines = closing_table(FOLDER, [], {"exit": outcome, "steps": 1})
    assert lines == ["", f"run        {beginning}", *files]
