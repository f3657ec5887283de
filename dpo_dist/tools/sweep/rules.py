"""Rules between the keys of a sweep."""

from dpo_dist.kit import ACCURACIES, HOLD_OUT, PREFIX, Rule, RunConfig, best_direction, likely_metric, unused
from dpo_dist.tools.sweep.extension import SweepConfig


def _searched_metric(config: RunConfig) -> str:
    return config.section_of(SweepConfig).by or ""


def _usual_metric(config: RunConfig) -> str:
    return PREFIX + ACCURACIES[config.loss.is_unpaired]


_RULES = [
    unused("sweep.by", "sweep.trials!=null", "set sweep.trials=20"),
    Rule(
        "sweep.trials!=null sweep.by",
        "a search needs an evaluation metric with a known best direction, highest or lowest",
        lambda c: f"set sweep.by={likely_metric(_searched_metric(c)) or _usual_metric(c)}",
        lambda c: best_direction(_searched_metric(c)) is None,
    ),
    Rule(
        "sweep.trials!=null data.eval=[]",
        "a search compares evaluations, and these runs have none",
        HOLD_OUT,
        lambda c: c.data.eval_share == 0,
    ),
]


def rules_of_verb(_verb: str) -> list[Rule]:
    """Return the rules, which are the same for every verb."""
    return _RULES
