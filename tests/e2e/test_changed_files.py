"""Inputs that are deleted while a run trains do not stop it; a base that changes does."""

from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides
from tests.support.invented import write_pairs
from tests.support.launch import history, run_verb
from tests.support.tiny_model import write_model

# A loss that changes files after the second step.
LOSS = """
import shutil
from pathlib import Path

from torch.nn.functional import softplus

HERE = Path({here!r})


def changing(policy, reference, config):
    rows = HERE / "run/dpo_metrics/log_history.json"
    if rows.exists() and rows.read_text().count("step_seconds") > 1:
        {change}
    return softplus(-config.beta * (policy.margin - reference.margin))
"""
DELETED = "data", "encoded", "store"


@pytest.fixture
def command(overrides: Overrides, tmp_path: Path) -> list[str]:
    write_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data/train.jsonl", 60, seed=1)
    paths = f"model.path={tmp_path}/model", f"data.train=[{tmp_path}/data/train.jsonl]"
    loss = "loss=custom", "loss.function=changing_loss:changing"
    return overrides(*paths, *loss, f"data.cache={tmp_path}/encoded")


def changing(folder: Path, change: str) -> None:
    (folder / "changing_loss.py").write_text(LOSS.format(here=str(folder), change=change))


def test_deleted_data_do_not_stop_a_run(command: list[str], tmp_path: Path) -> None:
    changing(tmp_path, f"[shutil.rmtree(HERE / n, ignore_errors=True) for n in {DELETED}]")
    ended = run_verb("train", command, cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert not any((tmp_path / name).exists() for name in ("data", "encoded"))
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert [row["step"] for row in history(tmp_path / "run")] == list(range(1, 11))


def test_a_base_that_changed_is_an_error_at_the_end_and_the_same_command_finishes(
    command: list[str], tmp_path: Path
) -> None:
    """The written model has files of the base."""
    config = tmp_path / "model/config.json"
    written = config.read_text()
    changing(tmp_path, "(HERE / 'stay').exists() or (HERE / 'model/config.json').write_text('{}')")
    ended = run_verb("train", command, cwd=tmp_path)
    assert ended.code == 2, ended.output
    assert "processor or adapter of the model that this run started from has changed" in ended.output
    assert not (tmp_path / "run/model").exists()
    config.write_text(written)
    (tmp_path / "stay").touch()
    ended = run_verb("train", command, cwd=tmp_path)
    assert ended.code == 0, ended.output
    for file in (tmp_path / "model").glob("tokenizer*"):
        assert (tmp_path / "run/model" / file.name).read_bytes() == file.read_bytes()
