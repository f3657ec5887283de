"""Identity of a run: its digest, run directory, title and settings, and its difference from another run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_dist.config.losses import LOSS_FUNCTION, LossKind
from dpo_dist.foundation.fields import key_facts, plain, schema_fields
from dpo_dist.foundation.user_code import find_function

# Reports show these settings of every run, and other keys only if they differ from their default.
_OBJECTIVE = ("model.path", "data.train", "loss.kind", "loss.beta", "reference.mode")
_ALWAYS = (*_OBJECTIVE, "optim.lr", "trainer.epochs", "trainer.global_batch_pairs", "trainer.seed")
_LENGTH = ("epochs", "max_steps")
_PRECISION = ("kind", "sums")


@dataclass(frozen=True)
class RunIdentity:
    """The keys that define a run's result, and their digest; see `RunConfig.identity`."""

    config: Any  # RunConfig, whose module imports this one

    @cached_property
    def digest(self) -> str:
        """8 hex digits of SHA-256 over the keys that define the result; paths count as written."""
        return _digest(self._defining)

    @cached_property
    def resume_digest(self) -> str:
        """The digest without what may change at a resume: the length, and whether AdamW is in bf16."""
        trainer = {key: value for key, value in self._defining["trainer"].items() if key not in _LENGTH}
        optim = {key: value for key, value in self._defining["optim"].items() if key not in _PRECISION}
        return _digest(self._defining | {"trainer": trainer, "optim": optim})

    @property
    def default_dir(self) -> Path:
        """The run directory for `run.dir=null`: the same on all ranks and at every start."""
        return Path(self.config.run.root) / f"{self.config.run.name}-{self.digest}"

    @property
    def length(self) -> str:
        """The keys that say how long the run is, as JSON."""
        return json.dumps({key: getattr(self.config.trainer, key) for key in _LENGTH})

    @property
    def recorded(self) -> dict[str, str]:
        """Digests, length and optimizer, as a run's state file and checkpoints record them."""
        return {
            "run_digest": self.digest,
            "resume_digest": self.resume_digest,
            "length": self.length,
            "optimizer": str(self.config.optim.kind),
        }

    @cached_property
    def values(self) -> dict[str, Any]:
        """The plain value of every `section.key` that defines the result."""
        values = {}
        for section, field in schema_fields(self.config).items():
            if not key_facts(field).free:
                content = getattr(self.config, section)
                for option, inner in schema_fields(content).items():
                    if not key_facts(inner).free:
                        values[f"{section}.{option}"] = plain(getattr(content, option))
        return values | {"loss.options": values["loss.options"] or None}  # {}: the defaults of the kind

    @cached_property
    def _defining(self) -> dict[str, Any]:
        defining: dict[str, Any] = plain(self.config, with_defaults=True)
        if self.config.teacher.is_policy:
            defining["teacher"]["mode"] = str(self.config.teacher.mode)
        if LossKind.custom in self.config.loss.kinds:
            function = find_function(self.config.loss.function, LOSS_FUNCTION)
            defining["loss"]["function_source"] = function.digest
        return defining


def _digest(defining: Mapping[str, Any]) -> str:
    canonical = json.dumps(defining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def settings(config: Any) -> dict[str, Any]:
    """Return the settings for reports: the usual ones, a new adapter's size, values that are no default."""
    defaults = type(config)().identity.values
    values = {}
    for key, value in config.identity.values.items():
        if key in _ALWAYS or value != defaults[key]:
            values[key] = value
    if not config.loss.uses("beta"):
        values.pop("loss.beta", None)
    if config.loss.terms:
        values.pop("loss.kind", None)
    adapter = config.model.adapter
    if adapter is not None and adapter.path is None:
        values["model.adapter"] = values["model.adapter"] | {"r": adapter.r, "alpha": adapter.alpha}
    if config.model.images is not None:
        values["model.images"] = values["model.images"] | {"train": str(config.model.images.train)}
    return values


def loss_kinds(settings: Mapping[str, Any]) -> list[str]:
    """Return the kinds of loss in `settings`, which may lack any key."""
    kinds = [term.get("kind") for term in settings.get("loss.terms") or ()] or [settings.get("loss.kind")]
    return list(map(str, kinds))


def title(config: Any, run_dir: Path) -> str:
    """Return a name with loss, beta, learning rate, adapter and seed.

    Example: `qwen7b ipo beta=0.1 lr=1e-06 1a2b3c4d`, in the run directory qwen7b-1a2b3c4d.
    """
    digest = config.identity.digest
    parts = [run_dir.name, "+".join(config.loss.kinds)]
    if config.loss.uses("beta"):
        parts.append(f"beta={config.loss.beta:g}")
    parts.append(f"lr={config.optim.lr:g}")
    adapter = config.model.adapter
    if adapter is not None and adapter.path is not None:
        parts.append(f"continues {adapter.path}")
    elif adapter is not None:
        parts.append(f"{adapter.variant} r={adapter.r}")
    if config.trainer.seed:
        parts.append(f"seed={config.trainer.seed}")
    if run_dir.name == f"{config.run.name}-{digest}":
        parts[0] = config.run.name
        parts.append(digest)
    return " ".join(parts)
