"""Preference losses: one definition per kind, float32, per pair; their mean over a global batch is the loss.

Notation of the formulas: `pw`, `pl` the policy's summed log-probs of chosen and rejected, `rw`, `rl` the
reference's, `nw`, `nl` completion token counts, `h = (pw - rw) - (pl - rl)` the difference of log-ratios,
`b` beta, `e` label smoothing.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo_dist.config.schema import LossConfig, LossKind, LossTermConfig
from dpo_dist.objective.logps import PairLogps


def preference_loss(
    policy: PairLogps,
    reference: PairLogps | None,
    config: LossConfig,
    mean_chosen_tokens: Tensor | float | None = None,
) -> Tensor:
    """Loss of each pair; the loss of a step is the mean over the pairs of its global batch.

    Args:
        policy: the policy's log-probs of these pairs.
        reference: the reference's, or None for kinds that need none (and for `reference_free`).
        config: kind or terms, beta and the kind's options.
        mean_chosen_tokens: mean `nw` over the *global* batch, by which `sft` becomes a token
            mean over that batch. None: these pairs are the global batch.

    Returns:
        float32 [pairs], differentiable in `policy`.

    Raises:
        ValueError: a kind needs a reference and `reference` is None.
    """
    if mean_chosen_tokens is None:
        mean_chosen_tokens = policy.chosen_tokens.mean()
    if config.reference_free:
        reference = _zero_reference(policy)
    total = torch.zeros_like(policy.chosen)
    for term in loss_terms(config):
        term_config = replace(config, kind=term.kind, terms=[])
        total = total + term.weight * _kind_loss(policy, reference, term_config, mean_chosen_tokens)
    return total


def loss_terms(config: LossConfig) -> list[LossTermConfig]:
    """The weighted sum that `config` describes; a plain kind is one term of weight 1."""
    return list(config.terms) or [LossTermConfig(kind=config.kind, weight=1.0)]


def _kind_loss(
    policy: PairLogps, reference: PairLogps | None, config: LossConfig, mean_chosen_tokens: Tensor | float
) -> Tensor:
    beta, smoothing = config.beta, config.label_smoothing
    match config.kind:
        case LossKind.sigmoid:
            # Rafailov et al. 2023, arXiv 2305.18290; smoothing: Mitchell's conservative DPO
            logits = beta * _margin(policy, _needed(reference, config))
            return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)
        case LossKind.robust:
            # Chowdhury et al. 2024, arXiv 2403.00409
            logits = beta * _margin(policy, _needed(reference, config))
            flipped = -(1 - smoothing) * logsigmoid(logits) + smoothing * logsigmoid(-logits)
            return flipped / (1 - 2 * smoothing)
        case LossKind.hinge:
            # SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657
            return relu(1 - beta * _margin(policy, _needed(reference, config)))
        case LossKind.ipo:
            # Azar et al. 2023, arXiv 2310.12036; length-averaged, as its authors confirmed
            needed = _needed(reference, config)
            margin = _mean_margin(policy, needed) if config.length_average else _margin(policy, needed)
            return (margin - 1 / (2 * beta)) ** 2
        case LossKind.sigmoid_norm:
            # Tulu 3, arXiv 2411.15124
            return -logsigmoid(beta * _mean_margin(policy, _needed(reference, config)))
        case LossKind.simpo:
            # Meng et al. 2024, arXiv 2405.14734
            margin = policy.chosen / policy.chosen_tokens - policy.rejected / policy.rejected_tokens
            return -logsigmoid(beta * margin - config.simpo_gamma)
        case LossKind.sft:
            return -policy.chosen / mean_chosen_tokens
    raise AssertionError(f"no formula for loss kind {config.kind}")


def _margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def _mean_margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    chosen = (policy.chosen - reference.chosen) / policy.chosen_tokens
    rejected = (policy.rejected - reference.rejected) / policy.rejected_tokens
    return chosen - rejected


def _needed(reference: PairLogps | None, config: LossConfig) -> PairLogps:
    if reference is None:
        raise ValueError(
            f"loss kind {config.kind} needs reference log-probs; pass them or set reference_free"
        )
    return reference


def _zero_reference(policy: PairLogps) -> PairLogps:
    zeros = torch.zeros_like(policy.chosen)
    return replace(policy, chosen=zeros, rejected=zeros)


@dataclass(frozen=True)
class Rewards:
    """Implicit rewards of pairs, float32 [pairs], without gradient."""

    chosen: Tensor
    rejected: Tensor


_LENGTH_AVERAGED = frozenset({LossKind.simpo, LossKind.sft})


@torch.no_grad()
def implicit_rewards(policy: PairLogps, reference: PairLogps | None, config: LossConfig) -> Rewards:
    """`b (p - r)`; without a reference `b p`, length-averaged where the kind is (DPO paper, equation 5)."""
    chosen, rejected = policy.chosen, policy.rejected
    if reference is not None and not config.reference_free:
        chosen, rejected = chosen - reference.chosen, rejected - reference.rejected
    elif loss_terms(config)[0].kind in _LENGTH_AVERAGED:
        chosen, rejected = chosen / policy.chosen_tokens, rejected / policy.rejected_tokens
    return Rewards(config.beta * chosen, config.beta * rejected)
