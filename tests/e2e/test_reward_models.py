"""A reward model by the command line: transformers, peft and judges open the folder that it writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord, turns_of
from dpo_dist.tools.sampling.judges import Question, RewardModel
from tests.e2e.conftest import Overrides, last_evaluation
from tests.support import tiny
from tests.support.launch import history, run_verb, train
from tests.support.tiny_model import write_model


def evaluated(overrides: list[str], run: Path) -> list[float]:
    """The scores that `evaluate` writes, chosen and rejected of each pair."""
    ended = run_verb("evaluate", overrides)
    assert ended.code == 0, ended.output
    return written_scores(run / "evaluation")


def written_scores(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
    return [row[f"reward_{side}"] for row in rows for side in ("chosen", "rejected")]


@torch.no_grad()
def plain_scores(model: Any, folder: Path, file: Path) -> list[float]:
    """Scores as the documentation of transformers computes them, one conversation after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        for side in ("chosen", "rejected"):
            inputs = tokenizer.apply_chat_template(
                record["prompt"] + record[side], return_tensors="pt", return_dict=True
            )
            scores.append(model(**inputs).logits[0, 0].item())
    return scores


@torch.no_grad()
def batched_scores(model: Any, folder: Path, file: Path) -> list[float]:
    """The same in one batch, which the tokenizer pads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token != tokenizer.eos_token
    records = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template(record["prompt"] + record[side], tokenize=False)
        for record in records
        for side in ("chosen", "rejected")
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    scores: list[float] = model(**inputs).logits[:, 0].tolist()
    return scores


def judged(folder: Path, file: Path, store: Path) -> list[float | None]:
    """Scores of the judge of `dpo-dist pairs`."""
    judge = RewardModel(str(folder), ModelConfig("unused", dtype=Dtype.fp32), store, torch.device("cpu"))
    judge.check()
    questions = []
    for record in read_records(str(file)):
        assert isinstance(record, PreferenceRecord)
        responses = (turns_of(response)[-1].content for response in record.responses)
        questions.append(Question(record, tuple(responses)))
    return [score for judgement in judge.judge(questions) for score in judgement.scores]


def test_a_reward_model_is_one_for_transformers_for_evaluations_and_for_judges(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    # A base whose padding token ends texts.
    tokenizer = tiny.with_template(tiny.qwen(), tiny.CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    base = f"model.path={write_model(tmp_path / 'base', tokenizer)}"
    file = assets / "eval.jsonl"
    data = f"data.eval=[{file}]"
    command = overrides("loss=reward", base, data, "optim.lr=3e-3", "trainer.epochs=2", "trainer.log_every=1")
    train(command, processes=2)
    run = tmp_path / "run"
    rows = history(run)
    assert not [name for name in rows[1] if "logps" in name or "entropy" in name]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert rows[-1]["eval_tokens/chosen"] > 2
    worst = map(json.loads, (run / "evaluation/training/worst.jsonl").read_text().splitlines())
    assert all(row["responses"]["chosen"]["text"].endswith("<|im_end|>\n") for row in worst)
    folder = run / "model"
    card = (folder / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "dpo-dist chat" not in card
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_labels == 1
    expected = plain_scores(model, folder, file)
    assert batched_scores(model, folder, file) == pytest.approx(expected, abs=1e-5)
    accuracy = np.mean(np.array(expected[::2]) > np.array(expected[1::2]))
    assert last_evaluation(run)["eval_rewards/accuracies"] == pytest.approx(accuracy)
    ours = evaluated([f"run.dir={run}"], run)
    assert ours == pytest.approx(expected, abs=1e-5)
    assert judged(folder, file, tmp_path / "store") == pytest.approx(expected, abs=1e-5)

    # A reward model is a start, too, and one of others is evaluated without a run of training.
    other = tmp_path / "other"
    foreign = ["loss=reward", f"model.path={folder}", f"evaluation.model={folder}", f"run.dir={other}"]
    assert evaluated(overrides(*foreign, data), other) == pytest.approx(expected, abs=1e-5)
    refused = run_verb("train", overrides(f"model.path={folder}", data, f"run.dir={tmp_path}/dpo"))
    assert refused.code == 2
    assert "this is a reward model" in refused.output
    assert "loss=reward" in refused.output


def test_an_adapter_of_a_reward_model_is_opened_by_peft_and_merged(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    # A base whose padding token ends conversations.
    tokenizer = tiny.with_template(tiny.qwen(), tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    tokenizer.pad_token = tokenizer.eos_token
    base = f"model.path={write_model(tmp_path / 'base', tokenizer)}"
    file = assets / "eval.jsonl"
    data = f"data.eval=[{file}]"
    train(overrides("loss=reward", base, data, "optim.lr=1e-2", "model.adapter.r=4", "trainer.save_every=2"))
    run = tmp_path / "run"
    folder = run / "model"
    described = json.loads((folder / "adapter_config.json").read_text())
    assert (described["task_type"], described["modules_to_save"]) == ("SEQ_CLS", ["score"])
    _, code = (folder / "README.md").read_text().split("```python\n")
    names: dict[str, Any] = {}
    exec(code.split("```")[0].replace("folder = '.'", f"folder = '{folder}'"), names)
    expected = plain_scores(names["model"], folder, file)
    *_, last = sorted((run / "checkpoints").glob("step-*"))
    evaluated([f"run.dir={run}", f"evaluation.model=[{folder},{last}]"], run)
    for name in ("model", last.name):
        [results] = (run / "evaluation").glob(f"{name}-*")
        assert written_scores(results) == pytest.approx(expected, abs=1e-5)
    ended = run_verb("export", [f"run.dir={run}", "export.merge=true", f"export.output={tmp_path}/merged"])
    assert ended.code == 0, ended.output
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert plain_scores(merged, tmp_path / "merged", file) == pytest.approx(expected, abs=1e-5)
