"""The rules between the values of a run, one row each: no option without effect (law L5).

Those about the data are in `rules_data`, those of `optim` in `rules_optim`, those about the reference in
`rules_reference`; bounds of single
values are declared at the fields of the schema.
"""

import difflib
from dataclasses import fields, replace
from datetime import date

from dpo_dist.config.data import (
    MARKER_GAP,
    UNTRAINED_PARTS,
    DataConfig,
    DataFormat,
    Ranked,
    SourceConfig,
)
from dpo_dist.config.keys import Rule
from dpo_dist.config.losses import OF_MODEL, Divergence, LossConfig, LossKind, kinds_using
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
from dpo_dist.config.verb_options import ExportedWeights

_FALLING = (LearningRateSchedule.linear, LearningRateSchedule.cosine)


def _has_no_warmup(optim: OptimConfig) -> bool:
    return not (optim.warmup_ratio if optim.warmup_steps is None else optim.warmup_steps)


def _warmup_ends_after_the_run(config: RunConfig) -> bool:
    warmup, steps = config.optim.warmup_steps, config.trainer.max_steps
    return warmup is not None and steps is not None and warmup > steps


OPTIM_RULES = (
    Rule(
        "optim.kind parallelism.offload_optimizer",
        lambda c: (
            c.optim.kind is OptimizerKind.adamw_8bit and c.parallelism.offload_optimizer is not Offload.none
        ),
        "an offloaded optimizer is DeepSpeed's CPU Adam, whose states are float32",
        "set optim.kind=adamw, or parallelism.offload_optimizer=none",
    ),
    Rule(
        "optim.betas",
        lambda c: len(c.optim.betas) != 2,
        "AdamW has two betas",
        "write 'optim.betas=[0.9,0.999]'",
        "[0.9, 0.999]",
    ),
    Rule(
        "optim.warmup_steps optim.warmup_ratio",
        lambda c: (
            c.optim.warmup_steps is not None and c.optim.warmup_ratio not in (0, OptimConfig.warmup_ratio)
        ),
        "the length of the warm-up is given twice",
        "set optim.warmup_ratio=0, or remove optim.warmup_steps",
        "one of them",
    ),
    Rule(
        "optim.warmup_steps trainer.max_steps",
        _warmup_ends_after_the_run,
        "the warm-up is longer than the run, so that optim.lr is never reached",
        "lower optim.warmup_steps, or raise trainer.max_steps",
    ),
    Rule(
        "optim.schedule optim.warmup_ratio optim.warmup_steps",
        lambda c: c.optim.schedule is LearningRateSchedule.constant_with_warmup and _has_no_warmup(c.optim),
        "constant_with_warmup has no warm-up here",
        "set optim.schedule=constant, optim.warmup_ratio=0.1 or optim.warmup_steps",
    ),
    Rule(
        "optim.min_lr_ratio optim.schedule",
        lambda c: c.optim.min_lr_ratio != OptimConfig.min_lr_ratio and c.optim.schedule not in _FALLING,
        "optim.min_lr_ratio has no effect with this schedule, which does not fall to 0",
        "remove optim.min_lr_ratio, or set optim.schedule=cosine or linear",
        "optim.schedule=cosine or linear",
    ),
    Rule(
        "trainer.ema_decay trainer.keep_last",
        lambda c: c.trainer.ema_decay is not None and not c.trainer.keep_last,
        "the moving average of the weights is in the checkpoints, and none is kept",
        "set trainer.keep_last=1, or remove trainer.ema_decay",
    ),
    Rule(
        "export.weights trainer.ema_decay",
        lambda c: c.export.weights is ExportedWeights.ema and c.trainer.ema_decay is None,
        "this run has no moving average of its weights",
        "set export.weights=last; a run with trainer.ema_decay has one",
    ),
)
"""In the order in which they are checked."""


def _is_coefficient(value: float | str | None) -> bool:
    return value > 0 if isinstance(value, int | float) else value in (None, OF_MODEL)


ROUTER_RULES = (
    Rule(
        "loss.router.aux_coefficient",
        lambda c: not _is_coefficient(c.loss.router.aux_coefficient),
        "loss.router.aux_coefficient is not a weight of the load-balancing loss",
        f"set loss.router.aux_coefficient={OF_MODEL}, or remove it",
        f"{OF_MODEL}, a number above 0, or null",
    ),
    Rule(
        "loss.router.aux_coefficient loss.router.z_coefficient model.compile",
        lambda c: c.loss.router.is_set and c.model.compile,
        "losses of routers are not known to be exact with compiled layers",
        "set model.compile=false, or remove loss.router",
    ),
)


PREFIX = "eval_"
_DIRECTIONS = {
    "loss": Direction.lowest,
    "rewards/accuracies": Direction.highest,
    "rewards/margins": Direction.highest,
    "rewards/chosen": Direction.highest,
    "rewards/both_fall": Direction.lowest,
    "kl/chosen": Direction.lowest,
    "kl/rejected": Direction.lowest,
}


def direction_of(trainer: TrainerConfig) -> Direction | None:
    """Return which values of `trainer.keep_best` are the best; None if it is not known."""
    metric = (trainer.keep_best or "").removeprefix(PREFIX)
    known = (way for name, way in _DIRECTIONS.items() if _is_of(metric, name))
    return trainer.keep_best_direction or next(known, None)


def _is_of(metric: str, name: str) -> bool:
    """Return whether a metric is `name`, also of one source, bucket of lengths or percentile."""
    return metric == name or metric.startswith((f"{name}/", f"{name}_by_length/"))


def _unused(option: str) -> Rule:
    return Rule(
        f"trainer.{option} trainer.keep_best",
        lambda c: (
            c.trainer.keep_best is None and getattr(c.trainer, option) != getattr(TrainerConfig, option)
        ),
        f"trainer.{option} has no effect without trainer.keep_best",
        f"set trainer.keep_best=eval_rewards/accuracies, or remove trainer.{option}",
    )


KEEP_BEST_RULES = (
    Rule(
        "trainer.keep_best data.eval",
        lambda c: c.trainer.keep_best is not None and not c.data.eval_sources,
        "the best checkpoint is chosen by evaluations, and there is no evaluation data",
        "set data.eval_share=0.05, data.eval=[held_out.jsonl] or trainer.keep_best=null",
    ),
    Rule(
        "trainer.keep_best trainer.eval_every",
        lambda c: c.trainer.keep_best is not None and not c.trainer.eval_every,
        "the last evaluation is the only one, so no checkpoint can be better than the last",
        "set trainer.eval_every=100, or remove trainer.keep_best",
    ),
    Rule(
        "trainer.keep_best",
        lambda c: c.trainer.keep_best is not None and not c.trainer.keep_best.startswith(PREFIX),
        "checkpoints are chosen by a metric of evaluations",
        f"set trainer.keep_best={PREFIX}{{trainer.keep_best}}",
        f"a metric whose name begins with {PREFIX}",
    ),
    Rule(
        "trainer.keep_best trainer.keep_best_direction",
        lambda c: c.trainer.keep_best is not None and direction_of(c.trainer) is None,
        "it is not known whether high or low values of this metric are better",
        "set trainer.keep_best_direction",
        "highest or lowest",
    ),
    _unused("keep_best_count"),
    _unused("keep_best_direction"),
)


OTHER_ROLE_NAMES = frozenset(
    {
        *("human", "Human", "User", "gpt", "chatgpt", "bot", "Assistant"),
        *("observation", "tool_response", "function", "function_call", "tool_call"),
    }
)
"""Roles of datasets that are read as user, assistant or tool."""


_ROLES = ("system", "user", "assistant", "tool")


def _is_mistyped_role(role: str) -> bool:
    """Return whether a role is nearly a usual one; a role of another name may be one of the records."""
    return role not in _ROLES and role.isalpha() and bool(difflib.get_close_matches(role, _ROLES, cutoff=0.8))


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _has_rankings(data: DataConfig) -> bool:
    """Return whether a source may have rankings, by its format."""
    return any(source.format in (DataFormat.auto, DataFormat.ranked) for source in [*data.train, *data.eval])


def _is_untrained_part(entry: str) -> bool:
    begin, _, end = entry.partition(MARKER_GAP)
    return entry in UNTRAINED_PARTS or bool(begin.strip() and end.strip())


def _is_repeated(sources: list[SourceConfig]) -> bool:
    """Return whether two sources are equal apart from their weights."""
    bare = [replace(source, weight=SourceConfig.weight) for source in sources]
    return any(source in bare[:index] for index, source in enumerate(bare))


DATA_RULES = (
    Rule(
        "data.train",
        lambda c: _is_repeated(c.data.train),
        "a source of data.train is given twice",
        "remove one of them; weight: 2 draws each of its pairs twice per epoch",
    ),
    Rule(
        "data.eval",
        lambda c: _is_repeated(c.data.eval),
        "a source of data.eval is given twice",
        "remove one of them",
    ),
    Rule(
        "data.eval",
        lambda c: any(source.weight != SourceConfig.weight for source in c.data.eval),
        "a weight has no effect on evaluation data: every pair counts once",
        "remove the weight, or set limit",
    ),
    Rule(
        "data.eval data.eval_share",
        lambda c: bool(c.data.eval) and c.data.eval_share > 0,
        "evaluation data are given twice: by their sources and as a share of the training data",
        "remove data.eval_share; data.drop_eval_prompts=true keeps prompts of data.eval out of training",
    ),
    Rule(
        "data.eval_seed",
        lambda c: c.data.eval_seed != DataConfig.eval_seed and not c.data.eval_share,
        "the seed has no effect without a share of held-out prompts",
        "set data.eval_share, or remove data.eval_seed",
    ),
    Rule(
        "data.drop_eval_prompts",
        lambda c: c.data.drop_eval_prompts and not c.data.eval,
        "no evaluation data are given whose prompts could be dropped",
        "set data.eval, or remove data.drop_eval_prompts (data.eval_share never shares a prompt)",
    ),
    Rule(
        "data.max_prompt_length data.max_length",
        lambda c: c.data.max_prompt_length is not None and c.data.max_prompt_length >= c.data.max_length,
        "the longest prompt leaves no room for a response",
        "raise data.max_length or lower data.max_prompt_length",
        "max_prompt_length < max_length",
    ),
    Rule(
        "data.template_date",
        lambda c: not _is_date(c.data.template_date),
        "data.template_date is not a date",
        f"write data.template_date={DataConfig.template_date}; other days in the same form",
        f"YYYY-MM-DD, such as {DataConfig.template_date}",
    ),
    Rule(
        "data.template_arguments",
        lambda c: not isinstance(c.data.template_arguments, dict | None),
        "data.template_arguments is not a mapping",
        "write 'data.template_arguments={{enable_thinking: false}}'",
        "null or a mapping of names and values",
    ),
    Rule(
        "data.trained_roles",
        lambda c: not c.data.trained_roles or not all(c.data.trained_roles),
        "data.trained_roles names no role, so the loss would count nothing",
        "write data.trained_roles=[assistant]",
        "a list of roles",
    ),
    Rule(
        "data.trained_roles",
        lambda c: bool(OTHER_ROLE_NAMES.intersection(c.data.trained_roles)),
        "data.trained_roles has a name that is read as another role",
        "write user, assistant or tool; docs/data.md lists the roles",
        "roles such as assistant, user, tool",
    ),
    Rule(
        "data.trained_roles",
        lambda c: any(map(_is_mistyped_role, c.data.trained_roles)),
        "data.trained_roles has a role that seems to be mistyped",
        "write assistant, user, tool or system",
        "roles such as assistant, user, tool",
    ),
    Rule(
        "data.untrained",
        lambda c: not all(map(_is_untrained_part, c.data.untrained)),
        "data.untrained has an entry that is neither a named part nor a pair of markers",
        "write a marker as BEGIN...END, such as '<note>...</note>'",
        f"a list of {', '.join(UNTRAINED_PARTS)} and BEGIN...END",
    ),
    Rule(
        "data.ranked data.train",
        lambda c: c.data.ranked is not Ranked.whole and not _has_rankings(c.data),
        "data.ranked has no effect: no source has rankings",
        "set data.ranked=whole, or remove the format of the source that has rankings",
        "a source of format ranked or auto",
    ),
)


def _is_model(model: object) -> bool:
    """Return whether `evaluation.model` names models: null, a path, or paths that differ."""
    models = model if isinstance(model, list) else [model]
    if not all(isinstance(each, str) and each for each in models):
        return model is None
    return bool(models) and len(set(models)) == len(models)


EVALUATION_RULES = (
    Rule(
        "evaluation.model",
        lambda c: not _is_model(c.evaluation.model),
        "evaluation.model names no model, or one twice",
        "write evaluation.model=FOLDER, or 'evaluation.model=[FOLDER,FOLDER]' for several in turn",
        "null, a path, or a list of paths that differ",
    ),
    Rule(
        "evaluation.data",
        lambda c: _is_repeated(c.evaluation.data),
        "a source of evaluation.data is given twice",
        "remove one of them",
    ),
    Rule(
        "evaluation.data",
        lambda c: any(source.weight != SourceConfig.weight for source in c.evaluation.data),
        "a weight has no effect on evaluation data: every pair counts once",
        "remove the weight, or set limit",
    ),
)


_SIXTEEN_BIT_KERNELS = (AttentionBackend.flash_attention_2, AttentionBackend.varlen)
_CHECKPOINTING = "none, full, or n of 2 or more: every n-th layer"


def _is_set(loss: LossConfig, option: str) -> bool:
    return bool(getattr(loss, option) != getattr(LossConfig, option))


def _names(kinds: list[LossKind]) -> str:
    return ", ".join(sorted(kinds))


_RUN_AND_MODEL = (
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
        "one of them",
    ),
    Rule(
        "model.activation_offload model.gradient_checkpointing",
        lambda c: c.model.activation_offload and c.model.gradient_checkpointing == "none",
        "only the inputs of checkpointed layers are moved to host memory",
        "set model.gradient_checkpointing=full or model.activation_offload=false",
        _CHECKPOINTING.replace("none, ", ""),
    ),
    Rule(
        "model.compile model.mlp_tile_tokens",
        lambda c: c.model.compile and c.model.mlp_tile_tokens is not None,
        "a compiled MLP computes all tokens at once",
        "set model.mlp_tile_tokens=null or model.compile=false",
        "one of them",
    ),
    Rule(
        "model.gradient_checkpointing",
        lambda c: c.model.gradient_checkpointing in (False, 0),
        "model.gradient_checkpointing is not a choice of layers",
        "set model.gradient_checkpointing=none",
        _CHECKPOINTING,
    ),
    Rule(
        "model.gradient_checkpointing",
        lambda c: (
            c.model.gradient_checkpointing not in ("none", "full")
            if isinstance(c.model.gradient_checkpointing, str)
            else c.model.gradient_checkpointing < 2
        ),
        "model.gradient_checkpointing is not a choice of layers",
        "set model.gradient_checkpointing=full",
        _CHECKPOINTING,
    ),
    Rule(
        "trainer.deterministic model.liger",
        lambda c: c.trainer.deterministic and c.model.liger,
        "Liger's kernels may not be deterministic",
        "set model.liger=false or trainer.deterministic=false",
        "one of them",
    ),
    *ADAPTER_RULES,
    Rule(
        "model.compile model.quantization",
        lambda c: c.model.compile and c.model.quantization is not None,
        "torch.compile is not known to be exact with quantized weights",
        "set model.compile=false",
    ),
)


def _unused_by_loss(option: str) -> Rule:
    return Rule(
        f"loss.{option} loss",
        lambda c: _is_set(c.loss, option) and not c.loss.uses(option),
        f"loss.{option} has no effect with this loss",
        f"remove loss.{option} or choose another loss.kind",
        f"a loss that uses it: {_names(kinds_using(option))}",
    )


def _unused_by_a_term(option: str) -> Rule:
    """Refuse an option of the whole loss that a term lacks; `sft` beside a preference loss is exempt."""

    def broken(config: RunConfig) -> bool:
        compared = [facts for facts in config.loss.facts if facts.fewest_responses > 1]
        return _is_set(config.loss, option) and any(option not in facts.options for facts in compared)

    return Rule(
        f"loss.{option} loss",
        broken,
        f"a term of the loss does not use loss.{option}",
        f"remove loss.{option}, or the terms that do not use it",
        f"terms that use it: {_names(kinds_using(option))}",
    )


_LOSS = (
    Rule(
        "loss",
        lambda c: len(set(c.loss.kinds)) < len(c.loss.kinds),
        "a kind of loss appears twice",
        "make it one term with the sum of the weights",
    ),
    Rule(
        "loss.kind loss.terms",
        lambda c: c.loss.kind is not LossConfig.kind and c.loss.kind not in c.loss.kinds,
        "loss.terms is the whole loss, so loss.kind has no effect",
        "add {{kind: {loss.kind}}} to loss.terms or remove loss.kind",
    ),
    *(_unused_by_loss(field.name) for field in fields(LossConfig) if kinds_using(field.name)),
    *(_unused_by_a_term(option) for option in ("divergence", "weighting")),
    Rule(
        "loss.function loss.kind",
        lambda c: LossKind.custom in c.loss.kinds and c.loss.function is None,
        "a custom loss needs a function",
        "set loss.function=my_losses:my_loss for the function my_loss in my_losses.py",
        "module:function",
    ),
    Rule(
        "loss.alpha_coefficient loss.divergence",
        lambda c: _is_set(c.loss, "alpha_coefficient") and c.loss.divergence is not Divergence.alpha,
        "loss.alpha_coefficient has no effect with this divergence",
        "remove loss.alpha_coefficient or set loss.divergence=alpha",
        "loss.divergence=alpha",
    ),
    Rule(
        "loss.label_smoothing loss",
        lambda c: c.loss.label_smoothing == 0 and any(facts.smoothing_above_0 for facts in c.loss.facts),
        "this loss takes the logarithm of loss.label_smoothing",
        "remove loss.label_smoothing, or choose a value in that range",
        "> 0 and < 0.5, or null",
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


def _unused_without_samples(option: str) -> Rule:
    return Rule(
        f"samples.{option} samples.prompts",
        lambda c: not c.samples.prompts and getattr(c.samples, option) != getattr(SamplesConfig, option),
        f"samples.{option} has no effect without samples",
        f"set samples.prompts=16, or remove samples.{option}",
    )


def _needs_eval_data(option: str, off: str) -> Rule:
    return Rule(
        f"trainer.{option} data.eval",
        lambda c: getattr(c.trainer, option) and not c.data.eval_sources,
        "no evaluation data is given",
        f"set data.eval_share=0.05, data.eval=[held_out.jsonl] or trainer.{option}={off}",
    )


_TRAINING = (
    _needs_eval_data("eval_every", "0"),
    _needs_eval_data("eval_at_start", "null"),
    Rule(
        "samples.prompts data.eval",
        lambda c: c.samples.prompts > 0 and not c.data.eval_sources,
        "samples are responses to prompts of the evaluation data, and there are none",
        "set data.eval_share=0.05, data.eval=[held_out.jsonl] or samples.prompts=0",
    ),
    *(_unused_without_samples(field.name) for field in fields(SamplesConfig) if field.name != "prompts"),
    Rule(
        "samples.every trainer.eval_every",
        lambda c: c.samples.every != SamplesConfig.every and not c.trainer.eval_every,
        "the last evaluation is the only one, and it always has samples: samples.every has no effect",
        "set trainer.eval_every, or remove samples.every",
    ),
    _needs_sharding("offload_parameters", ParallelismKind.zero3),
    _needs_sharding("offload_optimizer", ParallelismKind.zero3, ParallelismKind.zero2),
    _not_on_nvme("offload_parameters"),
    _not_on_nvme("offload_optimizer"),
)


def _is_numbers_by_name(thresholds: object) -> bool:
    if not isinstance(thresholds, dict):
        return thresholds is None
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        for value in thresholds.values()
    )


_DOCTOR = (
    Rule(
        "doctor.thresholds",
        lambda c: not _is_numbers_by_name(c.doctor.thresholds),
        "doctor.thresholds is no mapping of rules to numbers",
        "write 'doctor.thresholds={{duplicates: 0.05}}'; docs/doctor.md lists the rules",
        "null or {{RULE: NUMBER, ...}}, numbers of 0 or more",
    ),
)

RULES = (
    *_RUN_AND_MODEL,
    *DATA_RULES,
    *_LOSS,
    *ROUTER_RULES,
    *OPTIM_RULES,
    *_TRAINING,
    *KEEP_BEST_RULES,
    *REFERENCE_RULES,
    *EVALUATION_RULES,
    *EXPORT_RULES,
    *_DOCTOR,
)
"""In the order in which they are checked."""
