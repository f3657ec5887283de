"""The worked examples of CONTRIBUTING.md: applied to a copy of the project, they do what the page says."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import ArceeConfig, AutoModelForCausalLM

from tests.support import tiny
from tests.support.families import COMMON, HEADS
from tests.support.pages import ROOT, blocks_of

EXAMPLES = [block.text for block in blocks_of("CONTRIBUTING.md") if block.language == "diff"]


def changes(diff: str) -> Iterator[tuple[str, list[str]]]:
    """The file and the lines of each hunk."""
    for part in diff.split("--- ")[1:]:
        name, *hunks = part.split("\n@@\n")
        yield from ((name, hunk.splitlines()) for hunk in hunks)


def apply(diff: str, root: Path) -> None:
    """Replace the old lines of every hunk by its new ones; the old ones occur exactly once."""
    for name, lines in changes(diff):
        file = root / name
        old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
        text = file.read_text() if file.exists() else ""
        if old:
            assert text.count(old) == 1, f"{name} has these lines {text.count(old)} times:\n{old}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.replace(old, new) if old else new)


def test_the_table_counts_the_files_and_lines_of_each_example() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| a ")]
    for (_, addition, files, lines, *_), diff in zip(rows, EXAMPLES, strict=True):
        hunks = list(changes(diff))
        added = sum(line[:1] == "+" and line != "+" for _, hunk in hunks for line in hunk)
        assert files.split(",")[0].strip() == str(len({name for name, _ in hunks})), addition
        assert lines.strip() == str(added), addition


# In one process, because its imports take longer than all it does.
TOGETHER = """
import json, os, runpy, sys
import pytest
from dpo_dist.config.verbs import VERBS

os._exit = sys.exit  # as a verb ends its process
tests, *commands = json.loads(sys.argv[1])
assert pytest.main(["-q", "-p", "no:cacheprovider", *tests]) == 0
for verb, *command in commands:
    sys.argv = [verb, *command]
    try:
        runpy.run_module(VERBS[verb].module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, command
"""


def test_the_examples_pass_their_tests_and_train_together(tmp_path: Path) -> None:
    for name in ("dpo_dist", "conf", "docs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name)  # compiled files, too
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for diff in EXAMPLES:
        apply(diff, tmp_path)
    tokenizer = tiny.qwen()
    torch.manual_seed(0)
    config = ArceeConfig(
        **COMMON | HEADS | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [{"question": f"{n}?", "revision": f"yes {n}", "draft": "no, never"} for n in range(8)]
    (tmp_path / "revisions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    names = (
        "objective/test_losses",
        "objective/test_metrics",
        "data/test_shapes",
        "model/test_architectures",
    )
    tests = [
        "-k",
        "sigmoid_margin or by_hand or revision or arcee",
        *(f"tests/unit/{name}.py" for name in names),
    ]
    run = "train model.path=model model.dtype=fp32 data.train=[revisions.jsonl] loss=sigmoid_margin "
    run += "tracking=off loss.options.target=0.5 run.dir=run trainer.max_steps=1 trainer.global_batch_pairs=8"
    commands = ("train --help loss.options.target", "count data.train=[revisions.jsonl]", run)
    ended = subprocess.run(
        [sys.executable, "-c", TOGETHER, json.dumps([tests, *map(str.split, commands)])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert "margin between the rewards" in ended.stdout
    assert "revisions.jsonl: 8 records" in ended.stdout
    (row,) = json.loads((tmp_path / "run/dpo_metrics/log_history.json").read_text())
    assert row["loss"] == pytest.approx(0.974077, abs=1e-5), "softplus(0.5) at no margin"
    assert row["logps/margins"] == pytest.approx(row["logps/chosen"] - row["logps/rejected"])
