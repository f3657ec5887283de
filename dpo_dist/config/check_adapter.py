"""What must hold for adapters, quantized weights, and the reference that is the adapter's base."""

from dpo_dist.config.ranges import check_range
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    ModelConfig,
    Offload,
    ParallelismConfig,
    ParallelismKind,
    Quantization,
    ReferenceConfig,
    ReferenceMode,
)
from dpo_dist.errors import ConfigError


def check_adapter(model: ModelConfig, reference: ReferenceConfig, parallelism: ParallelismConfig) -> None:
    """Accept these sections or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    if model.adapter is not None:
        _check_shape(model.adapter)
    if reference.mode is ReferenceMode.adapter:
        _check_reference(model, reference)
    if model.quantization is not None:
        _check_quantization(model, reference, parallelism)


def _check_shape(adapter: AdapterConfig) -> None:
    check_range("model.adapter.r", adapter.r, at_least=1)
    check_range("model.adapter.alpha", adapter.alpha, above=0)
    if adapter.dropout != 0:
        raise ConfigError(
            "policy and reference must compute the same function, so nothing is dropped out",
            where="model.adapter.dropout",
            got=f"{adapter.dropout:g}",
            expected="0",
            remedy="leave it out; a smaller r, fewer target_modules or a larger loss.beta regularize too",
        )
    targets = adapter.target_modules
    named = isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
    if not named and targets != "all-linear":
        raise ConfigError(
            "model.adapter.target_modules names no layers",
            where="model.adapter.target_modules",
            got=str(targets),
            expected="all-linear, or a list such as [q_proj,v_proj]",
            remedy="write target_modules: all-linear, or names in brackets",
        )


def _check_reference(model: ModelConfig, reference: ReferenceConfig) -> None:
    if model.adapter is None:
        raise ConfigError(
            "without an adapter there is none to switch off",
            where="reference.mode, model.adapter",
            got=f"{reference.mode}, null",
            remedy="set model.adapter={r: 64, alpha: 128}, or choose reference=cached",
        )
    if reference.path is not None:
        raise ConfigError(
            "with its adapter off the policy is its own base and no other model",
            where="reference.path, reference.mode",
            got=f"{reference.path}, {reference.mode}",
            remedy="leave reference.path out, or choose reference=cached",
        )
    if reference.offload is not Offload.none:
        raise ConfigError(
            "the reference is the policy itself, so it cannot be offloaded alone",
            where="reference.offload, reference.mode",
            got=f"{reference.offload}, {reference.mode}",
            remedy="leave reference.offload out, or set parallelism.offload_parameters",
        )


def _check_quantization(
    model: ModelConfig, reference: ReferenceConfig, parallelism: ParallelismConfig
) -> None:
    if model.adapter is None:
        raise ConfigError(
            "quantized weights cannot be trained themselves",
            where="model.quantization, model.adapter",
            got=f"{model.quantization}, null",
            remedy="set model.adapter={r: 64, alpha: 128}, or model.quantization=null",
        )
    if parallelism.kind is not ParallelismKind.ddp:
        raise ConfigError(
            "ZeRO shards plain numbers, and would tear the blocks of quantized weights from their scales",
            where="model.quantization, parallelism.kind",
            got=f"{model.quantization}, {parallelism.kind}",
            expected="parallelism.kind=ddp: every process holds the whole quantized base",
            remedy="choose parallelism=ddp, or model.quantization=null to shard the base",
        )
    if model.quantization is Quantization.int8 and model.adapter.variant is AdapterVariant.dora:
        raise ConfigError(
            "DoRA needs the norms of the base's weights, which peft cannot take of 8-bit ones",
            where="model.adapter.variant, model.quantization",
            got=f"{model.adapter.variant}, {model.quantization}",
            remedy="set model.quantization=nf4, or another model.adapter.variant",
        )
    if model.compile:
        raise ConfigError(
            "torch.compile is not known to be exact with quantized weights",
            where="model.compile, model.quantization",
            got=f"true, {model.quantization}",
            remedy="set model.compile=false",
        )
    has_own_weights = reference.mode in (ReferenceMode.cached, ReferenceMode.live)
    if has_own_weights and reference.path is None and reference.quantization is not model.quantization:
        raise ConfigError(
            "the reference would be scored without the quantization that the policy starts from",
            where="reference.quantization, model.quantization",
            got=f"{reference.quantization or 'null'}, {model.quantization}",
            expected="the same, or reference.mode=adapter: the policy's own base, with its adapter off",
            remedy=f"choose reference=adapter, or set reference.quantization={model.quantization}",
        )
