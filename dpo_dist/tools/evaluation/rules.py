"""Rules between the keys of the verb `evaluate`."""

from dpo_dist.config.rules import once, unweighted, without_images
from dpo_dist.kit import Rule

_RULES = [once("evaluation.data"), unweighted("evaluation.data"), without_images("evaluation.data")]


def rules_of_verb(_verb: str) -> list[Rule]:
    """Return the rules, which are the same for every verb."""
    return _RULES
