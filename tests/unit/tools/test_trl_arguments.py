"""Arguments of TRL's trainers become the file of a run, or one error that names them; without training."""

import copy
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partialmethod
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import trl
import yaml
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.training_args import ParallelMode
from trl import RichProgressCallback
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.rules import value_at
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.training.start.named_models import find_export_paths
from dpo_dist.training.steps.schedule import check_schedule, learning_rate
from dpo_dist.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from dpo_dist.trl.callbacks import Absent
from dpo_dist.trl.processes import Processes
from dpo_dist.trl.unseen import frozen_weights, hooks
from tests.support.families import tiny_config
from tests.support.tiny import CHATML
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": f"q{number}", "chosen": f" yes {number}", "rejected": " no"} for number in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def keys_of(trainer: DPOTrainer) -> dict[str, Any]:
    """The keys that the trainer's file sets, with their sections."""
    found = dict[str, Any]()

    def collect(tree: dict[str, Any], above: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                collect(value, f"{above}{name}.")
            else:
                found[above + name] = value

    collect(yaml.safe_load((trainer.folder / "dpo_dist.yaml").read_text()), "")
    return found


def translated(folder: Path, output: Path, trainer: Any = DPOTrainer, **given: Any) -> dict[str, Any]:
    options = {name: given.pop(name) for name in list(given) if name in TRAINERS_OWN}
    config = DPOConfig if trainer is DPOTrainer else KTOConfig
    args = config(output_dir=str(output), **given)
    every = {"model": str(folder), "train_dataset": PAIRS} | options
    return keys_of(trainer(args=args, **every))


TRAINERS_OWN = (
    *("model", "ref_model", "train_dataset", "eval_dataset", "processing_class", "callbacks"),
    *("peft_config", "quantization_config", "data_collator", "optimizers", "compute_metrics"),
)


@pytest.mark.parametrize("name", ["DPOConfig", "KTOConfig"])
def test_arguments_and_defaults_are_those_of_trl(name: str) -> None:
    trl = pytest.importorskip("trl")
    ours, theirs = (
        {
            entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
            for entry in fields(config)
        }
        for config in ({"DPOConfig": DPOConfig, "KTOConfig": KTOConfig}[name], getattr(trl, name))
    )
    assert ours.pop("words") == []
    assert ours == theirs


def test_arguments_are_read_from_a_command_line() -> None:
    words = ["--output_dir", "o", "--loss_type", "ipo", "hinge", "--learning_rate", "1e-5", "--bf16", "false"]
    [args] = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(
        [*words, "--model_init_kwargs", '{ "dtype": "bfloat16" }']
    )
    keys = args.keys()
    assert (keys["loss_type"], keys["learning_rate"]) == (["ipo", "hinge"], 1e-5)
    assert keys["model_init_kwargs"] == {"dtype": "bfloat16"}


def test_a_class_below_the_arguments_has_defaults_and_fields_of_its_own(folder: Path, tmp_path: Path) -> None:
    @dataclass
    class Mine(DPOConfig):
        beta: float = 0.5
        learning_rate: float = 5e-5
        ema: bool = False
        dataset_name: str = ""

    args = Mine(output_dir=str(tmp_path), ema=True, dataset_name="mine")
    found = keys_of(DPOTrainer(str(folder), args=args, train_dataset=PAIRS))
    assert (found["loss.beta"], found["optim.lr"]) == (0.5, 5e-5)
    assert "trainer.ema_decay" not in found


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"eval_strategy": "steps", "logging_steps": 7, "output_dir": "~/out"},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
        {"metric_for_best_model": "rewards/accuracies"},
        {"metric_for_best_model": "eval_loss"},
        {"metric_for_best_model": "loss", "greater_is_better": True, "output_dir": None},
    ],
)
def test_what_is_not_given_is_derived_as_by_transformers(given: dict[str, Any]) -> None:
    ours, theirs = (config(**{"output_dir": "o"} | given) for config in (DPOConfig, TrainingArguments))
    names = ("output_dir", "do_eval", "metric_for_best_model", "greater_is_better")
    names += ("eval_steps",) if "logging_steps" in given else ()  # whose default TRL changes
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


def test_arguments_know_their_process_before_it_joins_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    args = DPOConfig(output_dir="o")
    assert (args.process_index, args.world_size, args.should_log) == (3, 4, False)
    assert args.get_process_log_level() > 0
    assert args.parallel_mode is ParallelMode.DISTRIBUTED
    assert args.keys()["num_processes"] == 4
    args = DPOConfig(output_dir="o", per_device_train_batch_size=2, save_strategy="epoch")
    assert args.intervals(records=20)["save_steps"] == 3  # of 2 pairs on each of 4 processes


def test_the_main_process_is_first_where_the_processes_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with DPOConfig(output_dir="o").main_process_first():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    args, barriers = DPOConfig(output_dir="o"), list[str]()
    with pytest.raises(ConfigError, match="main_process_first"):
        args.main_process_first()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.barrier", lambda: barriers.append("met"))
    for first in (args.main_process_first, Processes(args).main_process_first):
        with pytest.raises(ZeroDivisionError), first():
            raise ZeroDivisionError
    assert barriers == ["met", "met"], "the others go on after an error"
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    processes, barriers[:] = Processes(DPOConfig(output_dir="o")), []
    with processes.main_process_first():
        assert barriers == ["met"]
    with processes.local_main_process_first():
        assert barriers == ["met"], "the first of its node goes first"
    assert barriers == ["met", "met"]


def test_what_processes_gather_is_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes = Processes(DPOConfig(output_dir="o"))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_gather", lambda every, own: [one.copy_(own) for one in every])
    for given, gathered in ((3.0, [3.0, 3.0]), ([1.0, 2.0], [1.0, 2.0, 1.0, 2.0]), ([[1.0]], [[1.0], [1.0]])):
        assert processes.gather(torch.tensor(given)).tolist() == gathered


def test_reading_the_device_leaves_the_states_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for has_gpu, device in ((True, "cuda:1"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        args = DPOConfig(output_dir="o", per_device_train_batch_size=3)
        assert (str(args.device), args.n_gpu, args.train_batch_size) == (device, int(has_gpu), 3)
    assert accelerator.state.num_processes == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert DPOConfig(output_dir="o", use_cpu=True).device.type == "cpu"


ADAPTER = {"model.adapter.r": 4, "model.adapter.alpha": 8, "model.adapter.target_modules": ["k_proj"]}
TRANSLATED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # Defaults that are not ours.
    (
        {},
        {"trainer.seed": 42, "trainer.log_every": 10, "trainer.save_every": 500, "optim.schedule": "linear"}
        | {"model.gradient_checkpointing": "full", "model.dtype": "bf16", "trainer.global_batch_pairs": 8}
        | {"parallelism.kind": "ddp", "tracking.to": [], "loss.kind": "sigmoid"},
    ),
    ({"bf16": False}, {"model.dtype": "fp32"}),
    ({"fp16": True}, {"model.dtype": "fp16"}),
    ({"bf16": False, "model_init_kwargs": {"dtype": torch.bfloat16}}, {"model.dtype": "bf16"}),
    ({"model_init_kwargs": {"dtype": "float32", "revision": "main"}}, {"model.dtype": "bf16"}),
    ({"loss_type": ["ipo"], "beta": 0.3}, {"loss.kind": "ipo", "loss.beta": 0.3}),
    (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss.terms": [{"kind": "sigmoid", "weight": 1.0}, {"kind": "sft", "weight": 0.5}]},
    ),
    # 20 pairs are 5 steps of 4.
    (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "epoch"},
        {"trainer.global_batch_pairs": 4, "trainer.save_every": 5},
    ),
    (
        {"train_dataset": {"easy": PAIRS[:4], "hard": PAIRS[4:]}, "per_device_train_batch_size": 4}
        | {"save_strategy": "epoch"},
        {"trainer.save_every": 5},
    ),
    ({"per_device_train_batch_size": 8, "num_train_epochs": 1.5}, {"trainer.max_steps": 5}),
    (
        {"per_device_train_batch_size": 8, "num_train_epochs": 2.0},
        {"trainer.epochs": 2.0, "trainer.max_steps": None},
    ),
    ({"logging_steps": 0.5, "max_steps": 8}, {"trainer.log_every": 4, "trainer.max_steps": 8}),
    ({"save_strategy": "no", "save_steps": 9}, {"trainer.save_every": 0}),
    ({"eval_strategy": "steps", "logging_steps": 3, "eval_dataset": PAIRS[:4]}, {"trainer.eval_every": 3}),
    (
        {"eval_strategy": "epoch", "eval_dataset": PAIRS[:4], "callbacks": [EarlyStoppingCallback(2)]}
        | {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "num_train_epochs": 1},
        {"trainer.eval_every": 3, "trainer.patience": 2, "trainer.keep_best": "eval_loss"}
        | {"trainer.final": "best"},
    ),
    ({"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["k_proj"], lora_dropout=0.1)}, ADAPTER),
    # peft's own choice for this model.
    (
        {"peft_config": LoraConfig()},
        {"model.adapter.target_modules": ["q_proj", "v_proj"]} | {"model.adapter.r": 8},
    ),
    ({"peft_config": LoraConfig(use_rslora=True)}, {"model.adapter.variant": "rslora"}),
    (
        {"peft_config": LoraConfig(target_modules="all-linear", target_parameters=["experts.down_proj"])},
        {"model.adapter.target_modules": ["all-linear", "experts.down_proj"]},
    ),
    # peft makes a set of the names in a configuration that it uses.
    (
        {"peft_config": LoraConfig(target_parameters={"experts.down_proj", "experts.gate_up_proj"})},
        {"model.adapter.target_modules": ["experts.down_proj", "experts.gate_up_proj"]},
    ),
    (
        {"peft_config": LoraConfig(target_modules="all-linear")}
        | {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
        {"model.quantization": "nf4", "model.adapter.target_modules": "all-linear"},
    ),
    ({"words": ["optim.lr=3e-4"], "warmup_steps": 0.1}, {"optim.warmup_ratio": 0.1}),
    (
        {"sync_ref_model": True, "ref_model_sync_steps": 16, "ref_model_mixup_alpha": 0.5},
        {"reference.mode": "live", "loss.sync_reference.every": 16, "loss.sync_reference.mixup": 0.5},
    ),
    ({"train_sampling_strategy": "group_by_length"}, {}),
    # 20 pairs are 40 labelled responses: 5 steps of 8.
    (
        {"trainer": KTOTrainer, "save_strategy": "epoch"},
        {"loss.kind": "kto", "data.unpair": True, "trainer.save_every": 5},
    ),
    (
        {"trainer": KTOTrainer, "loss_type": "apo_zero_unpaired", "desirable_weight": 2.0}
        | {"train_dataset": [{"prompt": "a", "completion": "b", "label": True}]},
        {"loss.kind": "apo_zero_unpaired", "data.unpair": False},
    ),
    (
        {"peft_config": LoraConfig(r=np.int64(4), lora_alpha=np.int64(8), lora_dropout=np.float64(0.1))}
        | {"loss_type": ["sigmoid", "sft"], "loss_weights": [np.float64(0.5), 1.0]},
        {"model.adapter.r": 4, "model.adapter.alpha": 8}
        | {"loss.terms": [{"kind": "sigmoid", "weight": 0.5}, {"kind": "sft", "weight": 1.0}]},
    ),
    ({"learning_rate": 1.0}, {"optim.lr": 1.0}),  # as tests of TRL have it
    ({"learning_rate": np.float64(5e-6), "beta": np.float32(0.5)}, {"optim.lr": 5e-6, "loss.beta": 0.5}),
    (
        {"weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.95, "max_grad_norm": 0.3},
        {"optim.weight_decay": 0.2, "optim.betas": [0.8, 0.95], "optim.max_grad_norm": 0.3},
    ),
    (
        {"trainer": KTOTrainer, "desirable_weight": 2.0, "undesirable_weight": 0.5},
        {"loss.desirable_weight": 2.0, "loss.undesirable_weight": 0.5},
    ),
    ({"activation_checkpointing": False}, {"model.gradient_checkpointing": "none"}),
    (
        {
            "local_rank": 0,
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_num_workers": 4,
            "optimizers": (None, None),
        },
        {},
    ),
    (
        {"learning_rate": np.float64(1e-3), "max_steps": np.int64(8), "loss_weights": np.array([2.0, 1.0])}
        | {"loss_type": ["sigmoid", "sft"]},
        {"optim.lr": 1e-3, "trainer.max_steps": 8}
        | {"loss.terms": [{"kind": "sigmoid", "weight": 2.0}, {"kind": "sft", "weight": 1.0}]},
    ),
    (
        {"eval_strategy": "epoch", "eval_dataset": {"easy": PAIRS[:4], "hard": PAIRS[4:]}}
        | {"load_best_model_at_end": True, "metric_for_best_model": "eval_hard_rewards/accuracies"},
        {"trainer.keep_best": "eval_rewards/accuracies/hard"},
    ),
    (
        {"eval_strategy": "epoch", "eval_dataset": {"a": PAIRS[:4], "a_b": PAIRS[4:]}}
        | {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_b_loss"},
        {"trainer.keep_best": "eval_loss/a_b"},
    ),
]


@pytest.mark.parametrize(("given", "ours"), TRANSLATED, ids=[", ".join(row[0]) for row in TRANSLATED])
def test_an_argument_is_the_key_of_the_same_meaning(
    given: dict[str, Any], ours: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    found = translated(folder, tmp_path, **given)
    assert {key: found.get(key) for key in ours} == ours


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"warmup_steps": 3},
    {"warmup_steps": 0.3},
    {"warmup_steps": 30},  # more than the run has
    {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    {"lr_scheduler_type": "cosine", "warmup_steps": 0.01},
    {"lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 2},
    {"lr_scheduler_type": "constant", "warmup_steps": 3},
    {"lr_scheduler_type": "constant", "warmup_steps": 0.3},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    {"lr_scheduler_type": "inverse_sqrt"},
    {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3},
    {"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 3, "lr_scheduler_kwargs": {"min_lr": 2e-6}},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 3,
        "lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "linear"},
    },
    {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.1},
    },
]


@pytest.mark.parametrize("given", SCHEDULES, ids=[", ".join(map(str, row.values())) for row in SCHEDULES])
def test_the_rate_of_each_step_is_that_of_transformers(
    given: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    steps = 11
    args = DPOConfig(output_dir=str(tmp_path), learning_rate=1e-5, max_steps=steps, **given)
    DPOTrainer(str(folder), args=args, train_dataset=PAIRS)
    optim = load_run_config([str(tmp_path / "dpo_dist.yaml")]).optim
    check_schedule(optim, steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-5)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(steps),
        steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    for step in range(steps):
        assert learning_rate(optim, step, steps) == pytest.approx(
            *scheduler.get_last_lr(), rel=1e-9, abs=1e-20
        )
        optimizer.step()
        scheduler.step()


class SeesGradients(TrainerCallback):  # type: ignore[misc]
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Inside a step."""


class AlsoSees(SeesGradients):
    """Has the event from its base."""


BEST: dict[str, Any] = {"eval_strategy": "epoch", "eval_dataset": PAIRS[:4], "load_best_model_at_end": True}
BEST |= {"metric_for_best_model": "rewards/margins"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha", "not offered"),
    ({"disable_dropout": False}, "disable_dropout", "the same function"),
    ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy", "shuffled"),
    ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "hub_strategy", "pushed at the end"),
    ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hub_strategy", "pushed at the end"),
    ({"compute_metrics": print}, "compute_metrics", "metrics.function"),
    ({"adam_epsilon": 1e-6}, "adam_epsilon", "always 1e-8"),
    ({"save_strategy": "best"}, "save_strategy", "trainer.save_every"),
    ({"data_collator": print}, "data_collator", "remove it"),
    ({"optimizers": (object(), None)}, "optimizers", "remove it"),
    ({"callbacks": [SeesGradients]}, "callbacks", "on_step_end"),
    ({"callbacks": [AlsoSees()]}, "callbacks", "on_step_end"),
    ({"callbacks": [SyncRefModelCallback(None, None)]}, "callbacks", "sync_ref_model"),
    ({"peft_config": IA3Config()}, "peft_config", "LoraConfig"),
    ({"peft_config": LoraConfig(bias="all")}, "lora_bias", "no biases"),
    ({"peft_config": LoraConfig(rank_pattern={"q": 2})}, "rank_pattern", "words"),
    (
        {"peft_config": LoraConfig(), "quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        "bnb_4bit_quant_type",
        "nf4",
    ),
    # What has an effect in TRL, and another one here, or none.
    ({"eval_strategy": "steps"}, "eval_strategy", "pass an eval_dataset"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end", "set eval_strategy"),
    (BEST | {"greater_is_better": False}, "greater_is_better", "set it to True"),
    (BEST | {"metric_for_best_model": "loss", "greater_is_better": True}, "greater_is_better", "to False"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last", "leave it out"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config", "of one process"),
    # Of a tied pair peft would train one as a copy.
    (
        {"peft_config": LoraConfig(modules_to_save=["lm_head"])},
        "peft_config.modules_to_save",
        "ensure_weight_tying",
    ),
    ({"peft_config": LoraConfig(modules_to_save=["head"])}, "peft_config.modules_to_save", "name modules"),
    ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef", "no mixture of experts"),
    ({"words": ["loss.betaa=1"]}, "command line: loss.betaa=1", "loss.beta"),
    ({"eval_on_start": True, "eval_dataset": PAIRS[:4]}, "eval_on_start", "call evaluate()"),
    ({"model_init_kwargs": {"dtype": "float16"}}, "model_init_kwargs.dtype", "fp16=True"),
    ({"loss_type": ["nca_pair"], "f_divergence_type": "js_divergence"}, "f_divergence_type", "nca_pair"),
    ({"loss_type": ["sigmoid", "aot"], "use_weighting": True}, "use_weighting", "refuses it with aot"),
    ({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}, "label_smoothing", "differ in sigmoid"),
    ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "use_weighting", "differ in sft"),
    ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, "lr_scheduler_type", "words"),
    ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type", "words"),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 3, "max_steps": 20}
        | {"lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.1}},
        "min_lr_ratio",
        "warm-up begins at this share",
    ),
    (
        {"eval_strategy": "epoch", "eval_dataset": {"easy": PAIRS[:4], "hard": PAIRS[4:]}}
        | {"metric_for_best_model": "loss"},
        "metric_for_best_model",
        "eval_easy_loss",
    ),
    ({"train_dataset": None}, "train_dataset", "datasets.Dataset"),
    (
        {"precompute_ref_log_probs": True, "train_dataset": Dataset.from_list(PAIRS).to_iterable_dataset()},
        "train_dataset",
        "leave it out",
    ),
    ({"train_dataset": []}, "train_dataset", "at least one"),
]


@pytest.mark.parametrize(("given", "where", "remedy"), REFUSED, ids=[", ".join(row[0]) for row in REFUSED])
def test_what_is_not_offered_is_named_with_the_reason(
    given: dict[str, Any], where: str, remedy: str, folder: Path, tmp_path: Path
) -> None:
    if "model_init_kwargs" not in given:
        given = {"model": AutoModelForCausalLM.from_pretrained(folder)} | given
    with pytest.raises(ConfigError) as raised:
        translated(folder, tmp_path, **given)
    assert not (tmp_path / "models").exists()
    assert raised.value.where == where
    assert remedy in raised.value.remedy
    of_both = ("train_dataset", "command line: loss.betaa=1", "peft_config.modules_to_save")
    assert isinstance(raised.value, ValueError) or where in of_both, "as in TRL"


@pytest.mark.parametrize("interval", [{"save_strategy": "epoch"}, {"save_steps": 0.5, "num_train_epochs": 2}])
def test_an_epoch_has_no_steps_for_records_that_cannot_be_used(
    interval: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    equal = [{"prompt": "q", "chosen": " yes", "rejected": " yes"}] * 4
    for name, bad in (("good", []), ("some bad", equal)):
        records = PAIRS[:6] + bad
        found = translated(
            folder, tmp_path / name, train_dataset=records, per_device_train_batch_size=2, **interval
        )
        assert found["trainer.save_every"] == 3, name


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"model_init_kwargs": {"attention_dropout": 0.5}}, "0.5"),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}, "2"),
    ],
)
def test_an_argument_in_a_mapping_is_refused_with_its_value(
    given: dict[str, Any], got: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        translated(folder, tmp_path, **given)
    assert raised.value.got == got


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"ref_model_mixup_alpha": 0.5},
    {"f_alpha_divergence_coef": 0.7},
    {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    {"accelerator_config": {"dispatch_batches": False}, "ddp_timeout": 180000000, "ddp_backend": "nccl"},
    {
        "label_names": [],
        "include_for_metrics": ["inputs"],
        "batch_eval_metrics": True,
        "prediction_loss_only": True,
    },
    {"torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "default"},
    {"model_init_kwargs": {"use_safetensors": True, "local_files_only": True, "max_memory": {0: "1GB"}}},
    BEST | {"greater_is_better": True},
]


@pytest.mark.parametrize("given", WITHOUT_EFFECT, ids=[", ".join(row) for row in WITHOUT_EFFECT])
def test_what_has_no_effect_in_trl_either_is_accepted(
    given: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    translated(folder, tmp_path, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"label_smoothing": 0.2},
        {"loss_type": ["nca_pair"], "label_smoothing": 0.2},
        {"loss_type": ["sft"], "ld_alpha": 0.5},
        {"discopop_tau": 0.2},
    ],
)
def test_an_option_that_trl_does_not_use_with_the_loss_changes_nothing_and_is_said(
    given: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    args, said = DPOConfig(output_dir=str(tmp_path), **given), f"{[*given][-1]}: TRL does not use it with"
    with pytest.warns(UserWarning, match=said) as noted:
        trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS)
    assert {key for key in keys_of(trainer) if key.startswith("loss.")} <= {"loss.kind"}
    places = {note.filename for note in noted if str(note.message).startswith(said)}
    assert places == {__file__}, "the line of the script that makes the trainer"


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"truncation_mode": "keep_end"}, "data.truncation"),
        ({"include_num_input_tokens_seen": "all"}, None),
        ({"loss_type": "kto", "trainer": KTOTrainer}, None),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 16}, None),  # 4 steps in TRL
    ],
)
def test_what_is_another_way_without_an_error_is_said(
    given: dict[str, Any], key: str | None, folder: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=next(iter(given))):
        found = translated(folder, tmp_path, **given)
    assert key is None or found[key] == "keep_end"


OLDER: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    # The trainer's arguments, `args`, and what the line of the error sets.
    (
        {"beta": 0.3, "loss_type": "ipo", "max_length": 64, "max_prompt_length": 32, "tokenizer": 1},
        None,
        {"loss.beta": 0.3, "loss.kind": "ipo", "data.max_length": 64, "data.max_prompt_length": 32},
    ),
    (
        {"beta": 0.3, "label_smoothing": 0, "truncation_mode": "keep_end"},
        TrainingArguments(
            output_dir="out",
            per_device_train_batch_size=2,
            max_steps=7,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            bf16=False,
        ),
        {"loss.beta": 0.3, "trainer.global_batch_pairs": 2, "trainer.max_steps": 7, "trainer.log_every": 500}
        | {"optim.lr": 5e-5, "optim.schedule": "cosine", "optim.warmup_steps": 3, "model.dtype": "fp32"}
        | {"model.gradient_checkpointing": "none", "data.truncation": "keep_end"},
    ),
    (
        {"beta": 0.3},
        DPOConfig(output_dir="out", learning_rate=2e-5, words=["data.on_bad_record=error"]),
        {"loss.beta": 0.3, "optim.lr": 2e-5, "trainer.log_every": 10, "data.on_bad_record": "error"},
    ),
    ({}, 0.3, {"loss.beta": 0.3}),
    ({"rpo_alpha": None}, TrainingArguments(output_dir="out"), {"optim.lr": 5e-5}),
]


@pytest.mark.parametrize(("given", "args", "ours"), OLDER)
def test_a_script_of_an_older_trl_is_told_the_line_to_write(
    given: dict[str, Any], args: Any, ours: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    trainer: Any = DPOTrainer
    with pytest.raises(ConfigError, match="an older TRL") as raised:
        trainer(str(folder), None, args, train_dataset=PAIRS, **given)
    assert raised.value.remedy.endswith("processing_class=... in place of tokenizer=...") is (
        "tokenizer" in given
    )
    line = raised.value.remedy.partition("write args=")[2].partition("; write processing_class")[0]
    written = eval(line, {"DPOConfig": DPOConfig})
    written.output_dir = str(tmp_path)
    DPOTrainer(str(folder), args=written, train_dataset=PAIRS)
    run = load_run_config([str(tmp_path / "dpo_dist.yaml"), *written.words])
    assert {key: value_at(run, key) for key in ours} == ours


def test_what_an_older_trainer_took_and_nothing_takes_now_is_in_the_same_error(folder: Path) -> None:
    trainer: Any = DPOTrainer
    given = {"beta": 0.2, "label_pad_token_id": -100, "data_collator": print}
    with pytest.raises(ConfigError) as raised:
        trainer(str(folder), train_dataset=PAIRS, **given)
    assert [part.where for part in raised.value.parts] == ["trainer", "label_pad_token_id", "data_collator"]
    with pytest.raises(ConfigError) as raised:
        trainer(str(folder), train_dataset=PAIRS, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert raised.value.remedy == "write processing_class=... in place of tokenizer=..."


def test_arguments_of_trl_itself_are_told_their_import(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(output_dir=str(tmp_path), bf16=False)
    with pytest.raises(ConfigError, match=r"from dpo_dist\.trl import DPOConfig"):
        DPOTrainer(str(folder), args=args, train_dataset=PAIRS)


@pytest.mark.parametrize(
    ("given", "weights", "ours"),
    [
        ({}, torch.float16, None),
        ({"fp16": True}, torch.float16, "fp16"),
        ({}, torch.bfloat16, "bf16"),
        ({"bf16": False}, torch.bfloat16, "bf16"),
        ({"bf16": False}, torch.float32, "fp32"),
    ],
)
def test_the_type_of_a_model_in_memory_counts_as_that_of_one_to_load(
    given: dict[str, Any], weights: torch.dtype, ours: str | None, folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights)
    if ours is None:
        with pytest.raises(ConfigError, match="float16 beside bf16") as raised:
            translated(folder, tmp_path, model=model, **given)
        assert raised.value.where == "model.dtype"
    else:
        assert translated(folder, tmp_path, model=model, **given)["model.dtype"] == ours


def test_all_arguments_that_are_not_offered_are_one_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        translated(folder, tmp_path, neftune_noise_alpha=5.0, adam_epsilon=1e-6)
    assert [part.where for part in raised.value.parts] == ["adam_epsilon", "neftune_noise_alpha"]


def _loss(*_: Any, **__: Any) -> Any:
    """An override that would change the run."""


OVERRIDES = [
    ("compute_loss", "loss.function"),
    ("dpo_loss", "loss.function"),
    ("get_batch_loss_metrics", "loss.function"),
    ("training_step", "loss.function"),
    ("create_optimizer", "optim"),
    ("get_train_dataloader", "train_dataset"),
    ("tokenize_row", "train_dataset"),
    ("evaluation_loop", "with TRL"),
    ("_save_checkpoint", "with TRL"),
    ("_precompute_ref_logps", "loss.function"),
    ("save_model", "save_strategy='no'"),
    ("create_model_card", "another name"),
]


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer])
@pytest.mark.parametrize(("name", "remedy"), OVERRIDES, ids=[name for name, _ in OVERRIDES])
def test_an_override_that_nothing_would_call_is_refused_by_class_and_method(
    trainer: type[DPOTrainer], name: str, remedy: str, folder: Path, tmp_path: Path
) -> None:
    parent = type("Parent", (trainer,), {name: _loss})
    mine = type("Mine", (parent,), {"helper": _loss, "_tag_names": ["mine"]})
    with pytest.raises(ConfigError) as raised:
        mine(str(folder), args=trainer.config(output_dir=str(tmp_path)), train_dataset=PAIRS)
    assert raised.value.where == f"Parent.{name}"
    assert remedy in raised.value.remedy
    assert not list(tmp_path.iterdir()), "before anything is written"


@pytest.mark.parametrize("form", [partialmethod, classmethod, property], ids=lambda form: form.__name__)
def test_an_override_is_refused_in_each_form_of_a_method(form: Any, folder: Path, tmp_path: Path) -> None:
    mine = type("Mine", (DPOTrainer,), {"compute_loss": form(_loss)})
    with pytest.raises(ConfigError, match=r"Mine\.compute_loss"):
        mine(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)


def test_an_override_by_a_class_of_transformers_or_on_the_class_itself_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = {"args": DPOConfig(output_dir=str(tmp_path)), "train_dataset": PAIRS}
    mixin = type("Mixin", (Trainer,), {"training_step": _loss})
    with pytest.raises(ConfigError, match=r"Mixin\.training_step"):
        type("Mine", (mixin, DPOTrainer), {})(str(folder), **given)
    monkeypatch.setattr(DPOTrainer, "compute_loss", _loss, raising=False)
    with pytest.raises(ConfigError, match=r"DPOTrainer\.compute_loss"):
        DPOTrainer(str(folder), **given)


@pytest.mark.parametrize("kind", [trl.DPOTrainer, trl.KTOTrainer], ids=["DPO", "KTO"])
def test_each_method_of_trl_is_refused_as_an_override_or_called(
    kind: type, folder: Path, tmp_path: Path
) -> None:
    trainer = DPOTrainer if kind is trl.DPOTrainer else KTOTrainer
    names = {name for name, value in vars(kind).items() if callable(value)}
    names = {name for name in names if not name.startswith("__")} - {"evaluate", "log"}
    mine = type("Mine", (trainer,), dict.fromkeys(names, _loss))
    with pytest.raises(ConfigError) as raised:
        mine(str(folder), args=trainer.config(output_dir=str(tmp_path)), train_dataset=PAIRS)
    refused = {part.where.removeprefix("Mine.") for part in raised.value.parts}
    assert names == refused


def test_what_a_script_replaces_in_the_trainer_of_transformers_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = {"args": DPOConfig(output_dir=str(tmp_path), eval_strategy="steps"), "train_dataset": PAIRS}
    monkeypatch.setattr(Trainer, "training_step", _loss)
    monkeypatch.setattr(DPOTrainer, "evaluate", _loss)
    with pytest.raises(ConfigError) as raised:
        DPOTrainer(str(folder), **given)
    assert [part.where for part in raised.value.parts] == ["DPOTrainer.evaluate", "Trainer.training_step"]


def test_a_property_for_what_trl_reads_at_each_step_is_refused(folder: Path, tmp_path: Path) -> None:
    both = property(_loss, _loss)
    mine = type("Mine", (DPOTrainer,), {"data_collator": both, "beta": both})
    with pytest.raises(ConfigError) as raised:
        mine(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    assert {part.where for part in raised.value.parts} == {"Mine.data_collator", "Mine.beta"}


def test_an_override_by_a_class_of_arguments_is_refused(folder: Path, tmp_path: Path) -> None:
    @dataclass
    class Mine(DPOConfig):
        beta: float = 0.3

        def get_warmup_steps(self, steps: int) -> int:
            return steps // 2

        def helper(self) -> int:
            return 1

    with pytest.raises(ConfigError, match=r"Mine\.get_warmup_steps"):
        DPOTrainer(str(folder), args=Mine(output_dir=str(tmp_path)), train_dataset=PAIRS)


def test_names_of_a_script_that_the_trainer_uses_itself_are_refused(folder: Path, tmp_path: Path) -> None:
    class Early(DPOTrainer):
        def __init__(self, **given: Any) -> None:
            self.config: Any = {}  # type: ignore[misc]
            super().__init__(**given)

    class Own(DPOTrainer):
        def own_model(self) -> Any:
            return None

    class Folder(DPOTrainer):
        def __init__(self, **given: Any) -> None:
            self.folder: Any = "mine"  # type: ignore[misc]
            self.mine = 1
            super().__init__(**given)

    class Run(DPOTrainer):
        def run(self) -> None:  # type: ignore[override]
            """An attribute of the trainer would hide it."""

    given: Any = {"model": str(folder), "args": DPOConfig(output_dir=str(tmp_path)), "train_dataset": PAIRS}
    for kind, name in ((Early, "config"), (Own, "own_model"), (Folder, "folder"), (Run, "run")):
        with pytest.raises(ConfigError, match=rf"trainer\.{name}"):
            kind(**given)
    assert not list(tmp_path.iterdir()), "before anything is written"
    trainer = DPOTrainer(**given)
    trainer.folder = Path("elsewhere")
    with pytest.raises(ConfigError, match=r"trainer\.folder"):
        trainer.train()


def test_arguments_have_the_places_of_trl(folder: Path, tmp_path: Path) -> None:
    args, tokenizer = DPOConfig(output_dir=str(tmp_path)), AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(str(folder), None, args, None, PAIRS, None, tokenizer)
    assert trainer.processing_class is tokenizer
    with pytest.raises(ConfigError, match="data_collator"):
        DPOTrainer(str(folder), None, args, _loss, PAIRS)


def test_attributes_are_those_of_trl_or_say_what_to_use(folder: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), beta=0.3, loss_type=["ipo"])
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS)
    assert isinstance(trainer, Trainer)
    assert (trainer.beta, trainer.loss_types, trainer.hub_model_id) == (0.3, ["ipo"], None)
    assert (trainer.aux_loss_enabled, trainer.is_fsdp_enabled) == (False, False)
    assert trainer.is_local_process_zero()
    assert args.distributed_state.is_main_process
    assert {"trl", "dpo"} <= {*trainer.model.model_tags}
    names = ("predict", "optimizer", "lr_scheduler", "data_collator", "get_train_dataloader", "compute_loss")
    for name in names:
        assert not hasattr(trainer, name)
        with pytest.raises(ConfigError, match=rf"trainer\.{name}"):
            getattr(trainer, name)
    processes = trainer.accelerator
    assert (processes.num_processes, processes.is_local_main_process) == (1, True)
    assert processes.unwrap_model(trainer.model) is trainer.model
    assert torch.equal(processes.gather(torch.ones(2)), torch.ones(2))
    with pytest.raises(ConfigError, match=r"accelerator\.backward"):
        _ = processes.backward
    assert trainer.get_num_trainable_parameters() == trainer.model.num_parameters()

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, **__: Any) -> None:
            """Of the script; the bars of an evaluation are the library's."""

    for bar in (Bar(), RichProgressCallback()):
        trainer.add_callback(bar)
        trainer.remove_callback(type(bar))
    for left in (ProgressCallback(), PrinterCallback()):
        trainer.add_callback(left)
    trainer.remove_callback(PrinterCallback)
    assert isinstance(trainer.pop_callback(ProgressCallback), ProgressCallback)
    assert trainer.pop_callback(ProgressCallback) is None


def test_data_of_a_trainer_have_the_token_ids_that_are_trained(folder: Path, tmp_path: Path) -> None:
    args, held_out = DPOConfig(output_dir=str(tmp_path), max_length=None), {"easy": PAIRS[:2]}
    pairs = [*PAIRS, {**PAIRS[0], "note": "a column of the last record only"}]
    trainer = DPOTrainer(str(folder), args=args, train_dataset=pairs, eval_dataset=held_out)
    tokenizer = trainer.processing_class
    assert trainer.train_dataset[-1]["note"] == pairs[-1]["note"]
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert row["prompt_ids"] == tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(row["chosen_ids"]) == pair["chosen"] + tokenizer.eos_token
        assert row["rejected"] == pair["rejected"]
    assert [len(rows) for rows in trainer.eval_dataset.values()] == [2]
    sides = ("chosen_ids", "rejected_ids")
    longest = max(
        len(row["prompt_ids"]) + max(len(row[side]) for side in sides) for row in trainer.train_dataset
    )
    assert keys_of(trainer)["data.max_length"] == longest


def test_a_method_that_is_replaced_on_the_trainer_is_refused_before_it_trains(
    folder: Path, tmp_path: Path
) -> None:
    trainer = DPOTrainer(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    trainer.compute_loss = _loss
    with pytest.raises(ConfigError) as raised:
        trainer.train()
    assert raised.value.where == "trainer.compute_loss"


def test_methods_of_its_own_and_those_that_are_called_do_not_hinder_a_subclass(
    folder: Path, tmp_path: Path
) -> None:
    called = {"log": _loss, "train": _loss, "evaluate": _loss, "reward_of": _loss}
    mine = type("Mine", (DPOTrainer,), called)
    mine(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    args = DPOConfig(output_dir=str(tmp_path), eval_strategy="epoch")
    with pytest.raises(ConfigError, match="evaluate"):  # the loop evaluates, and would not call it
        mine(str(folder), args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:4])


def test_arguments_that_change_after_the_trainer_is_made_are_refused(folder: Path, tmp_path: Path) -> None:
    trainer = DPOTrainer(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    trainer.args.learning_rate = 1e-3
    trainer.args.loss_type.append("sft")
    with pytest.raises(ConfigError) as raised:
        trainer.train()
    assert {part.where for part in raised.value.parts} == {"args.learning_rate", "args.loss_type"}


def test_attributes_that_change_after_the_trainer_is_made_are_refused(folder: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path))
    trainer: Any = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:4])
    for name in ("train_dataset", "eval_dataset", "ref_model", "model"):
        with pytest.raises(ConfigError, match=rf"trainer\.{name}"):
            setattr(trainer, name, PAIRS[:2])
    trainer.loss_types, trainer.optimizer, trainer.compute_metrics = ["ipo"], object(), _loss
    trainer.beta = args.beta  # which changes nothing
    with pytest.raises(ConfigError) as raised:
        trainer.train()
    assert {part.where for part in raised.value.parts} == {
        "trainer.loss_types",
        "trainer.optimizer",
        "trainer.compute_metrics",
    }


def test_a_model_or_a_tokenizer_that_changes_after_the_trainer_is_made_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    args, tokenizer = DPOConfig(output_dir=str(tmp_path)), AutoTokenizer.from_pretrained(folder)
    given: dict[str, Any] = {"args": args, "train_dataset": PAIRS, "processing_class": tokenizer}
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))

    def refusal(trainer: DPOTrainer) -> dict[str, str]:
        with pytest.raises(ConfigError) as raised:
            trainer.train()
        return {part.where: part.got for part in raised.value.parts or [raised.value]}

    trainer = DPOTrainer(model, reference, **given)
    reference.register_forward_hook(_loss)
    assert refusal(trainer) == {"ref_model": "a hook on the model"}
    model.model.norm.weight.requires_grad = False
    assert refusal(trainer).keys() == {"model", "ref_model"}
    for kind in ({}, {"peft_config": LoraConfig(r=2)}):
        named = DPOTrainer(str(folder), **given, **kind)
        named.model.get_output_embeddings().register_forward_hook(_loss)
        assert "hook on" in refusal(named)["model"]
    named = DPOTrainer(str(folder), **given)
    named.processing_class.pad_token = named.processing_class.eos_token
    named.processing_class(["a", "b c d"], padding=True, truncation=True, max_length=1)
    named.processing_class.chat_template = "{{ messages }}"
    assert refusal(named) == {"trainer.processing_class": "another chat_template"}
    named.processing_class.add_tokens(["<new>"])
    assert refusal(named) == {"trainer.processing_class": "other tokens"}


def test_a_script_may_read_what_transformers_computes_from_the_arguments(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TrainedError(Exception):
        pass

    def train(*_: Any, **__: Any) -> Any:
        raise TrainedError

    monkeypatch.setattr("dpo_dist.api.train", train)
    trainer = DPOTrainer(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    assert trainer.args.device.type
    trainer.args.note = "of the script"
    with pytest.raises(TrainedError):
        trainer.train()


def test_a_column_that_the_first_record_of_a_list_lacks_is_read(folder: Path, tmp_path: Path) -> None:
    pair = {
        name: [{"role": role, "content": name}]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    found = translated(folder, tmp_path, train_dataset=[pair, {**pair, "tools": []}])
    assert found["data.train"][0]["columns"]["tools"] == "tools"
    answered = translated(folder, tmp_path, train_dataset=[pair | {"chosen": "yes", "rejected": "no"}])
    assert "format" not in answered["data.train"][0]


@pytest.mark.parametrize("first", [{"chosen": None}, {"chosen": None, "rejected": None}, {"prompt": None}])
def test_a_record_without_a_response_does_not_change_how_others_are_read(
    first: dict[str, None], folder: Path, tmp_path: Path
) -> None:
    pairs = [pair | {"system": "s", "margin": 3.0} for pair in PAIRS]
    without, [source] = (
        translated(folder, tmp_path, train_dataset=rows)["data.train"]
        for rows in (pairs, [pairs[0] | first, *pairs])
    )
    assert source["format"] == "text"
    assert source["columns"] == without[0]["columns"]


@pytest.mark.parametrize(("option", "values"), [("lora_alpha", (16, 64)), ("use_rslora", (False, True))])
def test_an_adapter_in_memory_is_trained_with_its_own_options(
    option: str, values: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    """Also if `output_dir` has one with the same weights."""
    for value in values:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", **{option: value})
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        path = translated(folder, tmp_path, model=adapted)["model.adapter.path"]
        assert PeftConfig.from_pretrained(path).to_dict()[option] == value


def test_a_model_in_memory_is_trained_with_the_tokenizer_given(folder: Path, tmp_path: Path) -> None:
    for template in (CHATML, CHATML + "{# another #}"):
        model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
        tokenizer.chat_template = template
        path = translated(folder, tmp_path, model=model, processing_class=tokenizer)["model.path"]
        assert AutoTokenizer.from_pretrained(path).chat_template == template


@pytest.mark.parametrize(
    ("held_out", "metric"), [(PAIRS[:4], "eval_loss"), ({"easy": PAIRS[:4]}, "eval_easy_loss")]
)
def test_of_two_equal_evaluations_the_earlier_is_the_best(
    held_out: Any, metric: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = DPOConfig(output_dir=str(tmp_path), eval_strategy="epoch", metric_for_best_model=metric)
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, eval_dataset=held_out)
    rows = [{"step": step, "epoch": 1.0, "eval_loss": loss} for step, loss in ((1, 0.7), (2, 0.5), (3, 0.5))]
    ended = {"exit": "preempted", "stopped_by": "a callback", "steps": 3, "train_seconds": 0.0}
    monkeypatch.setattr("dpo_dist.api.train", lambda *_, **__: ended)
    monkeypatch.setattr("dpo_dist.api.read_metrics", lambda _: rows)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 2)
    assert [row[metric] for row in trainer.state.log_history if metric in row] == [0.7, 0.5, 0.5]


def test_sets_have_any_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One like the end of a metric, and one with two underscores, which a prefix may have, too."""
    sets = {"hard__set": PAIRS[:2], "chosen": PAIRS[2:4]}
    args = DPOConfig(output_dir=str(tmp_path), eval_strategy="epoch")
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, eval_dataset=sets)
    row = {"step": 1, "epoch": 1.0}
    for end in ("", "/hard__set", "/chosen"):
        row |= {f"eval_loss{end}": 0.5, f"eval_rewards/chosen{end}": 0.1}
    ended = {"exit": "preempted", "stopped_by": "a callback", "steps": 1, "train_seconds": 0.0}
    monkeypatch.setattr("dpo_dist.api.train", lambda *_, **__: ended)
    monkeypatch.setattr("dpo_dist.api.read_metrics", lambda _: [row])
    trainer.train()
    names = [sorted(name for name in row if "eval_" in name) for row in trainer.state.log_history[:2]]
    assert names == [[f"eval_{label}_loss", f"eval_{label}_rewards/chosen"] for label in sets]

    found = json.dumps({label: {"eval_loss": 0.5} for label in sets})
    monkeypatch.setattr("dpo_dist.verbs.evaluate.main", lambda _: results.write_text(found))
    monkeypatch.setattr("dpo_dist.trl.models.ScriptModels.trained", lambda _: str(folder))
    results = trainer.run.evaluation.results
    results.parent.mkdir(parents=True)
    assert sorted(trainer.evaluate(metric_key_prefix="my__test")) == [
        "my__test_chosen_loss",
        "my__test_hard__set_loss",
    ]


def test_weights_that_the_class_of_a_model_freezes_are_not_those_of_the_script(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("afmoe"))
    assert any(not weight.requires_grad for weight in model.parameters())
    assert not frozen_weights(model, "model")
    model.lm_head.weight.requires_grad = False
    assert [error.got for error in frozen_weights(model, "model")] == [
        "a model with frozen weights: lm_head.weight"
    ]


def test_what_a_script_changes_in_the_code_of_a_model_is_refused(folder: Path) -> None:
    class Mine(Qwen2ForCausalLM):  # type: ignore[misc]
        pass

    def changed(change: Any, kind: Any = Qwen2ForCausalLM) -> list[str]:
        model = kind.from_pretrained(folder)
        change(model)
        return [error.got for error in hooks(model, "model")]

    def replace(model: Any) -> None:
        model.model.norm.forward = MethodType(lambda _, hidden: hidden, model.model.norm)

    assert changed(add_hook_to_module_of) == []
    assert changed(add_fused_lm_head) == [], "as SFTTrainer leaves a model"
    assert changed(replace) == ["another forward of model.norm"]
    assert changed(lambda model: None, Mine) == ["a class of its own, Mine"]
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        found = changed(lambda model, name=register: getattr(model.model.norm.weight, name)(_loss))
        assert found == ["a hook on model.norm"]
    before = changed(lambda model: model.lm_head.register_full_backward_pre_hook(_loss))
    assert before == ["a hook on lm_head"]


def add_hook_to_module_of(model: Any) -> None:
    """Hook a model as accelerate does for a `device_map`."""
    add_hook_to_module(model, AlignDevicesHook("cpu"))


def test_frozen_weights_and_hooks_of_a_model_in_memory_are_refused(folder: Path, tmp_path: Path) -> None:
    def refusal(model: Any, **given: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            translated(folder, tmp_path, model=model, **given)
        return raised.value.got

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.enable_input_require_grads()
    translated(folder, tmp_path, model=model)
    model.model.norm.weight.requires_grad = False
    assert "model.norm.weight" in refusal(model)
    translated(folder, tmp_path, model=model, peft_config=LoraConfig(r=2))  # which freezes all
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2))
    adapted.base_model.model.model.norm.weight.requires_grad = True
    assert "model.norm.weight" in refusal(adapted)
    adapted.base_model.model.model.norm.weight.requires_grad = False
    for name, weight in adapted.named_parameters():
        weight.requires_grad = "lora_B" in name
    assert "lora_A" in refusal(adapted)
    hooked = AutoModelForCausalLM.from_pretrained(folder)
    hooked.lm_head.register_forward_hook(_loss)
    assert refusal(hooked) == "a hook on lm_head"
    assert refusal(str(folder), ref_model=hooked) == "a hook on lm_head"


@pytest.mark.parametrize(("given", "ours"), [(None, "model"), (0.0, None), (0.5, 0.5)])
def test_a_mixture_of_experts_has_the_router_loss_of_trl(
    given: float | None, ours: Any, tmp_path: Path
) -> None:
    tiny_config("qwen3_moe").save_pretrained(tmp_path / "experts")
    found = translated(tmp_path / "experts", tmp_path / "out", router_aux_loss_coef=given)
    assert found.get("loss.router.aux_coefficient") == ours


def test_models_in_memory_are_saved_once_by_content(folder: Path, tmp_path: Path) -> None:
    model, other = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    first = translated(folder, tmp_path, model=model, ref_model=other)
    assert first["model.path"] == first["reference.path"], "the content is the same"
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    second = translated(folder, tmp_path, model=model, ref_model=other)
    assert second["model.path"] == first["model.path"]
    saved = AutoModelForCausalLM.from_pretrained(second["reference.path"])
    assert torch.equal(saved.lm_head.weight, other.lm_head.weight)
    assert len([entry for entry in (tmp_path / "models").iterdir() if entry.is_dir()]) == 2


def test_an_adapter_in_memory_is_continued(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    found = translated(folder, tmp_path, model=get_peft_model(base, LoraConfig(r=2)))
    assert found["model.path"] == str(folder)
    assert (Path(found["model.adapter.path"]) / "adapter_model.safetensors").is_file()


def test_an_adapter_whose_base_was_changed_in_memory_is_refused(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=2))
    translated(folder, tmp_path, model=model)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.base_layer.weight[0] += 1
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        translated(folder, tmp_path, model=model)


def test_an_adapter_beside_another_is_refused(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2))
    model.add_adapter("other", LoraConfig(r=2))
    with pytest.raises(ConfigError, match="default, other"):
        translated(folder, tmp_path, model=model)


def test_a_quantized_model_in_memory_is_quantized_again_by_its_name(folder: Path, tmp_path: Path) -> None:
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits)
    found = translated(folder, tmp_path, model=model, peft_config=LoraConfig())
    assert (found["model.path"], found["model.quantization"]) == (str(folder), "nf4")


def test_a_file_of_deepspeed_counts_by_its_content(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}))
    found = translated(folder, tmp_path, deepspeed=str(file))
    assert found["parallelism.kind"] == "zero3"


def test_a_mapping_may_say_how_a_model_is_quantized(folder: Path, tmp_path: Path) -> None:
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for given in ({"model_init_kwargs": {"quantization_config": bits}}, {"quantization_config": bits}):
        found = translated(folder, tmp_path, peft_config=LoraConfig(), **given)
        assert found["model.quantization"] == "nf4"


def test_keys_that_an_evaluation_would_ignore_are_refused(folder: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path))
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:4])
    with pytest.raises(ConfigError, match="ignore_keys"):
        trainer.evaluate(ignore_keys=["logits"])


def test_before_training_a_trainer_has_what_it_was_given(folder: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    given = {"train_dataset": PAIRS, "peft_config": LoraConfig()}
    trainer = DPOTrainer(str(folder), args=args, processing_class=tokenizer, **given)
    assert [row["prompt"] for row in trainer.train_dataset] == [pair["prompt"] for pair in PAIRS]
    assert trainer.eval_dataset is None
    assert isinstance(trainer.model, PeftModel)
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == tokenizer.chat_template
    named = DPOTrainer(str(folder), args=args, **given)
    assert named.processing_class.get_vocab() == tokenizer.get_vocab()


def test_modules_of_one_weight_are_saved_as_one_if_peft_ties_them(folder: Path, tmp_path: Path) -> None:
    for wanted in (["lm_head"], ["embed_tokens", "lm_head"]):
        with pytest.raises(ConfigError) as raised:
            translated(folder, tmp_path, peft_config=LoraConfig(modules_to_save=wanted))
        line = raised.value.remedy.removeprefix("write ")
        found = translated(folder, tmp_path, peft_config=eval(line, {"LoraConfig": LoraConfig}))
        assert {*found["model.adapter.modules_to_save"]} == {"embed_tokens", "lm_head"}


@pytest.mark.parametrize("changed", ["model", "ref_model", "named", "loaded"])
def test_weights_that_change_after_the_trainer_is_made_are_refused(
    changed: str, folder: Path, tmp_path: Path
) -> None:
    args = DPOConfig(output_dir=str(tmp_path))
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    given: dict[str, Any] = {"args": args, "train_dataset": PAIRS, "eval_dataset": PAIRS[:4]}
    trainer = DPOTrainer(*((str(folder),) if changed in ("named", "loaded") else (model, reference)), **given)
    chosen = {"ref_model": lambda: reference, "loaded": lambda: trainer.ref_model}
    weights = chosen.get(changed, lambda: trainer.model)()
    with torch.no_grad():
        weights.model.norm.weight[0] = 3
    for call in (trainer.train, trainer.evaluate, trainer.save_model):
        with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
            call()


def test_a_saved_model_generates_as_the_script_says(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = DPOTrainer(model, args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    trainer.model.generation_config.max_new_tokens = 7
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.max_new_tokens == 7


def test_a_callback_that_is_added_later_counts(folder: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), eval_strategy="epoch")
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:4])
    assert "trainer.patience" not in keys_of(trainer)
    for remove in (trainer.remove_callback, trainer.pop_callback):
        trainer.add_callback(EarlyStoppingCallback(2))
        assert keys_of(trainer)["trainer.patience"] == 2
        remove(EarlyStoppingCallback)
        assert "trainer.patience" not in keys_of(trainer)


class _Event(TrainerCallback):
    """Changes something at each row."""

    def __init__(self, change: Callable[[Any, Any], None]) -> None:
        self._change = change

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._change(args, state)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda args, state: setattr(state, "max_steps", 2), "callbacks"),
        (lambda args, state: setattr(state, "save_steps", 2), "callbacks"),
        (lambda args, state: setattr(args, "max_grad_norm", 0.1), r"args\.max_grad_norm"),
    ],
    ids=["max_steps", "save_steps", "max_grad_norm"],
)
def test_what_a_callback_changes_without_an_effect_is_refused(
    change: Any, where: str, folder: Path, tmp_path: Path
) -> None:
    given: Any = {"args": DPOConfig(output_dir=str(tmp_path)), "train_dataset": PAIRS}
    trainer = DPOTrainer(str(folder), callbacks=[_Event(lambda *_: None)], **given)
    trainer.log({"loss": 1.0})
    trainer.add_callback(_Event(change))
    with pytest.raises(ConfigError, match=where):
        trainer.log({"loss": 1.0})


@pytest.mark.parametrize("event", ["on_prediction_step", "on_optimizer_step"])
def test_an_event_that_does_not_happen_here_is_refused_however_it_is_added(
    event: str, folder: Path, tmp_path: Path
) -> None:
    given: Any = {"args": DPOConfig(output_dir=str(tmp_path)), "train_dataset": PAIRS}
    trainer, late, on_itself = DPOTrainer(str(folder), **given), TrainerCallback(), TrainerCallback()
    setattr(on_itself, event, _loss)
    with pytest.raises(ConfigError, match=event):
        trainer.add_callback(on_itself)
    trainer.callback_handler.add_callback(late)
    setattr(late, event, _loss)
    with pytest.raises(ConfigError, match=event):
        trainer.train()


def test_options_of_train_that_have_no_effect_are_refused(folder: Path, tmp_path: Path) -> None:
    trainer: Any = DPOTrainer(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    with pytest.raises(ConfigError) as raised:
        trainer.train(trial={"beta": 1}, ignore_keys_for_eval=["logits"])
    assert {part.got for part in raised.value.parts} == {"trial", "ignore_keys_for_eval"}
    with pytest.raises(TypeError, match="foo"):
        trainer.train(None, foo=1)


def test_a_signal_ends_the_script_and_a_callback_ends_only_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = {"exit": "preempted", "stopped_by": "SIGTERM", "steps": 1, "train_seconds": 0.0}
    monkeypatch.setattr("dpo_dist.api.train", lambda *_, **__: ended)
    monkeypatch.setattr("dpo_dist.api.read_metrics", lambda _: [])
    args = DPOConfig(output_dir=str(tmp_path))
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS)
    with pytest.raises(SystemExit) as raised:
        trainer.train()
    assert raised.value.code == ExitCode.preempted
    ended["stopped_by"] = "SIGTERM, a callback"
    assert trainer.train().global_step == 1


def test_each_use_of_what_callbacks_do_not_get_says_what_to_use() -> None:
    absent = Absent("train_dataloader", "iterate over the trainer's train_dataset")
    assert absent
    for use in (len, iter, lambda one: one[0], lambda one: one(), lambda one: one.dataset):
        with pytest.raises(ConfigError, match=r"(?s)train_dataloader.*train_dataset"):
            use(absent)


def test_a_rank_does_not_wait_for_ever_for_a_rank_0_that_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = {"exit": "preempted", "stopped_by": "a callback", "steps": 2, "train_seconds": 0.0}
    monkeypatch.setattr("dpo_dist.api.train", lambda *_, **__: ended)
    monkeypatch.setattr("dpo_dist.api.read_metrics", lambda _: [])
    args = DPOConfig(output_dir=str(tmp_path), words=["parallelism.timeout_seconds=1"])
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS)
    (trainer.run.checkpoints / "step-000002").mkdir(parents=True)
    trainer.run.config.write_text(to_yaml(load_run_config([str(tmp_path / "dpo_dist.yaml")])))
    trainer.train()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DpoDistError, match=r"rank 0 has not written .*step-000002 in 1 s"):
        trainer.save_model(str(tmp_path / "after"))


@pytest.mark.parametrize("wanted", [True, "dpo/checkpoint-2"])
def test_a_script_that_resumes_before_its_first_checkpoint_is_told_to_leave_it_out(
    wanted: bool | str, folder: Path, tmp_path: Path
) -> None:
    trainer = DPOTrainer(str(folder), args=DPOConfig(output_dir=str(tmp_path)), train_dataset=PAIRS)
    with pytest.raises(ConfigError, match="no checkpoint yet: leave it out"):
        trainer.train(resume_from_checkpoint=wanted)


@pytest.mark.parametrize(("is_best", "name"), [(True, "step-000002"), (False, "step-000004")])
def test_a_run_that_stopped_has_the_weights_that_its_end_would_have(
    is_best: bool, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = DPOConfig(output_dir=str(tmp_path), eval_strategy="epoch", load_best_model_at_end=is_best)
    trainer = DPOTrainer(str(folder), args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:4])
    for step in (2, 4):
        (trainer.run.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    (trainer.run.checkpoints / "best").write_text("step-000002")
    trainer.run.model.mkdir()
    (trainer.run.model / "of_a_shorter_run").touch()
    trainer.run.config.write_text(to_yaml(load_run_config([str(tmp_path / "dpo_dist.yaml")])))
    trainer.save_model(str(tmp_path / "before"))
    assert (tmp_path / "before" / "model.safetensors").is_file(), "of the model that was given"

    def write(config: Any) -> None:
        _, output = find_export_paths(config)
        output.mkdir(parents=True)
        (output / output.name).touch()

    monkeypatch.setattr("dpo_dist.verbs.export.main", write)
    ended = {"exit": "preempted", "stopped_by": "a callback", "steps": 4, "train_seconds": 0.0}
    monkeypatch.setattr("dpo_dist.api.train", lambda *_, **__: ended)
    monkeypatch.setattr("dpo_dist.api.read_metrics", lambda _: [])
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.train()
    for _ in range(2):
        trainer.save_model(str(tmp_path / "after"))
    assert [file.name for file in (tmp_path / "after").iterdir()] == [name]


def test_a_tokenizer_is_the_models_own_or_written_beside_it(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "b c d e f"], padding=True)
    assert translated(folder, tmp_path, processing_class=tokenizer)["model.path"] == str(folder)
    spoken = copy.deepcopy(tokenizer)
    spoken.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    found = translated(folder, tmp_path, processing_class=spoken)
    assert found["model.path"] == str(folder)
    assert Path(found["data.chat_template"]).read_text() == spoken.chat_template
    spoken.chat_template = None
    assert "data.chat_template" not in translated(folder, tmp_path, processing_class=spoken)
    tokenizer.add_tokens(["<new>"])
    found = translated(folder, tmp_path, processing_class=tokenizer)
    assert "<new>" in AutoTokenizer.from_pretrained(found["model.path"]).get_vocab()


def test_images_are_read_and_their_parts_trained_as_in_trl(folder: Path, tmp_path: Path) -> None:
    seen = [pair | {"images": ["a.png"]} for pair in PAIRS]
    found = translated(folder, tmp_path, train_dataset=seen)
    assert (found["model.images.train"], found["data.images"]) == ("tower", str(Path.cwd()))
    found = translated(folder, tmp_path, train_dataset=seen, peft_config=LoraConfig(r=2))
    assert found["model.images.train"] == "none"


def test_datasets_are_written_as_they_are_given(folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list(PAIRS)
    named = {"easy": PAIRS[:2], "hard": rows.select(range(3))}
    options = {"train_dataset": rows.to_iterable_dataset(), "eval_dataset": named, "eval_strategy": "epoch"}
    found = translated(folder, tmp_path, **options)
    [train], tests = found["data.train"], found["data.eval"]
    assert list(map(json.loads, Path(train["path"]).read_text().splitlines())) == PAIRS
    lines = {source["label"]: len(Path(source["path"]).read_text().splitlines()) for source in tests}
    assert lines == {"easy": 2, "hard": 3}


@pytest.mark.parametrize(
    ("given", "epochs"), [({"num_train_epochs": 2.5}, 3), ({"max_steps": 9}, 3), ({"max_steps": 8}, 2)]
)
def test_a_run_begins_as_many_epochs_as_transformers_says(
    tmp_path: Path, given: dict[str, Any], epochs: int
) -> None:
    """`state.num_train_epochs` of callbacks."""
    args = DPOConfig(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, **given)
    assert args.epochs(7) == epochs
