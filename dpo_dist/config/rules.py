"""The rules between the values of a run, one row each: no option without effect (law L5).

Those about adapters, exports and the reference model are in `rules_model`; bounds are in the schema.
"""

import difflib
from dataclasses import replace

from dpo_dist.config.data import MARKER_GAP, UNTRAINED_PARTS, DataFormat, SourceConfig
from dpo_dist.config.fields import fields_of
from dpo_dist.config.keys import LOSS, Rule, unused
from dpo_dist.config.losses import Divergence, LossConfig, LossKind, kinds_using
from dpo_dist.config.metrics import METRICS, PREFIX
from dpo_dist.config.rules_model import ADAPTER_RULES, EXPORT_RULES, REFERENCE_RULES
from dpo_dist.config.schema import (
    AttentionBackend,
    Direction,
    Dtype,
    LearningRateSchedule,
    Offload,
    OptimConfig,
    OptimizerKind,
    ParallelismKind,
    RunConfig,
    SamplesConfig,
    TrainerConfig,
)

_SIXTEEN_BIT_KERNELS = (AttentionBackend.flash_attention_2, AttentionBackend.varlen)
_FALLING = (LearningRateSchedule.linear, LearningRateSchedule.cosine)
_ONE = "one of them"
_EVAL_DATA = "set data.eval_share=0.05 or data.eval=[held_out.jsonl]"

_MODEL = (
    Rule(
        "run.name",
        lambda c: c.run.name in ("", ".", "..") or "/" in c.run.name,
        "run.name is not the name of one folder",
        "set run.root to choose the folder of run directories",
        "a name without /, other than . and ..",
    ),
    Rule(
        "model.attention model.dtype",
        lambda c: c.model.dtype is Dtype.fp32 and c.model.attention in _SIXTEEN_BIT_KERNELS,
        "{model.attention} computes in 16 bits only",
        "set model.attention=sdpa or model.dtype=bf16",
    ),
    Rule(
        "model.compile model.liger",
        lambda c: c.model.compile and c.model.liger,
        "torch.compile and Liger's kernels fuse the same operations",
        "set model.liger=false or model.compile=false",
        _ONE,
    ),
    Rule(
        "model.compile model.quantization",
        lambda c: c.model.compile and c.model.quantization is not None,
        "torch.compile is not known to be exact with quantized weights",
        "set model.compile=false",
    ),
    Rule(
        "trainer.deterministic model.liger",
        lambda c: c.trainer.deterministic and c.model.liger,
        "Liger's kernels may not be deterministic",
        "set model.liger=false or trainer.deterministic=false",
        _ONE,
    ),
    unused(
        "model.activation_offload model.gradient_checkpointing",
        lambda c: c.model.gradient_checkpointing != "none",
        "set model.gradient_checkpointing=full: the inputs of checkpointed layers are moved",
    ),
)

OTHER_ROLE_NAMES = frozenset(
    [
        "human",
        "Human",
        "User",
        "gpt",
        "chatgpt",
        "bot",
        "Assistant",
        "observation",
        "tool_response",
        "function",
        "function_call",
        "tool_call",
    ]
)
"""Roles of datasets that are read as user, assistant or tool."""
_ROLES = ("system", "user", "assistant", "tool")
_EXPECTED_ROLES = "roles such as assistant, user, tool"


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


def _sources_at(config: RunConfig, key: str) -> list[SourceConfig]:
    section, _, name = key.partition(".")
    sources: list[SourceConfig] = getattr(getattr(config, section), name)
    return sources


def _is_repeated(sources: list[SourceConfig]) -> bool:
    """Return whether two sources are equal apart from their weights."""
    bare = [replace(source, weight=SourceConfig.weight) for source in sources]
    return any(source in bare[:index] for index, source in enumerate(bare))


def _given_once(key: str) -> Rule:
    return Rule(
        key,
        lambda c: _is_repeated(_sources_at(c, key)),
        f"a source of {key} is given twice",
        "remove one of them; weight: 2 draws each pair of a source of data.train twice per epoch",
    )


def _unweighted(key: str) -> Rule:
    return Rule(
        key,
        lambda c: any(source.weight != SourceConfig.weight for source in _sources_at(c, key)),
        "a weight has no effect on evaluation data: every pair counts once",
        "remove the weight, or set limit",
    )


def _names_models_once(config: RunConfig) -> bool:
    models = config.evaluation.models
    return bool(models) and "" not in models and len(set(models)) == len(models)


_DATA = (
    _given_once("data.train"),
    _given_once("data.eval"),
    _given_once("evaluation.data"),
    _unweighted("data.eval"),
    _unweighted("evaluation.data"),
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
        "max_prompt_length < max_length",
    ),
    Rule(
        "data.trained_roles",
        lambda c: not c.data.trained_roles or not all(c.data.trained_roles),
        "data.trained_roles names no role, so the loss would count nothing",
        "write data.trained_roles=[assistant]",
        _EXPECTED_ROLES,
    ),
    Rule(
        "data.trained_roles",
        lambda c: bool(OTHER_ROLE_NAMES.intersection(c.data.trained_roles)),
        "data.trained_roles has a name that is read as another role",
        "write user, assistant or tool; docs/data.md lists the roles",
        _EXPECTED_ROLES,
    ),
    Rule(
        "data.trained_roles",
        lambda c: any(map(_is_mistyped_role, c.data.trained_roles)),
        "data.trained_roles has a role that seems to be mistyped",
        "write assistant, user, tool or system",
        _EXPECTED_ROLES,
    ),
    Rule(
        "data.untrained",
        lambda c: not all(map(_is_untrained_part, c.data.untrained)),
        "data.untrained has an entry that is neither a named part nor a pair of markers",
        "write a marker as BEGIN...END, such as '<note>...</note>'",
        f"a list of {', '.join(UNTRAINED_PARTS)} and BEGIN...END",
    ),
    Rule(
        "evaluation.model",
        lambda c: not _names_models_once(c),
        "evaluation.model names no model, or one twice",
        "write evaluation.model=FOLDER, or 'evaluation.model=[FOLDER,FOLDER]' for several in turn",
        "null, a path, or a list of paths that differ",
    ),
)


def _unused_by_loss(option: str) -> Rule:
    users = ", ".join(sorted(kinds_using(option)))
    return unused(
        f"loss.{option} {LOSS}",
        lambda c: c.loss.uses(option),
        "choose another loss.kind",
        f"a loss that uses it: {users}",
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
        f"terms that use it: {', '.join(sorted(kinds_using(option)))}",
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
    *(_unused_by_a_term(option) for option in ("divergence", "weighting")),
    Rule(
        "loss.function loss.kind",
        lambda c: LossKind.custom in c.loss.kinds and c.loss.function is None,
        "a custom loss needs a function",
        "set loss.function=my_losses:my_loss for the function my_loss in my_losses.py",
        "module:function",
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
        "remove loss.label_smoothing, or choose a value in that range",
        "> 0 and < 0.5, or null",
    ),
    Rule(
        "loss.router.aux_coefficient loss.router.z_coefficient model.compile",
        lambda c: c.loss.router.is_set and c.model.compile,
        "losses of routers are not known to be exact with compiled layers",
        "set model.compile=false, or remove loss.router",
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
        _ONE,
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


def _needs_sharding(option: str, *kinds: ParallelismKind) -> Rule:
    key = f"parallelism.{option}"
    return Rule(
        f"{key} parallelism.kind",
        lambda c: getattr(c.parallelism, option) is not Offload.none and c.parallelism.kind not in kinds,
        f"{{parallelism.kind}} does not support {key}",
        f"set parallelism.kind={kinds[0]} or {key}=none",
        f"parallelism.kind={' or '.join(kinds)}",
    )


def _not_on_nvme(option: str) -> Rule:
    return Rule(
        f"parallelism.{option}",
        lambda c: getattr(c.parallelism, option) is Offload.nvme,
        "only the reference model can be offloaded to NVMe, not the policy",
        f"set parallelism.{option}=cpu",
        "none or cpu",
    )


def _needs_eval_data(key: str, off: str) -> Rule:
    section, _, option = key.partition(".")
    return Rule(
        f"{key} data.eval",
        lambda c: bool(getattr(getattr(c, section), option)) and not c.data.eval_sources,
        f"{key} is about evaluations, and no evaluation data is given",
        f"{_EVAL_DATA}, or {key}={off}",
    )


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
    _not_on_nvme("offload_parameters"),
    _not_on_nvme("offload_optimizer"),
)


def direction_of(trainer: TrainerConfig) -> Direction | None:
    """Return which values of `trainer.keep_best` are the best; None if it is not known."""
    metric = (trainer.keep_best or "").removeprefix(PREFIX)
    known = (row.best for name, row in METRICS.items() if row.best and _is_of(metric, name))
    return next(known, None)


def _is_of(metric: str, name: str) -> bool:
    """Return whether a metric is `name`, also of one source, bucket of lengths or percentile."""
    return metric == name or metric.startswith((f"{name}/", f"{name}_by_length/"))


_KEEP_BEST = (
    unused(
        "trainer.keep_best trainer.eval_every",
        lambda c: c.trainer.eval_every > 0 or not c.data.eval_sources,
        "set trainer.eval_every=100: the last evaluation is the only one",
    ),
    Rule(
        "trainer.keep_best",
        lambda c: c.trainer.keep_best is not None and not c.trainer.keep_best.startswith(PREFIX),
        "checkpoints are chosen by a metric of evaluations",
        f"set trainer.keep_best={PREFIX}{{trainer.keep_best}}",
        f"a metric whose name begins with {PREFIX}",
    ),
    Rule(
        "trainer.keep_best",
        lambda c: (c.trainer.keep_best or "").startswith(PREFIX) and direction_of(c.trainer) is None,
        "it is not known whether high or low values of this metric are better",
        "choose eval_loss, eval_rewards/accuracies or eval_rewards/margins",
    ),
)

RULES = (
    *_MODEL,
    *ADAPTER_RULES,
    *_DATA,
    *_LOSS,
    *_OPTIM,
    *_TRAINING,
    *_KEEP_BEST,
    *REFERENCE_RULES,
    *EXPORT_RULES,
)
"""In the order in which they are checked."""
