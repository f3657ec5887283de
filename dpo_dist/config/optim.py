"""The keys of `optim`: the optimizer, its learning rate and schedule, and the norm of gradients."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from dpo_dist.config.fields import key, schema

LearningRateSchedule = StrEnum(
    "LearningRateSchedule", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
)
OptimizerKind = StrEnum("OptimizerKind", ["adamw", "adamw_8bit", "muon"])


@schema
class OptimConfig:
    """AdamW or Muon, and the learning-rate schedule, a pure function of the step."""

    kind: OptimizerKind = key(OptimizerKind.adamw)
    """`adamw`; `adamw_8bit`: its states take 2 bytes for each weight in place of 8 (bitsandbytes, the
    `quantization` extra); `muon`: Muon for matrices, AdamW for embeddings, output layer, stacked experts,
    biases and norms, with the same `lr` and `weight_decay` (arXiv 2502.16982). Master weights are float32."""
    lr: float = key(1e-6, gt=0)
    """Peak learning rate; 5e-7 to 5e-6 is usual if all weights are trained."""
    schedule: LearningRateSchedule = key(LearningRateSchedule.cosine)
    """Course of the learning rate after warm-up. `inverse_sqrt` falls as sqrt(w / step) after w steps of
    warm-up, without warm-up as sqrt(10,000 / (10,000 + step)), as in transformers. `wsd` (warm-up, stable,
    decay) is constant until its decay, which is linear."""
    warmup_ratio: float = key(0.1, ge=0, le=1)
    """Share of all steps that warm up the learning rate; the first of w such steps has lr / w."""
    warmup_steps: int | None = key(None, ge=0)
    """Steps of warm-up, in place of `warmup_ratio`; null: by the ratio."""
    warmup_from_zero: bool = key(False)
    """Warm up as transformers does, one step later: the first step has rate 0 and changes no weight, the step
    after the w of the warm-up has `lr`, which a shorter run never reaches."""
    min_lr_ratio: float = key(0.0, ge=0, lt=1)
    """Last learning rate of `linear`, `cosine`, `wsd`, as a share of `lr`; 0: one step more would have 0."""
    decay_ratio: float = key(0.2, gt=0, le=1)
    """Share of all steps in the decay of `wsd`."""
    weight_decay: float = key(0.0, ge=0)
    """Decoupled weight decay; biases and norms have none."""
    betas: list[Annotated[float, Field(strict=True, ge=0, lt=1)]] = key(
        [0.9, 0.999], accepts="two numbers, >= 0 and < 1: [0.9,0.999]", min_length=2, max_length=2
    )
    """Decay rates of the first and second moments of AdamW; the momentum of `muon` is always 0.95."""
    max_grad_norm: float | None = key(1.0, gt=0)
    """Largest norm of the gradient; a larger gradient is clipped to this norm. null: none is clipped."""
