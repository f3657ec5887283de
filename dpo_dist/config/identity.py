"""Identity of a run: digest, run directory, title, settings, and its difference from another run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.fields import facts_of, fields_of
from dpo_dist.config.losses import LossKind
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.user_code import find_function

# In the settings of every run; other keys only if they differ from their default.
_OBJECTIVE = ("model.path", "data.train", "loss.kind", "loss.beta", "reference.mode")
_ALWAYS = (*_OBJECTIVE, "optim.lr", "trainer.epochs", "trainer.global_batch_pairs", "trainer.seed")


def run_digest(config: RunConfig) -> str:
    """Return 8 hex digits of SHA-256 over the keys that define the run's result; paths count as written."""
    defining = plain(config, with_defaults=True)
    if LossKind.custom in config.loss.kinds:
        defining["loss"]["function_source"] = find_function(config.loss.function).digest
    canonical = json.dumps(defining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def run_dir(config: RunConfig) -> Path:
    """Return `run.dir`, by default `<run.root>/<run.name>-<digest>`: equal on all ranks and in all starts."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    return Path(config.run.root) / f"{config.run.name}-{run_digest(config)}"


def settings(config: RunConfig) -> dict[str, Any]:
    """Return what defines the run's result: the usual settings, an adapter's size, and what is no default."""
    defaults = _values(RunConfig())
    shown = {key: value for key, value in _values(config).items() if key in _ALWAYS or value != defaults[key]}
    if not config.loss.uses("beta"):
        shown.pop("loss.beta", None)
    if config.loss.terms:
        shown.pop("loss.kind", None)
    if (adapter := config.model.adapter) is not None and adapter.path is None:
        shown["model.adapter"] |= {"r": adapter.r, "alpha": adapter.alpha}
    return shown


def kinds_in(settings: Mapping[str, Any]) -> list[str]:
    """Return the kinds of losses in `settings`, of which any may be missing."""
    kinds = [term.get("kind") for term in settings.get("loss.terms") or ()] or [settings.get("loss.kind")]
    return list(map(str, kinds))


def title(config: RunConfig, run_dir: Path) -> str:
    """Return a name with loss, beta, learning rate, adapter and seed.

    Example: `qwen7b ipo beta=0.1 lr=1e-06 1a2b3c4d`, in the run directory qwen7b-1a2b3c4d.
    """
    digest = run_digest(config)
    is_default = run_dir.name == f"{config.run.name}-{digest}"
    parts = [config.run.name if is_default else run_dir.name, "+".join(config.loss.kinds)]
    if config.loss.uses("beta"):
        parts.append(f"beta={config.loss.beta:g}")
    parts.append(f"lr={config.optim.lr:g}")
    if (adapter := config.model.adapter) is not None:
        new = f"{adapter.variant} r={adapter.r}"
        parts.append(new if adapter.path is None else f"continues {adapter.path}")
    if config.trainer.seed:
        parts.append(f"seed={config.trainer.seed}")
    return " ".join([*parts, digest] if is_default else parts)


def differing_keys(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values give `old` and `new` different digests: `{"loss.beta": (0.1, 0.2)}`."""
    before, after = _values(old), _values(new)
    return {key: (value, after[key]) for key, value in before.items() if value != after[key]}


def _values(config: RunConfig) -> dict[str, Any]:
    """Return the plain value of every `section.key` that defines the run's result."""
    values = {
        f"{section}.{option}": plain(getattr(getattr(config, section), option))
        for section, content in fields_of(config).items()
        if not facts_of(content).free
        for option, field in fields_of(getattr(config, section)).items()
        if not facts_of(field).free
    }
    return values | {"loss.options": values["loss.options"] or None}  # {}: the defaults of the kind


def plain(value: Any, *, with_defaults: bool = False) -> Any:
    """Return `value` without dataclasses and enums; of a dataclass the keys that define the result.

    Keys at their default are left out unless `with_defaults`; a null becomes the value that it means.
    """
    if isinstance(value, list):
        return [plain(item, with_defaults=with_defaults) for item in value]
    if not is_dataclass(value):
        return str(value) if isinstance(value, str) else value
    content = {}
    for option, field in fields_of(value).items():
        item, facts = getattr(value, option), facts_of(field)
        if not facts.free and (
            with_defaults or item not in (field.get_default(call_default_factory=True), facts.null_means)
        ):
            shown = plain(facts.null_means if item is None else item, with_defaults=with_defaults)
            if with_defaults or option != "options" or shown:  # {}: the defaults of the kind of loss
                content[option] = shown
    return content
