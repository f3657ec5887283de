"""Rules between the values of a run, one row each: an option without effect is an error (law L5).

Also the keys that each verb needs and reads, and the choice for `reference.mode=auto`. The schema has the
bounds of single values.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import getitem
from typing import Any

from dpo_dist.config.extensions import rule_modules
from dpo_dist.config.keys import all_keys, to_unset
from dpo_dist.config.losses import DistillOptions, LossConfig, LossKind, kinds_using
from dpo_dist.config.metrics import CUSTOM, METRICS, PREFIX
from dpo_dist.config.mistakes import nearest
from dpo_dist.config.schema import SCHEMA, UNSET, Direction, Offload, ReferenceMode, RunConfig, TeacherMode
from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ConfigError, raise_all
from dpo_dist.foundation.fields import as_written, schema_fields, validated
from dpo_dist.foundation.text import HIDDEN

Condition = Callable[[RunConfig], bool]
LOSS = "loss"
"""A rule's key for the loss: it means `loss.kind`, or `loss.terms` if the loss has terms."""


@dataclass(frozen=True)
class Rule:
    """A rule between values: a configuration breaks it if all parts of `when`, and `also`, are true.

    A part is `KEY=VALUE`, `KEY=VALUE|VALUE`, `KEY!=VALUE`, or a bare KEY, which is always true and only
    named in the error, as `also` reads it. The keys of all parts give an error's `where` and `got`. In `why`
    `{model.attention}` stands for the value of that key. If the command sets one of the keys `yields_to` but
    not the first key of `when`, the first key goes back to its default.
    """

    when: str
    why: str
    remedy: str | Callable[[RunConfig], str]
    also: Condition = lambda _: True
    yields_to: tuple[str, ...] = ()

    def is_broken(self, config: RunConfig) -> bool:
        """Return whether a configuration breaks the rule."""
        return all(_holds(config, part) for part in self.when.split()) and self.also(config)

    def keys(self, config: RunConfig) -> list[str]:
        """Return the keys of `when`."""
        loss_key = "loss.terms" if config.loss.terms else "loss.kind"
        return [loss_key if key == LOSS else key for key in self._named()]

    def _named(self) -> list[str]:
        return re.findall(r"(?:^| )([\w.]+)", self.when)

    def error(self, config: RunConfig) -> ConfigError:
        """Return the error of a configuration that breaks it."""
        values = [as_written(value_at(config, key)) for key in self._named()]
        remedy = self.remedy(config) if callable(self.remedy) else self.remedy
        why = self.why.format(**vars(config))
        return ConfigError(why, where=", ".join(self.keys(config)), got=", ".join(values), remedy=remedy)


def _holds(config: RunConfig, part: str) -> bool:
    key, equals, values = part.partition("=")
    value = value_at(config, key.rstrip("!"))
    is_listed = not equals or as_written(value) in values.split("|")
    return is_listed is not key.endswith("!")


def unused(key: str, unless: str, remedy: str = "", or_if: Condition = lambda _: False) -> Rule:
    """Return the rule that refuses a key without effect: it needs the part `unless` of a rule, or `or_if`."""
    other = unless.partition("=")[0].rstrip("!")
    remedy = remedy or "set " + re.sub("!=.*", "=...", unless.replace("|", " or "))
    return unused_beside(key, other, remedy, lambda c: _holds(c, unless) or or_if(c))


def unused_beside(key: str, other: str, remedy: str, has_effect: Condition) -> Rule:
    """Return the rule that refuses a key that is set and by the value of the key `other` has no effect."""
    default = all_keys()[key].default
    return Rule(
        f"{key} {other}",
        f"{key} has no effect with this {other}",
        to_unset(key) + f", or {remedy}",
        lambda c: value_at(c, key, default) != default and not has_effect(c),
        yields_to=() if other == LOSS else (other,),  # loss=NAME gives all options of the loss
    )


def _stores_teacher(config: RunConfig) -> bool:
    return config.loss.needs_teacher and config.teacher.mode is TeacherMode.cached


def _needs_whole_teacher(config: RunConfig) -> bool:
    return config.loss.options_of(DistillOptions).mix > 0


def without_evaluations(key: str, or_if: Condition = lambda _: False) -> Rule:
    """Refuse a key of evaluations in a run that has no data for them."""
    rule = unused_beside(key, "data.eval", HOLD_OUT, lambda c: bool(c.data.eval_sources) or or_if(c))
    why = f"{key} has no effect without evaluation data"
    return replace(rule, why=why, yields_to=("data.eval", "data.eval_share"))


def reset_unused(
    config: RunConfig, set_keys: Collection[str], set_by_presets: Iterable[str], rules: Iterable[Rule]
) -> RunConfig:
    """Reset an earlier option if a key of the command takes its effect away.

    `set_keys`: keys of the command, which are never reset; `set_by_presets`: keys that its presets set.
    """
    for rule in rules:
        key = re.split("[ !=]", rule.when)[0]
        yields = not {*set_keys, *set_by_presets}.isdisjoint(rule.yields_to)
        if yields and key not in set_keys and rule.is_broken(config):
            *sections, name = key.split(".")
            values = asdict(config)
            reduce(getitem, sections, values)[name] = all_keys()[key].default
            config = validated(SCHEMA, values)
            set_keys = {*set_keys, key}
    return config


def check_rules(config: RunConfig, rules: Iterable[Rule]) -> None:
    """Raise one error with every rule that a configuration breaks."""
    raise_all([rule.error(config) for rule in rules if rule.is_broken(config)])


def value_at(config: RunConfig, key: str, absent: Any = None) -> Any:
    """Return the value of a key; `absent` for a key of a section that is null, such as `model.adapter`."""
    if key == LOSS:  # named for the error only: `also` says which losses break the rule
        return "+".join(config.loss.kinds)
    *sections, name = key.split(".")
    section = reduce(getattr, sections, config)
    return absent if section is None else getattr(section, name)


def once(key: str) -> Rule:
    """Refuse a source that is listed twice."""
    return Rule(
        key,
        f"a source of {key} is given twice",
        "remove one of them; weight: 2 draws each pair of a source of data.train twice per epoch",
        lambda c: (
            len({str(replace(source, weight=1.0)) for source in value_at(c, key)}) < len(value_at(c, key))
        ),
    )


def unweighted(key: str) -> Rule:
    """Refuse weights of sources that are not drawn from."""
    return Rule(
        key,
        "a weight has no effect on evaluation data: every pair counts once",
        "remove the weight, or set limit",
        lambda c: any(source.weight != 1 for source in value_at(c, key)),
    )


def without_images(key: str) -> Rule:
    """Refuse folders of images that are not read."""
    return Rule(
        f"{key} model.images=null",
        "the folder of a source's images has no effect with this model.images",
        "remove the field images of the source, or set model.images.train=none to read images",
        lambda c: any(source.images for source in value_at(c, key)),
    )


def _unused_by_loss(option: str) -> Rule:
    """Refuse an option that no preference loss of the sum uses; all must use `divergence` and `weighting`."""
    has_effect = all if option in ("divergence", "weighting") else any

    def is_used(loss: LossConfig) -> bool:
        terms = [facts for facts in loss.facts if facts.fewest_responses > 1 or facts.is_unpaired]
        return bool(terms) and has_effect(option in facts.uses for facts in terms)

    users = ", ".join(sorted(kinds_using(option)))
    remedy = f"choose a loss that uses it: {users}; loss=NAME replaces all options of the loss"
    return unused_beside(f"loss.{option}", LOSS, remedy, lambda c: is_used(c.loss))


def _unused_by_reference(key: str, yields_to: tuple[str, ...] = ()) -> tuple[Rule, Rule]:
    """Refuse an option of `reference` in modes that load no model, and with a loss that needs none."""
    by_mode = unused(key, "reference.mode=cached|live", or_if=lambda c: not c.loss.needs_reference)
    by_loss = unused_beside(key, LOSS, "choose a loss with a reference", lambda c: c.loss.needs_reference)
    return replace(by_mode, yields_to=yields_to), replace(by_loss, yields_to=yields_to)


def best_direction(metric: str) -> Direction | None:
    """Return whether high or low values of an evaluation's metric are the best; None: unknown."""
    if metric.startswith(PREFIX + CUSTOM):
        return Direction.highest
    # A metric may be for one source, bucket of lengths or percentile; `loss/kl` is not a source's `loss`.
    metric_or_group = f"{metric}/"
    names = [
        name
        for name in METRICS
        if metric_or_group.startswith((f"{PREFIX}{name}/", f"{PREFIX}{name}_by_length/"))
    ]
    return METRICS[max(names, key=len)].best if names else None


_JUDGED_METRICS = [PREFIX + name for name in METRICS if METRICS[name].best]
"""Metrics of evaluations with a known best direction."""


def _instead_of_metric(name: str) -> str:
    listed = "choose eval_loss, eval_rewards/accuracies, eval_rewards/margins or eval_custom/NAME"
    near = nearest(name, _JUDGED_METRICS)
    return f"did you mean {near[0]}? {listed}" if near else listed


_NOT_KEPT = (HIDDEN, "${")
_ADAPTER = "set 'model.adapter={r: 64, alpha: 128}'"
HOLD_OUT = "set data.eval_share=0.05 or 'data.eval=[held_out.jsonl]'"
RULES = (
    # The run.
    Rule(
        "run.after_checkpoint",
        "the command has *** or ${{, which a configuration has for a hidden secret and for another key",
        "write $NAME for variables of the environment, also for secrets",
        lambda c: any(mark in (c.run.after_checkpoint or "") for mark in _NOT_KEPT),
    ),
    # The model.
    Rule(
        "model.attention=flash_attention_2|flash_attention_3|varlen model.dtype=fp32",
        "{model.attention} computes in 16 bits only",
        "set model.attention=sdpa or model.dtype=bf16",
    ),
    Rule(
        "trainer.deterministic=true model.fused=liger",
        "Liger's kernels may not be deterministic",
        "set model.fused=none or trainer.deterministic=false",
    ),
    unused(
        "model.activation_offload",
        "model.gradient_checkpointing!=none",
        "set model.gradient_checkpointing=full: the inputs of checkpointed layers are moved",
    ),
    unused(
        "model.tiled_mlp",
        "model.gradient_checkpointing!=none",
        "set model.gradient_checkpointing=full: other layers keep all that an MLP computes",
    ),
    *(
        Rule(
            f"model.fused=compile {other}",
            "torch.compile is not known to be exact with this setting",
            f"set model.fused=none, or remove {other.partition('=')[0].rstrip('!')}",
        )
        for other in (
            "model.quantization!=null",
            "reference.quantization!=null",
            "loss.router.aux_coefficient!=null",
            "model.tiled_mlp=true",
        )
    ),
    # Adapters and quantized weights.
    Rule(
        "model.adapter.modules_to_save!=null model.adapter.target_modules!=all-linear|null",
        "a module that is trained in full needs no low-rank matrices",
        "list the module in only one of the two keys",
        lambda c: (
            not set(value_at(c, "model.adapter.modules_to_save")).isdisjoint(
                value_at(c, "model.adapter.target_modules")
            )
        ),
    ),
    Rule(
        "model.quantization!=null model.adapter=null",
        "quantized weights cannot be trained themselves",
        _ADAPTER + ", or model.quantization=null",
    ),
    Rule(
        "model.quantization!=null parallelism.kind!=ddp",
        "ZeRO would separate quantized weights from the scales of their blocks",
        "choose parallelism=ddp, where every process has the whole base, or model.quantization=null",
    ),
    Rule(
        "model.adapter.variant=dora model.quantization=int8",
        "DoRA needs the norms of the base's weights, which peft cannot compute from 8-bit weights",
        "set model.quantization=nf4, or another model.adapter.variant",
    ),
    # Images in prompts.
    Rule(
        "model.images!=null parallelism.sequence_parallel!=1",
        "ranks that share the tokens of a sequence cannot share its images",
        "set parallelism.sequence_parallel=1, or remove model.images",
    ),
    Rule(
        "model.images.train!=none|null model.adapter!=null",
        "with an adapter, no weights of the model itself are trained",
        "set model.images.train=none, and name the projector in model.adapter.modules_to_save (by the "
        "model's family [multi_modal_projector], [merger] or [embed_vision]) or its layers in "
        "model.adapter.target_modules",
    ),
    Rule(
        f"model.images!=null {LOSS}",
        "reward models read only text: their classes in transformers take no features of images",
        to_unset("model.images"),
        lambda c: c.loss.of_scores,
    ),
    # Data.
    once("data.train"),
    once("data.eval"),
    unweighted("data.eval"),
    Rule(
        "data.eval_share!=0 data.eval!=[]",
        "evaluation data are given twice: by their sources and as a share of the training data",
        to_unset("data.eval_share")
        + "; data.drop_eval_prompts=true keeps prompts of data.eval out of training",
        yields_to=("data.eval",),
    ),
    unused("data.drop_eval_prompts", "data.eval!=[]", "set data.eval; data.eval_share never shares a prompt"),
    without_images("data.train"),
    without_images("data.eval"),
    once("evaluation.data"),
    unweighted("evaluation.data"),
    without_images("evaluation.data"),
    Rule(
        "data.max_prompt_length!=null data.max_length",
        "the longest prompt leaves no room for a response",
        lambda c: (
            f"set data.max_prompt_length={c.data.max_length // 2}"
            + f", or data.max_length={2 * (c.data.max_prompt_length or 0)}"
        ),
        lambda c: (c.data.max_prompt_length or 0) >= c.data.max_length,
    ),
    # The loss.
    Rule(
        LOSS,
        "a loss of labelled records cannot be summed with losses of pairs",
        "set loss=kto or loss=apo_zero_unpaired alone",
        lambda c: c.loss.is_unpaired and len(c.loss.kinds) > 1,
    ),
    Rule(
        LOSS,
        "a loss of scores cannot be summed with losses of log-probs: the model gives one or the other",
        "set loss=reward alone",
        lambda c: c.loss.of_scores and len(c.loss.kinds) > 1,
    ),
    unused_beside(
        "data.untrained",
        LOSS,
        "choose another loss: reward scores whole conversations",
        lambda c: not c.loss.of_scores,
    ),
    Rule(
        LOSS,
        "a kind of loss appears twice",
        "make it one term with the sum of the weights",
        lambda c: len(set(c.loss.kinds)) < len(c.loss.kinds),
    ),
    unused_beside(
        "loss.kind",
        "loss.terms",
        "add it to loss.terms, which is the whole loss",
        lambda c: c.loss.kind in c.loss.kinds,
    ),
    *(_unused_by_loss(option) for option in schema_fields(LossConfig) if kinds_using(option)),
    Rule(
        f"loss.function=null {LOSS}",
        "a custom loss needs a function",
        "set loss.function=my_losses:my_loss for the function my_loss in my_losses.py",
        lambda c: LossKind.custom in c.loss.kinds,
    ),
    unused("loss.alpha_coefficient", "loss.divergence=alpha"),
    Rule(
        f"loss.label_smoothing=0 {LOSS}",
        "this loss takes the logarithm of loss.label_smoothing",
        to_unset("loss.label_smoothing") + ", or choose a value > 0 and < 0.5",
        lambda c: any(facts.smoothing_above_0 for facts in c.loss.facts),
    ),
    # The optimizer.
    Rule(
        "optim.kind=adamw_bf16 parallelism.offload_optimizer parallelism.offload_parameters",
        "this optimizer updates the weights where the forward has them, on the device",
        "set parallelism=zero3, zero2 or ddp, or optim.kind=adamw",
        lambda c: {c.parallelism.offload_optimizer, c.parallelism.offload_parameters} != {Offload.none},
    ),
    Rule(
        "optim.kind=adamw_bf16 model.dtype!=bf16",
        "this optimizer updates weights in bf16",
        "set model.dtype=bf16, or optim.kind=adamw",
    ),
    Rule(
        "optim.sums=bf16 optim.kind!=adamw_bf16",
        "float32 master weights take float32 gradients",
        "remove optim.sums, or set optim.kind=adamw_bf16",
    ),
    Rule(
        "optim.sums=fp32 optim.kind=adamw_bf16 parallelism.kind=ddp",
        "with float32 sums DeepSpeed's stage 1 keeps float32 master weights",
        "set parallelism=zero2, or remove optim.sums",
    ),
    Rule(
        "optim.warmup",
        "the warm-up is a share of the steps below 1, or a whole number of them",
        lambda c: f"set optim.warmup={c.optim.warmup:.0f}, or a share such as 0.1",
        lambda c: c.optim.warmup > 1 and not c.optim.warmup.is_integer(),
    ),
    unused("optim.min_lr_ratio", "optim.schedule=cosine|linear"),
    Rule(
        "trainer.ema_decay!=null trainer.keep_last=0",
        "checkpoints hold the moving average of the weights, but no checkpoint is kept",
        "set trainer.keep_last=1, or remove trainer.ema_decay",
    ),
    # Training and evaluations.
    *map(without_evaluations, ("trainer.eval_every", "trainer.keep_best")),
    unused("parallelism.offload_parameters", "parallelism.kind=zero3"),
    unused("parallelism.shard_size", "parallelism.kind=zero3"),
    unused("parallelism.experts", "parallelism.kind=zero3", or_if=lambda c: c.model.quantization is not None),
    Rule(
        "parallelism.experts parallelism.shard_size!=null",
        "groups that share experts are parts of the groups of parallelism.shard_size",
        "set parallelism.shard_size to a multiple of parallelism.experts",
        lambda c: (c.parallelism.shard_size or 0) % c.parallelism.experts != 0,
    ),
    Rule(
        "parallelism.experts!=1 loss.sync_reference.every!=null",
        "a reference that follows the policy has its experts on other processes",
        to_unset("parallelism.experts") + ", or loss.sync_reference.every",
    ),
    Rule(
        "parallelism.shard_size!=null parallelism.offload_optimizer!=none",
        "gradients that go to the host cannot be summed over several copies of the weights",
        to_unset("parallelism.shard_size") + ", or set parallelism.offload_optimizer=none",
    ),
    unused("parallelism.offload_optimizer", "parallelism.kind=zero3|zero2"),
    unused(
        "trainer.keep_best",
        "trainer.eval_every!=0",
        "set trainer.eval_every=100, else there is only the last evaluation",
        lambda c: not c.data.eval_sources,
    ),
    unused("trainer.patience", "trainer.keep_best!=null", "set trainer.keep_best=eval_loss"),
    Rule(
        "trainer.keep_best!=null",
        "this is no evaluation metric with a known best direction, highest or lowest",
        lambda c: _instead_of_metric(c.trainer.keep_best or ""),
        lambda c: best_direction(c.trainer.keep_best or "") is None,
    ),
    # The reference.
    Rule(
        f"reference.mode=none {LOSS}",
        "this loss needs a reference model",
        "choose reference=auto",
        lambda c: any(facts.needs_reference and facts.fewest_responses == 1 for facts in c.loss.facts),
    ),
    Rule(
        f"reference.mode!=none {LOSS}",
        "this loss does not use a reference model",
        "choose reference=none, or remove reference.mode: auto follows the loss",
        lambda c: not c.loss.needs_reference,
    ),
    Rule(
        "reference.mode=adapter model.adapter=null",
        "reference.mode=adapter switches off the policy's adapter, and the policy has none",
        _ADAPTER + ", or choose reference=cached",
    ),
    # Not `reference.store` and `behind`: like `data.cache` they name folders, which scripts set for runs of
    # every mode.
    unused("reference.accept", "reference.mode=cached", or_if=_stores_teacher),
    *_unused_by_reference("reference.path"),
    *_unused_by_reference("reference.quantization"),
    unused_beside(
        "reference.system", LOSS, "choose a loss with a reference", lambda c: c.loss.needs_reference
    ),
    # An experiment may set these, while the command chooses a loss or mode without a reference.
    *_unused_by_reference("reference.offload", yields_to=("reference.mode",)),
    Rule(
        # Without an adapter the rule above it says what is wrong.
        "reference.quantization model.quantization!=null model.adapter!=null reference.path=null "
        "reference.mode=cached|live",
        "the reference model would not have the quantization with which the policy starts",
        lambda c: f"choose reference=adapter, or set reference.quantization={c.model.quantization}",
        lambda c: c.reference.quantization is not c.model.quantization,
    ),
    Rule(
        "reference.quantization!=null reference.offload!=none",
        "a quantized reference model is whole on every device and cannot be offloaded",
        "remove one of them",
    ),
    unused("loss.sync_reference.mixup", "loss.sync_reference.every!=null", "set loss.sync_reference.every"),
    Rule(
        "loss.sync_reference.every!=null reference.mode!=live",
        "only a live reference can follow the policy",
        "choose reference=live, or remove loss.sync_reference.every",
    ),
    Rule(
        "loss.sync_reference.every!=null model.adapter!=null",
        "a reference can follow the policy only if all weights train",
        to_unset("loss.sync_reference.every") + ", or model.adapter",
    ),
    Rule(
        "loss.sync_reference.every!=null reference.quantization!=null",
        "a quantized reference cannot take the policy's weights",
        "set reference.quantization=null, or remove loss.sync_reference.every",
    ),
    # The teacher.
    Rule(
        f"teacher.path=null teacher.mode=cached|live {LOSS}",
        "this loss learns from a teacher",
        "set teacher.path to a model with the tokenizer of model.path",
        lambda c: c.loss.needs_teacher,
    ),
    *(
        unused_beside(f"teacher.{name}", LOSS, "choose loss=distill", lambda c: c.loss.needs_teacher)
        for name in ("path", "digest", "system", "mode", "k", "offload")
    ),
    unused("teacher.digest", "teacher.mode=cached"),
    unused("teacher.offload", "teacher.mode=cached|live"),
    Rule(
        f"teacher.mode=cached {LOSS}",
        "loss.options.mix above 0 needs whole distributions, and the store has sparse ones",
        "set teacher.mode=live, or learn KL(policy, teacher) on the policy's own samples: loss=reverse_kl",
        _needs_whole_teacher,
    ),
    Rule(
        f"teacher.k {LOSS}",
        "teacher.k has no effect with loss.options.mix above 0, which takes whole distributions",
        to_unset("teacher.k") + ", or loss.options.mix",
        lambda c: c.teacher.k != all_keys()["teacher.k"].default and _needs_whole_teacher(c),
    ),
    Rule(
        "teacher.path!=null teacher.mode=policy|adapter",
        "in this mode the policy is its own teacher",
        "remove teacher.path, or set teacher.mode=cached",
    ),
    Rule(
        f"teacher.mode=adapter model.adapter=null {LOSS}",
        "teacher.mode=adapter switches off the policy's adapter, and the policy has none",
        _ADAPTER + ", or set teacher.mode=policy",
        lambda c: c.loss.needs_teacher,
    ),
    # Exported models.
    unused("export.merge", "model.adapter!=null", "train an adapter"),
    unused("export.weights", "trainer.ema_decay!=null", "set trainer.ema_decay"),
)
"""The rules of every verb, in the order of the checks."""


_NEEDED = {
    "model.path": Rule(
        f"model.path={UNSET}",
        "model.path is not set",
        "set model.path to a folder or hub name, or choose a preset: model=NAME; for a run that exists "
        "begin with its configuration: dpo-dist train RUN/config.yaml",
    ),
    "data.train": Rule(
        "data.train=[]",
        "no training data is given",
        "set 'data.train=[pairs.jsonl]', or choose a preset with data=...",
    ),
    "reference.mode": Rule(
        f"reference.mode!=cached {LOSS}",
        "only a stored reference or teacher can be precomputed",
        "set reference=cached, with a loss that uses a reference model",
        lambda c: not _stores_teacher(c),
    ),
}


def rules_of(verb: str) -> list[Rule]:
    """Return all rules for a verb's configuration; without a verb, the rules for every verb."""
    rules = [*needs_of(verb), *RULES]
    for module in rule_modules():
        rules += module.rules_of_verb(verb)
    return rules


def needs_of(verb: str) -> list[Rule]:
    """Return the rules about the keys that a verb needs, for a configuration that is made in Python, too."""
    rules = [_NEEDED[key] for key in VERBS[verb].needs] if verb else []
    if verb and VERBS[verb].reuses_config:
        rules[0] = replace(rules[0], remedy=f"{rules[0].remedy}, or name a run: run.dir=RUN")
    return rules


def resolve_reference(config: RunConfig) -> RunConfig:
    """Replace `auto` of `reference.mode` by `none`, `adapter` or `cached`."""
    reference = config.reference
    mode = ReferenceMode.cached
    if reference.mode is not ReferenceMode.auto:
        return config
    if not config.loss.needs_reference:
        mode = ReferenceMode.none
    elif config.model.adapter is not None and reference.path is None and reference.quantization is None:
        mode = ReferenceMode.adapter
    return replace(config, reference=replace(reference, mode=mode))
