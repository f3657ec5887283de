"""TRL's own loss code as the oracle: equal where the definitions agree, both values where they do not."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer

from dpo_dist.config.losses import Divergence, LossConfig, LossKind, Weighting
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


def trl_loss(batch: Batch, kind: str, smoothing: float, beta: float, **changes: Any) -> float:
    """The loss that TRL's DPO trainer gives, some options changed."""
    # What a model returns in TRL stands one place earlier than the token it scores.
    log_probs = batch.policy[:, 1:]
    options = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False} | changes
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
        args=SimpleNamespace(discopop_tau=0.05),
        **options,
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    reference_chosen, reference_rejected = batch.weighed(batch.reference, options["ld_alpha"]).chunk(2)
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


@pytest.mark.parametrize(
    ("kind", "smoothing"),
    [
        *((kind, 0.0) for kind in AS_TRL),
        *((kind, 0.3) for kind in ("robust", "exo_pair", "aot", "aot_unpaired")),
    ],
)
def test_kinds_defined_alike_have_trl_s_loss(kind: str, smoothing: float) -> None:
    batch = Batch()
    ours = our_loss(batch, LossConfig(LossKind(kind), 0.5, smoothing))
    assert ours == pytest.approx(trl_loss(batch, kind, smoothing, 0.5), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "kind", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
)
@pytest.mark.parametrize(
    ("divergence", "named", "coefficient"),
    [
        ("forward_kl", "forward_kl", 1.0),
        ("js", "js_divergence", 1.0),
        *(("alpha", "alpha_divergence", coefficient) for coefficient in (0.5, 1.0, 1.7)),
    ],
)
def test_divergences_are_trl_s(kind: str, divergence: str, named: str, coefficient: float) -> None:
    batch = Batch()
    smoothing = 0.2 if kind == "exo_pair" else None
    config = LossConfig(LossKind(kind), 0.1, smoothing, Divergence(divergence), coefficient)
    changes = {"f_divergence_type": named, "f_alpha_divergence_coef": coefficient}
    expected = trl_loss(batch, kind, smoothing or 0.0, 0.1, **changes)
    assert our_loss(batch, config) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitised_log_probs_are_trl_s(alpha: float) -> None:
    batch = Batch()
    expected = trl_loss(batch, "sigmoid", 0.0, 0.1, ld_alpha=alpha)
    assert our_loss(batch, LossConfig(ld_alpha=alpha)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "nca_pair"])
def test_wpo_weighs_pairs_as_trl_does(kind: str) -> None:
    batch = Batch()
    weighted = trl_loss(batch, kind, 0.0, 0.1, use_weighting=True)
    config = LossConfig(LossKind(kind), weighting=Weighting.wpo)
    assert our_loss(batch, config) == pytest.approx(weighted, rel=1e-5)
    assert abs(weighted - trl_loss(batch, kind, 0.0, 0.1)) > 0.01
