"""A start that is refused changes nothing in the run directory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import FolderConfig, ModelConfig, RunConfig
from dpo_dist.distributed.checkpoint import Checkpoint
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.insight.console import Console
from dpo_dist.training import run
from dpo_dist.training.start import Start
from tests.support.alone import ALONE

CHECKS = [
    "describe_run",
    "load_inputs",
    "check_keep_best",
    "check_identity",
    "describe_change",
    "check_disk_room",
]


@pytest.mark.parametrize("refusing", CHECKS)
def test_a_refused_lengthening_leaves_the_finished_run_as_it_was(
    refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()
    files = [folder.config, folder.environment, folder.state, folder.summary, folder.report]
    for file in files:
        file.write_text(f"former {file.name}")
    dataset = SimpleNamespace(labels=[], fingerprint="d")
    inputs: dict[str, Any] = {
        "eval_set": dataset,
        "train_set": dataset,
        "policy_files": SimpleNamespace(digest="m", folder=tmp_path),
        "reference_files": None,
        "sampler": SimpleNamespace(steps=9),
        "weights": 9,
    }
    answers = {"load_inputs": SimpleNamespace(**inputs), "describe_run": {}, "describe_change": ""}
    for name in CHECKS:
        monkeypatch.setattr(run, name, lambda *_, name=name, **__: answers.get(name))

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("refused")

    monkeypatch.setattr(run, refusing, refuse)
    monkeypatch.setattr(run.Position, "of", lambda _: None)
    start = Start(Checkpoint(folder.checkpoints / "step-000004", {"step": 4}))
    config = RunConfig(run=FolderConfig(str(folder)), model=ModelConfig("somewhere"))
    with pytest.raises(ConfigError, match="refused"):
        run._begin(config, start, ALONE, Console(None))
    assert [file.read_text() for file in files] == [f"former {file.name}" for file in files]
