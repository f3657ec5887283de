"""The rules between the values of a run, one row each: no option without effect (law L5).

Those about the reference model are in `rules_reference`; bounds of single values are declared at the fields
of the schema.
"""

from dataclasses import fields
from datetime import date

from dpo_dist.config.check import Rule
from dpo_dist.config.data_schema import (
    MARKER_GAP,
    UNTRAINED_PARTS,
    DataConfig,
    DataFormat,
    Ranked,
    SourceConfig,
)
from dpo_dist.config.loss_kinds import Divergence, LossConfig, LossKind, kinds_using
from dpo_dist.config.rules_doctor import DOCTOR_RULES
from dpo_dist.config.rules_reference import REFERENCE_RULES
from dpo_dist.config.schema import (
    AdapterVariant,
    AttentionBackend,
    Dtype,
    Offload,
    ParallelismKind,
    Quantization,
    RunConfig,
)

_SIXTEEN_BIT_KERNELS = (AttentionBackend.flash_attention_2, AttentionBackend.varlen)
_CHECKPOINTING = "none, full, or n of 2 or more: every n-th layer"


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _names_layers(targets: object) -> bool:
    if isinstance(targets, list):
        return bool(targets) and all(isinstance(name, str) and name for name in targets)
    return targets == "all-linear"


def _has_rankings(data: DataConfig) -> bool:
    """Return whether a source may have rankings, by its format."""
    return any(source.format in (DataFormat.auto, DataFormat.ranked) for source in [*data.train, *data.eval])


def _is_untrained_part(entry: str) -> bool:
    begin, _, end = entry.partition(MARKER_GAP)
    return entry in UNTRAINED_PARTS or bool(begin.strip() and end.strip())


def _is_set(loss: LossConfig, option: str) -> bool:
    return bool(getattr(loss, option) != getattr(LossConfig, option))


def _names(kinds: list[LossKind]) -> str:
    return ", ".join(sorted(kinds))


_RUN_AND_MODEL = (
    Rule(
        "run.name",
        lambda c: not c.run.name or "/" in c.run.name,
        "run.name is not the name of one folder",
        "set run.root to choose the folder of run directories",
        "a name without /",
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
    Rule(
        "model.adapter.dropout",
        lambda c: c.model.adapter is not None and c.model.adapter.dropout != 0,
        "policy and reference must compute the same function, so an adapter has no dropout",
        "remove it; a smaller r, fewer target_modules or a larger loss.beta regularize too",
        "0",
    ),
    Rule(
        "model.adapter.target_modules",
        lambda c: c.model.adapter is not None and not _names_layers(c.model.adapter.target_modules),
        "model.adapter.target_modules names no layers",
        "write target_modules: all-linear, or names in brackets",
        "all-linear, or a list such as [q_proj,v_proj]",
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
    Rule(
        "model.compile model.quantization",
        lambda c: c.model.compile and c.model.quantization is not None,
        "torch.compile is not known to be exact with quantized weights",
        "set model.compile=false",
    ),
)

_DATA = (
    Rule(
        "data.train",
        lambda c: not c.data.train,
        "no training data is given",
        "set data.train=[pairs.jsonl], or choose a preset with data=...",
        "at least one source",
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


def _needs_eval_data(option: str, off: str) -> Rule:
    return Rule(
        f"trainer.{option} data.eval",
        lambda c: getattr(c.trainer, option) and not c.data.eval_sources,
        "no evaluation data is given",
        f"set data.eval_share=0.05, data.eval=[held_out.jsonl] or trainer.{option}={off}",
    )


_TRAINING = (
    Rule(
        "optim.betas",
        lambda c: len(c.optim.betas) != 2,
        "AdamW has two betas",
        "write 'optim.betas=[0.9,0.999]'",
        "[0.9, 0.999]",
    ),
    _needs_eval_data("eval_every", "0"),
    _needs_eval_data("eval_at_start", "false"),
    _needs_sharding("offload_parameters", ParallelismKind.zero3),
    _needs_sharding("offload_optimizer", ParallelismKind.zero3, ParallelismKind.zero2),
    _not_on_nvme("offload_parameters"),
    _not_on_nvme("offload_optimizer"),
)

RULES = (*_RUN_AND_MODEL, *_DATA, *_LOSS, *_TRAINING, *REFERENCE_RULES, *DOCTOR_RULES)
"""In the order in which they are checked."""
