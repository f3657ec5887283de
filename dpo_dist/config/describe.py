"""What tells one run from another: for summary.json, and as a name for people."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.fields import declaration
from dpo_dist.config.load import defining_sections, run_digest
from dpo_dist.config.schema import RunConfig

# Told of every run; other settings only where they are not at their default.
_ALWAYS = frozenset(
    {
        "model.path",
        "data.train",
        "loss.kind",
        "loss.beta",
        "reference.mode",
        "optim.lr",
        "trainer.epochs",
        "trainer.global_batch_pairs",
        "trainer.seed",
    }
)


def settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that define the run's result: the usual ones and those not at their default.

    Returns:
        Flat keys with plain values: `{"loss.kind": "simpo", "loss.beta": 2.0, ...}`.
    """
    defaults, found = RunConfig(), {}
    for section in defining_sections():
        mine, usual = getattr(config, section), getattr(defaults, section)
        for field in fields(mine):
            key, value = f"{section}.{field.name}", getattr(mine, field.name)
            if not declaration(field).defines_result:
                continue
            if key in _ALWAYS or value != getattr(usual, field.name, None):
                found[key] = _plain(value)
    if not config.loss.uses("beta"):
        found.pop("loss.beta", None)
    if config.loss.terms:
        found.pop("loss.kind", None)
    return found


def title(config: RunConfig, run_dir: Path) -> str:
    """Return a name with loss, beta, learning rate, adapter and seed.

    Example: `qwen7b ipo beta=0.1 lr=1e-06 1a2b3c4d`, in the folder qwen7b-1a2b3c4d.
    """
    digest = run_digest(config)
    is_default = run_dir.name == f"{config.run.name}-{digest}"
    parts = [config.run.name if is_default else run_dir.name, "+".join(config.loss.kinds)]
    if config.loss.uses("beta"):
        parts.append(f"beta={config.loss.beta:g}")
    parts.append(f"lr={config.optim.lr:g}")
    if config.model.adapter is not None:
        parts.append(f"{config.model.adapter.variant} r={config.model.adapter.r}")
    if config.trainer.seed:
        parts.append(f"seed={config.trainer.seed}")
    return " ".join([*parts, digest] if is_default else parts)


def _plain(value: Any) -> Any:
    """Without dataclasses and enumerations; of a source, an adapter or a term only what was set."""
    if is_dataclass(value):
        usual = type(value)
        return {
            field.name: _plain(getattr(value, field.name))
            for field in fields(value)
            if getattr(value, field.name) != getattr(usual, field.name, None)
        }
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value
