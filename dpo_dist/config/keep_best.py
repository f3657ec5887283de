"""Checkpoints kept by an evaluation metric: the direction of each metric, and the rules of the keys."""

from dpo_dist.config.check import Rule
from dpo_dist.config.schema import Direction, TrainerConfig

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
