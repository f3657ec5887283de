"""Rules between the keys of `pairs` that hold for every verb; those of the verb itself are in `start`."""

from dpo_dist.kit import LOSS, Rule

_RULES = [
    Rule(
        "model.adapter.path!=null pairs.rounds!=0",
        "each round merges its adapter into the model, so that the next one has no adapter to continue",
        "merge the adapter of model.adapter.path into its base, and set model.path to the result",
    ),
    Rule(
        f"pairs.rounds!=0 {LOSS}",
        "each round trains the model that responds, and a reward model gives no responses",
        "train the reward model first, and name it in pairs.reward_model",
        lambda c: c.loss.of_scores,
    ),
]


def rules_of_verb(_verb: str) -> list[Rule]:
    """Return the rules, which are the same for every verb."""
    return _RULES
