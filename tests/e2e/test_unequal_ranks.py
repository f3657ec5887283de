"""Two ranks with different configurations end with one error before they load anything."""

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides
from tests.support.launch import run_verb


def enter_own_disk() -> None:
    """As on a node whose disk has another version of the file."""
    os.chdir(f"node-{os.environ['RANK']}")


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_ranks_with_different_configurations_end_with_one_error(
    verb: str, overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / f"node-{rank}").mkdir()
        (tmp_path / f"node-{rank}/mine.yaml").write_text(f"sampling: {{temperature: 0.{rank + 1}}}\n")
    command = overrides("sampling.prompts=2", f"data.eval=[{assets}/eval.jsonl]")
    if verb == "compare":
        models = f"compare.models=[a={assets}/model,b={assets}/model]"
        command = [models, f"data.eval=[{assets}/eval.jsonl]", "model.dtype=fp32", f"run.dir={tmp_path}/run"]
    ended = run_verb(verb, ["mine.yaml", *command], processes=2, cwd=tmp_path, prepare=enter_own_disk)
    assert ended.code == 2, ended.output
    assert "sampling.temperature: 0.1 on rank 0" in ended.output
    assert "0.2 on rank 1" in ended.output
    assert ended.output.count("different settings or software") == 1
