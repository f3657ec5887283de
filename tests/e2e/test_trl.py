"""Scripts of TRL run by dpo_dist with one import replaced: losses, methods, TRL's own script."""

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.invented import write_pairs
from tests.support.launch import environment
from tests.support.pages import in_process
from tests.support.tiny_model import write_model
from tests.support.warm import ENVIRONMENT

TEXTS = [
    {
        "prompt": f"Why is {number} times 7 equal to {number * 7}?",
        "chosen": f" Because {'seven ' * (number % 3)}sevens add up.",
        "rejected": f" It is {'really ' * (number % 4)}not.",
    }
    for number in range(12)
]
# Texts that look like dialogues, and columns that TRL does not read.
DIALOGUES = [
    pair | {"prompt": f"\n\nHuman: {pair['prompt']}\n\nAssistant:", "system": "Be brief.", "margin": 3.0}
    for pair in TEXTS
]
WHOLE = [{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")} for pair in DIALOGUES]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in DIALOGUES
    for side in ("chosen", "rejected")
]
KINDS = ("sigmoid", "ipo", "hinge", "apo_zero", "kto", "apo_zero_unpaired")
DATA = {"sigmoid": DIALOGUES, "ipo": WHOLE, "kto": LABELLED}
STEPS = 5


def train_each(module: str, folder: Path) -> None:
    """Train by every kind of loss, all pairs in each step, so that their order does not matter."""
    os.environ.update(ENVIRONMENT)
    trainers = importlib.import_module(module)
    from datasets import Dataset

    rows = {}
    for kind in KINDS:
        name = "KTO" if kind in ("kto", "apo_zero_unpaired") else "DPO"
        records, data = len(TEXTS) * (2 if name == "KTO" else 1), DATA.get(kind, TEXTS)
        args = getattr(trainers, f"{name}Config")(
            output_dir=str(folder / module / kind),
            loss_type=kind if name == "KTO" else [kind],
            per_device_train_batch_size=records,
            max_steps=STEPS,
            learning_rate=1e-3,
            warmup_steps=2,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        trainer = getattr(trainers, f"{name}Trainer")(
            str(folder / "model"), args=args, train_dataset=Dataset.from_list(data)
        )
        trainer.train()
        history = [row for row in trainer.state.log_history if "loss" in row]
        rows[kind] = {name: [row[name] for row in history] for name in ("loss", "learning_rate")}
    (folder / f"{module}.json").write_text(json.dumps(rows))


def test_losses_and_rates_of_five_steps_are_those_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    write_model(tmp_path / "model")
    for module in ("trl", "dpo_dist.trl"):
        in_process(train_each, module, tmp_path)
    theirs, ours = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("trl", "dpo_dist.trl"))
    for kind in KINDS:
        losses, rates = ours[kind]["loss"], ours[kind]["learning_rate"]
        assert len(losses) == STEPS
        assert losses[1] > losses[-1]
        assert losses == pytest.approx(theirs[kind]["loss"], abs=1e-5), kind
        assert rates == pytest.approx(theirs[kind]["learning_rate"], rel=1e-9, abs=0), kind


def use_methods(variables: dict[str, str], folder: Path) -> None:
    """Evaluate, stop by a callback, save, evaluate on other sets, and continue to the end."""
    os.environ.clear()
    os.environ.update(variables)
    import pandas as pd
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    from dpo_dist import api
    from dpo_dist.foundation.errors import ConfigError
    from dpo_dist.trl import DPOConfig, DPOTrainer

    events: list[tuple[str, Any]] = []

    class Stop(TrainerCallback):
        step = 3

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("begin", state.global_step))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            events.append(("log", logs["step"]))
            assert logs["mark"] == 7
            control.should_training_stop = state.global_step == self.step

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            events.append(("evaluate", metrics.get("eval_easy_loss")))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("save", state.global_step))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("end", state.global_step))

    args = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        bf16=False,
    )
    stop = Stop()

    class Marked(DPOTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, "mark": 7.0}, start_time)

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"mine": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = Marked(
        model=model,
        args=args,
        train_dataset=pd.DataFrame(TEXTS),
        eval_dataset={"easy": TEXTS[:4], "hard": TEXTS[4:]},
        callbacks=[stop],
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    assert before["eval_easy_loss"] == pytest.approx(0.6931, abs=1e-4)
    with pytest.raises(ConfigError) as raised:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert raised.value.where == "resume_from_checkpoint"
    events.clear()
    first = trainer.train()
    assert first.global_step in (stop.step, stop.step + 1), "after the next step at the latest"
    kinds = [kind for kind, _ in events]
    assert (kinds[0], kinds[-1]) == ("begin", "end")
    assert {"evaluate", "save"} <= {*kinds}
    assert [step for kind, step in events if kind == "log"][:3] == [1, 2, 2], "a row of a step, an evaluation"
    trainer.save_model(str(folder / "stopped"))
    stopped = AutoModelForCausalLM.from_pretrained(folder / "stopped")
    assert torch.equal(stopped.lm_head.weight, model.lm_head.weight), "the model in memory is trained"
    assert trainer.model is model
    stop.step = 0
    trainer.control.should_training_stop = False
    last = trainer.train(resume_from_checkpoint=True)
    assert last.global_step == 6
    assert not torch.equal(stopped.lm_head.weight, trainer.model.lm_head.weight)
    history = trainer.state.log_history
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "grad_norm", "learning_rate", "epoch", "logps/chosen"}
    names |= {"rewards/chosen", "rewards/margins"}
    assert names <= history[0].keys()
    assert {"eval_easy_loss", "eval_hard_rewards/accuracies"} <= history[-2].keys()
    assert history[-1] == {**last.metrics, "step": 6}
    assert last.metrics["train_loss"] == pytest.approx(sum(row.get("loss", 0) for row in history) / 6)
    of_training = history[-2]["eval_hard_loss"]
    after = trainer.evaluate()
    assert after["eval_hard_loss"] == pytest.approx(of_training, abs=1e-6)
    trainer.log_metrics("eval", after)
    trainer.save_metrics("eval", after)
    trainer.save_state()
    assert json.loads((folder / "out" / "all_results.json").read_text()) == after
    assert trainer.evaluate(TEXTS, metric_key_prefix="test")["test_mine"] == 1.0
    trainer.save_model()
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.model_type == "qwen2"
    assert trainer.train().global_step == 6, "the same call finds the complete run"
    ended = api.read_summary(folder / "out" / "run")
    assert ended["exit"] == "completed"


def test_methods_do_what_those_of_trl_do(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    in_process(use_methods, {**environment(), **ENVIRONMENT}, tmp_path)


def train_adapters(variables: dict[str, str], folder: Path) -> None:
    """Train a new adapter, and one in memory; the trainer's model has it, to merge as in TRL."""
    os.environ.clear()
    os.environ.update(variables)
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from dpo_dist.trl import DPOConfig, DPOTrainer

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    own = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), LoraConfig(r=2))
    for name, model, config in (("new", base, LoraConfig(r=2)), ("own", own, None)):
        args = DPOConfig(output_dir=str(folder / name), max_steps=2, learning_rate=1e-2, bf16=False)
        trainer = DPOTrainer(model, args=args, train_dataset=TEXTS, peft_config=config)
        trainer.train()
        assert isinstance(trainer.model, PeftModel)
        trained = [weight for key, weight in trainer.model.named_parameters() if "lora_B" in key]
        assert trained, name
        assert all(weight.abs().max() > 0 for weight in trained), name
        merged = trainer.model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
        assert not torch.equal(merged, base.model.layers[0].self_attn.q_proj.weight)
    assert trainer.model is own


def test_adapters_are_models_of_peft(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    in_process(train_adapters, {**environment(), **ENVIRONMENT}, tmp_path)


def run_script(variables: dict[str, str], name: str, folder: Path, words: list[str]) -> None:
    """Run a script of TRL with the import of its trainer and arguments replaced."""
    os.environ.clear()
    os.environ.update(variables)
    import trl

    text = (Path(trl.__file__).parent / "scripts" / f"{name}.py").read_text()
    method = name.upper()
    for imported in (f"{method}Trainer, ", f"{method}Config, "):
        assert imported in text
        text = text.replace(imported, "", 1)
    script = folder / f"{name}.py"
    script.write_text(f"from dpo_dist.trl import {method}Config, {method}Trainer\n{text}")
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo", ["--use_peft", "--lora_r", "4", "--eval_strategy", "steps", "--eval_steps", "2"]),
        ("kto", ["--lr_scheduler_type=cosine", "--warmup_steps", "0.1"]),
    ],
)
def test_a_script_of_trl_runs(name: str, words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    write_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data" / "train.jsonl", 8, seed=1)
    write_pairs(tmp_path / "data" / "test.jsonl", 4, seed=2)
    words = [*words, "--dataset_name", str(tmp_path / "data")]
    words += ["--model_name_or_path", str(tmp_path / "model")]
    words += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--no_remove_unused_columns"]
    variables = {**environment(), **ENVIRONMENT, "HF_HOME": str(tmp_path / "hf")}
    in_process(run_script, variables, name, tmp_path, words)
    saved = "adapter_model.safetensors" if name == "dpo" else "model.safetensors"
    assert (tmp_path / "out" / saved).is_file()
    summary = json.loads((tmp_path / "out/run/dpo_metrics/summary.json").read_text())
    assert (summary["exit"], summary["steps"]) == ("completed", 2)
