"""Files of a run, the same command again, and reuse of the reference store."""

import csv
import json
import math
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.config.data import DataConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.insight.metrics.log import PHASES
from dpo_dist.insight.metrics.trackers import wandb_names
from dpo_dist.reference.store import LogpStore, open_shard, read_fingerprint
from scripts.wandb_dashboard import SECTIONS
from tests.e2e.conftest import Overrides
from tests.support import tiny
from tests.support.launch import ROOT, history, run_verb, summary, train
from tests.support.tiny_model import write_model
from tests.support.wandb_file import history_rows, media_rows


def beginnings(text: str) -> set[str]:
    """Return the words of each indented line that come before a number, a path or a result."""
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    timeless = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines]
    return {re.split(r"\d|/|output| are equal|(?<=verdict:)", line)[0].rstrip() for line in timeless}


def test_a_run_writes_all_files_of_the_contract(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    screen = train(
        overrides(
            f"data.eval=[{assets}/eval.jsonl]",
            "tracking.wandb=offline",
            "trainer.eval_every=2",
        ),
        processes=2,
        cold=True,
    ).output
    run = tmp_path / "run"
    for name in ("config.yaml", "environment.json", "report.html", "checkpoints/latest", "model/config.json"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "dpo_metrics/training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert "FutureWarning" not in screen
    optional = {
        "",
        "encoding the train data:",
        "encoding the eval data:",
    }  # other tests may have encoded them
    documented = beginnings((ROOT / "docs/console.md").read_text().partition("## JSON objects")[0])
    assert len(documented) > 15
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
        times = [float(line[f"time/{phase}"]) for phase in PHASES]
        assert min(times) >= 0
        assert sum(times) == pytest.approx(float(line["step_seconds"]))

    ended = summary(run)
    assert (ended["exit"], ended["steps"], ended["pairs_seen"], ended["world_size"]) == (
        "completed",
        4,
        23,
        2,
    )
    assert ended["reference"]["computed"] == 2 * (23 + 5)
    assert ended["final"]["loss"] == steps[-1]["loss"]
    assert all(best["step"] > 0 for best in ended["best"].values())
    assert (ended["settings"]["loss.kind"], ended["settings"]["optim.lr"]) == ("sigmoid", 1e-4)
    assert ended["peak_memory_bytes"] > 0


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


def test_transformers_loads_the_model_with_its_trained_log_probs(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    evaluated_on = f"data.eval=[{assets}/eval.jsonl]"
    train(overrides(evaluated_on, "optim.lr=1e-2", "trainer.max_steps=2"), processes=2)
    described, own = (
        json.loads((one / "config.json").read_text()) for one in (tmp_path / "run/model", assets / "model")
    )
    assert described | {"dtype": own["dtype"]} == own
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    tokenizer = tiny.qwen()
    sums = []
    for record in read_records(f"{assets}/eval.jsonl"):
        pair = encode_pair(record, tokenizer, DataConfig())  # type: ignore[arg-type]
        assert isinstance(pair, EncodedExample)
        ids = torch.tensor([*pair.prompt_ids.tolist(), *pair.responses[0].tolist()])
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
        sums.append(logps[len(pair.prompt_ids) - 1 :].sum().item())
    evaluated = history(tmp_path / "run")[-1]["eval_logps/chosen"]
    assert abs(sum(sums) / len(sums) - evaluated) < 1e-4 * abs(evaluated)


def test_a_finished_run_is_not_repeated_and_an_error_with_other_data(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    data, rows = tmp_path / "train.jsonl", tmp_path / "run/dpo_metrics/log_history.json"
    lines = (assets / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    command = overrides("trainer.max_steps=1", "trainer.keep_last=0", f"data.train=[{data}]")
    train(command, cold=True)
    assert not list((tmp_path / "run/checkpoints").iterdir())
    before = rows.stat().st_mtime_ns
    assert "is complete" in train(command).output
    assert rows.stat().st_mtime_ns == before
    data.write_text("".join(lines[1:]))
    other = run_verb("train", command)
    assert other.code == 2, other.output
    assert "the training data of this run changed" in other.output


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
    train(overrides(f"model.path={changed}", f"run.dir={tmp_path}/changed-run", "trainer.max_steps=1"))
    assert summary(tmp_path / "changed-run")["reference"]["computed"] == 12

    train(overrides("model.dtype=bf16", f"run.dir={tmp_path}/bf16-run", "trainer.max_steps=1"))
    assert summary(tmp_path / "bf16-run")["reference"]["computed"] == 12


def test_a_model_trained_with_sft_is_its_own_reference(overrides: Overrides, tmp_path: Path) -> None:
    train(overrides("loss.kind=sft", "reference.mode=none", "trainer.max_steps=2", "optim.lr=1e-3"))
    warmed = [f"model.path={tmp_path}/run/model", f"run.dir={tmp_path}/dpo", "trainer.max_steps=2"]
    train(overrides(*warmed))
    first = history(tmp_path / "dpo")[0]
    assert abs(first["loss"] - 0.693147) < 1e-5
    assert abs(first["rewards/margins"]) < 1e-5


def test_the_step_0_check_finds_log_probs_of_another_model(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Log-probs of another model under this model's fingerprint: only re-scoring can find them."""
    train(overrides("trainer.max_steps=1"))
    other = write_model(tmp_path / "other", seed=9)
    train(overrides(f"model.path={other}", f"run.dir={tmp_path}/other-run", "trainer.max_steps=1"))
    by_label = {
        space.label: space for path in (tmp_path / "store").glob("*/") if (space := read_fingerprint(path))
    }
    own, others = by_label[f"{assets}/model"], by_label[str(other)]
    shards = [
        shard for file in (tmp_path / "store" / own.name).glob("*.safetensors") if (shard := open_shard(file))
    ]
    keys = np.concatenate([shard.keys for shard in shards])
    rows = LogpStore.open(tmp_path / "store", own).read(keys)
    shutil.rmtree(tmp_path / "store" / others.name)
    LogpStore.open(tmp_path / "store", others).write(keys, rows)
    ended = run_verb(
        "train", overrides(f"model.path={other}", f"run.dir={tmp_path}/third-run", "trainer.max_steps=1")
    )
    assert ended.code == 2, ended.output
    assert "differ from a fresh computation" in ended.output
    assert "train.jsonl:" in ended.output


def test_a_loss_that_is_not_finite_ends_the_run_with_3(overrides: Overrides, tmp_path: Path) -> None:
    ended = run_verb("train", overrides("optim.lr=1e30", "optim.warmup_ratio=0", "trainer.epochs=3"))
    assert ended.code == 3, ended.output
    assert "diverged" in ended.output
    ended_summary = summary(tmp_path / "run")
    assert ended_summary["exit"] == "diverged"
    assert [finding["rule"] for finding in ended_summary["verdict"]["findings"]] == ["diverged"]
    sentence = f"verdict: {ended_summary['verdict']['sentence']}"
    first = min(int(file.stem.rpartition("-")[2]) for file in (tmp_path / "run/logs").glob("bad-step-*"))
    assert f"was the first value that is not finite, at step {first};" in sentence
    assert history(tmp_path / "run")[-1]["step"] > first
    assert ended.output.index("diverged: loss or gradient is not finite") < ended.output.index(sentence)
    assert ended.output.count("loss or gradient is not finite") == 1
    last = json.loads((tmp_path / "run/dpo_metrics/log_history.json").read_text())[-1]
    unknown = ["loss", "rewards/accuracies", "rewards/both_fall", "rewards/margins"]
    assert [last[name] for name in unknown] == [None] * 4


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
