"""What must hold between the options of the reference store."""

from dpo_dist.config.schema import Numerics, ReferenceConfig, ReferenceMode
from dpo_dist.errors import ConfigError


def check_store(reference: ReferenceConfig) -> None:
    """Accept the options or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    is_stored = reference.mode is ReferenceMode.cached
    if reference.rows_per_shard != ReferenceConfig.rows_per_shard and not is_stored:
        raise ConfigError(
            "only a store has shards",
            where="reference.rows_per_shard, reference.mode",
            got=f"{reference.rows_per_shard}, {reference.mode}",
            expected="reference.mode=cached",
            remedy="remove reference.rows_per_shard",
        )
    if reference.audit_pairs != ReferenceConfig.audit_pairs and reference.mode is ReferenceMode.none:
        raise ConfigError(
            "without a reference there is nothing to audit",
            where="reference.audit_pairs, reference.mode",
            got=f"{reference.audit_pairs}, {reference.mode}",
            expected="a reference",
            remedy="remove reference.audit_pairs",
        )
    if reference.numerics is Numerics.strict:
        return
    if not is_stored:
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
