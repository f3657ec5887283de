"""Rules about the policy's adapter and the reference model, and what `reference.mode=auto` is."""

from collections.abc import Callable, Collection
from dataclasses import replace

from dpo_dist.config.keys import Rule, unused
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    Offload,
    ParallelismKind,
    Quantization,
    ReferenceConfig,
    ReferenceMode,
    RunConfig,
)
from dpo_dist.config.verb_options import ExportedWeights

_LOADED = (ReferenceMode.cached, ReferenceMode.live)
_STORED = (ReferenceMode.cached,)
MODES_USING = {
    "path": _LOADED,
    "quantization": _LOADED,
    "numerics": _STORED,
    "offload": _LOADED,
    "nvme_path": _LOADED,
    "rows_per_shard": _STORED,
}
"""Options of `reference` and the modes in which they have an effect.

`store` is not among them: like `data.cache` it names a folder, which scripts and saved configurations set for
runs of every mode.
"""

# They define the reference model; the other options only say how it is loaded and scored.
_DEFINING = ("path", "quantization", "numerics")


def resolve_reference(config: RunConfig, given: Collection[str] = ()) -> RunConfig:
    """Replace `auto` by `none`, `adapter` or `cached`, and reset options without effect.

    An experiment may set how its reference model is loaded, and the command line may choose a loss or a mode
    that loads none. Options that the command line sets are kept, so that a rule refuses them.

    Args:
        config: with every section typed.
        given: the keys that the command line sets.
    """
    reference = config.reference
    mode_given = not {"reference", "reference.mode"}.isdisjoint(given)
    follows = reference.mode is ReferenceMode.auto or (not mode_given and _is_overruled(config, given))
    mode = _needed_mode(config) if follows else reference.mode
    unused = []
    if follows or mode_given:
        unused += [opt for opt, modes in MODES_USING.items() if mode not in modes and opt not in _DEFINING]
    if follows and mode is ReferenceMode.none and _is_given("loss", given):
        unused += _DEFINING
    defaults = ReferenceConfig()
    reset = {option: getattr(defaults, option) for option in unused if f"reference.{option}" not in given}
    return replace(config, reference=replace(reference, mode=mode, **reset))


def _is_overruled(config: RunConfig, given: Collection[str]) -> bool:
    """Return whether the command line chooses a loss or a model that contradicts the experiment's mode."""
    mode = config.reference.mode
    if _is_given("loss", given):
        return (mode is ReferenceMode.none) is config.loss.needs_reference
    return mode is ReferenceMode.adapter and config.model.adapter is None and _is_given("model", given)


def _is_given(section: str, given: Collection[str]) -> bool:
    return any(key.partition(".")[0] == section for key in given)


def _needed_mode(config: RunConfig) -> ReferenceMode:
    if not config.loss.needs_reference:
        return ReferenceMode.none
    reference, model = config.reference, config.model
    base_is_reference = reference.path is None and reference.quantization is None
    if model.adapter is not None and base_is_reference:
        return ReferenceMode.adapter
    return ReferenceMode.cached


def _names_layers(targets: object) -> bool:
    if isinstance(targets, list):
        return bool(targets) and all(isinstance(name, str) and name for name in targets)
    return targets in ("all-linear", None)


def _names_each_once(modules: list[str]) -> bool:
    return all(modules) and len(set(modules)) == len(modules)


def _of_adapter(
    keys: str, broken: Callable[[AdapterConfig], bool], why: str, remedy: str, expected: str = ""
) -> Rule:
    """Return a rule between the keys of an adapter."""

    def is_broken(config: RunConfig) -> bool:
        return config.model.adapter is not None and broken(config.model.adapter)

    return Rule(" ".join(f"model.adapter.{key}" for key in keys.split()), is_broken, why, remedy, expected)


EXPORT_RULES = (
    unused("export.merge model.adapter", lambda c: c.model.adapter is not None, "train an adapter"),
    unused(
        "export.weights trainer.ema_decay", lambda c: c.trainer.ema_decay is not None, "set trainer.ema_decay"
    ),
    unused(
        "export.checkpoint export.average",
        lambda c: not c.export.average,
        "remove one of them: export.average names what is exported",
    ),
    Rule(
        "export.average export.merge export.weights",
        lambda c: bool(c.export.average) and (c.export.merge or c.export.weights is not ExportedWeights.last),
        "export.average takes whole models, so export.merge and export.weights have no effect on it",
        "export each checkpoint with export.merge or export.weights first, and name the folders",
    ),
    Rule(
        "export.average",
        lambda c: (
            len(c.export.average) == 1
            or len({member.path for member in c.export.average}) < len(c.export.average)
        ),
        "an average has two members or more, each once",
        "set export.checkpoint for one; for more of one member {{path: FOLDER, weight: 2}}",
        "two folders or more",
    ),
)

ADAPTER_RULES = (
    _of_adapter(
        "dropout",
        lambda adapter: adapter.dropout != 0,
        "policy and reference must compute the same function, so an adapter has no dropout",
        "remove it; a smaller r, fewer target_modules or a larger loss.beta regularize too",
        "0",
    ),
    _of_adapter(
        "target_modules",
        lambda adapter: not _names_layers(adapter.target_modules),
        "model.adapter.target_modules names no layers",
        "write target_modules: all-linear, or names in brackets",
        "all-linear, or a list such as [q_proj,v_proj]",
    ),
    _of_adapter(
        "modules_to_save target_modules",
        lambda adapter: (
            isinstance(adapter.target_modules, list)
            and bool(set(adapter.modules_to_save or ()) & set(adapter.target_modules))
        ),
        "a module that is trained in full needs no low-rank matrices",
        "remove it from one of both",
    ),
    _of_adapter(
        "modules_to_save",
        lambda adapter: not _names_each_once(adapter.modules_to_save or []),
        "model.adapter.modules_to_save names each module once",
        "write names in brackets, or remove the key",
        "a list such as [embed_tokens,lm_head]",
    ),
    *(
        unused(
            f"model.adapter.{option} model.adapter.path",
            lambda c: c.model.adapter is None or c.model.adapter.path is not None,
            "set model.adapter.path too",
        )
        for option in ("on_top",)
    ),
    _of_adapter(
        "on_top variant",
        lambda adapter: adapter.on_top and adapter.variant is AdapterVariant.dora,
        "DoRA scales the weights that it changes, and would scale those of the adapter below it too",
        "set model.adapter.variant=lora, or merge the first adapter into its base",
        "variant lora or rslora",
    ),
    Rule(
        "model.adapter pairs.rounds",
        lambda c: c.model.adapter is not None and c.model.adapter.path is not None and bool(c.pairs.rounds),
        "each round merges its adapter into the model, so that the next one has no adapter to continue",
        "merge the adapter of model.adapter.path into its base, and set model.path to the result",
    ),
    Rule(
        "model.quantization model.adapter",
        lambda c: c.model.quantization is not None and c.model.adapter is None,
        "quantized weights cannot be trained themselves",
        "set model.adapter={{r: 64, alpha: 128}}, or model.quantization=null",
    ),
    Rule(
        "model.quantization parallelism.kind",
        lambda c: c.model.quantization is not None and c.parallelism.kind is not ParallelismKind.ddp,
        "ZeRO would separate quantized weights from the scales of their blocks",
        "choose parallelism=ddp, or model.quantization=null to shard the base",
        "parallelism.kind=ddp: every process has the whole quantized base",
    ),
    Rule(
        "model.adapter.variant model.quantization",
        lambda c: (
            c.model.quantization is Quantization.int8
            and c.model.adapter is not None
            and c.model.adapter.variant is AdapterVariant.dora
        ),
        "DoRA needs the norms of the base's weights, which peft cannot compute from 8-bit ones",
        "set model.quantization=nf4, or another model.adapter.variant",
    ),
)


def _unused_in_mode(option: str) -> Rule:
    modes = MODES_USING[option]
    return unused(
        f"reference.{option} reference.mode",
        lambda c: c.reference.mode in modes,
        "choose another reference.mode",
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
    *(_unused_in_mode(option) for option in MODES_USING),
)

_PLACEMENT = (
    Rule(
        "reference.offload reference.nvme_path",
        lambda c: c.reference.offload is Offload.nvme and c.reference.nvme_path is None,
        "offload to NVMe needs a folder on the device",
        "set reference.nvme_path to a folder on a local disk of every node",
    ),
    unused(
        "reference.nvme_path reference.offload",
        lambda c: c.reference.offload is Offload.nvme or c.reference.mode not in _LOADED,
        "set reference.offload=nvme",
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
    unused(
        "loss.sync_reference.mixup loss.sync_reference.every",
        lambda c: c.loss.sync_reference.every is not None,
        "set loss.sync_reference.every",
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
