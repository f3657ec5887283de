"""What must hold between where the reference lies, in what precision, and whether it follows the policy."""

from dpo_dist.config.loss_kinds import SyncReferenceConfig
from dpo_dist.config.ranges import check_range
from dpo_dist.config.schema import Offload, ParallelismConfig, ReferenceConfig, ReferenceMode, RunConfig
from dpo_dist.errors import ConfigError


def check_placement(config: RunConfig) -> None:
    """Accept where `config` puts policy and reference, or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_nvme(config.reference, config.model.compile)
    _check_policys_offload(config.parallelism)
    _check_quantization(config.reference, config.model.compile)
    _check_sync(config.loss.sync_reference, config)


def _check_nvme(reference: ReferenceConfig, compiled: bool) -> None:
    where, got = (
        "reference.offload, reference.nvme_path",
        f"{reference.offload}, {reference.nvme_path or 'null'}",
    )
    on_nvme = reference.offload is Offload.nvme
    if on_nvme and reference.nvme_path is None:
        raise ConfigError(
            "offload to NVMe needs a folder on the device",
            where=where,
            got=got,
            remedy="set reference.nvme_path to a folder on a local disk of every node",
        )
    if not on_nvme and reference.nvme_path is not None:
        raise ConfigError(
            "reference.nvme_path has no effect without offload to nvme",
            where=where,
            got=got,
            remedy="leave reference.nvme_path out, or set reference.offload=nvme",
        )
    if on_nvme and compiled:
        raise ConfigError(
            "a compiled layer needs all its weights at once, more than are read from NVMe at a time",
            where="model.compile, reference.offload",
            got="true, nvme",
            remedy="set model.compile=false or reference.offload=cpu",
        )


def _check_policys_offload(parallelism: ParallelismConfig) -> None:
    for option in ("offload_parameters", "offload_optimizer"):
        if getattr(parallelism, option) is Offload.nvme:
            raise ConfigError(
                "only the reference can lie on NVMe, not what is trained",
                where=f"parallelism.{option}",
                got="nvme",
                expected="none or cpu",
                remedy=f"set parallelism.{option}=cpu",
            )


def _check_quantization(reference: ReferenceConfig, compiled: bool) -> None:
    if reference.quantization is None:
        return
    if reference.mode not in (ReferenceMode.cached, ReferenceMode.live):
        raise ConfigError(
            "reference.quantization has no effect without a reference of its own",
            where="reference.quantization, reference.mode",
            got=f"{reference.quantization}, {reference.mode}",
            expected="reference.mode cached or live",
            remedy="leave reference.quantization out",
        )
    if reference.offload is not Offload.none:
        raise ConfigError(
            "a quantized reference is whole on every device and cannot be offloaded",
            where="reference.quantization, reference.offload",
            got=f"{reference.quantization}, {reference.offload}",
            expected="reference.offload=none",
            remedy="leave one of them out",
        )
    if compiled:
        raise ConfigError(
            "torch.compile is not known to be exact with quantized weights",
            where="model.compile, reference.quantization",
            got=f"true, {reference.quantization}",
            remedy="set model.compile=false, or leave reference.quantization out",
        )


def _check_sync(sync: SyncReferenceConfig, config: RunConfig) -> None:
    check_range("loss.sync_reference.every", sync.every, at_least=1)
    check_range("loss.sync_reference.mixup", sync.mixup, above=0, at_most=1)
    reference = config.reference
    if sync.every is None:
        if sync.mixup != SyncReferenceConfig.mixup:
            raise ConfigError(
                "loss.sync_reference.mixup has no effect without loss.sync_reference.every",
                where="loss.sync_reference",
                got=f"mixup {sync.mixup:g}, every null",
                remedy="set loss.sync_reference.every, or leave mixup out",
            )
        return
    if reference.mode is not ReferenceMode.live:
        raise ConfigError(
            "only a live reference can follow the policy",
            where="loss.sync_reference.every, reference.mode",
            got=f"{sync.every}, {reference.mode}",
            expected="reference.mode=live, with a loss that needs a reference",
            remedy="choose reference=live, or leave loss.sync_reference out",
        )
    if config.model.adapter is not None:
        raise ConfigError(
            "an adapter's base does not move, so the reference has nothing to follow",
            where="loss.sync_reference.every, model.adapter",
            got=f"{sync.every}, an adapter",
            remedy="train all weights, or leave loss.sync_reference out",
        )
    if reference.quantization is not None:
        raise ConfigError(
            "quantized weights cannot be moved towards the policy's",
            where="loss.sync_reference.every, reference.quantization",
            got=f"{sync.every}, {reference.quantization}",
            remedy="leave one of them out",
        )
    if reference.offload is Offload.nvme:
        raise ConfigError(
            "the reference follows the policy in memory, not on NVMe",
            where="loss.sync_reference.every, reference.offload",
            got=f"{sync.every}, nvme",
            expected="reference.offload none or cpu",
            remedy="set reference.offload=cpu, or leave loss.sync_reference out",
        )
