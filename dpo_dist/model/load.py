"""From a model folder or hub name to a packed model and its tokenizer."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.loading_report import LoadStateDictInfo

from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig
from dpo_dist.errors import ConfigError
from dpo_dist.model.attention import PACKED
from dpo_dist.model.attention_backend import check_kernel, choose_backend, heads_of
from dpo_dist.model.folder import check_tokenizer_files, weight_files
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.layers import check_compiler, check_liger, checkpoint_layers, use_liger
from dpo_dist.model.quantize import keep_trainable, quantized_loading
from dpo_dist.model.supported import check_no_remote_model, check_supported

log = logging.getLogger(__name__)

# In the names of options that make training random: dropout, layerdrop, router_jitter_noise.
_NOISES = ("drop", "jitter", "noise")

TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


def load_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a model folder.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    # Without its files transformers makes an empty one of the model's kind.
    check_tokenizer_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ConfigError(
            "the model folder's tokenizer cannot be loaded",
            where="model.path",
            got=f"{folder}: {_first_line(error)}",
            remedy="put the tokenizer's files beside config.json",
        ) from error
    return tokenizer


def load_packed(folder: Path, config: ModelConfig, max_length: int, device: torch.device) -> PackedCausalLM:
    """The model of `folder` with packed attention and the chunked head.

    Under a ZeRO-3 loading context every process reads and keeps its own shard only. Dropout is switched off:
    policy and reference must compute the same function (law L7).

    Args:
        folder: of `model_folder`.
        config: precision, attention backend, what is done to the layers, remote code.
        max_length: the longest prompt plus response, in tokens.
        device: where attention will run.

    Raises:
        ConfigError: the model cannot be loaded, or not packed exactly, or not with these kernels here.
    """
    backend = choose_backend(config.attention, config.dtype, device)
    model_config = load_config(folder, config)
    check_supported(model_config, max_length)
    if backend is not AttentionBackend.sdpa:
        check_kernel(backend, device, heads_of(model_config), TORCH_DTYPES[config.dtype])
    if config.liger:
        check_liger(model_config.model_type, device)
    if config.compile:
        check_compiler(device)
    causal_lm = _load_weights(folder, model_config, config, device)
    if config.quantization is not None:
        keep_trainable(causal_lm)
    if config.liger:
        use_liger(causal_lm)
    checkpoint_layers(causal_lm, config.gradient_checkpointing)
    return PackedCausalLM(causal_lm, backend, config.compile)


def _load_weights(folder: Path, model_config: Any, config: ModelConfig, device: torch.device) -> Any:
    try:
        causal_lm, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=TORCH_DTYPES[config.dtype],
            attn_implementation=PACKED,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **placement(config, device),
        )
    except Exception as error:  # an architecture's constructor can raise anything about its configuration
        raise ConfigError(
            "the model cannot be loaded", where="model.path", got=f"{folder}: {_first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            "the model folder lacks weights, which would start at random values",
            where="model.path",
            got=f"{folder} without {', '.join(missing[:5])} ({len(missing)} in all)",
            remedy="point the key at a complete model folder",
        )
    scattered = is_deepspeed_zero3_enabled() and config.quantization is None
    unread = _unread_when_scattered(causal_lm, folder) if scattered else report["unexpected_keys"]
    check_all_weights_read(causal_lm, sorted(unread), folder)
    return causal_lm


def _unread_when_scattered(causal_lm: Any, folder: Path) -> set[str]:
    """Return the names of tensors in the weight files that were not loaded, reading names only.

    Under ZeRO-3 transformers does not say so itself.
    """
    held = causal_lm.state_dict()
    mapping = getattr(causal_lm, "_weight_conversions", None) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = causal_lm.base_model_prefix
    unread = set()
    for file in weight_files(folder):
        for name in _tensor_names(file):
            renamed, _ = rename_source_key(
                name, renamings, converters, base_model_prefix=prefix, meta_state_dict=held
            )
            if renamed not in held and f"{prefix}.{renamed}" not in held:
                unread.add(name)
    info = LoadStateDictInfo(set(), unread, set(), [], {}, set())
    causal_lm._adjust_missing_and_unexpected_keys(info)  # names that the architecture passes over
    found: set[str] = info.unexpected_keys
    return found


def _tensor_names(file: Path) -> list[str]:
    if file.suffix == ".json":  # an index
        return []
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as content:
            return list(content.keys())
    return list(torch.load(file, map_location="meta", weights_only=True))


def placement(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put whole weights straight on a GPU, without a copy on the host."""
    if config.quantization is not None:
        return quantized_loading(config.quantization, TORCH_DTYPES[config.dtype], device)
    on_host = device.type == "cpu" or is_deepspeed_zero3_enabled()  # which puts its shards itself
    return {} if on_host else {"device_map": {"": device}}


def check_all_weights_read(causal_lm: Any, unread: list[str], folder: Path) -> None:
    """Raise an error where weight files have more for a module of the model than the architecture reads.

    Whole modules that the model has not (a value head, layers that predict further tokens) are only logged:
    log-probs do not need them.

    Args:
        causal_lm: the loaded model.
        unread: names of tensors in the files that were not loaded.
        folder: of the model, for the error.

    Raises:
        ConfigError: a module of the model lacks some of its weights, so that another function is computed.
    """
    if not unread:
        return
    modules = dict(causal_lm.named_modules())
    containers = {"", causal_lm.base_model_prefix}
    containers |= {name for name, module in modules.items() if isinstance(module, torch.nn.ModuleList)}
    foreign: list[str] = []
    own: list[str] = []
    for name in unread:
        parts = name.split(".")
        owner = next(o for n in range(len(parts), -1, -1) if (o := ".".join(parts[:n])) in modules)
        (foreign if owner in containers else own).append(name)
    if own:
        raise ConfigError(
            f"the weight files have tensors that {type(causal_lm).__name__} does not read",
            where="model.path",
            got=f"{folder} with {', '.join(own[:5])} ({len(own)} in all)",
            expected="weights and config.json of one architecture",
            remedy="check model_type and the options in config.json",
        )
    log.warning(
        "%s: not used by %s: %s (%d tensors in all)",
        folder,
        type(causal_lm).__name__,
        ", ".join(foreign[:5]),
        len(foreign),
    )


def load_config(folder: Path, config: ModelConfig) -> Any:
    """Return the transformers configuration of a model folder, with all dropout and noise switched off.

    Raises:
        ConfigError: its config.json cannot be read, names code of its own for the model, or says that the
            weights are quantized in their files.
    """
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a configuration's validation can raise anything
        raise ConfigError(
            "the model's config.json cannot be read",
            where="model.path",
            got=f"{folder}: {_first_line(error)}",
        ) from error
    if config.trust_remote_code:
        check_no_remote_model(folder, model_config)
    quantized = getattr(model_config, "quantization_config", None)
    if quantized is not None:
        # Quantized weights have no gradient: biases and norms alone would be trained.
        raise ConfigError(
            "the model's weights are quantized in their files",
            where="model.path",
            got=f"{folder}, quantized by {dict(quantized).get('quant_method', 'a method without a name')}",
            expected="weights in bf16, fp16 or fp32",
            remedy="use the model it was made from; model.quantization=nf4 quantizes that when it is loaded",
        )
    for name, value in vars(model_config).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and any(noise in name for noise in _NOISES):
            setattr(model_config, name, 0.0)
    return model_config


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
