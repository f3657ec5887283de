"""Names in other trainers of options of experts, long sequences, adapters and exports; see `aliases`."""


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
        "write 'model.adapter={init: pissa_niter_4}'; it starts from singular vectors": (
            "pissa_init pissa_iter"
        ),
        "write 'model.adapter={modules_to_save: [lm_head]}'; it trains modules": (
            "modules_to_save additional_target"
        ),
        "the result is an adapter of the original base already": "pissa_convert",
        "write 'model.adapter={init: pissa_niter_4}'; others: olora, gaussian": (
            "init_lora_weights peft_init_lora_weights lora_init"
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
        "python -m dpo_dist.export run.dir=RUN 'export.average=[step-000100,step-000200]'": (
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
