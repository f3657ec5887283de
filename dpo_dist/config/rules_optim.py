"""The rules between values of `optim`, and between them and others."""

from dpo_dist.config.check import Rule
from dpo_dist.config.export_schema import ExportedWeights
from dpo_dist.config.optim_schema import LearningRateSchedule, OptimConfig, OptimizerKind
from dpo_dist.config.schema import Offload, RunConfig

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
