"""Files of keys of other trainers become files for `train`, with the reason for each key that is left out."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist import convert
from dpo_dist.config.losses import LossKind, LossTermConfig
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from tests.unit.config.support import configured, error_of

FILES = Path(__file__).parents[1] / "assets" / "foreign"


def converted(content: str, folder: Path, name: str = "foreign.yaml") -> tuple[RunConfig, str]:
    """Return the configuration of the converted file, and its comments."""
    (folder / name).write_text(content)
    (output := folder / "ours.yaml").unlink(missing_ok=True)
    assert convert.main([str(folder / name), str(output)]) == 0
    lines = output.read_text().splitlines(keepends=True)
    comments = "".join(line for line in lines if line.startswith("#"))
    return configured(run=[str(output)]), comments


# A file's keys, beside a model and data; what our keys are; a part of the comments.
TRANSLATED: list[tuple[str, dict[str, Any], str]] = [
    # Several keys together.
    (
        "{per_device_train_batch_size: 2, gradient_accumulation_steps: 8}",
        {"trainer.global_batch_pairs": 16},
        "2 pairs x 8, times the number of GPUs there, which nothing says: 128 for 8",
    ),
    (
        "{}",
        {"trainer.global_batch_pairs": 8, "optim.schedule": "linear", "trainer.epochs": 3},
        "its defaults",
    ),
    ("{stage: dpo}", {"optim.lr": 5e-5, "model.adapter.r": 8, "model.adapter.alpha": 16}, "optim.lr, "),
    (
        "{stage: dpo, finetuning_type: full, lora_rank: 4}",
        {"model.adapter": None},
        "lora_rank: 4 — not needed",
    ),
    ("{use_peft: true, lora_r: 64}", {"model.adapter.r": 64, "model.adapter.alpha": 32}, ""),
    ("{use_peft: false, lora_r: 64}", {"model.adapter": None}, "lora_r: 64 — not needed"),
    ("{adam_beta1: 0.8, adam_beta2: 0.95}", {"optim.betas": [0.8, 0.95]}, ""),
    (
        "{learning_rate: 1.0e-5, lr_scheduler_type: cosine_with_min_lr, "
        "lr_scheduler_kwargs: {min_lr: 1.0e-6}}",
        {"optim.lr": 1e-5, "optim.schedule": "cosine", "optim.min_lr_ratio": pytest.approx(0.1)},
        "",
    ),
    ("{lr_scheduler_type: cosine, lr_scheduler_kwargs: {min_lr_rate: 0.2}}", {"optim.min_lr_ratio": 0.2}, ""),
    ("{warmup_steps: 0, warmup_ratio: 0.05}", {"optim.warmup_steps": None, "optim.warmup_ratio": 0.05}, ""),
    ("{base_model: m, warmup_steps: 7}", {"optim.warmup_steps": 7}, "data.truncation"),
    (
        "{loss_type: [sigmoid, bco], loss_weights: [0.8, 0.2]}",
        {"loss.terms": [LossTermConfig(LossKind.sigmoid, 0.8), LossTermConfig(LossKind.bco_pair, 0.2)]},
        "",
    ),
    (
        "{stage: dpo, pref_loss: ipo, pref_ftx: 0.5}",
        {"loss.terms": [LossTermConfig(LossKind.ipo, 1.0), LossTermConfig(LossKind.sft, 0.5)]},
        "",
    ),
    ("{base_model: m}", {"trainer.global_batch_pairs": 1}, ""),
    ("{stage: dpo, finetuning_type: oft}", {"model.adapter": None}, "adapter: oft — not offered"),
    ("{use_peft: true}", {"model.adapter.target_modules": "all-linear"}, "peft chooses few"),
    (
        "{total_batch_size: 64, micro_batch_size: 2}",
        {"trainer.global_batch_pairs": 64},
        "micro_batch_size — not",
    ),
    (
        "{loss_type: simpo}",
        {"loss.terms": [LossTermConfig(LossKind.simpo, 1.0), LossTermConfig(LossKind.sft, 1.0)]},
        "",
    ),
    ("{stage: dpo, pref_loss: orpo, pref_beta: 0.3}", {"loss.kind": "orpo", "loss.orpo_lambda": 0.3}, ""),
    ("{loss_type: simpo, beta: 2.5, gamma_beta_ratio: 0.4}", {"loss.beta": 2.5, "loss.simpo_gamma": 1.0}, ""),
    ("{stage: dpo, pref_loss: simpo, simpo_gamma: 0.7}", {"loss.beta": 0.1, "loss.simpo_gamma": 0.7}, ""),
    # Machines and precision.
    (
        "{deepspeed: ds_z3_offload_config.json}",
        {"parallelism.kind": "zero3", "parallelism.offload_parameters": "cpu"},
        "",
    ),
    ("{deepspeed: {zero_optimization: {stage: 2}}}", {"parallelism.kind": "zero2"}, ""),
    ("{deepspeed: my.json}", {"parallelism.kind": "zero3"}, "deepspeed: my.json — choose parallelism=zero3"),
    ("{fsdp: full_shard auto_wrap, fsdp_config: {x: 1}}", {"parallelism.kind": "zero3"}, ""),
    (
        "{stage: dpo, quantization_bit: 4, deepspeed: zero3.json}",
        {"model.quantization": "nf4", "parallelism.kind": "ddp"},
        "zero3.json — a quantized base is whole",
    ),
    (
        "{use_peft: true, load_in_8bit: true, load_in_4bit: false}",
        {"model.quantization": "int8"},
        "load_in_4bit",
    ),
    ("{bf16: false}", {"model.dtype": "fp32"}, ""),
    ("{fp16: true, bf16: false}", {"model.dtype": "fp16"}, ""),
    (
        "{bf16: true, torch_dtype: float32}",
        {"model.dtype": "bf16"},
        "torch_dtype: float32 — model.dtype is already",
    ),
    (
        "{model_init_kwargs: {torch_dtype: float32, attn_implementation: sdpa}}",
        {"model.dtype": "fp32"},
        "the fastest",
    ),
    # Intervals.
    (
        "{save_steps: 20, save_strategy: no}",
        {"trainer.save_every": 0},
        "save_steps: 20 — trainer.save_every is",
    ),
    ("{eval_steps: 5}", {"trainer.eval_every": 0}, "eval_steps: 5 — trainer.eval_every has no effect"),
    ("{eval_steps: 5, val_size: 0.1}", {"trainer.eval_every": 5, "data.eval_share": 0.1}, ""),
    ("{max_steps: -1}", {"trainer.max_steps": None}, "max_steps: -1 — not needed"),
    ("{report_to: [tensorboard]}", {"tracking.wandb": "off", "tracking.also": ["tensorboard"]}, ""),
    ("{optim: paged_adamw_8bit}", {"optim.kind": "adamw_8bit"}, ""),
    ("{optim: rmsprop}", {"optim.kind": "adamw"}, "optim: rmsprop — "),
    # What is not known, is off or says nothing.
    (
        "{new_key: 3, use_dora: false}",
        {},
        "new_key: 3 — no counterpart is known\n# use_dora: false — not needed",
    ),
    ("{run_name: , logging_dir: ''}", {}, "logging_dir, run_name: empty"),
    (f"{{hub_token: hf_{'a1' * 17}}}", {}, "hub_token: *** —"),
    (
        "{gradient_accumulation_steps: auto}",
        {},
        "gradient_accumulation_steps: auto — set trainer.global_batch",
    ),
    (
        "{f_divergence_type: js_divergence, loss: {kind: ipo}}",
        {"loss.divergence": "js"},
        "loss: {kind: ipo} — ",
    ),
    ("{enable_thinking: false}", {"data.template_arguments": {"enable_thinking": False}}, ""),
]


def value_of(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("foreign", "ours", "comment"), TRANSLATED, ids=[row[0] for row in TRANSLATED])
def test_keys_of_other_trainers_are_translated(
    foreign: str, ours: dict[str, Any], comment: str, tmp_path: Path
) -> None:
    content = {"model_name_or_path": "m", "dataset": "a", "dataset_name": "a.jsonl"} | yaml.safe_load(foreign)
    config, comments = converted(yaml.safe_dump(content), tmp_path)
    assert {key: value_of(config, key) for key in ours} == ours
    assert comment in comments


DATA: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = [
    (
        "{dataset_name: org/name-v1.5, dataset_config: sub, dataset_train_split: tr, eval_strategy: steps}",
        [{"path": "org/name-v1.5", "name": "sub", "split": "tr"}],
        [{"path": "org/name-v1.5", "name": "sub", "split": "test"}],
    ),
    (
        "{dataset_mixer: {a/b: 0.5, c/d: 1}, dataset_splits: [train_prefs, test_prefs]}",
        [{"path": "a/b", "split": "train_prefs", "weight": 0.5}, {"path": "c/d", "split": "train_prefs"}],
        [{"path": "a/b", "split": "test_prefs"}, {"path": "c/d", "split": "test_prefs"}],
    ),
    (
        "{dataset_mixture: {datasets: [{id: a/b, config: c, split: s, columns: [chosen]}], "
        "test_split_size: 0.1}}",
        [{"path": "a/b", "name": "c", "split": "s"}],
        [],
    ),
    (
        "{stage: dpo, dataset: 'x, y', dataset_dir: lf, eval_dataset: z, max_samples: 9}",
        [{"path": "lf", "name": "x", "limit": 9}, {"path": "lf", "name": "y", "limit": 9}],
        [{"path": "lf", "name": "z", "limit": 9}],
    ),
    (
        """{base_model: m, datasets: [{path: json, ds_type: json, data_files: [a.jsonl, b.jsonl],
        type: {field_prompt: question, field_chosen: good}}],
        test_datasets: [{path: c.jsonl, split: train}]}""",
        [{"path": f"{name}.jsonl", "columns": {"prompt": "question", "chosen": "good"}} for name in "ab"],
        [{"path": "c.jsonl"}],
    ),
]


@pytest.mark.parametrize(("foreign", "train", "evaluated"), DATA)
def test_data_of_other_trainers_are_sources(
    foreign: str, train: list[dict[str, Any]], evaluated: list[dict[str, Any]], tmp_path: Path
) -> None:
    content = json.dumps({"model_name_or_path": "m", "beta": 0.1} | yaml.safe_load(foreign))
    config, _ = converted(content, tmp_path, "foreign.json")
    for sources, expected in ((config.data.train, train), (config.data.eval, evaluated)):
        options = [{key: value for key, value in asdict(one).items() if value is not None} for one in sources]
        assert options == [{"format": "auto", "weight": 1.0} | want for want in expected]


@pytest.mark.parametrize("trainer", ["llama_factory", "trl", "axolotl"])
def test_every_key_of_a_recipe_is_translated_or_named(trainer: str, tmp_path: Path) -> None:
    text = (FILES / f"{trainer}.yaml").read_text()
    config, comments = converted(text, tmp_path)
    assert "no counterpart is known" not in comments
    assert "cannot have this value" not in comments
    remedy = error_of(str(FILES / f"{trainer}.yaml"), run=[]).remedy
    assert remedy.startswith(f"dpo-dist convert {FILES}/{trainer}.yaml {FILES}/{trainer}_converted.yaml ")
    shown = {"llama_factory": (5e-6, 0.1, 2048), "trl": (5e-7, 0.01, 1024), "axolotl": (2e-4, 0.1, 4096)}
    assert (config.optim.lr, config.loss.beta, config.data.max_length) == shown[trainer]


def test_a_file_that_exists_or_cannot_be_read_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "foreign.yaml").write_text("{model_name_or_path: m, loss_type: ipo, beta: 0.3}")
    for words, text in (([file, file], "this file exists"), ([tmp_path / "gone.yaml"], "cannot be read")):
        with pytest.raises(ConfigError, match=text):
            convert.main([str(word) for word in words])
    assert convert.main([str(file)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss"] == {"kind": "ipo", "beta": 0.3}


def test_a_file_of_this_program_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "mine.yaml").write_text("{loss: ipo, data: {train: [a.jsonl]}, optim.lr: 1.0e-6}")
    with pytest.raises(ConfigError, match=f"dpo-dist train {file} --check"):
        convert.main([str(file)])
