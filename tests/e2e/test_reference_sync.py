"""TR-DPO from the command line: results are equal after a resume."""

from pathlib import Path

from tests.e2e.conftest import Overrides
from tests.support.launch import history, run_verb, summary, train

SYNC = [
    "reference.mode=live",
    "trainer.max_steps=5",
    "optim.lr=1e-3",
    "loss.sync_reference={every: 2, mixup: 0.5}",
]


def test_a_reference_that_follows_is_restored_on_resume(overrides: Overrides, tmp_path: Path) -> None:
    train(overrides(*SYNC, f"run.dir={tmp_path}/whole"), processes=2)
    whole = history(tmp_path / "whole")

    stopped = run_verb("train", overrides(*SYNC, "trainer.stop_after_steps=3"), processes=2)
    assert summary(tmp_path / "run")["exit"] == "preempted", stopped.output
    [checkpoint] = (tmp_path / "run/checkpoints").glob("step-*")
    assert '"reference/rank-00001-00000.safetensors"' in (checkpoint / "manifest.json").read_text()
    train(overrides(*SYNC), processes=2)
    assert history(tmp_path / "run") == whole
