"""TRL's trainers by our import on two processes: losses and weights are TRL's, also of sharded ones."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import environment
from tests.support.lookups import recorded_lookups
from tests.support.tiny_model import write_model
from tests.support.warm import ENVIRONMENT, context, reserve_port, start_parent
from tests.unit.trl.conftest import PAIRS

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
ZERO = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
SIZES = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"
)
UNTESTED = {"zero_allow_untested_optimizer": True, **SIZES}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}, **UNTESTED}},
    "zero3": {"deepspeed": {"zero_optimization": ZERO, **UNTESTED}},
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP},
}


def train(variables: dict[str, str], folder: Path, options: dict[str, Any]) -> None:
    """Train by TRL, by our import, with the store of the run before, and with that store on one rank only."""
    log = os.open(folder / f"rank-{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    import trl
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import AutoTokenizer

    from dpo_dist import trl as guest

    class Apart(guest.DPOTrainer):  # type: ignore[misc]
        reference_store = "output/reference" if variables["RANK"] == "0" else "output/elsewhere"

    place = {"use_cpu": True, "ddp_backend": "gloo"}
    if "deepspeed" in options:  # on a CPU, Accelerate takes gloo for DeepSpeed if it is told to
        PartialState.__init__ = functools.partialmethod(PartialState.__init__, backend="gloo")
        place = {}
    results = []
    for kind in (trl.DPOTrainer, guest.DPOTrainer, guest.DPOTrainer, Apart):
        args = guest.DPOConfig(
            f"out-{len(results)}",
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            learning_rate=0.05,
            optim="sgd",
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            bf16=False,
            disable_tqdm=True,
            **place,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained("model")
        trainer = kind("model", args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
        with recorded_lookups(trainer.accelerator.unwrap_model(trainer.ref_model)) as forwards:
            trainer.train()
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # ZeRO-3: on rank 0
        sums = {name: float(weight.double().square().sum()) for name, weight in weights.items()}
        names = ("loss", "grad_norm", "entropy", "logps/chosen")
        rows = [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]
        results.append({"rows": rows, "weights": sums, "forwards": len(forwards)})
    (folder / f"rank-{variables['RANK']}.json").write_text(json.dumps(results))


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_weights_are_those_of_trl(engine: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    start_parent()
    port, processes = reserve_port(), []
    for rank in map(str, range(2)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if not engine.startswith("zero"):
            place["ACCELERATE_USE_CPU"] = "true"
        if engine == "fsdp2":
            place |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        variables = {**environment(), **ENVIRONMENT, **place}
        arguments = (variables, tmp_path, ENGINES[engine])
        processes.append(context.Process(target=train, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(300)
    for process in processes:
        if process.is_alive():
            process.kill()
    said = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said[0][-3000:]
    assert said[0].count("rows are packed") == 3
    assert "rows are packed" not in said[1]
    assert "TRL's own forward" not in said[0] + said[1]
    for rank in range(2):
        theirs, *ours = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for result in ours:
            for row, wanted in zip(result["rows"], theirs["rows"], strict=True):
                assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            assert result["weights"] == pytest.approx(theirs["weights"], rel=1e-5, abs=1e-6)
        forwards = [result["forwards"] for result in ours]
        assert forwards == [4, 1, 4], "the second run asks the reference once; the last one does on all ranks"
