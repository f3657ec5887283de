"""The rows about the adapter: what goes together, and with the weights below it; those about exports."""

from collections.abc import Callable

from dpo_dist.config.adapter_schema import AdapterConfig, AdapterVariant, splits_base
from dpo_dist.config.check import Rule
from dpo_dist.config.export_schema import ExportConfig
from dpo_dist.config.schema import ParallelismKind, Quantization, RunConfig

# config.yaml of earlier versions names the default of every key.
_UNSET_INITS = (None, "default")


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
    Rule(
        "export.merge model.adapter",
        lambda c: c.export.merge and c.model.adapter is None,
        "the run trains all weights, so there is no adapter to merge",
        "remove export.merge",
    ),
    Rule(
        "export.average export.checkpoint",
        lambda c: bool(c.export.average) and c.export.checkpoint != ExportConfig.checkpoint,
        "export.average names what is exported, so export.checkpoint has no effect",
        "add the checkpoint to export.average, or remove one of them",
    ),
    Rule(
        "export.average",
        lambda c: len(c.export.average) == 1 or len(set(c.export.average)) < len(c.export.average),
        "an average has two members or more, each once",
        "set export.checkpoint for a single one; export.average_weights gives members different weights",
        "[step-000100,step-000200]",
    ),
    Rule(
        "export.average_weights export.average",
        lambda c: bool(c.export.average_weights) and len(c.export.average_weights) != len(c.export.average),
        "export.average_weights has another number of entries than export.average",
        "give each member of export.average one weight, or remove export.average_weights",
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
    _of_adapter(
        "revision path",
        lambda adapter: adapter.revision is not None and adapter.path is None,
        "model.adapter.revision has no effect without model.adapter.path",
        "set model.adapter.path too, or remove model.adapter.revision",
    ),
    _of_adapter(
        "on_top path",
        lambda adapter: adapter.on_top and adapter.path is None,
        "model.adapter.on_top has no effect without model.adapter.path",
        "set model.adapter.path too, or remove model.adapter.on_top",
    ),
    _of_adapter(
        "on_top variant",
        lambda adapter: adapter.on_top and adapter.variant is AdapterVariant.dora,
        "DoRA scales the weights that it changes, and would scale those of the adapter below it too",
        "set model.adapter.variant=lora, or merge the first adapter into its base",
        "variant lora or rslora",
    ),
    _of_adapter(
        "init path",
        lambda adapter: adapter.init not in _UNSET_INITS and adapter.continues,
        "an adapter that is continued has its values already",
        "remove model.adapter.init, or set model.adapter.on_top=true for a new adapter above it",
    ),
    _of_adapter(
        "init variant",
        lambda adapter: splits_base(adapter.init) and adapter.variant is AdapterVariant.dora,
        "DoRA scales the weights of which this initialization takes a part",
        "set model.adapter.variant=lora or model.adapter.init=default",
    ),
    Rule(
        "model.adapter.init model.quantization",
        lambda c: (
            c.model.quantization is not None
            and c.model.adapter is not None
            and splits_base(c.model.adapter.init)
        ),
        "quantized weights have no singular vectors or QR factors",
        "set model.adapter.init=default, or model.quantization=null",
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
            c.model.quantization is Quantization.int8 and c.model.adapter.variant is AdapterVariant.dora
        ),
        "DoRA needs the norms of the base's weights, which peft cannot compute from 8-bit ones",
        "set model.quantization=nf4, or another model.adapter.variant",
    ),
)
