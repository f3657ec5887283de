"""Several verbs in the same processes of a launcher, one after the other."""

import json
import os
from pathlib import Path
from typing import Any

from tests.support import tiny
from tests.support.launch import environment
from tests.support.tiny_model import write_model
from tests.support.warm import ENVIRONMENT, context, reserve_port, start_parent

PAIRS = [
    {"prompt": f"q{number}", "chosen": " right" * (1 + number % 3), "rejected": " wrong"}
    for number in range(8)
]


def evaluate_train_evaluate(variables: dict[str, str], folder: Path) -> None:
    log = os.open(folder / f"rank-{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(variables)
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, TrainerCallback

    from dpo_dist.trl import DPOConfig, DPOTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == 1
            control.should_log = control.should_evaluate = state.global_step == 2

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    PartialState()  # as in scripts that load a model for each process
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    args = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_steps=5,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=5,
        save_total_limit=9,
        bf16=False,
    )
    sets = {"train_dataset": PAIRS, "eval_dataset": PAIRS}
    trainer = DPOTrainer(model, args=args, **sets)
    if trainer.is_world_process_zero():
        trainer.add_callback(Stop)
    losses = [trainer.evaluate()["eval_loss"], trainer.train().training_loss]
    trained = float(model.model.layers[0].self_attn.q_proj.weight.sum())
    rows = [(row["step"], "eval_loss" in row) for row in trainer.state.log_history]
    losses += [trainer.evaluate()["eval_loss"], rows, trained]
    (folder / f"rank-{variables['RANK']}.json").write_text(json.dumps(losses))


def test_two_processes_evaluate_and_train_and_evaluate(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tiny.qwen())
    start_parent()
    port, processes = reserve_port(), []
    for rank in map(str, range(2)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables = {**environment(), **ENVIRONMENT, **place}
        processes.append(context.Process(target=evaluate_train_evaluate, args=(variables, tmp_path)))
        processes[-1].start()
    for process in processes:
        process.join(400)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    said = [(tmp_path / f"rank-{rank}.log").read_text()[-2000:] for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "every process has the same results"
    before, trained, after, rows, _ = first
    assert before > trained > after
    assert rows == [[2, False], [2, True], [3, False], [3, False]], "at last the mean loss"
    saved = sorted(folder.name for folder in (tmp_path / "out" / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-000001", "step-000003"], "as the callback of one process asked"
    keys = (tmp_path / "out" / "dpo_dist.yaml").read_text()
    assert "global_batch_pairs: 4" in keys, "pairs of each process, times two"
