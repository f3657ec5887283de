"""Load a model folder as a packed model, and its tokenizer."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.loading_report import LoadStateDictInfo

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.model.architectures import quantized_weights, recorded_arrangement
from dpo_dist.model.attention import check_kernels, choose_backend
from dpo_dist.model.folder import CONFIG_FILE, check_tokenizer_files, read_model_json, weight_files
from dpo_dist.model.layers import checkpoint_layers, use_liger
from dpo_dist.model.memory import offload_inputs
from dpo_dist.model.numerics import check_precision
from dpo_dist.model.optional_packages import check_bitsandbytes
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.supported import (
    check_causal_class,
    check_device,
    check_shared_tokens,
    check_supported,
    check_text,
    freeze_as_defined,
    keep_evaluating,
    switch_off_noise,
)
from dpo_dist.model.ulysses import TokenExchange

TOKENIZER_CONFIG = "tokenizer_config.json"
# An implementation with a slash, by itself or by part of the model.
_KERNEL = re.compile(r'"\w*_implementation"\s*:\s*("[^"]*/[^"]*"|\{[^}]*/[^}]*\})')


def own_code_error(folder: Path, key: str, file: str = CONFIG_FILE) -> ConfigError | None:
    """Return the error of a folder that transformers cannot load without the code that `file` names.

    Args:
        folder: of the model.
        key: the configuration key of the folder.
        file: the JSON file that transformers was reading.
    """
    try:
        named = read_model_json(folder / file).get("auto_map")
    except ConfigError:
        return None
    if not named:
        return None
    return ConfigError(
        "the model folder names Python code, which is not run",
        where=key,
        got=f"{folder / file}: auto_map {_first(named)}",
        expected="classes of transformers",
        remedy="name a model that transformers knows itself, or read the code first and then set "
        "model.trust_remote_code=true",
    )


def check_no_kernels(folder: Path, key: str) -> None:
    """Check that config.json names no kernel of the Hub, which transformers would download and run.

    Raises:
        ConfigError: it does.
    """
    if named := _KERNEL.search((folder / CONFIG_FILE).read_text(encoding="utf-8")):
        raise ConfigError(
            "the model's config.json names code on the Hub, which is not run",
            where=key,
            got=f"{folder / CONFIG_FILE}: {' '.join(named[0].split())}",
            expected="an implementation of transformers",
            remedy="remove it from config.json: model.attention selects the kernel",
        )


def _first(value: Any) -> str:
    if isinstance(value, dict) and value:
        name, code = next(iter(value.items()))
        return f"{name}: {code}"
    return str(value)


log = logging.getLogger(__name__)


def unread_when_sharded(causal_lm: Any, folder: Path) -> set[str]:
    """Return the names of tensors in the weight files that were not loaded; reads only names.

    Under ZeRO-3 transformers does not report them.

    Args:
        causal_lm: the loaded model; its weights may be sharded.
        folder: of the model.
    """
    loaded = causal_lm.state_dict()
    mapping = getattr(causal_lm, "_weight_conversions", None) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = causal_lm.base_model_prefix
    unread = set()
    for file in weight_files(folder):
        for name in _tensor_names(file):
            renamed, _ = rename_source_key(
                name, renamings, converters, base_model_prefix=prefix, meta_state_dict=loaded
            )
            if renamed not in loaded and f"{prefix}.{renamed}" not in loaded:
                unread.add(name)
    info = LoadStateDictInfo(set(), unread, set(), [], {}, set())
    causal_lm._adjust_missing_and_unexpected_keys(info)  # names that the architecture ignores
    found: set[str] = info.unexpected_keys
    return found


def _tensor_names(file: Path) -> list[str]:
    if file.suffix == ".json":  # an index
        return []
    with safe_open(file, "pt") as content:
        return list(content.keys())


def check_all_weights_read(causal_lm: Any, unread: list[str], folder: Path, key: str = "model.path") -> None:
    """Check that the architecture reads all tensors that the files contain for its modules.

    Tensors of modules that the model does not have (a value head, layers that predict further tokens) are
    only logged: log-probs do not depend on them. Layers beyond those that config.json counts are an error.

    Args:
        causal_lm: the loaded model.
        unread: names of tensors in the files that were not loaded.
        folder: of the model, for the error.
        key: the configuration key to name in the error.

    Raises:
        ConfigError: a module of the model has further tensors in the files: the model is another function.
    """
    if not unread:
        return
    modules = dict(causal_lm.named_modules())
    # Layers that predict further tokens follow the others in the same list (DeepSeek-V3, GLM-4.5).
    predicting = getattr(causal_lm.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    foreign: list[str] = []
    own: list[str] = []
    for name in unread:
        parts = name.split(".")
        depth = next(n for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules)
        owner = ".".join(parts[:depth])
        is_foreign = owner in ("", causal_lm.base_model_prefix)
        if isinstance(modules[owner], torch.nn.ModuleList) and parts[depth].isdecimal():
            is_foreign = int(parts[depth]) < len(modules[owner]) + predicting
        (foreign if is_foreign else own).append(name)
    if own:
        raise ConfigError(
            f"the weight files have tensors that {type(causal_lm).__name__} does not read",
            where=key,
            got=f"{folder} with {', '.join(own[:5])} ({len(own)} in all)",
            expected="weights and config.json of one architecture",
            remedy="check model_type and the options in config.json, such as num_hidden_layers",
        )
    log.warning(
        "%s: not used by %s: %s (%d tensors in all)",
        folder,
        type(causal_lm).__name__,
        ", ".join(foreign[:5]),
        len(foreign),
    )


def quantized_loading(
    quantization: Quantization | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that quantize linear layers, except the output layer.

    Args:
        quantization: None returns no arguments.
        dtype: of products with the quantized weights.
        device: of the loaded weights.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if quantization is None:
        return {}
    check_bitsandbytes(quantization, "model.quantization")
    nf4 = quantization is Quantization.nf4
    config = BitsAndBytesConfig(
        load_in_8bit=not nf4,
        load_in_4bit=nf4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(causal_lm: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for CPUs at the first scoring.

    Repacked weights pass no gradients, and scoring alternates with training.
    """
    module: Any
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
        offload_inputs(causal_lm)
    model = PackedCausalLM(causal_lm, backend, config.compile, sequence, Arrangement.padded)
    model.start_as(recorded_arrangement(text.model_type), max_length)
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
