"""The keys of `loss.router`."""

from dataclasses import dataclass

from dpo_dist.config.fields import key

OF_MODEL = "model"
"""The value of `loss.router.aux_coefficient` for the coefficient in the model's config.json."""


@dataclass(frozen=True)
class RouterConfig:
    """Losses of the routers of a mixture of experts, which training adds to the loss of each global batch."""

    aux_coefficient: int | float | str | None = key(
        None,
        "Weight of the load-balancing loss, or `model`: `router_aux_loss_coef` of its config.json; "
        "null: without it.",
        added=True,
        accepts="model, a number above 0, or null",
    )
    z_coefficient: float | None = key(
        None, "Weight of the router z-loss (arXiv 2202.08906); null: without it.", above=0, added=True
    )

    @property
    def is_set(self) -> bool:
        """Return whether a loss of the routers is added."""
        return self != RouterConfig()
