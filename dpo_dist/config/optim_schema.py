"""The keys of `optim`: type, default, bounds, meaning; see `schema`."""

from dataclasses import dataclass
from enum import StrEnum

from dpo_dist.config.fields import key

LearningRateSchedule = StrEnum(
    "LearningRateSchedule", ["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"]
)
OptimizerKind = StrEnum("OptimizerKind", ["adamw", "adamw_8bit"])


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule, a pure function of the step."""

    kind: OptimizerKind = key(
        OptimizerKind.adamw,
        "`adamw`, or `adamw_8bit`: its states take 2 bytes for each weight in place of 8 (bitsandbytes, the "
        "`quantization` extra). Master weights are float32 with both.",
        added=True,
    )
    lr: float = key(1e-6, "Peak learning rate; 5e-7 to 5e-6 is usual if all weights are trained.", above=0)
    schedule: LearningRateSchedule = key(
        LearningRateSchedule.cosine,
        "Learning rate after warm-up, which every schedule has; `constant_with_warmup` is `constant` that "
        "refuses a run without warm-up. `inverse_sqrt` falls as sqrt(w / step) after w steps of warm-up, "
        "without them as sqrt(10,000 / (10,000 + step)), as in transformers.",
    )
    warmup_ratio: float = key(
        0.1,
        "Share of all steps in which the learning rate rises; the first of w such steps has lr / w.",
        at_least=0,
        at_most=1,
    )
    warmup_steps: int | None = key(
        None,
        "Number of steps in which the learning rate rises, in place of `warmup_ratio`; null: by the ratio.",
        at_least=0,
        added=True,
    )
    min_lr_ratio: float = key(
        0.0,
        "Share of `lr` to which `linear` and `cosine` fall; 0: to 0, in the step after the last.",
        at_least=0,
        below=1,
        added=True,
    )
    weight_decay: float = key(0.0, "Decoupled weight decay.", at_least=0)
    betas: list[float] = key([0.9, 0.999], "Decay rates of both moments.", at_least=0, below=1)
    eps: float = key(1e-8, "Added to the root of the second moment.", above=0)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this norm.", above=0)
