"""Runs of other trainers become files for `train`, with the reason for each key that is left out."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_dist.compat.convert import __main__ as convert
from dpo_dist.compat.convert.reading import ForeignRun, read
from dpo_dist.compat.convert.translate import translate_run
from dpo_dist.compat.other_trainers import other_trainers
from dpo_dist.config.load import complete_config
from dpo_dist.config.losses import DiscopopOptions, LossKind, LossTermConfig, SimpoOptions
from dpo_dist.config.schema import SCHEMA, ImagesConfig, RunConfig, TrainedImageParts
from dpo_dist.data.config import SourceConfig
from dpo_dist.foundation.errors import ConfigError
from tests.unit.config.support import configured, error_of

FILES = Path(__file__).parents[2] / "assets" / "foreign"


def converted(run: str | Path) -> tuple[RunConfig, str]:
    """Return the configuration that a file or command becomes, and its comments."""
    lines = translate_run(read(str(run))).as_file().splitlines(keepends=True)
    comments = "".join(line for line in lines if line.startswith("#"))
    return complete_config(SCHEMA.validate_python(yaml.safe_load("".join(lines)))), comments


def terms(**weights: float) -> list[LossTermConfig]:
    return [LossTermConfig(LossKind(kind), weight) for kind, weight in weights.items()]


# A file's keys, beside a model and data; what our keys are; a part of the comments.
TRANSLATED: list[tuple[str, dict[str, Any], str]] = [
    # Several keys together.
    (
        "{per_device_train_batch_size: 2, gradient_accumulation_steps: 8}",
        {"trainer.global_batch_pairs": 16},
        "2 pairs x 8; multiply it by the number of GPUs there, which is not given: 128 for 8 GPUs",
    ),
    ("{}", {"trainer.global_batch_pairs": 8, "optim.schedule": "linear", "trainer.epochs": 3}, "defaults"),
    ("{stage: dpo}", {"optim.lr": 5e-5, "model.adapter.r": 8, "model.adapter.alpha": 16}, "optim.lr, "),
    ("{stage: dpo, finetuning_type: full, lora_rank: 4}", {"model.adapter": None}, "4 — not needed"),
    (
        "{use_peft: true, lora_r: 64}",
        {"model.adapter.r": 64, "model.adapter.alpha": 32},
        "peft chooses only a few",
    ),
    ("{adam_beta1: 0.8, adam_beta2: 0.95}", {"optim.betas": [0.8, 0.95]}, ""),
    ("{loss_type: simpo, beta: 3, dpo_beta: 2}", {"loss.beta": 3}, "dpo_beta: 2 — beta overrides it"),
    (
        "{learning_rate: 1.0e-5, lr_scheduler_type: cosine_with_min_lr, "
        "lr_scheduler_kwargs: {min_lr: 1.0e-6}}",
        {"optim.lr": 1e-5, "optim.schedule": "cosine", "optim.min_lr_ratio": pytest.approx(0.1)},
        "",
    ),
    ("{warmup_steps: 0, warmup_ratio: 0.05}", {"optim.warmup_steps": None, "optim.warmup_ratio": 0.05}, ""),
    ("{base_model: m, warmup_steps: 7}", {"optim.warmup_steps": 7}, "data.truncation"),
    ("{warmup_steps: 7}", {"optim.warmup_from_zero": True}, ""),
    (
        "{ref_model_sync_steps: 8, f_alpha_divergence_coef: 0.3}",
        {"loss.sync_reference.every": None, "loss.alpha_coefficient": 0.5},
        "ref_model_sync_steps: 8 — not needed: TRL reads it only with sync_ref_model: True",
    ),
    ("{warmup_steps: 0}", {"optim.warmup_from_zero": False}, ""),
    ("{lr_scheduler_type: constant, warmup_ratio: 0.1}", {"optim.warmup_ratio": 0}, "0.1 — not needed"),
    (
        "{loss_type: [sigmoid, bco], loss_weights: [0.8, 0.2]}",
        {"loss.terms": terms(sigmoid=0.8, bco_pair=0.2)},
        "",
    ),
    ("{loss_weights: [0.5]}", {"loss.terms": terms(sigmoid=0.5)}, ""),
    ("{stage: dpo, pref_loss: ipo, pref_ftx: 0.5}", {"loss.terms": terms(ipo=1.0, sft=0.5)}, ""),
    # The method's own loss stays when a term or an option beside it is left out.
    (
        "{stage: kto, pref_beta: 0.2, pref_ftx: 0.1}",
        {"loss.kind": "kto", "loss.terms": [], "loss.beta": 0.2},
        "pref_ftx: 0.1 — a loss of labelled records cannot be summed",
    ),
    ("{rlhf_type: kto, rpo_alpha: 0.1}", {"loss.kind": "kto"}, "rpo_alpha: 0.1 — not needed"),
    ("{rlhf_type: orpo, rpo_alpha: 0.1}", {"loss.kind": "orpo", "loss.terms": []}, "0.1 — not needed"),
    ("{stage: sft, pref_ftx: 0.1}", {"loss.kind": "sft"}, "pref_ftx: 0.1 — not needed"),
    ("{stage: kto, pref_loss: sigmoid}", {"loss.kind": "kto"}, "pref_loss: sigmoid — not needed"),
    ("{base_model: m, rl: kto, dpo_norm_loss: true}", {"loss.kind": "kto"}, "true — not needed"),
    ("{rl: cpo, loss_type: sigmoid}", {"loss.kind": "cpo"}, "trains by cpo"),
    (
        "{loss_type: [discopop, discopop], discopop_tau: 0.2}",
        {"loss.kind": "discopop", "loss.terms": [], "loss.options.tau": 0.2},
        "a kind of loss appears twice",
    ),
    (
        "{stage: dpo, kto_chosen_weight: 1.0}",
        {"loss.kind": "sigmoid", "loss.desirable_weight": 1.0},
        "kto_chosen_weight: 1 — not needed: there, it is read only with kto",
    ),
    ("{base_model: m, rl: dpo, kto_undesirable_weight: 0.2}", {"loss.kind": "sigmoid"}, "0.2 — not needed"),
    ("{stage: dpo, pref_ftx: 0.12345678}", {"loss.terms": terms(sigmoid=1.0, sft=0.12345678)}, ""),
    ("{total_batch_size: 64, micro_batch_size: 2}", {"trainer.global_batch_pairs": 64}, "_size — not"),
    ("{loss_type: simpo}", {"loss.terms": terms(simpo=1.0, sft=1.0)}, ""),
    (
        "{stage: dpo, pref_loss: orpo, pref_beta: 0.3}",
        {"loss.kind": "orpo", "loss.options.odds_weight": 0.3},
        "",
    ),
    (
        "{loss_type: simpo, beta: 2.5, gamma_beta_ratio: 0.4}",
        {"loss.beta": 2.5, "loss.options.gamma": 1.0},
        "",
    ),
    ("{stage: dpo, pref_loss: simpo, simpo_gamma: 0.7}", {"loss.beta": 0.1, "loss.options.gamma": 0.7}, ""),
    ("{loss_type: discopop, discopop_tau: 0.2}", {"loss.options.tau": 0.2}, ""),
    ("{loss_type: ipo, discopop_tau: 0.2}", {"loss.kind": "ipo"}, "0.2 — TRL does not use it with ipo"),
    (
        "{loss_type: [sigmoid, discopop], discopop_tau: 0.2}",
        {
            "loss.terms": [
                *terms(sigmoid=1.0),
                LossTermConfig(LossKind.discopop, options=DiscopopOptions(0.2)),
            ]
        },
        "",
    ),
    # Machines and precision.
    (
        "{deepspeed: ds_z2_offload_config.json, val_size: 0.2}",
        {"parallelism.kind": "zero2", "parallelism.offload_parameters": "none"}
        | {"parallelism.offload_optimizer": "cpu", "data.eval_share": 0.2},
        "",
    ),
    (
        "{dataset_mixture: {datasets: [{id: a/b}], test_split_size: 0.1}}",
        {"data.eval_share": 0.1},
        "",
    ),
    (
        "{deepspeed: ds_z3_offload_config.json}",
        {"parallelism.kind": "zero3", "parallelism.offload_parameters": "cpu"}
        | {"parallelism.offload_optimizer": "cpu"},
        "",
    ),
    (
        "{deepspeed: {zero_optimization: {stage: 2, stage3_prefetch_bucket_size: 1}}}",
        {"parallelism.kind": "zero3"},
        "— choose parallelism=zero3, zero2 or ddp",
    ),
    ("{deepspeed: stage3_no_offloading.conf}", {"parallelism.offload_optimizer": "none"}, ""),
    ("{num_processes: 4, deepspeed: }", {"parallelism.kind": "ddp", "tracking.to": []}, "1 x 4 proc"),
    ("{deepspeed: my.json}", {"parallelism.kind": "zero3"}, "deepspeed: my.json — choose parallelism=zero3"),
    ("{fsdp: full_shard auto_wrap, fsdp_config: {x: 1}}", {"parallelism.kind": "zero3"}, ""),
    (
        "{stage: dpo, quantization_bit: 4, deepspeed: zero3.json}",
        {"model.quantization": "nf4", "parallelism.kind": "ddp"},
        "zero3.json — a quantized base is not sharded",
    ),
    ("{use_peft: true, load_in_8bit: true}", {"model.quantization": "int8"}, ""),
    ("{bf16: false}", {"model.dtype": "fp32"}, ""),
    ("{fp16: true, bf16: false}", {"model.dtype": "fp16"}, ""),
    ("{bf16: true, torch_dtype: float32}", {"model.dtype": "bf16"}, "float32 — model.dtype is already"),
    (
        "{model_init_kwargs: {torch_dtype: float32, attn_implementation: sdpa}}",
        {"model.dtype": "fp32"},
        "the fastest",
    ),
    # Intervals.
    ("{save_steps: 20, save_strategy: no}", {"trainer.save_every": 0}, "20 — trainer.save_every is"),
    ("{eval_steps: 5}", {"trainer.eval_every": 0}, "eval_steps: 5 — trainer.eval_every has no effect"),
    ("{eval_steps: 5, val_size: 0.1}", {"trainer.eval_every": 5, "data.eval_share": 0.1}, ""),
    ("{max_steps: -1}", {"trainer.max_steps": None}, "max_steps: -1 — not needed"),
    ("{report_to: [tensorboard, mlflow]}", {"tracking.to": ["tensorboard", "mlflow"]}, ""),
    ("{report_to: comet_ml}", {"tracking.to": ["comet_ml"]}, ""),
    ("{report_to: all}", {"tracking.to": ["wandb"]}, ""),
    ("{report_to: none, loss_type: ipo}", {"tracking.to": []}, ""),
    (
        "{report_to: [neptune, wandb]}",
        {"tracking.to": ["wandb"]},
        "[neptune] — the trackers of tracking.to are wandb, ",
    ),
    ("{use_swanlab: true}", {"tracking.to": ["swanlab"]}, ""),
    ("{base_model: m, use_comet: true, wandb_project: p}", {"tracking.to": ["comet_ml", "wandb"]}, ""),
    ("{wandb_mode: disabled}", {"tracking.to": []}, ""),
    ("{optim: paged_adamw_8bit}", {"optim.kind": "adamw_8bit"}, ""),
    ("{optim: muon}", {"optim.kind": "muon"}, ""),
    ("{use_muon: true, stage: dpo}", {"optim.kind": "muon", "parallelism.kind": "ddp"}, ""),
    ("{use_muon: true, deepspeed: ds_z3_config.json}", {"optim.kind": "adamw"}, "Muon needs whole"),
    ("{max_grad_norm: null}", {"optim.max_grad_norm": None}, ""),
    ("{max_grad_norm: 0}", {"optim.max_grad_norm": None}, ""),
    ("{base_model: m, max_grad_norm: null}", {"optim.max_grad_norm": 1.0}, "max_grad_norm: empty"),
    (
        "{lr_scheduler_type: warmup_stable_decay, max_steps: 70, "
        "lr_scheduler_kwargs: {num_decay_steps: 7, min_lr_ratio: 0.1, decay_type: linear}}",
        {"optim.schedule": "wsd", "optim.decay_ratio": 0.1, "optim.min_lr_ratio": 0.1},
        "",
    ),
    (
        "{lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 7}}",
        {"optim.schedule": "wsd", "optim.decay_ratio": 0.2},
        "num_decay_steps: 7 — set optim.decay_ratio",
    ),
    (
        "{stage: dpo, lr_scheduler_type: warmup_stable_decay, warmup_ratio: 0.1}",
        {"optim.schedule": "wsd", "optim.decay_ratio": pytest.approx(0.6)},
        "decay_type: cosine — ",
    ),
    ("{optim: rmsprop}", {"optim.kind": "adamw"}, "optim: rmsprop — "),
    ("{max_length: }", {}, "max_length: null — there no text is cut"),
    ("{preprocessing_num_workers: 16}", {}, "16 — not needed"),
    ("{adam_epsilon: 1.0e-8}", {}, "adam_epsilon: 1e-08 — not offered: the epsilon of AdamW is always 1e-8"),
    ("{sync_ref_model: true}", {"loss.sync_reference.every": 512, "reference.mode": "live"}, ""),
    (
        "{early_stopping_patience: 3, metric_for_best_model: rewards/margins, eval_steps: 5, val_size: 0.1}",
        {"trainer.patience": 3, "trainer.keep_best": "eval_rewards/margins", "trainer.eval_every": 5},
        "",
    ),
    (
        "{base_model: m, rl: dpo, dpo_loss_type: [ipo], early_stopping_patience: 3, val_set_size: 0.1}",
        {"loss.kind": "ipo", "trainer.patience": 3, "trainer.keep_best": "eval_loss"},
        "trainer.eval_every: 100, because",
    ),
    ("{val_size: 2000}", {"data.eval_share": 0}, "val_size: 2000 — data.eval_share cannot"),
    # Other trainers.
    (
        "{stage: dpo, adapter_name_or_path: x, quantization_bit: 4, lora_rank: 4, lora_target: all}",
        {"model.adapter.path": "x", "model.adapter.r": None, "reference.path": "m"}
        | {"model.quantization": "nf4", "reference.quantization": "nf4"},
        "lora_rank: 4 — not needed: the adapter that is continued",
    ),
    (
        "{base_model: m, rl: dpo, adapter: lora}",
        {"model.adapter.r": 16, "model.adapter.alpha": 32, "data.max_length": 512},
        "data.truncation",
    ),
    (
        "{base_model: m, rl: simpo}",
        {
            "loss.beta": 0.1,
            "loss.terms": [LossTermConfig(LossKind.simpo, options=SimpoOptions(0.5)), *terms(sft=1.0)],
        },
        "",
    ),
    ("{base_model: m}", {"loss.kind": "sft", "trainer.global_batch_pairs": 1}, "trains by sft"),
    (
        "{base_model: m, rl: dpo, dpo_loss_type: [sigmoid, sft], dpo_loss_weights: [1.0, 0.5]}",
        {"loss.terms": terms(sigmoid=1.0, sft=0.5)},
        "",
    ),
    (
        "{base_model: m, rl: kto, kto_desirable_weight: 0.2}",
        {"loss.kind": "kto", "loss.desirable_weight": 0.2},
        "",
    ),
    (
        "{rlhf_type: dpo}",
        {
            "model.adapter.r": 8,
            "model.adapter.alpha": 32,
            "optim.lr": 1e-4,
            "optim.schedule": "cosine",
            "optim.weight_decay": 0.1,
            "optim.betas": [0.9, 0.95],
            "trainer.global_batch_pairs": 16,
            "data.truncation": "drop",
        },
        "trainer.global_batch_pairs: 1 pairs x 16: 16, or a little more, on any number of GPUs up to 16",
    ),
    ("{rlhf_type: dpo, per_device_train_batch_size: 16}", {}, "16 pairs x 1; multiply it by the number"),
    # Names that mean something else in another trainer.
    ("{rlhf_type: dpo, model_name: [Bob]}", {"model.path": "m"}, "[Bob] — write the name into"),
    ("{rlhf_type: dpo, loss_scale: last_round}", {"model.dtype": "bf16"}, "not needed: the loss counts"),
    ("{rlhf_type: dpo, loss_scale: default}", {"model.dtype": "bf16"}, "default — not offered: the loss"),
    # Of two keys that say the same, one is named that has no effect.
    ("{stage: dpo, model: n}", {"model.path": "m"}, "model: n — model_name_or_path overrides it"),
    (
        "{datasets: [{path: b.jsonl}], eval_strategy: steps}",
        {"data.train": [SourceConfig("b.jsonl")]},
        "dataset_name: a.jsonl — the list of datasets overrides it",
    ),
    (
        "{datasets: [{path: b.jsonl}], dataset_mixture: {datasets: [{path: c.jsonl}]}}",
        {"data.train": [SourceConfig("c.jsonl")]},
        "datasets: [{path: b.jsonl}] — dataset_mixture overrides it",
    ),
    (
        "{min_lr_rate: 0.2, lr_scheduler_kwargs: {min_lr_rate: 0.1}}",
        {"optim.min_lr_ratio": 0.1},
        "min_lr_rate: 0.2 — lr_scheduler_kwargs.min_lr_rate overrides it",
    ),
    ("{rlhf_type: dpo, train_type: full}", {"model.adapter": None, "optim.lr": 1e-5}, ""),
    (
        "{tuner_type: lora, adapters: [x], ref_adapters: [x], lora_rank: 8}",
        {"model.adapter.path": "x", "model.adapter.r": None, "reference.path": None},
        "ref_adapters: [x] — not needed",
    ),
    (
        "{rlhf_type: simpo}",
        {
            "loss.beta": 2.0,
            "loss.terms": [LossTermConfig(LossKind.simpo, options=SimpoOptions(1.0)), *terms(sft=1.0)],
        },
        "",
    ),
    # Their names of datasets are not read.
    (
        "{rlhf_type: dpo, dataset: [HF::c/d#5]}",
        {},
        "write data.train: [{path: ORG/NAME, name",
    ),
    ("{mixer_list: [a/b, 1.0], use_lora: false}", {}, "mixer_list: [a/b, 1] — write data.train: [{path: ORG"),
    ("{rlhf_type: dpo, ref_model: m, tuner_type: full}", {"reference.path": "m"}, ""),
    (
        "{use_lora: true}",
        {"model.adapter.r": 64, "model.adapter.alpha": 16, "loss.kind": "sigmoid_norm", "loss.beta": 5.0}
        | {"optim.max_grad_norm": None},
        "",
    ),
    (
        "{use_lora: false, dpo_loss_type: simpo, dpo_gamma_beta_ratio: 0.4, dpo_beta: 10}",
        {"loss.kind": "simpo", "loss.options.gamma": 4.0, "model.adapter": None},
        "",
    ),
    ("{with_tracking: true, loss_type: wpo}", {"loss.weighting": "wpo", "tracking.to": ["wandb"]}, ""),
    # Images. These trainers train a tower without its projector, and adapters on a tower's layers.
    (
        "{stage: dpo, finetuning_type: full, freeze_vision_tower: true, image_max_pixels: 589824, "
        "media_dir: pictures}",
        {"model.images": ImagesConfig(max_pixels=589824), "data.images": "pictures"},
        "",
    ),
    (
        "{rlhf_type: dpo, tuner_type: full, freeze_vit: true, freeze_aligner: false, max_pixels: 99}",
        {"model.images": ImagesConfig(TrainedImageParts.projector, 99)},
        "",
    ),
    (
        "{stage: dpo, finetuning_type: full, freeze_vision_tower: false}",
        {"model.images.train": "tower"},
        "projector: null} — here the projector is trained with the tower",
    ),
    (
        "{rlhf_type: dpo, tuner_type: full, freeze_aligner: false, freeze_vit: false, freeze_llm: true}",
        {"model.images.train": "tower"},
        "freeze_llm: true — not offered",
    ),
    (
        "{rlhf_type: dpo, tuner_type: lora, freeze_vit: false, model_type: qwen2_5_vl}",
        {"model.images": None, "model.adapter.r": 8},
        "with an adapter, no weights of the model itself are trained",
    ),
    # What is not known, is off or says nothing.
    (
        "{wandb_api_key: q1, env: {HF_TOKEN: q2, A: B_KEY=q5}, swanlab_lark_secret: [q3], pad_token: q4}",
        {},
        '{HF_TOKEN: "***", A: "B_KEY=***"} — no counterpart is known\n# swanlab_lark_secret: *** — '
        "no counterpart is known\n# pad_token: q4",
    ),
    *[
        (f"{{{name}: hidden-value}}", {}, f"{name}: *** — no counterpart is known")
        for name in (
            *(
                "api_key",
                "accessKey",
                "auth_key",
                "private_key",
                "secret_key",
                "hub_key",
                "hf_key",
                "wandb_key",
            ),
            *("client_secret", "secrets", "password", "passwd", "credential", "credentials", "hub_token"),
            *("slack_webhook", "DISCORD_WEBHOOK_URL"),
        )
    ],
    ("{new_key: 3, use_dora: false}", {}, "3 — no counterpart is known\n# use_dora: false — not needed"),
    ("{run_name: , logging_dir: ''}", {}, "run_name, logging_dir: empty"),
    ("{gradient_accumulation_steps: auto}", {}, "_steps: auto — set trainer.global_batch"),
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
    (file := tmp_path / "foreign.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    config, comments = converted(file)
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
        [
            {
                "path": f"{name}.jsonl",
                "fields": {"prompt": "question", "chosen": "good", "rejected": "rejected"},
            }
            for name in "ab"
        ],
        [{"path": "c.jsonl"}],
    ),
    (
        "{use_lora: false, dataset_mixer: {a/b: 20000, c/d: 0.5, e: 0}}",
        [{"path": "a/b", "split": "train", "limit": 20000}, {"path": "c/d", "split": "train", "weight": 0.5}],
        [],
    ),
]


@pytest.mark.parametrize(("foreign", "train", "evaluated"), DATA)
def test_data_of_other_trainers_are_sources(
    foreign: str, train: list[dict[str, Any]], evaluated: list[dict[str, Any]], tmp_path: Path
) -> None:
    content = json.dumps({"model_name_or_path": "m", "beta": 0.1} | yaml.safe_load(foreign))
    (file := tmp_path / "foreign.json").write_text(content)
    config, _ = converted(file)
    for sources, expected in ((config.data.train, train), (config.data.eval, evaluated)):
        options = [{key: value for key, value in asdict(one).items() if value is not None} for one in sources]
        assert options == [{"weight": 1.0} | want for want in expected]


def test_formats_of_texts_are_named_unless_they_change_nothing(tmp_path: Path) -> None:
    kind = {"field_prompt": "q", "prompt_format": "{prompt}", "chosen_format": "{chosen}<end>"}
    content = {"base_model": "m", "rl_beta": 0.2, "datasets": [{"path": "a.jsonl", "type": kind}]}
    (file := tmp_path / "ax.yml").write_text(yaml.safe_dump(content))
    config, comments = converted(file)
    assert config.data.train[0].fields == {"prompt": "q", "chosen": "chosen", "rejected": "rejected"}
    assert "data.train[0].chosen_format: {chosen}<end> — texts are read without it: write reader" in comments
    assert "prompt_format" not in comments


COMMANDS: list[tuple[str, dict[str, Any], str]] = [
    (
        "trl dpo --model_name_or_path m --beta=0.2 --use_peft --lora_target_modules q_proj v_proj",
        {"model.path": "m", "loss.beta": 0.2, "model.adapter.target_modules": ["q_proj", "v_proj"]},
        "From the command, read as a run of TRL that trains by dpo",
    ),
    (
        "trl dpo --model_name_or_path m --use_peft --lora_target_modules all-linear"
        " --lora_target_parameters 7.mlp.experts.gate_up_proj 7.mlp.experts.down_proj",
        {
            "model.adapter.target_modules": [
                "all-linear",
                "7.mlp.experts.gate_up_proj",
                "7.mlp.experts.down_proj",
            ]
        },
        "trains by dpo",
    ),
    (
        "accelerate launch --config_file z3.yaml --num_processes 4 -m trl.scripts.kto --config FILE --beta 1",
        {"parallelism.kind": "zero3", "trainer.global_batch_pairs": 32, "loss.kind": "kto", "loss.beta": 1},
        "8 pairs x 1 x 4 processes",
    ),
    ("python examples/dpo_vlm.py --beta 0.2 --output_dir o", {"loss.beta": 0.2}, "of TRL that trains by dpo"),
    ("llamafactory-cli train FILE pref_beta=0.3 stage=dpo", {"loss.beta": 0.3, "optim.lr": 2e-6}, "Factory"),
    ("axolotl train FILE --rl orpo --micro-batch-size 3", {"trainer.global_batch_pairs": 3}, "by orpo"),
    (
        """#!/bin/sh
export MODEL=m LR="5e-7"  # don't panic
# swift rlhf --model other
export MAX_PIXELS=1003520 VIDEO_MAX_PIXELS=9
NPROC_PER_NODE=2 swift rlhf --rlhf_type dpo --model "${MODEL}" \\
    --learning_rate $LR --gradient_accumulation_steps 8 \\
    --dataset 'a#5' b --output_dir out-$(date; echo 1) --hub_token abc "$@" 2>&1 | tee log; echo done""",
        {"model.path": "m", "optim.lr": 5e-7, "trainer.global_batch_pairs": 16}
        | {"model.images.max_pixels": 1_003_520},
        "output_dir: out-$(...) — the shell computes it: write the value",
    ),
    (
        "torchrun --nnodes 1 --nproc_per_node 4 dpo.py --config FILE --beta 1",
        {"trainer.global_batch_pairs": 32},
        "8 pairs x 1 x 4 processes",
    ),
    *[
        (
            f"torchrun --{nodes} --nproc_per_node 4 dpo.py --config FILE --beta 1",
            {"trainer.global_batch_pairs": 8},
            "8 pairs x 1; multiply it by the number of GPUs there, which is not given",
        )
        for nodes in ("nnodes 2", "nnodes=16", "nnodes 1:4")
    ],
    (
        """accelerate launch --use_deepspeed --deepspeed_config_file stage3_no_offloading_accelerate.conf \\
     open_instruct/dpo_tune_cache.py --mixer_list a/b 1.0 c/d 300 --learning_rate $LR --loss_type dpo_norm""",
        {"parallelism.kind": "zero3", "parallelism.offload_parameters": "none"},
        "learning_rate: $LR — the shell computes it",
    ),
]


@pytest.mark.parametrize(("command", "ours", "comment"), COMMANDS, ids=[row[0][:20] for row in COMMANDS])
def test_commands_are_read_as_files_are(
    command: str, ours: dict[str, Any], comment: str, tmp_path: Path
) -> None:
    (keys := tmp_path / "keys.yaml").write_text("{model_name_or_path: m, learning_rate: 2e-6}")
    command = command.replace("FILE", str(keys))
    (script := tmp_path / "run.sh").write_text(command)
    runs: list[str | Path] = [command] if "\n" not in command else [command, script]
    for run in runs:
        config, comments = converted(run)
        assert {key: value_of(config, key) for key in ours} == ours
        assert comment.replace("the command", getattr(run, "name", "the command")) in comments
        assert "abc" not in comments


REFUSED = [
    ("one.yaml", "beta: 0.3", "this is not a run of a trainer"),
    ("docker.yaml", "{services: {a: 1}, volumes: {}, model: m}", "this is not a run of a trainer"),
    ("a.sh", "set -e\npython train.py --beta 0.1\n", "this is not a run of a trainer"),
    ("notes.txt", "We trained it with trl, and it isn't bad: see swift.", "this is not a run of a trainer"),
    ("train.py", "from trl import DPOConfig\nDPOConfig(beta=0.1)", "as keys into a YAML file"),
    ("b.sh", "trl dpo --beta 1\ntrl kto --beta 1", "this script starts 2 runs"),
    ("c.sh", "trl grpo --beta 1", "trains by a method that is not translated"),
    ("d.sh", 'open_instruct/dpo_tune_cache.py "$CONFIG"', "cannot be read"),
    (
        "new.yaml",
        "{stage: dpo, model_name_or_path: m, adapter_name_or_path: x, create_new_adapter: true}",
        "a new adapter on top",
    ),
    ("oft.yaml", "{stage: dpo, model_name_or_path: m, finetuning_type: oft}", "another kind of adapter"),
    ("seq.sh", "swift sft --model m --task_type seq_cls", "trains by a method that is not translated"),
    ("loss.sh", "trl dpo --model_name_or_path m --loss_type sigmoid bar", "dpo-dist does not have this loss"),
    ("bco.sh", "trl dpo --model_name_or_path m --loss_type bco_unpaired", "on pairs loss=bco_pair"),
    (
        "rm.yaml",
        "{stage: rm, model_name_or_path: m, dataset: a}",
        "trains by a method that is not translated",
    ),
    ("cpo.sh", "trl cpo --model_name_or_path m --loss_type hinge", "trains by cpo, and its keys"),
    # The other trainers refuse these sums of losses, too.
    ("kto.sh", "swift rlhf --rlhf_type kto --model m --loss_type kto sft", "a sum of losses that it cannot"),
    ("ipo.yaml", "{rl: ipo, base_model: m, dpo_loss_type: [sigmoid, sft], lr: 1}", "a sum of losses that it"),
    ("sum.sh", "trl dpo --model_name_or_path m --loss_weights 1 2", "a sum of losses that it cannot train"),
    ("online.yaml", "{stage: ppo, model_name_or_path: m, dataset: a}", "no pretraining or online RL"),
    (
        "sync.yaml",
        "{model_name_or_path: m, use_peft: true, load_in_4bit: true, sync_ref_model: true, beta: 0.1}",
        "with an adapter there is no reference that follows the policy",
    ),
    ("broken.yaml", "{stage: dpo", "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_not_known_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        convert.main([str(file), str(tmp_path / "ours.yaml")])
    assert not (tmp_path / "ours.yaml").exists()


TABLE = other_trainers()
NAMES = sorted({*" ".join([*TABLE["keys"].values(), *(row["names"] for row in TABLE["advice"])]).split()})
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
LEAVES |= st.just(10**400)
LEAVES |= st.sampled_from(["auto", "dpo", "simpo", "stage3", "1.0", "$X", "a,b", "'", "a#3", "[x]"])
INNER = st.sampled_from(["path", "type", "zero_optimization", "datasets", "data_files", "device", "weight"])
VALUES = st.recursive(
    LEAVES, lambda some: st.lists(some, max_size=3) | st.dictionaries(INNER, some, max_size=3), max_leaves=6
)
MORE = ["datasets", "dataset_mixture", "dataset_mixer", "loss_terms", "rl", "num_processes", "loss_type"]


@given(
    st.sampled_from(list(other_trainers()["trainers"])),
    st.dictionaries(st.sampled_from(NAMES) | st.sampled_from(MORE), VALUES, max_size=6),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_values_of_odd_types_are_named_or_one_error(trainer: str, keys: dict[str, Any]) -> None:
    try:
        text = translate_run(ForeignRun(trainer, keys, "file")).as_file()
    except ConfigError:
        return
    complete_config(SCHEMA.validate_python(yaml.safe_load(text)))


@pytest.mark.parametrize("trainer", ["llama_factory", "trl", "axolotl"])
def test_every_key_of_a_recipe_is_translated_or_named(trainer: str, tmp_path: Path) -> None:
    ours = tmp_path / "ours.yaml"
    assert convert.main([f"{FILES}/{trainer}.yaml", str(ours)]) == 0
    config, comments = configured(run=[str(ours)]), ours.read_text()
    assert "no counterpart is known" not in comments
    assert "cannot have this value" not in comments
    remedy = error_of(str(FILES / f"{trainer}.yaml"), run=[]).remedy
    assert remedy.startswith(f"dpo-dist convert {FILES}/{trainer}.yaml {FILES}/{trainer}_converted.yaml ")
    shown = {"llama_factory": (5e-6, 0.1, 2048), "trl": (5e-7, 0.01, 1024), "axolotl": (2e-4, 0.1, 4096)}
    assert (config.optim.lr, config.loss.beta, config.data.max_length) == shown[trainer]


ODD_VALUES = [
    (f"learning_rate: 1.0e-5\nmin_lr: {10**400}", "min_lr: 1000"),
    ("num_processes: true", "num_processes: true — "),
    ("micro_batch_size: yes", "micro_batch_size: true — "),
    ("loss_terms: [simpo, sft]", "read as a run of TRL"),
    ("chat_template_kwargs: {1: !!binary YWI=}", "read as a run of TRL"),
    ("run_name: 2026-01-02", "read as a run of TRL"),
    ("stage: dpo\nlora_rank: [null]", "read as a run of LLaMA-Factory"),
    ("1: 2", "1: 2 — no counterpart is known"),
    ("dataset_mixer: {1: 0.5, 2026-01-02: 0}", "dataset_mixer.2026-01-02: 0 — neither"),
]


@pytest.mark.parametrize(("content", "comment"), ODD_VALUES)
def test_odd_values_in_a_file_are_named(content: str, comment: str, tmp_path: Path) -> None:
    (file := tmp_path / "odd.yaml").write_text(
        f"model_name_or_path: m\nnum_train_epochs: 1\nbeta: 0.2\n{content}"
    )
    assert comment in converted(file)[1]


def test_a_file_that_exists_or_cannot_be_read_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "foreign.yaml").write_text("{model_name_or_path: m, loss_type: ipo, beta: 0.3}")
    for words, text, where in (
        ([file, file], "this file exists", file),
        ([tmp_path / "gone.sh"], "cannot be read", tmp_path / "gone.sh"),
        ([file, file / "ours.yaml"], "this file cannot be written", file / "ours.yaml"),
    ):
        with pytest.raises(ConfigError, match=text) as raised:
            convert.main([str(word) for word in words])
        assert raised.value.where == str(where)
    assert convert.main([str(file)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss"] == {"kind": "ipo", "beta": 0.3}


def test_a_file_of_this_program_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "mine.yaml").write_text("{loss: ipo, data: {train: [a.jsonl]}, optim.lr: 1.0e-6}")
    with pytest.raises(ConfigError, match=f"dpo-dist train {file} --check"):
        convert.main([str(file)])
