"""Names of options and values in other trainers, with the keys, values and remedies here.

The names are those of Hugging Face TrainingArguments, TRL's DPOConfig, LLaMA-Factory and common use. A name
is looked up whole and by its last part, in lower case, with `_` for `-`.
"""

from dpo_dist.config.model_aliases import MODEL_KEY_ALIASES, MODEL_REMEDIES, by_name

# Keys of the same meaning; the value can be kept.
KEY_ALIASES = MODEL_KEY_ALIASES | by_name(
    {
        "model.path": (
            "model_name_or_path model_name model_path model_id base_model pretrained_model_name_or_path"
        ),
        "model.revision": "model_revision",
        "model.dtype": "torch_dtype dtype precision",
        "model.attention": "attn_implementation",
        "model.trust_remote_code": "trust_remote_code",
        "model.liger": "use_liger_kernel use_liger enable_liger_kernel",
        "model.compile": "torch_compile",
        "model.gradient_checkpointing": "gradient_checkpointing",
        "data.train": (
            "train train_file train_data train_path train_dataset datasets dataset_name "
            "dataset_path data_path data.path data.name data.dataset data.file data.files"
        ),
        "data.eval": (
            "eval eval_file eval_data eval_dataset validation_file validation_data val_data "
            "data.test data.val data.validation"
        ),
        "data.max_length": "cutoff_len max_seq_len max_seq_length max_len model_max_length sequence_len",
        "data.max_prompt_length": "max_prompt_len prompt_max_len",
        "data.truncation": "truncation_mode truncation_strategy",
        "data.processes": "dataset_num_proc preprocessing_num_workers num_proc num_workers",
        "loss.beta": "pref_beta dpo_beta",
        "loss.label_smoothing": "dpo_label_smoothing",
        "loss.divergence": "f_divergence_type",
        "loss.alpha_coefficient": "f_alpha_divergence_coef",
        "loss.simpo_gamma": "gamma",
        "loss.terms": "loss_terms",
        "loss.sync_reference.every": "ref_model_sync_steps",
        "loss.sync_reference.mixup": "ref_model_mixup_alpha",
        "reference.path": "ref_model ref_model_name_or_path ref_model_path reference_model",
        "reference.revision": "ref_model_revision",
        "optim.lr": "learning_rate lr",
        "optim.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
        "optim.warmup_ratio": "warmup",
        "optim.warmup_steps": "warmup_steps num_warmup_steps",
        "optim.min_lr_ratio": "min_lr_ratio min_lr_rate cosine_min_lr_ratio",
        "optim.weight_decay": "wd",
        "optim.eps": "adam_epsilon adam_eps epsilon",
        "optim.betas": "adam_betas",
        "optim.max_grad_norm": "gradient_clipping gradient_clip_val grad_clip clip_grad_norm max_norm",
        "trainer.epochs": "num_train_epochs num_epochs n_epochs",
        "trainer.global_batch_pairs": "total_batch_size global_batch_size train_batch_size batch_size",
        "trainer.save_every": "save_steps save_interval save_freq checkpoint_every",
        "trainer.eval_every": "eval_steps eval_interval eval_freq evaluation_steps",
        "trainer.eval_at_start": "eval_on_start",
        "trainer.log_every": "logging_steps log_steps log_interval logging_interval",
        "trainer.keep_last": "save_total_limit",
        "trainer.seed": "data_seed random_seed",
        "run.dir": "output_dir output_path out_dir save_dir out output",
        "run.name": "run_name experiment_name exp_name",
        "tracking.project": "wandb_project",
        "tracking.entity": "wandb_entity",
        "tracking.group": "wandb_group",
        "tracking.tags": "wandb_tags",
        "tracking.notes": "wandb_notes",
        "tracking.wandb": "wandb_mode",
        "parallelism.timeout_seconds": "ddp_timeout",
        "parallelism.sequence_parallel": "sp_size sequence_parallel_size ulysses_sequence_parallel_size",
        "model.adapter.r": "model.adapter.rank model.adapter.lora_r model.adapter.lora_rank",
        "model.adapter.alpha": "model.adapter.lora_alpha",
        "model.adapter.dropout": "model.adapter.lora_dropout",
        "model.adapter.target_modules": (
            "model.adapter.targets model.adapter.modules model.adapter.lora_target"
        ),
        "model.adapter.variant": "model.adapter.type model.adapter.kind",
        "model.adapter.path": "model.adapter.adapter_name_or_path model.adapter.folder",
        "model.adapter.on_top": "model.adapter.create_new_adapter",
        "model.adapter.init": "model.adapter.init_lora_weights",
    }
)

# Names in an entry of data.train or data.eval.
SOURCE_ALIASES = by_name(
    {
        "path": "file file_name dataset hf_hub_url url dataset_dir dataset_id",
        "name": "subset config_name configuration dataset_name entry",
        "data_dir": "folder",
        "format": "type formatting ds_type",
        "columns": (
            "column_mapping field_mapping fields prompt_key input_key output_key chosen_key rejected_key "
            "field_prompt field_messages field_chosen field_rejected field_system"
        ),
        "tags": "message_property_mappings roles role_tag content_tag",
        "weight": "probability ratio",
        "limit": "max_samples num_samples n",
    }
)

_ACCUMULATION = (
    "set trainer.global_batch_pairs: pairs of an optimizer step over all processes; "
    "trainer.micro_batch_tokens bounds what a device computes at once, accumulation follows from both"
)
_ADAPTER = "'model.adapter={r: 16, alpha: 32, target_modules: all-linear}' trains an adapter"
_ADAPTER_OR_ALL = f"{_ADAPTER}; without it all weights are trained"
_DEEPSPEED = (
    "choose parallelism=zero3, zero2 or ddp; DeepSpeed's configuration is built from the keys of parallelism"
)
_LOSS = "choose loss=NAME, or weigh several in loss.terms"
_OFFLOAD = "set parallelism.offload_parameters, parallelism.offload_optimizer or reference.offload to cpu"
_RESUME = "set run.resume=auto (the default), never or must; the same command finds its checkpoints"
_LAUNCHER = (
    "options of the launcher come before -m: accelerate launch --num_processes N -m dpo_dist.train ..."
)
_BEST = "set trainer.keep_best=eval_loss: model/ is the last step's, export.checkpoint=best the best one's"

# Remedies for options without a key of the same meaning.
REMEDIES = MODEL_REMEDIES | by_name(
    {
        _LOSS: "loss_type pref_loss loss.type loss.name",
        "'loss.terms=[{kind: sigmoid, weight: 1}, {kind: sft, weight: 0.1}]'": "loss_weights pref_ftx",
        "choose loss=sigmoid_sft; the weight of its sft term is in loss.terms": "rpo_alpha",
        "set loss.weighting=wpo": "use_weighting",
        _ACCUMULATION: (
            "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size "
            "micro_batch_size mini_batch_size gradient_accumulation_steps gradient_accumulation "
            "grad_accum"
        ),
        "trainer.micro_batch_tokens bounds evaluation too": "per_device_eval_batch_size eval_batch_size",
        "set model.dtype=bf16 (the default) or fp32": "bf16 tf32",
        "not offered: bf16 has 8 bits, so that an update below 2^-9 of a weight is lost, and with the usual "
        "optim.lr of 8e-8 to 1e-6 nearly all are; model.dtype=bf16 has float32 master weights, and "
        "optim.kind=adamw_8bit saves memory": (
            "pure_bf16 bf16_full master_weights fp32_master_weights bf16_master_weights use_master_weights "
            "master_dtype optimizer_dtype bf16_master_weights_and_grads master_weight_dtype state_dtype "
            "stochastic_rounding"
        ),
        "set model.dtype=fp16; its loss scale is dynamic": (
            "fp16 initial_scale_power loss_scale_window min_loss_scale fp16_opt_level"
        ),
        "set model.dtype=bf16 (the default), fp16 or fp32; the first two have float32 master weights": (
            "mixed_precision"
        ),
        "set model.attention=auto, flash_attention_2, varlen or sdpa": "flash_attn",
        "set model.attention=flash_attention_2": "use_flash_attention_2",
        "set model.quantization=int8, with model.adapter and parallelism=ddp": "load_in_8bit",
        "set model.quantization=nf4, with model.adapter and parallelism=ddp": "load_in_4bit",
        "set model.quantization=int8 or nf4, with model.adapter and parallelism=ddp": "quantization_bit",
        _ADAPTER: (
            "use_peft peft peft_config lora use_lora lora_r lora_rank lora_alpha lora_dropout "
            "lora_target lora_target_modules target_modules"
        ),
        _ADAPTER_OR_ALL: "finetuning_type",
        "python -m dpo_dist.extend writes a model with more tokens": "resize_vocab new_special_tokens",
        "'model.adapter={path: FOLDER}' continues an adapter; on_top: true trains a new one above it": (
            "adapter_name_or_path create_new_adapter adapter_folder"
        ),
        "write +experiment=NAME": "exp experiments",
        "set pairs.reward_model, pairs.function=module:function or pairs.endpoint": (
            "judge judge_model reward_model reward_model_path"
        ),
        "set samples.prompts=16": "generate_during_eval predict_with_generate",
        "evaluation.model of evaluate takes the folder of one, <run.dir>/checkpoints/step-000100; "
        "export.checkpoint of export its name": "checkpoint checkpoints",
        "set tracking.wandb=auto, online, offline or off": "report_to use_wandb wandb",
        "log files are in run.dir": "logging_dir",
        "set optim.kind=adamw or adamw_8bit; the other options of AdamW are in optim": "optim_type optimizer",
        "AdamW is the optimizer: choose optim=adamw or adamw_8bit, its options are in optim": "optim",
        "set optim.betas=[0.9,0.999]": "adam_beta1 adam_beta2",
        "set optim.min_lr_ratio: the lowest rate as a share of optim.lr": "min_lr lr_end",
        "set optim.min_lr_ratio and optim.warmup_steps": "lr_scheduler_kwargs",
        _DEEPSPEED: "deepspeed deepspeed_config zero_stage parallelism.stage parallelism.zero fsdp ddp",
        "training is DPO; choose loss=sft for supervised fine-tuning": "stage",
        _OFFLOAD: "cpu_offload offload",
        "set reference.mode=cached: log-probs are computed once and stored": "precompute_ref_log_probs",
        "set reference.micro_batch_tokens": "precompute_ref_batch_size",
        "set reference=live and loss.sync_reference.every": "sync_ref_model",
        _RESUME: "resume_from_checkpoint resume",
        "set run.resume=never with a new run.dir to start a new run": "overwrite_output_dir",
        "set trainer.save_every: steps, or 0 for the end only": "save_strategy",
        "set trainer.eval_every: steps, or 0 for the end only": "eval_strategy evaluation_strategy",
        "set trainer.log_every: steps": "logging_strategy",
        _BEST: "load_best_model_at_end metric_for_best_model",
        "set data.max_length: tokens of prompt and response together": (
            "max_completion_length max_target_length"
        ),
        "set data.eval_share: the share of prompts reserved for evaluation": (
            "val_size val_set_size split_dataset_ratio eval_size test_size eval_ratio val_ratio val_split "
            "data.val_size data.val_split"
        ),
        "--check checks values, model, tokenizer, data and folders, and exits": "dry_run validate check",
        "--config-dir DIR adds a folder of yours": "config_path",
        "set limit of a source: 'data.train=[{path: pairs.jsonl, limit: 1000}]'": (
            "max_samples max_train_samples data.limit"
        ),
        "set split of a source: 'data.train=[{path: org/name, split: train}]'": (
            "split data.split dataset_split dataset_train_split dataset_test_split"
        ),
        "set format of a source: 'data.train=[{path: pairs.jsonl, format: text}]'": "data.format",
        "set weight of a source: 'data.train=[{path: pairs.jsonl, weight: 0.5}]'": (
            "data.weight mix_strategy interleave_probs dataset_probs prompt_data_probs dataset_mixer"
        ),
        "write 'data.train=[{path: FOLDER, name: ENTRY}]': FOLDER has the dataset_info.json": (
            "dataset_dir custom_dataset_info"
        ),
        "write 'data.train=[PATH]'; for an entry of LLaMA-Factory's dataset_info.json, which is in FOLDER, "
        "'data.train=[{path: FOLDER, name: ENTRY}]'": "dataset",
        "set columns of a source: 'data.train=[{path: a.jsonl, columns: {prompt: question}}]'": (
            "columns data.columns prompt_key input_key output_key chosen_key rejected_key label_key "
            "field_messages field_chosen field_rejected"
        ),
        "tools and messages are read from each record": "tools data.tools tool_format",
        "put system texts into the records: the field system": "default_system system system_prompt",
        "messages are rendered by the chat template; for texts set data.text_as_messages=true": (
            "apply_chat_template input_template"
        ),
        "not needed: the loss counts a response from where both sides part": (
            "train_on_prompt train_on_inputs mask_history"
        ),
        "not needed: encoded data are found by their content in data.cache": (
            "tokenized_path dataset_prepared_path overwrite_cache load_from_cache_file"
        ),
        "not needed: files are streamed": (
            "streaming dataset_streaming buffer_size preprocessing_batch_size max_shard_size"
        ),
        "not offered: images, audio and videos are not read": "media_dir image_max_pixels video_max_pixels",
        "the tokenizer's own chat template is used; another one, a file or a name: data.chat_template": (
            "template chat_template chat_template_path chat_template_jinja"
        ),
        "set data.template_arguments={enable_thinking: false}": "enable_thinking chat_template_kwargs",
        "set data.trained_roles and data.untrained": "roles_to_train assistant_only_loss loss_scale",
        "not needed: pairs are always packed without padding": (
            "packing padding_free neat_packing sample_packing"
        ),
        "not needed: pairs are packed without padding and balanced by compute cost": "group_by_length",
        "not needed: the verb dpo_dist.train trains": "do_train",
        "not needed: data.eval is evaluated if it is set": "do_eval",
        "not needed": "remove_unused_columns label_pad_token_id",
        "not needed: dropout is always off": "disable_dropout",
        "not needed; data.processes is the number of encoding processes": "dataloader_num_workers",
        "not offered": "neftune_noise_alpha",
        "not offered; upload model/ of the run directory": "push_to_hub",
        _LAUNCHER: (
            "devices gpus n_gpus nnodes num_nodes num_gpus num_processes "
            "nproc_per_node num_machines config_file"
        ),
        "not needed: accelerate launch or torchrun sets it in the environment": ("local_rank"),
        "--config-dir DIR adds a folder of yours; +experiment=NAME reads DIR/experiment/NAME.yaml": (
            "config config_name"
        ),
        "not needed: --cfg job prints resolved values": "resolve",
        "one command is one run: to sweep, launch one process group (one job) for each value": "multirun",
    }
)

# Values of the same meaning.
VALUE_ALIASES = by_name(
    {
        "sigmoid": "dpo",
        "hinge": "slic slic_hf",
        "sft": "nll",
        "sigmoid_sft": "rpo",
        "nca_pair": "nca",
        "exo_pair": "exo",
        "bco_pair": "bco",
        "sppo_hard": "sppo",
        "apo_zero": "apo",
        "sigmoid_norm": "dpo_norm",
        "plackett_luce": "pl lipo",
        "bf16": "bfloat16 torch.bfloat16",
        "fp16": "float16 half torch.float16",
        "adamw_8bit": "adamw_bnb_8bit paged_adamw_8bit adamw8bit adam8bit",
        "adamw": "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused paged_adamw paged_adamw_32bit",
        "fp32": "float32 float 32 torch.float32",
        "flash_attention_2": "fa2 flash_attention",
        "sdpa": "eager",
        "nf4": "int4 4bit 4",
        "int8": "8bit 8",
        "cosine": "cosine_with_min_lr cosine_with_restarts cosine_warmup_with_min_lr",
        "zero3": "stage3 deepspeed fsdp",
        "ddp": "stage1 zero1",
        "off": "false no disabled",
        "zero2": "stage2",
        "keep_end": "left",
        "keep_start": "right",
        "drop": "skip ignore",
        "online": "on true",
        "error": "raise fail",
    }
)


def alias_of(key: str, names: dict[str, str]) -> str | None:
    """Return the entry of `names` for `key`: for the whole key, else for its last part."""
    plain = key.lower().replace("-", "_")
    return names.get(plain) or names.get(plain.rpartition(".")[2])
