"""Files of a run, the same command again, and reuse of the reference store."""

import csv
import json
import math
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.training.reporting.wandb_run import wandb_names
from scripts.wandb_dashboard import SECTIONS
from tests.e2e.conftest import Overrides, assert_last_log_probs, small_run
from tests.support.doctor_data import agent_records, write
from tests.support.launch import ROOT, history, log, run_verb, summary, train
from tests.support.tiny_model import write_model
from tests.support.wandb_file import history_rows, media_rows


def beginnings(text: str) -> set[str]:
    """Return the words of each indented line that come before a number, a path or a result."""
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    timeless = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines]
    return {re.split(r"\d|/|output| are equal|(?<=verdict:)", line)[0].rstrip() for line in timeless}


@dataclass(frozen=True)
class Trained:
    """A complete run of two processes by the real command line."""

    data: Path
    command: list[str]
    run: Path
    screen: str


@pytest.fixture(scope="module")
def trained(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    data = Path(shutil.copy(assets / "train.jsonl", folder))
    command = [*small_run(assets, folder), f"data.train=[{data}]", f"data.eval=[{assets}/eval.jsonl]"]
    command += ["tracking=wandb", "trainer.eval_every=2", "optim.lr=1e-2"]
    return Trained(data, command, folder / "run", train(command, processes=2, cold=True).output)


def test_a_run_writes_all_files_of_the_contract(trained: Trained) -> None:
    run, screen = trained.run, trained.screen
    for name in ("config.yaml", "environment.json", "report.html", "checkpoints/latest", "model/config.json"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "dpo_metrics/training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert "FutureWarning" not in screen
    assert "prefixes:" not in log(run), "the pairs begin differently"
    optional = {"", "encoding the eval data:"}  # another test may have encoded them
    page = (ROOT / "docs/watching.md").read_text()
    shown = page.partition("### A run without a terminal")[2].partition("### JSON objects")[0]
    documented = beginnings(shown)
    assert len(documented) > 12
    assert documented - optional <= beginnings(textwrap.indent(screen, "    "))
    assert "FutureWarning" in (run / "logs/rank-0.log").read_text()

    rows = history(run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    assert (rows[0]["epoch"], rows[0]["eval_rewards/margins"]) == (0.0, 0.0)
    assert [row["pairs"] for row in steps] == [6, 6, 6, 5]
    assert steps[-1]["epoch"] == 1.0
    with (run / "dpo_metrics/training_metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["loss"]) for line in table if line["loss"]] == [row["loss"] for row in steps]
    assert [line["step"] for line in table if line["eval_loss"]] == ["0", "2", "4"]
    tracked = history_rows(run)
    written = json.loads((run / "dpo_metrics/log_history.json").read_text())
    assert tracked == [wandb_names(row) for row in written]
    media = {name for row in media_rows(run) for name in row}
    logged = {name for row in tracked for name in row} | media
    panels = [panel for panels in SECTIONS.values() for panel in panels]
    always = [panel for panel in panels if panel.needs in ("", "reference", "evaluations")]
    assert [name for panel in always for name in panel.missing(logged)] == []
    for line in (line for line in table if line["loss"]):
        assert float(line["step_seconds"]) > 0

    ended = summary(run)
    found = [ended[name] for name in ("exit", "steps", "pairs_seen", "world_size")]
    assert found == ["completed", 4, 23, 2]
    assert ended["reference"]["computed"] == 2 * (23 + 5)
    assert ended["final"]["loss"] == steps[-1]["loss"]
    assert all(best["step"] > 0 for best in ended["best"].values())
    assert (ended["settings"]["loss.kind"], ended["settings"]["optim.lr"]) == ("sigmoid", 1e-2)
    assert ended["peak_memory_bytes"] > 0


def test_transformers_loads_the_model_with_its_trained_log_probs(trained: Trained, assets: Path) -> None:
    described, own = (
        json.loads((one / "config.json").read_text()) for one in (trained.run / "model", assets / "model")
    )
    assert described | {"dtype": own["dtype"]} == own
    model = AutoModelForCausalLM.from_pretrained(trained.run / "model", dtype=torch.float32)
    assert_last_log_probs(model, assets, trained.run)


def test_a_finished_run_is_not_repeated_and_an_error_with_other_data(trained: Trained) -> None:
    rows = trained.run / "dpo_metrics/log_history.json"
    before = rows.stat().st_mtime_ns
    assert "is complete" in train(trained.command).output
    assert rows.stat().st_mtime_ns == before
    trained.data.write_text("".join(trained.data.read_text().splitlines(keepends=True)[1:]))
    other = run_verb("train", trained.command)
    assert other.code == 2, other.output
    assert "the training data of this run has changed" in other.output


@pytest.mark.parametrize(
    ("options", "is_known"),
    [
        (["loss=beta_dpo", "model.adapter={r: 4}"], True),
        (["loss.weighting=wpo"], False),
        (["loss=simpo"], False),
    ],
    ids=["coupled, by an adapter", "weights from a forward", "no reference"],
)
def test_the_log_begins_with_the_values_before_the_first_step(
    options: list[str], is_known: bool, overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Those of the reference where the policy starts as it, without entropies, which need a forward."""
    train(overrides(f"data.eval=[{assets}/eval.jsonl]", "trainer.max_steps=1", *options))
    start, *rows = history(tmp_path / "run")
    needs_forward = {key for key in rows[-1] if "entropy" in key and key.startswith("eval_")}
    assert len(needs_forward) == 2
    assert bool(needs_forward & start.keys()) is not is_known
    assert (start["step"], start["epoch"], start["eval_pairs"]) == (0, 0.0, 5)
    if is_known:
        assert (start["eval_rewards/margins"], start["eval_rewards/accuracies"]) == (0.0, 0.5)
        assert start["eval_loss"] == pytest.approx(math.log(2))


def test_a_run_says_what_shared_prefixes_save_its_reference(overrides: Overrides, tmp_path: Path) -> None:
    """Its rows count the tokens of the data, however many of them are computed."""
    agents = write(tmp_path / "agents.jsonl", agent_records(23))
    words = overrides(f"data.train=[{agents}]", "trainer.log_every=1", "trainer.micro_batch_tokens=2000")
    logs, tokens = [], []
    for name in ("true", "false"):
        run = tmp_path / name
        own = [f"trainer.prefix_tree={name}", f"run.dir={run}", f"reference.store={run}/store"]
        train([*words, *own], processes=2)
        logs.append(log(run))
        tokens.append(sum(row["tokens"] for row in history(run) if "tokens" in row))
    assert tokens[0] == tokens[1]
    [scored] = re.findall(r"reference: (\d+) % fewer tokens than by sharing prompts only\n", logs[0])
    assert 30 < int(scored) < 90
    assert "fewer tokens" not in logs[1]


def test_reference_log_probs_are_computed_once(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    """Another beta, loss, learning rate, order or world size computes nothing; other weights everything."""
    assert run_verb("precompute", overrides(f"run.dir={tmp_path}/scored")).code == 0
    other = overrides(
        "loss.kind=ipo", "loss.beta=0.5", "optim.lr=1e-3", "trainer.seed=7", "trainer.max_steps=3"
    )
    screen = train(other, processes=2).output
    assert summary(tmp_path / "run")["reference"]["computed"] == 0
    assert "loading a model to score" not in screen + (tmp_path / "run/logs/rank-0.log").read_text()

    changed = write_model(tmp_path / "changed", seed=5)
    for name, other in (("weights", f"model.path={changed}"), ("precision", "model.dtype=bf16")):
        train(overrides(other, f"run.dir={tmp_path}/{name}", "trainer.max_steps=1"))
        assert summary(tmp_path / name)["reference"]["computed"] == 12


def test_evaluation_data_can_be_split_off_the_training_data(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    screen = train(overrides("data.eval_share=0.3", "trainer.eval_every=2")).output
    data = summary(tmp_path / "run")["data"]
    held_out = data["eval"]["read"]
    assert held_out > 0
    assert data["train"]["held_out_for_eval"] == held_out
    assert (data["eval"]["prompts_also_in_train"], data["eval"]["also_in_train"]) == (0, 0)
    assert f"{held_out} held_out_for_eval" in screen
    assert any("eval_loss" in row for row in history(tmp_path / "run"))
