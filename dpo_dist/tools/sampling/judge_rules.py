"""Rules for the settings of the judge and of a server, checked before torch is imported."""

from collections.abc import Callable

from dpo_dist.foundation.user_code import user_function
from dpo_dist.kit import Rule, RunConfig, to_unset, unused
from dpo_dist.tools.sampling.keys import PairsConfig

JUDGES = "pairs.reward_model pairs.function pairs.endpoint.url"
_HAS_ENDPOINT = "pairs.endpoint.url!=null"
_SERVED = "sampling.endpoint.url!=null"


def endpoint_rules(count: Callable[[RunConfig], int]) -> tuple[Rule, ...]:
    """Return the rules for `pairs.endpoint` and `sampling.endpoint`; `count`: how many models respond."""
    return (
        *(unused(f"pairs.endpoint.{key}", _HAS_ENDPOINT) for key in ("model", "verdicts", "criterion")),
        Rule(
            f"pairs.endpoint.model=null {_HAS_ENDPOINT}",
            "the endpoint's model is not set",
            "set it to the name under which the endpoint serves the judge",
        ),
        *(unused(f"sampling.endpoint.{key}", _SERVED) for key in ("model", "parallel", "reload")),
        Rule(
            f"sampling.endpoint.model!=null sampling.endpoint.reload=null {_SERVED}",
            "several models cannot be served under one name",
            to_unset("sampling.endpoint.model")
            + ": the server is then asked for each model by the model's own name; or set "
            "sampling.endpoint.reload to a command that changes the weights",
            lambda c: count(c) > 1,
        ),
        Rule(
            f"model.images!=null {_SERVED}",
            "a server gets prompts as tokens, without images",
            to_unset("sampling.endpoint.url") + ", or set model.images=null",
        ),
    )


def count_judges(pairs: PairsConfig) -> int:
    """Return how many judges are configured."""
    return sum(judge is not None for judge in (pairs.reward_model, pairs.function, pairs.endpoint.url))


def check_function(pairs: PairsConfig) -> None:
    """Check that the judge's function can be imported, if one is configured."""
    if pairs.function is not None:
        user_function(pairs.function, "pairs.function")
