"""Rules for the judge's settings, checked before torch is imported."""

from dpo_dist.config.rule import Rule, unused
from dpo_dist.config.user_code import user_function
from dpo_dist.config.verb_sections import PairsConfig

JUDGES = "pairs.reward_model pairs.function pairs.endpoint.url"
_HAS_ENDPOINT = "pairs.endpoint.url!=null"
ENDPOINT_RULES = (
    *(unused(f"pairs.endpoint.{key}", _HAS_ENDPOINT) for key in ("model", "verdicts", "criterion")),
    Rule(
        f"pairs.endpoint.model=null {_HAS_ENDPOINT}",
        "the endpoint's model is not set",
        "set it to the name under which the endpoint serves the judge",
    ),
)


def count_judges(pairs: PairsConfig) -> int:
    """Return how many judges are configured."""
    return sum(judge is not None for judge in (pairs.reward_model, pairs.function, pairs.endpoint.url))


def check_function(pairs: PairsConfig) -> None:
    """Check that the judge's function can be imported, if one is configured."""
    if pairs.function is not None:
        user_function(pairs.function, "pairs.function")
