"""What must hold between the options of the reference store."""

from dpo_dist.config.schema import Numerics, ReferenceConfig, ReferenceMode
from dpo_dist.errors import ConfigError


def check_store(reference: ReferenceConfig) -> None:
    """Accept the options or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    if reference.numerics is Numerics.strict:
        return
    if reference.mode is not ReferenceMode.cached:
        raise ConfigError(
            "only rows of the store can be of other numerics",
            where="reference.numerics, reference.mode",
            got=f"{reference.numerics}, {reference.mode}",
            expected="reference.mode=cached",
            remedy="leave reference.numerics out",
        )
    if not reference.audit_pairs:
        raise ConfigError(
            "rows of other numerics serve only where their drift is measured",
            where="reference.numerics, reference.audit_pairs",
            got=f"{reference.numerics}, 0",
            remedy="leave reference.audit_pairs out, or set reference.numerics=strict",
        )
