"""The rules about the losses of routers."""

from dpo_dist.config.check import Rule
from dpo_dist.config.router_schema import OF_MODEL


def _is_coefficient(value: float | str | None) -> bool:
    return value > 0 if isinstance(value, int | float) else value in (None, OF_MODEL)


ROUTER_RULES = (
    Rule(
        "loss.router.aux_coefficient",
        lambda c: not _is_coefficient(c.loss.router.aux_coefficient),
        "loss.router.aux_coefficient is not a weight of the load-balancing loss",
        f"set loss.router.aux_coefficient={OF_MODEL}, or remove it",
        f"{OF_MODEL}, a number above 0, or null",
    ),
    Rule(
        "loss.router.aux_coefficient loss.router.z_coefficient model.compile",
        lambda c: c.loss.router.is_set and c.model.compile,
        "losses of routers are not known to be exact with compiled layers",
        "set model.compile=false, or remove loss.router",
    ),
)
