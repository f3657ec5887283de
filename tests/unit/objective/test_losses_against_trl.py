"""TRL's own loss code as the oracle: equal where the definitions agree, both values where they do not."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer

from dpo_dist.config.losses import DiscopopOptions, Divergence, LossConfig, LossKind, Weighting
from dpo_dist.objective.logps import PairLogps, desensitised_weights, wpo_weights
from dpo_dist.objective.losses import BatchFacts, preference_loss

PAIRS, PROMPT_TOKENS, LONGEST = 6, 3, 9


class Batch:
    """Random per-token log-probs of prompts of equal and completions of different lengths."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, LONGEST + 1, (2 * PAIRS,), generator=generator)
        places = torch.arange(PROMPT_TOKENS + LONGEST)
        self.mask = (places >= PROMPT_TOKENS) & (places < PROMPT_TOKENS + self.tokens[:, None])
        policy, reference, collisions = -3 * torch.rand((3, *self.mask.shape), generator=generator)
        self.policy, self.reference = policy * self.mask, reference * self.mask
        self.collisions = collisions * self.mask

    def weighed(self, token_logps: Tensor, ld_alpha: float | None) -> Tensor:
        weights = self.mask.float()
        if ld_alpha is not None:
            pairs = list(zip(*self.tokens.view(2, -1).tolist(), strict=True))
            flat = iter(desensitised_weights(pairs, ld_alpha).split([n for pair in pairs for n in pair]))
            in_order = [next(flat) for _ in range(2 * PAIRS)]
            for row, of_response in enumerate([*in_order[::2], *in_order[1::2]]):
                weights[row, PROMPT_TOKENS : PROMPT_TOKENS + len(of_response)] = of_response
        return (token_logps * weights).sum(1)

    def pairs(self, token_logps: Tensor, ld_alpha: float | None = None) -> PairLogps:
        chosen, rejected = self.weighed(token_logps, ld_alpha).chunk(2)
        chosen_tokens, rejected_tokens = self.tokens.float().chunk(2)
        return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)


DIVERGENCES = {
    Divergence.reverse_kl: "reverse_kl",
    Divergence.forward_kl: "forward_kl",
    Divergence.js: "js_divergence",
    Divergence.alpha: "alpha_divergence",
}


def trl_loss(batch: Batch, config: LossConfig) -> float:
    """The loss that TRL's DPO trainer gives."""
    # What a model returns in TRL stands one place earlier than the token it scores.
    log_probs = batch.policy[:, 1:]
    outputs = SimpleNamespace(
        log_probs=log_probs,
        log_sum_sq_probs=batch.collisions[:, 1:],
        entropy=torch.zeros_like(log_probs),
        mean_logits=torch.zeros_like(log_probs),
        is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
    )

    def same(values: Tensor) -> Tensor:
        return values

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        args=SimpleNamespace(discopop_tau=config.options_of(DiscopopOptions).tau),
        f_divergence_type=DIVERGENCES[config.divergence],
        f_alpha_divergence_coef=config.alpha_coefficient,
        ld_alpha=config.ld_alpha,
        use_weighting=config.weighting is Weighting.wpo,
        loss_types=[config.kind.value],
        loss_weights=[1.0],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    reference_chosen, reference_rejected = batch.weighed(batch.reference, config.ld_alpha).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(batch.mask, dtype=torch.int64),
        "attention_mask": torch.ones_like(batch.mask, dtype=torch.int64),
        "completion_mask": batch.mask.long(),
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    loss: Any = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return float(loss)


def our_loss(batch: Batch, config: LossConfig) -> float:
    policy, reference = (batch.pairs(logps, config.ld_alpha) for logps in (batch.policy, batch.reference))
    weights = None
    if config.weighting is Weighting.wpo:
        weights = wpo_weights(batch.policy, batch.collisions, batch.pairs)
    return float(preference_loss(policy, reference, config, BatchFacts(pair_weights=weights)).mean())


AS_TRL = [
    *("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "nca_pair", "bco_pair"),
    *("sppo_hard", "apo_zero", "apo_down", "discopop", "aot", "aot_unpaired"),
]
OF_MARGINS = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
CONFIGS = [
    *(LossConfig(LossKind(kind), 0.5, 0.0) for kind in AS_TRL),
    *(LossConfig(LossKind(kind), 0.5, 0.3) for kind in ("robust", "exo_pair", "aot", "aot_unpaired")),
    *(
        LossConfig(LossKind(kind), 0.1, 0.2 if kind == "exo_pair" else 0.0, divergence, coefficient)
        for kind in OF_MARGINS
        for divergence, coefficient in (
            (Divergence.forward_kl, 1.0),
            (Divergence.js, 1.0),
            *((Divergence.alpha, coefficient) for coefficient in (0.5, 1.0, 1.7)),
        )
    ),
    LossConfig(LossKind.discopop, 0.5, options=DiscopopOptions(tau=0.4)),
    *(LossConfig(label_smoothing=0.0, ld_alpha=alpha) for alpha in (0.0, 0.3, 1.0)),
    *(
        LossConfig(LossKind(kind), 0.1, 0.0, weighting=Weighting.wpo)
        for kind in ("sigmoid", "ipo", "nca_pair")
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_defined_alike_are_trl_s(config: LossConfig) -> None:
    batch = Batch()
    rounding = 1e-6 if config.divergence is Divergence.reverse_kl else 1e-5  # of exponents
    assert our_loss(batch, config) == pytest.approx(trl_loss(batch, config), rel=rounding, abs=1e-6)
