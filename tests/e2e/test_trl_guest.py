"""A script with trainers of TRL by dpo_dist: what it finds afterwards, and what its launcher says."""

import atexit
import faulthandler
import json
import logging
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.support.launch import environment
from tests.support.pages import in_process
from tests.support.parent import ROOT
from tests.support.tiny_model import write_model
from tests.support.warm import ENVIRONMENT, context, reserve_port, run_warm_apart, start_parent
from tests.support.warm_launch import fork_python

PAIRS = [
    {
        "prompt": f"Why is {number} times 7 equal to {number * 7}?",
        "chosen": f" Because {'seven ' * (number % 3)}sevens add up.",
        "rejected": f" It is {'really ' * (number % 4)}not.",
    }
    for number in range(8)
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
STEPS = 2


def prefer(kind: str, folder: Path, name: str, **given: Any) -> list[float]:
    """Train by DPO or KTO in this process, all records in each step; the losses."""
    from dpo_dist import trl

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    records = PAIRS if kind == "DPO" else LABELLED
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / name),
        per_device_train_batch_size=len(records) // processes,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        words=given.pop("words", []),
    )
    model = str(folder / "model")
    trainer = getattr(trl, f"{kind}Trainer")(model, args=args, train_dataset=records, **given)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def tune(folder: Path) -> list[float]:
    """Train on the chosen texts by transformers' own trainer; the losses."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    args = TrainingArguments(
        output_dir=str(folder / "tuned"),
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args,
        train_dataset=Dataset.from_list([tokenizer(pair["prompt"] + pair["chosen"]) for pair in PAIRS]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def found() -> dict[str, Any]:
    """What a script finds in its process, and a run might change."""
    from torch.distributed import distributed_c10d
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    root = logging.getLogger()
    return {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "streams": (sys.stdout, sys.stderr),
        "except hook": sys.excepthook,
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "fault handler": faulthandler.is_enabled(),
        "python threads": threading.active_count(),
        "logging": (root.level, root.handlers[:], logging.root.manager.disable),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # type: ignore[index]
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cpu threads": torch.get_num_threads(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        "gradients": torch.is_grad_enabled(),
        "linear": torch.nn.functional.linear,
        "timeout": distributed_c10d.default_pg_timeout,
        "shards": is_deepspeed_zero3_enabled(),
    }


def kept() -> tuple[int, int, int]:
    """Threads, open files and functions at exit, of which the first run may leave some, and no other."""
    threads, files = (len([*Path("/proc/self", name).iterdir()]) for name in ("task", "fd"))
    return threads, files, atexit._ncallbacks()


def notebook(variables: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    from accelerate import Accelerator
    from transformers import TrainerCallback

    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(2, 2)
    layer, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), 0.1))
    losses, left = [], []
    for number in range(3):
        row = [tune(folder)]
        for kind, words in (("DPO", ["parallelism=zero3"]), ("KTO", [])):
            before = found()
            row.append(prefer(kind, folder, f"{kind}-{number}", words=words))
            after = found()
            assert {name for name in before if before[name] != after[name]} == set(), kind
            row.append(tune(folder))
            accelerator.backward(layer(torch.ones(1, 2)).sum())
            optimizer.step()
        losses.append(row)
        left.append(kept())
    assert losses[0][0] == losses[0][2]
    assert losses[1:] == losses[:1] * 2
    assert left[1:] == left[:1] * 2
    assert (accelerator.num_processes, accelerator.device.type) == (1, "cpu")

    class Fail(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    before = found()
    with pytest.raises(ZeroDivisionError):
        prefer("DPO", folder, "failed", callbacks=[Fail()])
    after = found()
    assert {name for name in before if before[name] != after[name]} == set()
    assert kept() == left[0]
    assert tune(folder) == losses[0][0]


def test_a_notebook_trains_by_several_trainers_three_times(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    in_process(notebook, {**environment(), **ENVIRONMENT}, tmp_path)


def train_in_a_world(variables: dict[str, str], folder: Path, name: str) -> None:
    rank = variables.get("RANK", "0")
    log = os.open(folder / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    first = prefer("DPO", folder, name)
    second = prefer("KTO", folder, name)  # where another run is, which every process must leave
    assert dict(os.environ) == variables
    (folder / f"{name}-{rank}.json").write_text(json.dumps([first, second]))


HALF = {"ACCELERATE_MIXED_PRECISION": "bf16"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", **HALF}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_CONFIG_DS_FIELDS": "gradient_accumulation_steps,zero3_init_flag,zero_stage,mixed_precision",
    **HALF,
}
LAUNCHES = {
    "alone": (1, {}, "ddp"),
    # As `accelerate launch --cpu --num_processes 2` starts one process.
    "cpu": (1, {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "ddp"),
    "torchrun": (2, {}, "ddp"),
    "fsdp2": (2, FSDP, "zero3"),
    "zero2": (2, DEEPSPEED, "zero2"),
}


def test_losses_are_the_same_under_every_launcher(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    start_parent()
    losses = {}
    for name, (size, added, kind) in LAUNCHES.items():
        port, processes = str(reserve_port()), []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{k: str(v) for k, v in place.items()}}
            variables = {**environment(), **ENVIRONMENT, **(world if size > 1 else {}), **added}
            processes.append(context.Process(target=train_in_a_world, args=(variables, tmp_path, name)))
            processes[-1].start()
        for process in processes:
            process.join(300)
            process.kill()
        said = (tmp_path / f"{name}-0.log").read_text()
        assert [process.exitcode for process in processes] == [0] * size, said[-3000:]
        assert f"fp32, {kind}" in said
        assert ("ZeRO-3 (parallelism=zero3) in place of FSDP" in said) == (name == "fsdp2")
        assert ("mixed_precision bf16 is not used" in said) == ("ACCELERATE_MIXED_PRECISION" in added)
        runs = [
            yaml.safe_load((tmp_path / name / run / "config.yaml").read_text()) for run in ("run-1", "run")
        ]
        assert [run["loss"]["kind"] for run in runs] == ["sigmoid", "kto"]
        assert not (tmp_path / name / "run-2").exists()
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(size)]
        assert ranks == ranks[:1] * size
        losses[name] = np.array(ranks[0])
    for name, values in losses.items():
        assert values == pytest.approx(losses["alone"], abs=1e-5), name


# The keys of TRL's deepspeed_zero3.yaml, for two processes on any machine.
ZERO3 = """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_multinode_launcher: standard
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
"""
SCRIPT = """
import json, sys, time
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from dpo_dist.distributed.deepspeed_internals import use_gloo_all_reduce
from dpo_dist.foundation.errors import DpoDistError
from tests.e2e.test_trl_guest import prefer

use_gloo_all_reduce()  # a script that joins the processes itself would compile DeepSpeed's own kernel


class Fail(TrainerCallback):
    def on_log(self, *_, **__):
        raise ZeroDivisionError


folder, state = Path(sys.argv[1]), PartialState()
losses = prefer("DPO", folder, "out")
if state.is_main_process:
    (folder / "losses.json").write_text(json.dumps(losses))
told = folder / "told.txt"
try:
    prefer("KTO", folder, "failed", callbacks=[Fail()])
except DpoDistError as error:
    told.write_text(str(error))
except ZeroDivisionError:
    for _ in range(300):
        time.sleep(0 if told.exists() else 0.1)
    raise
state.wait_for_everyone()
state.wait_for_everyone()
"""


def test_accelerate_launches_a_script_and_ends_it_when_one_process_fails(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "zero3.yaml").write_text(ZERO3)
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["launch", "--main_process_port", str(reserve_port())]
    words += ["--config_file", str(tmp_path / "zero3.yaml"), str(tmp_path / "script.py"), str(tmp_path)]
    module, variables = "accelerate.commands.accelerate_cli", {**environment(), **ENVIRONMENT}
    code, output, errors = run_warm_apart(module, words, variables, ROOT, 400, fork_python)
    assert "fp32, zero3" in output + errors, errors[-3000:]
    assert json.loads((tmp_path / "losses.json").read_text())[0] == pytest.approx(0.6931, abs=1e-4)
    assert code == 1
    assert "ZeroDivisionError" in errors
    assert "the script failed on rank 0" in (tmp_path / "told.txt").read_text()
    assert "ZeroDivisionError" in (tmp_path / "told.txt").read_text()
