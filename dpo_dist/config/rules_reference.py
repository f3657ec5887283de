"""The rules about the reference model: mode, numerics, offload, quantization, moving with the policy."""

from collections.abc import Callable

from dpo_dist.config.check import Rule
from dpo_dist.config.loss_kinds import SyncReferenceConfig
from dpo_dist.config.reference_mode import MODES_USING
from dpo_dist.config.schema import Numerics, Offload, ReferenceConfig, ReferenceMode, RunConfig


def _unused_in_mode(option: str) -> Rule:
    modes = MODES_USING[option]
    return Rule(
        f"reference.{option} reference.mode",
        lambda c: (
            getattr(c.reference, option) != getattr(ReferenceConfig, option) and c.reference.mode not in modes
        ),
        f"reference.{option} has no effect with reference.mode={{reference.mode}}",
        f"remove reference.{option}",
        f"reference.mode={' or '.join(modes)}",
    )


_MODE = (
    Rule(
        "reference.mode loss",
        lambda c: c.reference.mode is ReferenceMode.none and c.loss.needs_reference,
        "this loss needs a reference model",
        "choose reference=auto, or set loss.reference_free=true to take its log-probs as 0",
        "auto, cached or live, or adapter with model.adapter",
    ),
    Rule(
        "reference.mode loss loss.reference_free",
        lambda c: c.reference.mode is not ReferenceMode.none and not c.loss.needs_reference,
        "this loss does not use a reference model",
        "choose reference=none, or remove reference.mode: auto follows the loss",
        "auto or none",
    ),
    Rule(
        "reference.mode model.adapter",
        lambda c: c.reference.mode is ReferenceMode.adapter and c.model.adapter is None,
        "reference.mode=adapter switches off the policy's adapter, and the policy has none",
        "set model.adapter={{r: 64, alpha: 128}}, or choose reference=cached",
    ),
    Rule(
        "reference.path reference.mode",
        lambda c: c.reference.mode is ReferenceMode.adapter and c.reference.path is not None,
        "with its adapter off, the policy is its base model, so reference.path has no effect",
        "remove reference.path, or choose reference=cached",
    ),
    Rule(
        "reference.offload reference.mode",
        lambda c: c.reference.mode is ReferenceMode.adapter and c.reference.offload is not Offload.none,
        "the reference model is the policy itself and cannot be offloaded alone",
        "remove reference.offload, or set parallelism.offload_parameters",
    ),
    *(_unused_in_mode(option) for option in MODES_USING),
    Rule(
        "reference.revision reference.path",
        lambda c: c.reference.revision is not None and c.reference.path is None,
        "reference.revision has no effect without reference.path",
        "set reference.path too, or model.revision for both",
    ),
    Rule(
        "reference.numerics reference.audit_pairs",
        lambda c: c.reference.numerics is Numerics.tolerant and not c.reference.audit_pairs,
        "log-probs of other numerics are reused only if their drift is measured",
        "remove reference.audit_pairs, or set reference.numerics=strict",
    ),
)

_PLACEMENT = (
    Rule(
        "reference.offload reference.nvme_path",
        lambda c: c.reference.offload is Offload.nvme and c.reference.nvme_path is None,
        "offload to NVMe needs a folder on the device",
        "set reference.nvme_path to a folder on a local disk of every node",
    ),
    Rule(
        "reference.offload reference.nvme_path",
        lambda c: c.reference.offload is not Offload.nvme and c.reference.nvme_path is not None,
        "reference.nvme_path has no effect without offload to nvme",
        "remove reference.nvme_path, or set reference.offload=nvme",
    ),
    Rule(
        "model.compile reference.offload",
        lambda c: c.model.compile and c.reference.offload is Offload.nvme,
        "a compiled layer needs all its weights at once, more than are read from NVMe at a time",
        "set model.compile=false or reference.offload=cpu",
    ),
    Rule(
        "reference.quantization model.quantization",
        lambda c: (
            c.model.quantization is not None
            and c.reference.mode in (ReferenceMode.cached, ReferenceMode.live)
            and c.reference.path is None
            and c.reference.quantization is not c.model.quantization
        ),
        "the reference model would not have the quantization that the policy starts from",
        "choose reference=adapter, or set reference.quantization={model.quantization}",
        "the same, or reference.mode=adapter: the policy's own base, with its adapter off",
    ),
    Rule(
        "reference.quantization reference.offload",
        lambda c: c.reference.quantization is not None and c.reference.offload is not Offload.none,
        "a quantized reference model is whole on every device and cannot be offloaded",
        "remove one of them",
        "reference.offload=none",
    ),
    Rule(
        "model.compile reference.quantization",
        lambda c: c.model.compile and c.reference.quantization is not None,
        "torch.compile is not known to be exact with quantized weights",
        "set model.compile=false, or remove reference.quantization",
    ),
)


def _sync(key: str, broken: Callable[[RunConfig], bool], why: str, remedy: str, expected: str = "") -> Rule:
    return Rule(
        f"loss.sync_reference.every {key}",
        lambda c: c.loss.sync_reference.every is not None and broken(c),
        why,
        f"{remedy}, or remove loss.sync_reference",
        expected,
    )


_SYNC = (
    Rule(
        "loss.sync_reference.mixup loss.sync_reference.every",
        lambda c: (
            c.loss.sync_reference.every is None and c.loss.sync_reference.mixup != SyncReferenceConfig.mixup
        ),
        "loss.sync_reference.mixup has no effect without loss.sync_reference.every",
        "set loss.sync_reference.every, or remove mixup",
    ),
    _sync(
        "reference.mode",
        lambda c: c.reference.mode is not ReferenceMode.live,
        "only a live reference model can follow the policy",
        "choose reference=live",
        "reference.mode=live, with a loss that needs a reference model",
    ),
    _sync(
        "model.adapter",
        lambda c: c.model.adapter is not None,
        "an adapter's base does not change, so the reference model has nothing to follow",
        "train all weights",
    ),
    _sync(
        "reference.quantization",
        lambda c: c.reference.quantization is not None,
        "quantized weights cannot be moved towards the policy's",
        "remove reference.quantization",
    ),
    _sync(
        "reference.offload",
        lambda c: c.reference.offload is Offload.nvme,
        "the reference model follows the policy in memory, not on NVMe",
        "set reference.offload=cpu",
        "reference.offload none or cpu",
    ),
)

REFERENCE_RULES = (*_MODE, *_PLACEMENT, *_SYNC)
