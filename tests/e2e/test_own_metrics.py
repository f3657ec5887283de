"""Metrics of a function of the user's own."""

from pathlib import Path

import pandas as pd
import pytest

from tests.e2e.conftest import Overrides, last_evaluation
from tests.support.launch import history, run_verb, summary, train
from tests.support.own_metrics import OWN


def test_metrics_of_a_function_are_in_rows_scores_charts_and_the_best_checkpoint(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Of two processes with odd numbers of pairs, against pandas, and against the metric with its formula."""
    words = overrides(
        f"data.eval=[{assets}/eval.jsonl,{{path: {assets}/train.jsonl, limit: 3}}]",
        *(f"metrics.function={OWN}", "trainer.keep_best=eval_custom/margin", "trainer.eval_every=2"),
        *("trainer.max_steps=4", "optim.lr=1e-3", "trainer.micro_batch_tokens=64"),
    )
    screen = train(words, processes=2).output
    run = tmp_path / "run"
    assert "metrics: custom/margin, custom/likelier by tests.support.own_metrics:of_pairs from " in screen
    rows = history(run)
    assert len(rows) == 4 + 3
    for row in rows:
        prefix = "eval_" if "eval_loss" in row else ""
        assert row[f"{prefix}custom/margin"] == pytest.approx(row[f"{prefix}rewards/margins"], rel=1e-12)
    last = last_evaluation(run)
    scores = pd.read_json(run / "evaluation/training/scores.jsonl", lines=True)
    assert len(scores) == 8
    assert scores["custom/margin"].tolist() == pytest.approx(scores["margin"].tolist(), rel=1e-6)
    per_token = [scores[f"logp_{side}"] / scores[f"tokens_{side}"] for side in ("chosen", "rejected")]
    assert scores["custom/likelier"].equals((per_token[0] > per_token[1]).astype(int))
    assert last["eval_custom/likelier"] == scores["custom/likelier"].mean()
    by_source = scores.groupby("source")["custom/likelier"].mean()
    assert {label: last[f"eval_custom/likelier/{label}"] for label in by_source.index} == dict(by_source)
    facts = summary(run)
    best = max((row for row in rows[1:] if "eval_loss" in row), key=lambda row: row["eval_custom/margin"])
    assert facts["best_checkpoint"]["value"] == best["eval_custom/margin"]
    assert facts["best"]["eval_custom/margin"] == {"value": best["eval_custom/margin"], "step": best["step"]}
    assert facts["final"]["eval_custom/likelier"] == last["eval_custom/likelier"]
    page = (run / "report.html").read_text()
    assert all(f"<b>{name}</b>" in page for name in ("custom/margin", "custom/likelier"))

    refused = run_verb("evaluate", [f"run.dir={run}"])
    assert (refused.code, "add metrics.function=" in refused.output) == (2, True)
    evaluated = run_verb("evaluate", [f"run.dir={run}", f"metrics.function={OWN}"])
    assert evaluated.code == 0, evaluated.output
    again = pd.read_json(run / "evaluation/scores.jsonl", lines=True)
    assert again["custom/margin"].tolist() == pytest.approx(scores["custom/margin"].tolist(), abs=1e-5)


def test_a_metric_changes_no_run(overrides: Overrides, tmp_path: Path) -> None:
    options = ["trainer.max_steps=2", f"run.root={tmp_path}"]
    words = [word for word in overrides(*options) if not word.startswith("run.dir=")]
    train(words)
    (run,) = tmp_path.glob("run-*")
    again = train([*words, f"metrics.function={OWN}"]).output
    assert "is complete" in again
    assert f"dpo-dist evaluate run.dir={run} metrics.function={OWN}\n" in again
    assert "dpo-dist evaluate" not in train(words).output
    for wrong in ("nomod:f", OWN.replace(":", "."), f"{OWN}_of_none"):
        assert run_verb("train", [*words, f"metrics.function={wrong}"]).code == 2
    assert list(tmp_path.glob("run-*")) == [run]
