"""The commands of docs/reward_models.md that write worked examples into a model's weights."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tests.support.launch import run_verb, summary
from tests.support.tiny_model import write_model

ROOT = Path(__file__).resolve().parents[2]


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model learns nothing of a manner, but each command reads what the one before it wrote."""
    page = (ROOT / "docs" / "reward_models.md").read_text()
    text = re.search(r"### Worked examples in the weights\n.*?\n\n((?: {4}[^\n]*\n)+)", page, re.DOTALL)
    assert text is not None
    model = write_model(tmp_path / "model")
    block = re.sub(r"^ {4}", "", text[1], flags=re.MULTILINE).replace("MODEL", str(model))
    script, sample, learn, answer, _ = (
        shlex.split(command) for command in block.replace("\\\n", "").strip().split("\n")
    )
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / script[1]), run_name="__main__")
    few = ["pairs.limit=20", "sampling.max_new_tokens=8", "pairs.unfinished=keep"]
    for command, more in ((sample, few), (learn, ["trainer.max_steps=1"]), (answer, few)):
        ended = run_verb(command[1], [*command[2:], *more], cwd=tmp_path)
        assert ended.code == 0, ended.output
        reads_another = "the teacher reads another prompt in 20 of 20 examples" in ended.output
        assert reads_another is (command is learn)
    assert summary(tmp_path / "sailor")["reference"]["teacher"]["computed"] == 16
    answered = [json.loads(line) for line in (tmp_path / "said/pairs/pairs.jsonl").read_text().splitlines()]
    assert [len(row["prompt"]) for row in answered] == [1] * 20
