"""The worked examples of docs/extending.md: applied to a copy of the project, they do what the page says."""

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
from tests.support.pages import ROOT, blocks_of

EXAMPLES = {block.title: block.text for block in blocks_of("extending.md") if block.language == "diff"}
# Rows of the page's table, by the title of their diff.
ROWS = {
    "loss": "a loss kind with an option",
    "format": "a data format",
    "metric per pair": "a metric per pair",
    "metric per token": "a metric per token",
    "architecture": "a model architecture",
}


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
        file.write_text(text.replace(old, new) if old else new)


@pytest.mark.parametrize("title", ROWS)
def test_the_table_counts_the_files_and_lines_of_each_example(title: str) -> None:
    hunks = list(changes(EXAMPLES[title]))
    lines = sum(line[:1] == "+" and line != "+" for _, hunk in hunks for line in hunk)
    page = (ROOT / "docs" / "extending.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {ROWS[title]} |"))
    _, _, files_told, lines_told, *_ = (cell.strip() for cell in row.split("|"))
    assert files_told.split(",")[0] == str(len({name for name, _ in hunks}))
    assert lines_told == str(lines)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all examples applied."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("dpo_dist", "conf", "docs", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for diff in EXAMPLES.values():
        apply(diff, copy)
    return copy


def run(copy: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_the_tests_that_the_examples_add_pass(extended: Path) -> None:
    files = (
        *("objective/test_losses.py", "objective/test_metrics.py"),
        *("data/test_formats.py", "model/test_architectures.py"),
    )
    chosen = "sigmoid_margin or by_hand or duel or arcee"
    pytest_options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen)
    output = run(extended, *pytest_options, *(f"tests/unit/{file}" for file in files))
    assert " passed" in output or "100%" in output


def test_one_run_uses_all_of_them(extended: Path) -> None:
    tokenizer = tiny.qwen()
    torch.manual_seed(0)
    config = ArceeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(extended / "model")
    tokenizer.save_pretrained(extended / "model")
    records = [
        {"question": f"{n}?", "answer_a": f"yes {n}", "answer_b": "no, never", "winner": "ab"[n % 2]}
        for n in range(8)
    ]
    (extended / "duels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides = "model.path=model model.dtype=fp32 data.train=[duels.jsonl] loss=sigmoid_margin tracking=off"
    smaller = "loss.target_margin=0.5 run.dir=run trainer.max_steps=1 trainer.global_batch_pairs=8"
    run(extended, "-m", "dpo_dist.train", *overrides.split(), *smaller.split())
    (row,) = json.loads((extended / "run/dpo_metrics/log_history.json").read_text())
    assert row["loss"] == pytest.approx(0.974077, abs=1e-5), "softplus(0.5) at no margin"
    assert row["logps/margins"] == pytest.approx(row["logps/chosen"] - row["logps/rejected"])
    assert row["logps/chosen"] < row["logps/chosen_per_token"] < 0
    explained = run(extended, "-m", "dpo_dist.train", "--help", "loss.target_margin")
    assert "margin between the rewards" in explained
