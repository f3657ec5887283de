"""The keys of `model.adapter`; see `schema`. The rules between them are in `rules_adapter`."""

from copy import copy
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from dpo_dist.config.fields import declaration, key

AdapterVariant = StrEnum("AdapterVariant", ["lora", "rslora", "dora"])
_INITS = r"default|gaussian|pissa|pissa_niter_[1-9]\d?|olora"
_OR_OWN = ", or that of the adapter that is continued."


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank matrices, trained in place of the model's own weights.

    Keys whose null has a meaning are null only in an adapter that is continued.
    """

    r: int | None = key(None, f"Rank; null: 16{_OR_OWN}", null_means=16, at_least=1)
    alpha: float | None = key(
        None,
        f"Scale of the update: alpha / r, for `rslora` alpha / sqrt(r); null: 32{_OR_OWN}",
        null_means=32.0,
        above=0,
    )
    dropout: float = key(0.0, "0 only: policy and reference must compute the same function.", accepts="0")
    target_modules: Any = key(
        None,
        f"`all-linear` (all but the output layer), or a list of names; null: `all-linear`{_OR_OWN}",
        accepts="all-linear, a list in brackets: [q_proj,v_proj], or null",
        null_means="all-linear",
    )
    variant: AdapterVariant | None = key(
        None,
        f"`lora`, `rslora` (arXiv 2312.03732) or `dora` (arXiv 2402.09353); null: `lora`{_OR_OWN}",
        null_means=AdapterVariant.lora,
    )
    path: str | None = key(
        None,
        "Folder or hub name of a LoRA adapter on `model.path`, such as one of supervised fine-tuning: the "
        "policy starts as the two, which are the reference too, and continues to train it.",
        added=True,
        filled=True,
    )
    revision: str | None = key(None, "Branch, tag or commit of `path` on the hub.", added=True)
    on_top: bool = key(False, "Train a new adapter above that of `path`, which stays as it is.", added=True)
    init: str | None = key(
        None,
        "Initial matrices: `default` (a random A, B = 0), `gaussian` (the same, normal), "
        "`pissa` or `pissa_niter_4` (arXiv 2404.02948; the latter approximate and fast), `olora` (arXiv "
        f"2406.01775); null: `default`{_OR_OWN}",
        added=True,
        accepts="default, gaussian, pissa, pissa_niter_1 to pissa_niter_99, olora, or null",
        pattern=_INITS,
        null_means="default",
    )
    modules_to_save: list[str] | None = key(
        None,
        "Modules trained in full beside the matrices, by the last parts of their names: "
        "`[embed_tokens,lm_head]`, norms. Of two that share their weight both or none. Null: "
        f"none{_OR_OWN}",
        added=True,
        null_means=[],
    )

    def __post_init__(self) -> None:
        if self.continues:
            return
        for field in fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, copy(declaration(field).null_means))

    @property
    def continues(self) -> bool:
        """Return whether the adapter of `path` is trained, not a new one."""
        return self.path is not None and not self.on_top


def splits_base(init: str | None) -> bool:
    """Return whether an initialization takes a part of the weights, which stays part of the function."""
    return init is not None and init.startswith(("pissa", "olora"))
