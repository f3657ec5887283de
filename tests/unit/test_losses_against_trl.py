"""TRL's own loss code as the oracle: equal where the definitions agree, both values where they do not."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from dpo_dist.config.schema import LossConfig, LossKind
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import preference_loss

PAIRS, PROMPT_TOKENS, LONGEST = 6, 3, 9


class Batch:
    """Random per-token log-probs of prompts of equal and completions of different lengths."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, LONGEST + 1, (2 * PAIRS,), generator=generator)
        places = torch.arange(PROMPT_TOKENS + LONGEST)
        self.mask = (places >= PROMPT_TOKENS) & (places < PROMPT_TOKENS + self.tokens[:, None])
        policy, reference = -3 * torch.rand((2, *self.mask.shape), generator=generator)
        self.policy, self.reference = policy * self.mask, reference * self.mask

    def pairs(self, token_logps: Tensor) -> PairLogps:
        chosen, rejected = token_logps.sum(1).chunk(2)
        chosen_tokens, rejected_tokens = self.tokens.float().chunk(2)
        return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)

    def rows(self, pairs: slice) -> Tensor:
        """The places of these pairs' chosen and rejected completions."""
        places = torch.arange(PAIRS)[pairs]
        return torch.cat((places, places + PAIRS))


def trl_loss(batch: Batch, kind: str, smoothing: float, beta: float, pairs: slice = slice(None)) -> float:
    """The loss that TRL's DPO trainer gives for one micro-batch of these `pairs`."""
    rows = batch.rows(pairs)
    # What a model returns in TRL stands one place earlier than the token it scores.
    log_probs = batch.policy[rows, 1:]
    outputs = SimpleNamespace(
        log_probs=log_probs,
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
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    reference_chosen, reference_rejected = batch.reference[rows].sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(batch.mask[rows], dtype=torch.int64),
        "attention_mask": torch.ones_like(batch.mask[rows], dtype=torch.int64),
        "completion_mask": batch.mask[rows].long(),
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    loss: Any = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return float(loss)


def our_loss(batch: Batch, config: LossConfig) -> float:
    return float(preference_loss(batch.pairs(batch.policy), batch.pairs(batch.reference), config).mean())


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize(
    ("kind", "smoothing"),
    [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.0), ("robust", 0.3), ("sigmoid_norm", 0.0)],
)
def test_kinds_defined_alike_have_trl_s_loss(kind: str, smoothing: float, beta: float) -> None:
    batch = Batch()
    ours = our_loss(batch, LossConfig(LossKind(kind), beta, smoothing))
    assert ours == pytest.approx(trl_loss(batch, kind, smoothing, beta), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_simpo_has_the_losses_of_trl_s_cpo_trainer(gamma: float) -> None:
    batch = Batch()
    pairs = batch.pairs(batch.policy)
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=gamma,
        beta=2.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected, _, _ = CPOTrainer.cpo_loss(
        trainer, pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    )
    ours = preference_loss(pairs, None, LossConfig(LossKind.simpo, 2.0, simpo_gamma=gamma))
    assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


def test_sft_of_one_micro_batch_has_trl_s_loss() -> None:
    batch = Batch()
    assert our_loss(batch, LossConfig(LossKind.sft)) == pytest.approx(trl_loss(batch, "sft", 0.0, 0.1))


def test_trl_leaves_label_smoothing_out_of_sigmoid() -> None:
    batch = Batch()
    margins = batch.pairs(batch.policy - batch.reference)
    logits = 0.5 * (margins.chosen - margins.rejected).double()
    hard = sum(math.log1p(math.exp(-x)) for x in logits.tolist()) / PAIRS
    flipped = sum(math.log1p(math.exp(x)) for x in logits.tolist()) / PAIRS
    assert trl_loss(batch, "sigmoid", 0.3, 0.5) == pytest.approx(hard, rel=1e-6)
    smoothed = our_loss(batch, LossConfig(LossKind.sigmoid, 0.5, 0.3))
    assert smoothed == pytest.approx(0.7 * hard + 0.3 * flipped, rel=1e-6)
    assert abs(smoothed - hard) > 0.01


def test_trl_s_sft_depends_on_how_pairs_fall_into_micro_batches() -> None:
    batch = Batch()
    halves = [slice(0, 1), slice(1, PAIRS)]
    trl = sum(trl_loss(batch, "sft", 0.0, 0.1, half) for half in halves) / 2
    chosen = batch.pairs(batch.policy)
    means = [float(-chosen.chosen[half].sum() / chosen.chosen_tokens[half].sum()) for half in halves]
    whole = float(-chosen.chosen.sum() / chosen.chosen_tokens.sum())
    assert trl == pytest.approx(sum(means) / 2, rel=1e-6)
    assert our_loss(batch, LossConfig(LossKind.sft)) == pytest.approx(whole, rel=1e-6)
    assert abs(trl - whole) > 0.01
