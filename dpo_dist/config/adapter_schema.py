"""The keys of `model.adapter`; see `schema`. The rules between them are in `rules_adapter`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dpo_dist.config.fields import key

AdapterVariant = StrEnum("AdapterVariant", ["lora", "rslora", "dora"])
_INITS = r"default|gaussian|pissa|pissa_niter_[1-9]\d?|olora"


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank matrices, trained in place of the model's own weights."""

    r: int = key(16, "Rank.", at_least=1)
    alpha: float = key(32.0, "Scale of the update: alpha / r, for `rslora` alpha / sqrt(r).", above=0)
    dropout: float = key(0.0, "0 only: policy and reference must compute the same function.", accepts="0")
    target_modules: Any = key(
        "all-linear",
        "`all-linear` (all but the output layer), or a list of names.",
        accepts="all-linear, or a list in brackets: [q_proj,v_proj]",
    )
    variant: AdapterVariant = key(
        AdapterVariant.lora, "`lora`, `rslora` (arXiv 2312.03732) or `dora` (arXiv 2402.09353)."
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
    init: str = key(
        "default",
        "Initial matrices: `default` (a random A, B = 0), `gaussian` (the same, normal), "
        "`pissa` or `pissa_niter_4` (arXiv 2404.02948; the latter approximate and fast), `olora` (arXiv "
        "2406.01775).",
        added=True,
        accepts="default, gaussian, pissa, pissa_niter_1 to pissa_niter_99, olora",
        pattern=_INITS,
    )
    modules_to_save: list[str] = key(
        [],
        "Modules trained in full beside the matrices, by the last parts of their names: "
        "`[embed_tokens,lm_head]`, norms. Of two that share their weight both or none.",
        added=True,
    )


def splits_base(init: str) -> bool:
    """Return whether an initialization takes a part of the weights, which stays part of the function."""
    return init.startswith(("pissa", "olora"))
