"""A number within its bounds, or an error that names them."""

import math
from typing import get_args

from dpo_dist.config.keys import run_keys
from dpo_dist.errors import ConfigError


def check_range(
    key: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Demand a finite number within the given bounds; null, where a key allows it, means no limit.

    Raises:
        ConfigError: it lies outside of them.
    """
    if value is None:
        return
    bounds = (
        (at_least, ">=", at_least is None or value >= at_least),
        (above, ">", above is None or value > above),
        (at_most, "<=", at_most is None or value <= at_most),
        (below, "<", below is None or value < below),
    )
    if math.isfinite(value) and all(kept for _, _, kept in bounds):
        return
    expected = " and ".join(f"{sign} {bound:g}" for bound, sign, _ in bounds if bound is not None)
    none = " or null" if type(None) in get_args(run_keys().get(key)) else ""
    raise ConfigError(
        f"{key} is out of range",
        where=key,
        got=f"{value:g}",
        expected=expected + none,
        remedy=f"choose {key} in that range" + (", or null" if none else ""),
    )
