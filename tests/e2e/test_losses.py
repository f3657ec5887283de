"""Losses by the command line: of rankings, scores and completions, of one's own, with a synced reference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.errors import DpoDistError, ExitCode
from dpo_dist.training.reporting.metrics_log import read_rows
from dpo_dist.training.start.dry_run import dry_run
from tests.e2e.conftest import Overrides
from tests.support.launch import history, run_verb, summary, train

RANKINGS: list[dict[str, Any]] = [
    {"prompt": f"question {n}", "responses": [f"answer {n} {rank}" * (rank + 1) for rank in range(2 + n % 3)]}
    for n in range(9)
]
SCORED = [
    {
        "prompt": f"question {n}",
        "chosen": "yes" * (n + 1),
        "rejected": "no",
        "score_chosen": 5,
        "score_rejected": n % 5,
    }
    for n in range(9)
]
LABELLED = [
    {"prompt": f"question {n % 9}", "completion": f"answer {n}" * (1 + n % 4), "label": n % 3 > 0}
    for n in range(11)
]
COMPLETIONS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(9)]


def written(file: Path, rows: list[dict[str, object]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train=[{file}]"


def test_completions_alone_train_a_model_that_is_then_its_own_reference(
    overrides: Overrides, tmp_path: Path
) -> None:
    data = written(tmp_path / "completions.jsonl", COMPLETIONS)
    train(overrides(data, "loss=sft", "trainer.epochs=2", "optim.lr=1e-2"), processes=2)
    rows = history(tmp_path / "run")
    assert rows[-1]["logps/chosen"] > rows[0]["logps/chosen"]
    assert not [name for name in rows[0] if "rejected" in name or "margins" in name]

    train(overrides(f"model.path={tmp_path}/run/model", f"run.dir={tmp_path}/dpo", "trainer.max_steps=1"))
    [first] = history(tmp_path / "dpo")
    assert abs(first["loss"] - math.log(2)) < 1e-5
    assert abs(first["rewards/margins"]) < 1e-5


def test_labelled_responses_train_the_same_on_two_processes_and_are_scored_once(
    overrides: Overrides, tmp_path: Path
) -> None:
    data = written(tmp_path / "labelled.jsonl", LABELLED)
    command = [data, "loss=kto", "trainer.epochs=2", "trainer.global_batch_pairs=3", "optim.lr=1e-3"]
    train(overrides(*command))
    train(overrides(*command, f"run.dir={tmp_path}/two"), processes=2)
    alone, two = history(tmp_path / "run"), history(tmp_path / "two")
    assert [set(row) for row in alone] == [set(row) for row in two], "also of batches that lack a side"
    for row, other in zip(alone, two, strict=True):
        for name in set(row) & {"loss", "loss/kl", "rewards/margins", "rewards/auc", "rewards/rejected"}:
            assert row[name] == pytest.approx(other[name], abs=1e-5), name
    assert any(row["loss/kl"] < 0 for row in alone) or alone[-1]["loss/kl"] != 0
    assert "rewards/accuracies" not in alone[0]
    reference = [summary(tmp_path / name)["reference"] for name in ("run", "two")]
    assert [report["computed"] for report in reference] == [2 * len(LABELLED), 0]
    pairs = written(tmp_path / "pairs.jsonl", SCORED)
    train(overrides(pairs, "loss=apo_zero_unpaired", f"run.dir={tmp_path}/apart"))
    assert summary(tmp_path / "apart")["data"]["train"]["pairs"] == 2 * len(SCORED)


def test_a_start_names_data_that_do_not_fit_the_loss(overrides: Overrides, tmp_path: Path) -> None:
    refused = run_verb("train", overrides(written(tmp_path / "rows.jsonl", COMPLETIONS)))
    assert refused.code == 2, refused.output
    assert "set loss=sft" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("rows", "loss", "said"),
    [
        (
            [row | {"scores": [4, 3, 2, 1][-len(row["responses"]) :]} for row in RANKINGS],
            "sigmoid",
            "set loss.kind=plackett_luce",
        ),
        (RANKINGS, "plackett_luce", "the columns are none of the known shapes"),
        (COMPLETIONS, "kto", "a label: true or false"),
        (LABELLED, "sigmoid", "set loss=kto"),
        (LABELLED, "sft", "set loss=kto"),
        ([{**row, "score_rejected": 5} for row in SCORED], "odpo", "above the rejected"),
    ],
)
def test_data_that_do_not_fit_the_loss_are_named_before_anything_is_computed(
    rows: list[dict[str, object]], loss: str, said: str, overrides: Overrides, tmp_path: Path
) -> None:
    config = load_run_config(overrides(written(tmp_path / "rows.jsonl", rows), f"loss={loss}"))
    with pytest.raises(DpoDistError) as caught:
        dry_run(config)
    assert caught.value.exit_code == ExitCode.invalid
    assert said in caught.value.block()
    assert "rows.jsonl" in caught.value.block()


def test_records_of_one_prompt_have_no_partners(overrides: Overrides, tmp_path: Path) -> None:
    rows = [{**row, "prompt": "same"} for row in LABELLED]
    refused = run_verb("train", overrides(written(tmp_path / "rows.jsonl", rows), "loss=kto"))
    assert refused.code == ExitCode.invalid
    assert "set loss=apo_zero_unpaired" in refused.output
    assert "rows.jsonl" in refused.output


OWN_LOSS = """
from torch.nn.functional import relu


def hinge(policy, reference, config):
    return relu(1 - config.beta * (policy.margin - reference.margin))
"""


def test_a_loss_of_ones_own_trains_on_two_processes_as_the_built_in_one(
    overrides: Overrides, tmp_path: Path
) -> None:
    (tmp_path / "my_losses.py").write_text(OWN_LOSS)
    command = overrides("loss=custom", "loss.function=my_losses:hinge", "trainer.max_steps=2")
    checked = run_verb("train", [*command, "--check"], cwd=tmp_path)
    assert checked.code == 0, checked.output
    assert "custom loss my_losses:hinge" in checked.output

    own = run_verb("train", command, processes=2, cwd=tmp_path)
    assert own.code == 0, own.output
    assert f"loss: custom loss my_losses:hinge from {tmp_path}/my_losses.py" in own.output
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["loss_function"].startswith("custom loss my_losses:hinge")

    train(overrides("loss=hinge", f"run.dir={tmp_path}/builtin", "trainer.max_steps=2"), processes=2)
    assert history(tmp_path / "run") == history(tmp_path / "builtin")

    (tmp_path / "my_losses.py").write_text(OWN_LOSS.replace("1 -", "2 -"))
    other = run_verb("train", command, cwd=tmp_path)
    assert other.code == 2, other.output
    assert "which depends on the source of my_losses:hinge" in other.output


def test_a_run_that_fails_after_steps_keeps_its_rows_until_the_same_command_starts_it_again(
    overrides: Overrides, tmp_path: Path
) -> None:
    """A loss that cannot take the five pairs of the last batch."""
    own, run = tmp_path / "my_losses.py", RunFolder(tmp_path / "run")
    command = overrides("loss=custom", "loss.function=my_losses:hinge")
    own.write_text(OWN_LOSS.replace("))\n", "))[:1]\n"))
    assert run_verb("train", command, cwd=tmp_path).code == 2
    assert not run.path.exists()  # it has no row

    own.write_text(OWN_LOSS.replace("))\n", "))[: 1 if policy.margin.numel() == 5 else None]\n"))
    failed = run_verb("train", command, cwd=tmp_path)
    assert failed.code == 2, failed.output
    assert "does not return one loss per pair" in failed.output
    assert [row["step"] for row in read_rows(run)] == [1, 2, 3]
    assert "does not return one loss per pair" in run.rank_log(0).read_text()

    own.write_text(OWN_LOSS)
    again = run_verb("train", command, cwd=tmp_path)
    assert again.code == 0, again.output
    assert "training starts again" in again.output
    assert [row["step"] for row in history(run.path)] == [1, 2, 3, 4]


def test_a_reference_that_follows_is_restored_on_resume(overrides: Overrides, tmp_path: Path) -> None:
    options = ["reference.mode=live", "loss.sync_reference={every: 2, mixup: 0.5}"]
    command = overrides(*options, "trainer.max_steps=5", "optim.lr=1e-3")
    train([*command, f"run.dir={tmp_path}/whole"], processes=2)
    stopped = run_verb("train", [*command, "trainer.stop_after_steps=3"], processes=2)
    assert stopped.code == 75, stopped.output
    [checkpoint] = (tmp_path / "run/checkpoints").glob("step-*")
    assert '"reference/rank-00001-00000.safetensors"' in (checkpoint / "manifest.json").read_text()
    train(command, processes=2)
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_pairs_with_votes_and_weights_train_above_their_floor(overrides: Overrides, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {n}", "chosen": "no" * n, "rejected": "yes" * n, "ups": 1, "downs": 3, "w": n}
        for n in range(1, 8)
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = "prompt: prompt, chosen: chosen, rejected: rejected, loss_weight: w, "
    fields += 'soft_label: "ups / (ups + downs)"'
    data = f"data.train=[{{path: {tmp_path}/votes.jsonl, fields: {{{fields}}}}}]"
    ended = train(overrides(data, "trainer.max_steps=4", "optim.lr=1e-2"), processes=2)
    assert "7 sides_exchanged" in ended.output
    steps = history(tmp_path / "run")
    floor = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(row["loss/excess"] == pytest.approx(row["loss"] - floor, abs=1e-6) for row in steps)
    assert steps[-1]["loss/excess"] < steps[0]["loss/excess"]
    refused = run_verb("train", overrides(data, "loss=ipo", f"run.dir={tmp_path}/ipo"))
    assert refused.code == 2, refused.output
    assert "votes.jsonl:1" in refused.output
    assert "ignore: [soft_label" in refused.output


def test_labelled_responses_are_shown_as_records_with_an_auc(overrides: Overrides, tmp_path: Path) -> None:
    """The run learns inverted labels, which the evaluation on true ones shows."""
    rows: list[dict[str, object]] = [
        {"prompt": f"question {number}", "completion": f"{word} {number}", "label": word == "yes"}
        for number in range(40)
        for word in ("yes", "no")
    ]
    held_out = written(tmp_path / "true.jsonl", rows[:40]).replace("train", "eval")
    data = written(tmp_path / "inverted.jsonl", [row | {"label": not row["label"]} for row in rows[40:]])
    more = ["trainer.epochs=3", "optim.lr=1e-2", "trainer.eval_every=5"]
    screen = train(overrides(data, held_out, "loss=kto", *more)).output
    assert "20 good and 20 bad responses" in screen
    assert "verdict: the rejected responses are preferred: evaluation AUC is 0." in screen
    run = RunFolder(tmp_path / "run")
    texts = [screen, run.report.read_text(), (run.model / "README.md").read_text()]
    assert not any(word in text for text in texts for word in ("accuracy ", "Accuracy", "0 pairs", "pairs/s"))
    header = run.metrics_table.read_text().splitlines()[0].split(",")
    assert {"rewards/auc", "eval_rewards/auc", "loss/kl"} < set(header)
    assert "rewards/accuracies" not in header

    ended = run_verb("evaluate", [f"run.dir={tmp_path}/run", f"evaluation.data=[{tmp_path}/inverted.jsonl]"])
    assert ended.code == 0, ended.output
    results = json.loads(run.evaluation.results.read_text())
    assert results["all"]["eval_rewards/auc"] > 0.5
    assert (results["all"]["eval_good"], results["all"]["eval_bad"]) == (20, 20)
    scores = [json.loads(line) for line in run.evaluation.scores.read_text().splitlines()]
    assert set(scores[0]) == {"source", "file", "line", "reward", "logp", "reference_logp", "tokens", "label"}
    assert [score["label"] for score in scores] == [word["label"] is False for word in rows[40:]]
