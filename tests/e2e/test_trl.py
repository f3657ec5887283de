"""Scripts of TRL run by dpo_dist with one import replaced: losses, methods, TRL's own script."""

import importlib
import json
import os
import re
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
            logging_steps=2 if kind == "hinge" else 1,
            logging_first_step=True,
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
        assert len(losses) == (3 if kind == "hinge" else STEPS)
        assert losses[1] > losses[-1]
        assert losses == pytest.approx(theirs[kind]["loss"], abs=1e-5), kind
        assert rates == pytest.approx(theirs[kind]["learning_rate"], rel=1e-9, abs=0), kind


def stopping(events: list[tuple[str, Any]], sums: list[float]) -> Any:
    """Return a callback that notes its events, and sums of logits of its model; it decides what is done."""
    import torch
    from transformers import TrainerCallback

    from dpo_dist.foundation.errors import ConfigError

    class Stop(TrainerCallback):
        step = 3

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("begin", state.global_step))
            assert (state.max_steps, state.num_train_epochs) == (6, 2)
            assert (state.best_metric is None) == (state.global_step < 2), "also after a resume"

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("epoch begin", state.epoch))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("epoch end", state.epoch))

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            events.append(("step begin", state.global_step))
            ids = torch.tensor([[5, 6, 7]])
            with torch.no_grad():
                sums.append(float(model(ids).logits.double().sum()))

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            events.append(("step end", state.global_step))
            assert given["processing_class"].decode([5])
            with pytest.raises(ConfigError, match="optimizer"):
                _ = given["optimizer"].param_groups
            control.should_save = state.global_step == 1
            control.should_evaluate = state.global_step == 5

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            events.append(("log", logs["step"]))
            assert logs["mark"] == 7
            control.should_training_stop = state.global_step == self.step

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            events.append(("evaluate", [key for key in metrics if key.endswith("_loss")]))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("save", state.global_step))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("end", state.global_step))

    return Stop()


def use_methods(variables: dict[str, str], folder: Path) -> None:
    """Evaluate, stop by a callback, save, evaluate on other sets, and continue to the end."""
    os.environ.clear()
    os.environ.update(variables)
    import pandas as pd
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_dist import api
    from dpo_dist.foundation.errors import ConfigError
    from dpo_dist.trl import DPOConfig, DPOTrainer

    of_sets = ("eval_easy_loss", "eval_hard_loss")
    events: list[tuple[str, Any]] = []
    sums: list[float] = []

    args = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=9,
        load_best_model_at_end=True,
        metric_for_best_model="eval_easy_loss",
        bf16=False,
    )
    stop = stopping(events, sums)

    class Marked(DPOTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, "mark": 7.0}, start_time)

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = Marked(
        model=model,
        args=args,
        train_dataset=pd.DataFrame(TEXTS),
        eval_dataset={"easy": TEXTS[:4], "hard": TEXTS[4:]},
        callbacks=[stop],
    )
    before = trainer.evaluate()
    assert before["eval_easy_loss"] == pytest.approx(0.6931, abs=1e-4)
    with pytest.raises(ConfigError) as raised:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert raised.value.where == "resume_from_checkpoint"
    events.clear()
    first = trainer.train()
    assert first.global_step == stop.step, "at that step"
    evaluated = [("log", 2), ("evaluate", ["eval_easy_loss"]), ("log", 2), ("evaluate", ["eval_hard_loss"])]
    assert [event for event in events if event[0] != "save"] == [
        *(("begin", 0), ("epoch begin", 0.0)),
        *(("step begin", 0), ("step end", 1), ("log", 1)),
        *(("step begin", 1), ("step end", 2), ("log", 2), *evaluated),
        *(("step begin", 2), ("step end", 3), ("log", 3), ("epoch end", 1.0)),
        *(("log", 3), ("end", 3)),
    ]
    assert [step for kind, step in events if kind == "save"] == [1, 2, 3]
    assert len({*sums}) == 3, "the model of callbacks is the one that trains"
    assert trainer.state.best_global_step == 2
    trainer.state.best_metric = None  # as in a new script
    assert trainer.state.best_model_checkpoint == str(trainer.run.checkpoints / "step-000002")
    trainer.save_model(str(folder / "stopped"))
    stopped = AutoModelForCausalLM.from_pretrained(folder / "stopped")
    assert torch.equal(stopped.lm_head.weight, model.lm_head.weight), "the model in memory is trained"
    assert trainer.model is model
    stop.step = 0
    with pytest.raises(ConfigError, match="resume_from_checkpoint=True"):
        trainer.train()
    last = trainer.train(resume_from_checkpoint=True)
    assert last.global_step == 6
    assert not torch.equal(stopped.lm_head.weight, trainer.model.lm_head.weight)
    history = trainer.state.log_history
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5, 6]
    sets = [("easy", "hard")["eval_hard_loss" in row] for row in history if row.keys() & {*of_sets}]
    assert sets == ["easy", "hard"] * 4, "after steps 2, 4, 5 and 6, a row for each"
    names = {"loss", "grad_norm", "learning_rate", "epoch", "logps/chosen"}
    names |= {"rewards/chosen", "rewards/margins"}
    assert names <= history[0].keys()
    assert {"eval_hard_loss", "eval_hard_rewards/accuracies"} <= history[-2].keys()
    assert history[-1] == {**last.metrics, "epoch": 2.0, "mark": 7.0, "step": 6}
    assert last.metrics["train_loss"] == pytest.approx(sum(row.get("loss", 0) for row in history) / 6)
    of_training = history[-2]["eval_hard_loss"]
    after = trainer.evaluate()
    assert after["eval_hard_loss"] == pytest.approx(of_training, abs=1e-6)
    trainer.log_metrics("eval", after)
    trainer.save_metrics("eval", after)
    trainer.save_state()
    assert json.loads((folder / "out" / "all_results.json").read_text()) == after
    assert trainer.evaluate(TEXTS, metric_key_prefix="test")["test_rewards/accuracies"] == 1.0
    assert {*trainer.evaluate("hard")} & {*of_sets} == {"eval_hard_loss"}
    trainer.save_model()
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.model_type == "qwen2"
    assert trainer.train(resume_from_checkpoint=True).global_step == 6, "it finds the complete run"
    ended = api.read_summary(folder / "out" / "run")
    assert ended["exit"] == "completed"


def test_methods_do_what_those_of_trl_do(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    in_process(use_methods, {**environment(), **ENVIRONMENT}, tmp_path)


def train_again(variables: dict[str, str], folder: Path) -> None:
    """Train other arguments in the same output_dir, then texts with an applied template as the error says."""
    os.environ.clear()
    os.environ.update(variables)
    from dpo_dist.foundation.errors import DataError
    from dpo_dist.trl import DPOConfig, DPOTrainer

    def trained(data: Any = TEXTS, **given: Any) -> Any:
        shared: dict[str, Any] = {"output_dir": str(folder / "out"), "max_steps": 1, "bf16": False}
        trainer = DPOTrainer(str(folder / "model"), args=DPOConfig(**shared | given), train_dataset=data)
        trainer.train()
        return trainer

    weights = [trained(beta=beta).model.lm_head.weight for beta in (0.1, 0.1, 0.9)]
    runs = [folder / "out" / name for name in ("run-1", "run-2", "run")]
    assert all((run / "model" / "model.safetensors").is_file() for run in runs), "none is lost"
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    templated = [{**pair, "prompt": turns.format(pair["prompt"])} for pair in TEXTS]
    with pytest.raises(DataError) as raised:
        trained(templated)
    words = re.search(r"DPOConfig\(words=\['(.*)'\]\)", raised.value.remedy)
    assert words is not None
    assert trained(templated, words=[words[1]]).state.global_step == 1


def test_a_second_trainer_trains_and_what_was_there_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    in_process(train_again, {**environment(), **ENVIRONMENT}, tmp_path)


def train_adapters(variables: dict[str, str], folder: Path) -> None:
    """Train a new adapter, and one in memory; the trainer's model has it, to merge as in TRL."""
    os.environ.clear()
    os.environ.update(variables)
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback

    from dpo_dist.trl import DPOConfig, DPOTrainer

    seen = list[list[float]]()

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            assert isinstance(model, PeftModel)
            weights = [weight for key, weight in model.named_parameters() if "lora_B" in key]
            seen.append([float(weight.abs().max()) for weight in weights])

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    own = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), LoraConfig(r=2))
    for name, model, config in (("new", base, LoraConfig(r=2)), ("own", own, None)):
        args = DPOConfig(output_dir=str(folder / name), max_steps=2, learning_rate=1e-2, bf16=False)
        trainer = DPOTrainer(model, args=args, train_dataset=TEXTS, peft_config=config, callbacks=[Look()])
        trainer.train()
        assert isinstance(trainer.model, PeftModel)
        trained = [weight for key, weight in trainer.model.named_parameters() if "lora_B" in key]
        assert trained, name
        assert [float(weight.abs().max()) for weight in trained] == seen.pop()
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


def look_within(variables: dict[str, str], folder: Path) -> None:
    """Ask a trainer for its model while it trains."""
    os.environ.clear()
    os.environ.update(variables)
    from transformers import TrainerCallback

    from dpo_dist.foundation.errors import ConfigError
    from dpo_dist.trl import DPOConfig, DPOTrainer

    class Look(TrainerCallback):
        steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.steps += 1
            assert trainer.model is model
            assert trainer.model_wrapped is model
            calls = {trainer.evaluate: "should_evaluate", trainer.save_model: "should_save"}
            for call, remedy in (calls | {trainer.push_to_hub: "model"}).items():
                with pytest.raises(ConfigError, match=remedy):
                    call()

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            with pytest.raises(ConfigError, match=f"step-{state.global_step:06d}.*on_step_end"):
                model.save_pretrained(folder / "checkpoint")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.save_model(str(folder / "saved"))

    class Logging(DPOTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            if "train_loss" not in logs:
                with pytest.raises(ConfigError, match=r"kwargs\['model'\]"):
                    _ = self.model

    look = Look()
    args = DPOConfig(output_dir=str(folder / "out"), max_steps=2, bf16=False, logging_steps=1)
    trainer = Logging(str(folder / "model"), args=args, train_dataset=TEXTS, callbacks=[look])
    trainer.train()
    assert look.steps == 2
    assert (folder / "saved" / "model.safetensors").is_file()


def test_the_model_of_a_trainer_is_not_that_before_training_while_it_trains(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    in_process(look_within, {**environment(), **ENVIRONMENT}, tmp_path)
