"""Names in other trainers of options of experts, long sequences, adapters and exports; see `aliases`."""

import difflib
from collections.abc import Iterable


def by_name(names: dict[str, str]) -> dict[str, str]:
    """Return `{name: key}` for `{key: "name name ..."}`."""
    return {name: key for key, listed in names.items() for name in listed.split()}


_IN_CONFIG = "it is a part of the model: set it in its config.json, as its authors say"
_ONE_OPTIMIZER = "not offered: set optim=adamw or adamw_8bit; an adapter (model.adapter) saves more memory"

MODEL_KEY_ALIASES = by_name(
    {
        "loss.router.aux_coefficient": (
            "router_aux_loss_coef router_aux_coef moe_aux_loss_coef moe_aux_loss_coeff aux_loss_coef "
            "aux_loss_coeff loss.router.aux_coef loss.router.aux"
        ),
        "loss.router.z_coefficient": (
            "router_z_loss_coef moe_z_loss_coef moe_z_loss_coeff z_loss_coef z_loss_coeff "
            "loss.router.z_coef loss.router.z_loss"
        ),
        "model.activation_offload": (
            "activation_offloading offload_activations activation_cpu_offload activation_offload"
        ),
        "parallelism.sequence_parallel": (
            "context_parallel_size cp_size sequence_parallel_degree ulysses_degree ulysses_size sp "
            "ulysses context_parallel sequence_parallel_size "
            "parallelism_config_sp_size parallelism_config_cp_size"
        ),
        "reference.quantization": "ref_model_quantization_bit",
        "trainer.ema_decay": "ema_decay ema_beta ema_rate",
        "export.output": "export_dir export.out export.dir export.folder export.path",
        "export.check": "export.verify export.validate",
        "model.adapter.path": "model.adapter.adapter_path model.adapter.adapter",
        "model.adapter.modules_to_save": "model.adapter.additional_target",
        "export.dtype": "infer_dtype export_dtype",
    }
)

MODEL_REMEDIES = by_name(
    {
        "set loss.router.aux_coefficient=model": "output_router_logits",
        "set trainer.ema_decay=0.99": "use_ema ema",
        "not offered: the moving average takes in the weights of every step": (
            "ema_every ema_steps ema_update_every ema_update_freq ema_start ema_start_step ema_warmup"
        ),
        "not offered: the loss scale of model.dtype=fp16 is dynamic": (
            "optim.loss_scale optim.initial_loss_scale optim.dynamic_loss_scale"
        ),
        "set model.mlp_tile_tokens=2048": "tiled_mlp use_tiled_mlp tiled_mlp_num_shards",
        "set parallelism.sequence_parallel=N, which divides the number of processes": (
            "sequence_parallel_mode sp_backend ring_attn_size ring_attn_func parallelism_config"
        ),
        _IN_CONFIG: (
            "rope_scaling rope_theta rope_type yarn sliding_window attn_logit_softcapping "
            "final_logit_softcapping max_position_embeddings"
        ),
        "write 'model.adapter={variant: dora}'": "use_dora peft_use_dora lora_use_dora",
        "write 'model.adapter={variant: rslora}'": "use_rslora peft_use_rslora lora_use_rslora",
        "write variant: dora in its place": "model.adapter.use_dora model.adapter.dora",
        "write variant: rslora in its place": "model.adapter.use_rslora model.adapter.rslora",
        "not offered: an adapter has matrices on linear layers, named by target_modules, without biases": (
            "lora_bias layers_to_transform target_parameters lora_target_parameters trainable_token_indices "
            "model.adapter.bias model.adapter.layers_to_transform model.adapter.target_parameters "
            "model.adapter.trainable_token_indices"
        ),
        "write 'model.adapter={path: FOLDER}'; it continues an adapter": (
            "peft_adapter lora_model_dir adapter_name"
        ),
        "write 'model.adapter={modules_to_save: [lm_head]}'; it trains modules": (
            "modules_to_save additional_target"
        ),
        "write 'model.adapter={init: gaussian}'; the other kind is default (a random A, B = 0)": (
            "init_lora_weights peft_init_lora_weights lora_init"
        ),
        "not offered: an adapter starts as default or gaussian, beside weights that stay as they are": (
            "pissa_init pissa_iter pissa_convert"
        ),
        "not offered: all matrices of an adapter have the rate optim.lr": (
            "loraplus_lr_ratio loraplus_lr_embedding loraplus_lr_groups"
        ),
        "not offered: 'model.adapter={r: 16}' trains low-rank matrices, without it all weights are trained": (
            "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules unfrozen_parameters"
        ),
        _ONE_OPTIMIZER: (
            "use_galore use_apollo use_badam use_adam_mini use_muon optim_args optim_target_modules"
        ),
        "not offered": "shift_attn use_unsloth use_unsloth_gc use_llama_pro expand_layers mixture_of_depths",
        "with model.adapter the reference is the policy with its adapter off, or the adapter it started "
        "from; reference.path names another model": (
            "ref_model_adapters ref_adapter_name model_adapter_name force_use_ref_model"
        ),
        "set model.quantization=nf4, which has double quantization and computes in model.dtype": (
            "bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_quant_storage use_bnb_nested_quant "
            "double_quantization quantization_type quantization_method bnb_config_kwargs"
        ),
        "not offered: parallelism=zero3 shards weights, gradients and optimizer states, of experts too": (
            "expert_parallel expert_parallel_size ep_size expert_model_parallel_size "
            "tensor_parallel_size tp_size "
            "pipeline_parallel_size pp_size tensor_model_parallel_size pipeline_model_parallel_size"
        ),
        "python -m dpo_dist.export run.dir=RUN export.merge=true writes adapter and base as one model": (
            "merge_lora merge_and_unload merge_adapter merge_adapters merge_weights"
        ),
        "export models, then average them: export run.dir=RUN 'export.average=[FOLDER,FOLDER]'": (
            "model_soup average_checkpoints checkpoint_averaging swa use_swa merge_method"
        ),
        "not needed: an export has files of at most 5 GB": (
            "export_size export.max_shard_size export.shard_size"
        ),
        "not needed: log-probs and master weights are float32": "upcast_lmhead_output fp32_lm_head",
        "not needed: models and checkpoints are in safetensors": "save_safetensors",
        "not needed: an export needs no GPU and writes safetensors": "export_device export_legacy_format",
        "not offered: quantize the exported folder by the tool that serves it": (
            "export_quantization_bit export_quantization_dataset export_quantization_nsamples"
        ),
        "not offered; upload the exported folder": "export_hub_model_id",
    }
)


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
        "transformers' resize_token_embeddings writes a model with more tokens (docs/adapters.md)": (
            "resize_vocab new_special_tokens"
        ),
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


# A guess of lower similarity misleads more people than it helps.
_SIMILAR, _NEARLY_EQUAL = 0.75, 0.9
# A wrong guess at one of these would end the run early, or late, without a message.
_NOT_GUESSED = frozenset(
    {"trainer.max_steps", "trainer.stop_after_steps", "trainer.max_seconds", "trainer.max_bad_steps"}
)


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return `known`, the most similar to `word` first; for dotted keys the last part counts again."""
    word = VALUE_ALIASES.get(word.lower(), word)
    return sorted(known, key=lambda candidate: sum(_similarities(word, candidate)), reverse=True)


def likely(word: str, known: Iterable[str]) -> list[str]:
    """Return those of `known` that the user probably meant by `word`, the most similar first."""
    candidates = list(known)
    same = VALUE_ALIASES.get(word.lower(), word.lower())
    if same in candidates:
        return [same]
    section, _, last_part = word.rpartition(".")
    # Keys of the same section with the word as a part of their name: loss.alpha, loss.ld_alpha.
    with_part = [
        candidate
        for candidate in candidates
        if candidate.rpartition(".")[0] == section
        and last_part in candidate.rpartition(".")[2].split("_")
        and candidate not in _NOT_GUESSED
    ]
    if with_part and word not in candidates:
        return with_part
    for candidate in nearest(word, candidates)[:3]:
        whole, last = _similarities(word, candidate)
        similarity = last if "." in word or "." not in candidate else max(whole, last)
        elsewhere = section in candidates and candidate.rpartition(".")[0] != section
        if similarity > (_NEARLY_EQUAL if elsewhere or candidate in _NOT_GUESSED else _SIMILAR):
            return [candidate]
    return []


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a question after the likely names of `known`, with a space after it; empty if there are none."""
    found = likely(word, known)
    return f"did you mean {' or '.join(found)}? " if found else ""


def _similarities(word: str, candidate: str) -> tuple[float, float]:
    """Return the similarity of the whole keys and that of their last parts, each from 0 to 1."""
    whole = difflib.SequenceMatcher(None, word, candidate).ratio()
    last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return whole, last
