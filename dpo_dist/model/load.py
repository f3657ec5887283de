"""Load a model folder as a packed model, and its tokenizer."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.arrangement import Arrangement
from dpo_dist.errors import ConfigError, first_line
from dpo_dist.model.activation_offload import PinnedMemory, offload_inputs
from dpo_dist.model.architectures import quantized_weights, recorded_arrangement
from dpo_dist.model.attention_backend import check_kernels, choose_backend
from dpo_dist.model.folder import CONFIG_FILE, check_tokenizer_files
from dpo_dist.model.foreign_code import TOKENIZER_CONFIG, check_no_kernels, own_code_error
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.layers import checkpoint_layers, use_liger
from dpo_dist.model.numerics import check_precision
from dpo_dist.model.option_checks import check_device, check_shared_tokens
from dpo_dist.model.quantize import keep_trainable, quantized_loading
from dpo_dist.model.sequence_parallel import TokenExchange
from dpo_dist.model.supported import (
    check_causal_class,
    check_supported,
    check_text,
    freeze_as_defined,
    keep_evaluating,
    switch_off_noise,
)
from dpo_dist.model.tiled_mlp import tile_mlps
from dpo_dist.model.unread_weights import check_all_weights_read, unread_when_sharded

log = logging.getLogger(__name__)

# Names in files that transformers (5.23) mistakes under ZeRO-3, as patterns, and names that it maps right:
# the final norm of DeepSeek-V4, as transformers saves it, would be that of compressed keys.
_RENAMED = {"deepseek_v4": {r"^model\.norm\.": r"^norm\."}}

TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}


def load_tokenizer(folder: Path, config: ModelConfig, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Args:
        folder: of the model.
        config: whether code of the folder may run.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: the folder has no tokenizer, or it cannot be loaded.
    """
    # Without files, transformers would create an empty tokenizer of the model's class.
    check_tokenizer_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        refused = None if config.trust_remote_code else own_code_error(folder, key, TOKENIZER_CONFIG)
        if refused is None and (folder / CONFIG_FILE).is_file():  # which transformers reads first
            load_config(folder, config, key)
        raise refused or ConfigError(
            "the model folder's tokenizer cannot be loaded",
            where=key,
            got=f"{folder}: {first_line(error)}",
            remedy="put the tokenizer's files beside config.json",
        ) from error
    return tokenizer


def load_packed(
    folder: Path,
    config: ModelConfig,
    max_length: int,
    device: torch.device,
    key: str = "model.path",
    sequence: TokenExchange | None = None,
) -> PackedCausalLM:
    """Return the model of `folder` with the chunked head, arranged as the record of its architecture says.

    Whether this is exact is for `exactness.settle` to check.

    Under a ZeRO-3 loading context every process keeps its own shard only. Dropout is off: policy and
    reference compute the same function (law L7).

    Args:
        folder: from `model_folder`.
        config: precision, attention backend, options of layers, remote code.
        max_length: the longest prompt plus response, in tokens.
        device: of the forward.
        key: the configuration key to name in an error.
        sequence: the ranks that share the tokens of each batch; None: this rank computes all.

    Raises:
        ConfigError: the model cannot be loaded, its packed forward is not exact, a kernel cannot run, or its
            heads cannot be divided among the ranks of `sequence`; an option of its layers has no effect.
    """
    backend = choose_backend(config.attention, config.dtype, device)
    model_config = load_config(folder, config, key)
    check_supported(model_config, max_length)
    text = model_config.get_text_config()
    if sequence is not None:
        check_shared_tokens(model_config, sequence.ranks)
    check_kernels(backend, device, text, TORCH_DTYPES[config.dtype])
    check_device(config, model_config.model_type, device)
    causal_lm = load_weights(folder, model_config, config, device, key=key)
    if config.quantization is not None:
        keep_trainable(causal_lm)
    if config.liger:
        use_liger(causal_lm)
    checkpoint_layers(causal_lm, config.gradient_checkpointing)
    if config.activation_offload:
        offload_inputs(causal_lm, PinnedMemory(device))
    model = PackedCausalLM(causal_lm, backend, config.compile, sequence, Arrangement.padded)
    if config.mlp_tile_tokens is not None:
        model.tiled = tile_mlps(causal_lm, config.mlp_tile_tokens, device, TORCH_DTYPES[config.dtype])
    model.start_as(recorded_arrangement(text.model_type))
    return model


def load_weights(
    folder: Path,
    model_config: Any,
    config: ModelConfig,
    device: torch.device,
    *,
    key: str = "model.path",
) -> Any:
    """Return the causal language model of `folder`, with every weight read and none left at random.

    Args:
        folder: of the model.
        model_config: from `load_config`.
        config: precision, quantization, remote code.
        device: of the forward.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: no causal language model, unread or missing weights, or the device lacks this precision.
    """
    check_precision(config.dtype, device)
    check_causal_class(model_config, key)
    try:
        causal_lm, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=TORCH_DTYPES[config.dtype],
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
            key_mapping=_RENAMED.get(model_config.model_type),
            **placement(config, device),
        )
    except Exception as error:  # an architecture's constructor can raise anything
        unsharded = ", or set parallelism=zero2 or ddp" if is_deepspeed_zero3_enabled() else ""
        raise ConfigError(
            "the model cannot be loaded",
            where=key,
            got=f"{folder}: {_loading_fault(error)}",
            remedy=f"download or save the model again, or set {key} to another model{unsharded}",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            "the model folder lacks weights, which would be initialized to random values",
            where=key,
            got=f"{folder} without {', '.join(missing[:5])} ({len(missing)} in all)",
            remedy=f"set {key} to a complete model folder",
        )
    is_sharded = is_deepspeed_zero3_enabled() and config.quantization is None
    unread = unread_when_sharded(causal_lm, folder) if is_sharded else report["unexpected_keys"]
    if not is_sharded and config.quantization is None:
        freeze_as_defined(causal_lm)
    keep_evaluating(causal_lm)
    check_all_weights_read(causal_lm, sorted(unread), folder, key)
    if causal_lm.config.model_type != model_config.model_type:
        log.warning("%s: only its text model is loaded (%s)", folder, type(causal_lm).__name__)
    return causal_lm


def _loading_fault(error: Exception) -> str:
    """Return the first line of an error, and the next one where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    is_announced = len(lines) > 1 and lines[0].endswith(":")
    return f"{first_line(error)} {lines[1][:200]}" if is_announced else first_line(error)


def placement(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that load unsharded weights directly to a GPU."""
    if config.quantization is not None:
        return quantized_loading(config.quantization, TORCH_DTYPES[config.dtype], device)
    on_host = device.type == "cpu" or is_deepspeed_zero3_enabled()  # ZeRO-3 moves its shards itself
    return {} if on_host else {"device_map": {"": device}}


def load_config(folder: Path, config: ModelConfig, key: str = "model.path") -> Any:
    """Return the transformers configuration of a model folder, with all dropout and noise switched off.

    Args:
        folder: of the model.
        config: whether its own code may run.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: config.json cannot be read, names code in the folder, describes quantized weights or
            several models of text.
    """
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a configuration's validation can raise anything
        refused = None if config.trust_remote_code else own_code_error(folder, key)
        raise refused or ConfigError(
            "the model's config.json cannot be read",
            where=key,
            got=f"{folder}: {first_line(error)}",
            remedy="download or save the model again, or install the transformers release that it needs",
        ) from error
    check_no_kernels(folder, key)
    check_text(model_config, key)
    quantized = getattr(model_config, "quantization_config", None)
    if quantized is not None:
        raise quantized_weights(folder, dict(quantized), key)
    switch_off_noise(model_config)
    return model_config
