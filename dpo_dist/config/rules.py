"""The rules between the values of a run, one row each: no option without effect (law L5).

Those about the data are in `rules_data`, those of `optim` in `rules_optim`, those about the reference in
`rules_reference`; bounds of single
values are declared at the fields of the schema.
"""

from dataclasses import fields

from dpo_dist.config.check import Rule
from dpo_dist.config.keep_best import KEEP_BEST_RULES
from dpo_dist.config.loss_kinds import Divergence, LossConfig, LossKind, kinds_using
from dpo_dist.config.rules_adapter import ADAPTER_RULES, EXPORT_RULES
from dpo_dist.config.rules_data import DATA_RULES, EVALUATION_RULES
from dpo_dist.config.rules_optim import OPTIM_RULES
from dpo_dist.config.rules_reference import REFERENCE_RULES
from dpo_dist.config.rules_router import ROUTER_RULES
from dpo_dist.config.samples_schema import SamplesConfig
from dpo_dist.config.schema import (
    AttentionBackend,
    Dtype,
    Offload,
    ParallelismKind,
    RunConfig,
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
