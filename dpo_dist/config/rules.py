"""The rules between the values of a run, one row each: no option without effect (law L5).

Bounds of single values are in the schema; what `reference.mode=auto` is, in `reference`.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

from dpo_dist.config.data import MARKER_GAP, UNTRAINED_PARTS, DataFormat, SourceConfig
from dpo_dist.config.fields import fields_of
from dpo_dist.config.keys import LOSS, Rule, unused
from dpo_dist.config.losses import Divergence, LossConfig, LossKind, kinds_using
from dpo_dist.config.metrics import METRICS, PREFIX
from dpo_dist.config.reference import LOADED, MODES_USING
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    AttentionBackend,
    Direction,
    Dtype,
    LearningRateSchedule,
    Offload,
    OptimConfig,
    OptimizerKind,
    ParallelismKind,
    Quantization,
    ReferenceMode,
    RunConfig,
    SamplesConfig,
    TrainerConfig,
)
from dpo_dist.config.verb_options import ExportedWeights

Test = Callable[[RunConfig], bool]
_SIXTEEN_BIT_KERNELS = (AttentionBackend.flash_attention_2, AttentionBackend.varlen)
_FALLING = (LearningRateSchedule.linear, LearningRateSchedule.cosine)
_NVME = Offload.nvme

_MODEL = (
    Rule(
        "run.name",
        lambda c: c.run.name in ("", ".", "..") or "/" in c.run.name,
        "run.name is not the name of one folder",
        "set run.root to choose the folder of run directories",
    ),
    Rule(
        "model.attention model.dtype",
        lambda c: c.model.dtype is Dtype.fp32 and c.model.attention in _SIXTEEN_BIT_KERNELS,
        "{model.attention} computes in 16 bits only",
        "set model.attention=sdpa or model.dtype=bf16",
    ),
    Rule(
        "trainer.deterministic model.liger",
        lambda c: c.trainer.deterministic and c.model.liger,
        "Liger's kernels may not be deterministic",
        "set model.liger=false or trainer.deterministic=false",
    ),
    unused(
        "model.activation_offload model.gradient_checkpointing",
        lambda c: c.model.gradient_checkpointing != "none",
        "set model.gradient_checkpointing=full: the inputs of checkpointed layers are moved",
    ),
)


def _not_compiled(keys: str, is_set: Test, why: str) -> Rule:
    return Rule(
        f"model.compile {keys}",
        lambda c: c.model.compile and is_set(c),
        why,
        f"set model.compile=false, or remove {keys.partition(' ')[0]}",
    )


_UNKNOWN = "torch.compile is not known to be exact with"
_COMPILE = (
    _not_compiled("model.liger", lambda c: c.model.liger, "torch.compile and Liger fuse the same operations"),
    _not_compiled(
        "model.quantization", lambda c: c.model.quantization is not None, f"{_UNKNOWN} quantized weights"
    ),
    _not_compiled(
        "reference.quantization",
        lambda c: c.reference.quantization is not None,
        f"{_UNKNOWN} quantized weights",
    ),
    _not_compiled(
        "reference.offload",
        lambda c: c.reference.offload is _NVME,
        "a compiled layer needs all its weights at once, more than are read from NVMe at a time",
    ),
    _not_compiled(
        "loss.router.aux_coefficient loss.router.z_coefficient",
        lambda c: c.loss.router.is_set,
        f"{_UNKNOWN} losses of routers",
    ),
)

OTHER_ROLE_NAMES = frozenset(
    {"human", "Human", "User", "gpt", "chatgpt", "bot", "Assistant"}
    | {"observation", "tool_response", "function", "function_call", "tool_call"}
)
"""Roles of datasets that are read as user, assistant or tool."""
_ROLES = ("system", "user", "assistant", "tool")


def _is_mistyped_role(role: str) -> bool:
    """Return whether a role is nearly a usual one; a role of another name may be one of the records."""
    return role not in _ROLES and role.isalpha() and bool(difflib.get_close_matches(role, _ROLES, cutoff=0.8))


def _has_rankings(config: RunConfig) -> bool:
    """Return whether a source may have rankings, by its format."""
    sources = [*config.data.train, *config.data.eval]
    return any(source.format in (DataFormat.auto, DataFormat.ranked) for source in sources)


def _is_untrained_part(entry: str) -> bool:
    begin, _, end = entry.partition(MARKER_GAP)
    return entry in UNTRAINED_PARTS or bool(begin.strip() and end.strip())


def at(config: RunConfig, key: str) -> Any:
    """Return the value of a key."""
    return reduce(getattr, key.split("."), config)


def _is_repeated(sources: list[SourceConfig]) -> bool:
    """Return whether two sources are equal apart from their weights."""
    bare = [replace(source, weight=SourceConfig.weight) for source in sources]
    return any(source in bare[:index] for index, source in enumerate(bare))


def _given_once(key: str) -> Rule:
    return Rule(
        key,
        lambda c: _is_repeated(at(c, key)),
        f"a source of {key} is given twice",
        "remove one of them; weight: 2 draws each pair of a source of data.train twice per epoch",
    )


def _unweighted(key: str) -> Rule:
    return Rule(
        key,
        lambda c: any(source.weight != SourceConfig.weight for source in at(c, key)),
        "a weight has no effect on evaluation data: every pair counts once",
        "remove the weight, or set limit",
    )


_DATA = (
    *map(_given_once, ("data.train", "data.eval", "evaluation.data")),
    *map(_unweighted, ("data.eval", "evaluation.data")),
    Rule(
        "data.eval data.eval_share",
        lambda c: bool(c.data.eval) and c.data.eval_share > 0,
        "evaluation data are given twice: by their sources and as a share of the training data",
        "remove data.eval_share; data.drop_eval_prompts=true keeps prompts of data.eval out of training",
    ),
    unused(
        "data.drop_eval_prompts data.eval",
        lambda c: bool(c.data.eval),
        "set data.eval; data.eval_share never shares a prompt",
    ),
    unused("data.ranked data.train", _has_rankings, "name a source of format ranked or auto"),
    Rule(
        "data.max_prompt_length data.max_length",
        lambda c: c.data.max_prompt_length is not None and c.data.max_prompt_length >= c.data.max_length,
        "the longest prompt leaves no room for a response",
        "raise data.max_length or lower data.max_prompt_length",
    ),
    Rule(
        "data.trained_roles",
        lambda c: (
            not c.data.trained_roles
            or not all(c.data.trained_roles)
            or bool(OTHER_ROLE_NAMES.intersection(c.data.trained_roles))
            or any(map(_is_mistyped_role, c.data.trained_roles))
        ),
        "data.trained_roles has no role, or one that is read as another role or mistyped",
        "write data.trained_roles=[assistant], or several of assistant, user, tool and system",
    ),
    Rule(
        "data.untrained",
        lambda c: not all(map(_is_untrained_part, c.data.untrained)),
        "data.untrained has an entry that is neither a named part nor a pair of markers",
        f"write {', '.join(UNTRAINED_PARTS)}, or a marker as BEGIN...END, such as '<note>...</note>'",
    ),
    Rule(
        "evaluation.model",
        lambda c: (
            not c.evaluation.models
            or "" in c.evaluation.models
            or len(set(c.evaluation.models)) < len(c.evaluation.models)
        ),
        "evaluation.model names no model, or one twice",
        "write evaluation.model=FOLDER, or 'evaluation.model=[FOLDER,FOLDER]' for several in turn",
    ),
)


def _unused_by_loss(option: str) -> Rule:
    users = ", ".join(sorted(kinds_using(option)))
    return unused(
        f"loss.{option} {LOSS}", lambda c: c.loss.uses(option), f"choose a loss that uses it: {users}"
    )


def _unused_by_a_term(option: str) -> Rule:
    """Refuse an option of the whole loss that a term lacks; `sft` beside a preference loss is exempt."""
    return Rule(
        f"loss.{option} {LOSS}",
        lambda c: (
            getattr(c.loss, option) != getattr(LossConfig, option)
            and c.loss.uses(option)
            and any(option not in facts.options for facts in c.loss.facts if facts.fewest_responses > 1)
        ),
        f"a term of the loss does not use loss.{option}",
        f"remove loss.{option}, or the terms that do not use it",
    )


_LOSS = (
    Rule(
        LOSS,
        lambda c: len(set(c.loss.kinds)) < len(c.loss.kinds),
        "a kind of loss appears twice",
        "make it one term with the sum of the weights",
    ),
    Rule(
        "loss.terms",
        lambda c: any(term.weight == 0 for term in c.loss.terms),
        "a term of weight 0 has no effect",
        "remove it from loss.terms",
    ),
    unused(
        "loss.kind loss.terms",
        lambda c: c.loss.kind in c.loss.kinds,
        "add it to loss.terms, which is the whole loss",
    ),
    *(_unused_by_loss(option) for option in fields_of(LossConfig) if kinds_using(option)),
    *map(_unused_by_a_term, ("divergence", "weighting")),
    Rule(
        "loss.function loss.kind",
        lambda c: LossKind.custom in c.loss.kinds and c.loss.function is None,
        "a custom loss needs a function",
        "set loss.function=my_losses:my_loss for the function my_loss in my_losses.py",
    ),
    unused(
        "loss.alpha_coefficient loss.divergence",
        lambda c: c.loss.divergence is Divergence.alpha,
        "set loss.divergence=alpha",
    ),
    Rule(
        f"loss.label_smoothing {LOSS}",
        lambda c: c.loss.label_smoothing == 0 and any(facts.smoothing_above_0 for facts in c.loss.facts),
        "this loss takes the logarithm of loss.label_smoothing",
        "remove loss.label_smoothing, or choose a value > 0 and < 0.5",
    ),
)


def _has_no_warmup(optim: OptimConfig) -> bool:
    return not (optim.warmup_ratio if optim.warmup_steps is None else optim.warmup_steps)


_OPTIM = (
    Rule(
        "optim.kind parallelism.offload_optimizer",
        lambda c: (
            c.optim.kind is OptimizerKind.adamw_8bit and c.parallelism.offload_optimizer is not Offload.none
        ),
        "an offloaded optimizer is DeepSpeed's CPU Adam, whose states are float32",
        "set optim.kind=adamw, or parallelism.offload_optimizer=none",
    ),
    Rule(
        "optim.warmup_steps optim.warmup_ratio",
        lambda c: (
            c.optim.warmup_steps is not None and c.optim.warmup_ratio not in (0, OptimConfig.warmup_ratio)
        ),
        "the length of the warm-up is given twice",
        "set optim.warmup_ratio=0, or remove optim.warmup_steps",
    ),
    Rule(
        "optim.warmup_steps trainer.max_steps",
        lambda c: (c.optim.warmup_steps or 0) > (c.trainer.max_steps or float("inf")),
        "the warm-up is longer than the run, so that optim.lr is never reached",
        "lower optim.warmup_steps, or raise trainer.max_steps",
    ),
    Rule(
        "optim.schedule optim.warmup_ratio optim.warmup_steps",
        lambda c: c.optim.schedule is LearningRateSchedule.constant_with_warmup and _has_no_warmup(c.optim),
        "constant_with_warmup has no warm-up here",
        "set optim.schedule=constant, optim.warmup_ratio=0.1 or optim.warmup_steps",
    ),
    unused(
        "optim.min_lr_ratio optim.schedule",
        lambda c: c.optim.schedule in _FALLING,
        "set optim.schedule=cosine or linear",
    ),
    Rule(
        "trainer.ema_decay trainer.keep_last",
        lambda c: c.trainer.ema_decay is not None and not c.trainer.keep_last,
        "the moving average of the weights is in the checkpoints, and none is kept",
        "set trainer.keep_last=1, or remove trainer.ema_decay",
    ),
)


def _needs_eval_data(key: str, off: str) -> Rule:
    return Rule(
        f"{key} data.eval",
        lambda c: bool(at(c, key)) and not c.data.eval_sources,
        f"{key} is about evaluations, and no evaluation data is given",
        f"set data.eval_share=0.05 or data.eval=[held_out.jsonl], or {key}={off}",
    )


def _needs_sharding(option: str, *kinds: ParallelismKind) -> Rule:
    key = f"parallelism.{option}"
    return Rule(
        f"{key} parallelism.kind",
        lambda c: at(c, key) is not Offload.none and c.parallelism.kind not in kinds,
        f"{{parallelism.kind}} does not support {key}",
        f"set parallelism.kind={' or '.join(kinds)}, or {key}=none",
    )


def _not_on_nvme(option: str) -> Rule:
    key = f"parallelism.{option}"
    return Rule(
        key,
        lambda c: at(c, key) is _NVME,
        "only the reference model can be offloaded to NVMe, not the policy",
        f"set {key}=cpu",
    )


def direction_of(trainer: TrainerConfig) -> Direction | None:
    """Return which values of `trainer.keep_best` are the best; None if it is not known."""
    metric = (trainer.keep_best or "").removeprefix(PREFIX)
    # Also of one source, bucket of lengths or percentile.
    known = (
        row.best
        for name, row in METRICS.items()
        if row.best and (metric == name or metric.startswith((f"{name}/", f"{name}_by_length/")))
    )
    return next(known, None)


_TRAINING = (
    _needs_eval_data("trainer.eval_every", "0"),
    _needs_eval_data("trainer.keep_best", "null"),
    _needs_eval_data("samples.prompts", "0"),
    *(
        unused(f"samples.{option} samples.prompts", lambda c: c.samples.prompts > 0, "set samples.prompts=16")
        for option in fields_of(SamplesConfig)
        if option != "prompts"
    ),
    _needs_sharding("offload_parameters", ParallelismKind.zero3),
    _needs_sharding("offload_optimizer", ParallelismKind.zero3, ParallelismKind.zero2),
    *map(_not_on_nvme, ("offload_parameters", "offload_optimizer")),
    unused(
        "trainer.keep_best trainer.eval_every",
        lambda c: c.trainer.eval_every > 0 or not c.data.eval_sources,
        "set trainer.eval_every=100: the last evaluation is the only one",
    ),
    Rule(
        "trainer.keep_best",
        lambda c: c.trainer.keep_best is not None and not c.trainer.keep_best.startswith(PREFIX),
        "checkpoints are chosen by a metric of evaluations, whose name begins with eval_",
        f"set trainer.keep_best={PREFIX}{{trainer.keep_best}}",
    ),
    Rule(
        "trainer.keep_best",
        lambda c: (c.trainer.keep_best or "").startswith(PREFIX) and direction_of(c.trainer) is None,
        "it is not known whether high or low values of this metric are better",
        "choose eval_loss, eval_rewards/accuracies or eval_rewards/margins",
    ),
)


def _names_layers(targets: object) -> bool:
    if isinstance(targets, list):
        return bool(targets) and all(isinstance(name, str) and name for name in targets)
    return targets in ("all-linear", None)


def _adapter(keys: str, broken: Callable[[AdapterConfig], bool], why: str, remedy: str) -> Rule:
    """Return a rule between the keys of an adapter."""
    return Rule(
        " ".join(f"model.adapter.{key}" for key in keys.split()),
        lambda c: c.model.adapter is not None and broken(c.model.adapter),
        why,
        remedy,
    )


_ADAPTER = (
    _adapter(
        "dropout",
        lambda adapter: adapter.dropout != 0,
        "policy and reference must compute the same function, so an adapter has no dropout",
        "remove it; a smaller r, fewer target_modules or a larger loss.beta regularize too",
    ),
    _adapter(
        "target_modules",
        lambda adapter: not _names_layers(adapter.target_modules),
        "model.adapter.target_modules names no layers",
        "write target_modules: all-linear, or names in brackets: [q_proj,v_proj]",
    ),
    _adapter(
        "modules_to_save target_modules",
        lambda adapter: (
            isinstance(adapter.target_modules, list)
            and not set(adapter.modules_to_save or ()).isdisjoint(adapter.target_modules)
        ),
        "a module that is trained in full needs no low-rank matrices",
        "remove it from one of both",
    ),
    _adapter(
        "modules_to_save",
        lambda adapter: "" in (names := adapter.modules_to_save or []) or len(set(names)) < len(names),
        "model.adapter.modules_to_save names each module once",
        "write names in brackets, such as [embed_tokens,lm_head], or remove the key",
    ),
    unused(
        "model.adapter.on_top model.adapter.path",
        lambda c: c.model.adapter is None or c.model.adapter.path is not None,
        "set model.adapter.path too",
    ),
    _adapter(
        "on_top variant",
        lambda adapter: adapter.on_top and adapter.variant is AdapterVariant.dora,
        "DoRA scales the weights that it changes, and would scale those of the adapter below it too",
        "set model.adapter.variant=lora, or merge the first adapter into its base",
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
        "choose parallelism=ddp, where every process has the whole base, or model.quantization=null",
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

_EXPORT = (
    unused("export.merge model.adapter", lambda c: c.model.adapter is not None, "train an adapter"),
    unused(
        "export.weights trainer.ema_decay", lambda c: c.trainer.ema_decay is not None, "set trainer.ema_decay"
    ),
    unused(
        "export.checkpoint export.average",
        lambda c: not c.export.average,
        "remove export.average, which names what is exported",
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
    ),
)


def _unused_in_mode(option: str) -> Rule:
    modes = MODES_USING[option]
    return unused(
        f"reference.{option} reference.mode",
        lambda c: c.reference.mode in modes,
        f"choose reference.mode={' or '.join(modes)}",
    )


def _sync(key: str, broken: Test, why: str, remedy: str) -> Rule:
    return Rule(
        f"loss.sync_reference.every {key}",
        lambda c: c.loss.sync_reference.every is not None and broken(c),
        why,
        f"{remedy}, or remove loss.sync_reference",
    )


_REFERENCE = (
    Rule(
        "reference.mode loss",
        lambda c: c.reference.mode is ReferenceMode.none and c.loss.needs_reference,
        "this loss needs a reference model",
        "choose reference=auto, or set loss.reference_free=true to take its log-probs as 0",
    ),
    Rule(
        "reference.mode loss loss.reference_free",
        lambda c: c.reference.mode is not ReferenceMode.none and not c.loss.needs_reference,
        "this loss does not use a reference model",
        "choose reference=none, or remove reference.mode: auto follows the loss",
    ),
    Rule(
        "reference.mode model.adapter",
        lambda c: c.reference.mode is ReferenceMode.adapter and c.model.adapter is None,
        "reference.mode=adapter switches off the policy's adapter, and the policy has none",
        "set model.adapter={{r: 64, alpha: 128}}, or choose reference=cached",
    ),
    *map(_unused_in_mode, MODES_USING),
    Rule(
        "reference.offload reference.nvme_path",
        lambda c: c.reference.offload is _NVME and c.reference.nvme_path is None,
        "offload to NVMe needs a folder on the device",
        "set reference.nvme_path to a folder on a local disk of every node",
    ),
    unused(
        "reference.nvme_path reference.offload",
        lambda c: c.reference.offload is _NVME or c.reference.mode not in LOADED,
        "set reference.offload=nvme",
    ),
    Rule(
        "reference.quantization model.quantization",
        lambda c: (
            c.model.quantization is not None
            and c.reference.mode in LOADED
            and c.reference.path is None
            and c.reference.quantization is not c.model.quantization
        ),
        "the reference model would not have the quantization that the policy starts from",
        "choose reference=adapter, or set reference.quantization={model.quantization}",
    ),
    Rule(
        "reference.quantization reference.offload",
        lambda c: c.reference.quantization is not None and c.reference.offload is not Offload.none,
        "a quantized reference model is whole on every device and cannot be offloaded",
        "remove one of them",
    ),
    unused(
        "loss.sync_reference.mixup loss.sync_reference.every",
        lambda c: c.loss.sync_reference.every is not None,
        "set loss.sync_reference.every",
    ),
    _sync(
        "reference.mode",
        lambda c: c.reference.mode is not ReferenceMode.live,
        "only a live reference model can follow the policy",
        "choose reference=live, with a loss that needs a reference model",
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
        lambda c: c.reference.offload is _NVME,
        "the reference model follows the policy in memory, not on NVMe",
        "set reference.offload=cpu",
    ),
)

RULES = (
    *_MODEL,
    *_COMPILE,
    *_ADAPTER,
    *_DATA,
    *_LOSS,
    *_OPTIM,
    *_TRAINING,
    *_REFERENCE,
    *_EXPORT,
)
"""In the order in which they are checked."""
