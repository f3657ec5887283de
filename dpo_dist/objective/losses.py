"""Preference losses: one definition per kind, per pair; their mean over a global batch is the loss.

Notation of the formulas: `pw`, `pl` the policy's summed log-probs of chosen and rejected, `rw`, `rl` the
reference's, `nw`, `nl` completion token counts, `Dw = pw - rw` and `Dl = pl - rl` the log-ratios, `Sw`, `Sl`
their scores under the divergence, `h = Sw - Sl`, `b` beta, `e` label smoothing. All are finite, with finite
gradients, for log-ratios up to 1e4 either way.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo_dist.config.loss_kinds import KINDS, BcoDelta, Divergence, LossConfig, LossKind, LossTermConfig
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.running_stats import RunningMeans

_LARGEST_EXPONENT = 80.0  # exp(89) is no float32
_LARGEST_ROOT = 1e19  # the square of more is no float32
_LARGEST_MEAN_LOGP = -1e-6  # of a response; above it the odds of orpo are infinite in float32


@dataclass(frozen=True)
class BatchFacts:
    """What some losses need to know beside log-probs.

    Attributes:
        mean_chosen_tokens: mean `nw` over the *global* batch, by which `sft` becomes a token mean over that
            batch. None: these pairs are the global batch.
        score_gaps: [pairs], score of chosen minus score of rejected (`odpo`).
        pair_weights: [pairs], multiply the losses of pairs (`weighting`), and not `sft`, of one response.
        running: means over the steps before (`beta_dpo`, `bco_pair`).
    """

    mean_chosen_tokens: Tensor | float | None = None
    score_gaps: Tensor | None = None
    pair_weights: Tensor | None = None
    running: RunningMeans = field(default_factory=RunningMeans)


def preference_loss(
    policy: PairLogps, reference: PairLogps | None, config: LossConfig, facts: BatchFacts | None = None
) -> Tensor:
    """Loss of each pair; the loss of a step is the mean over the pairs of its global batch.

    For coupled kinds (`config.is_coupled`) the given pairs must be the whole global batch.

    Args:
        policy: the policy's log-probs of these pairs. With `config.ld_alpha` they are sums by
            `desensitised_weights` already, as those of the reference.
        reference: the reference's of the same responses, or None for kinds that need none (and for
            `reference_free`).
        config: kind or terms, beta and the kind's options.
        facts: what else the loss needs; by default nothing.

    Returns:
        [pairs] in the dtype of `policy`, differentiable in it.

    Raises:
        ValueError: a kind needs a reference or scores that are not given, or the reference lacks responses.
    """
    facts = facts or BatchFacts()
    if config.reference_free:
        reference = policy.minus(policy).detached()
    total = torch.zeros_like(policy.chosen)
    for term in loss_terms(config):
        loss = term.weight * _kind_loss(term.kind, policy, reference, config, facts)
        if facts.pair_weights is not None and "weighting" in KINDS[term.kind].options:
            loss = loss * facts.pair_weights
        total = total + loss
    return total


def loss_terms(config: LossConfig) -> list[LossTermConfig]:
    """The weighted sum that `config` describes; a plain kind is one term of weight 1."""
    return list(config.terms) or [LossTermConfig(kind=config.kind, weight=1.0)]


def _kind_loss(  # noqa: C901, PLR0911, PLR0912  (one branch for each kind, nothing else)
    kind: LossKind, policy: PairLogps, reference: PairLogps | None, config: LossConfig, facts: BatchFacts
) -> Tensor:
    if reference is None:
        if KINDS[kind].needs_reference:
            raise ValueError(f"loss kind {kind} needs reference log-probs; pass them or set reference_free")
        reference = policy  # does not occur in these kinds
    beta, smoothing, ratios = config.beta, _smoothing(kind, config), policy.minus(reference)
    match kind:
        case LossKind.simpo:
            # Meng et al. 2024, arXiv 2405.14734
            margin = policy.mean_chosen - policy.mean_rejected
            return -logsigmoid(beta * margin - config.simpo_gamma)
        case LossKind.orpo:
            # Hong et al. 2024, arXiv 2403.07691
            log_odds_ratio = _log_odds(policy.mean_chosen) - _log_odds(policy.mean_rejected)
            return -policy.mean_chosen - config.orpo_lambda * logsigmoid(log_odds_ratio)
        case LossKind.cpo:
            # Xu et al. 2024, arXiv 2401.08417
            return (
                -logsigmoid(beta * (policy.chosen - policy.rejected))
                - config.cpo_nll_weight * policy.mean_chosen
            )
        case LossKind.sft:
            chosen = policy.chosen if policy.whole_chosen is None else policy.whole_chosen
            return -chosen / _mean_chosen_tokens(policy, facts)
        case LossKind.sigmoid:
            # Rafailov et al. 2023, arXiv 2305.18290; smoothing: Mitchell's conservative DPO
            return _smoothed(beta * _margin(ratios, config), smoothing)
        case LossKind.robust:
            # Chowdhury et al. 2024, arXiv 2403.00409
            logits = beta * _margin(ratios, config)
            flipped = -(1 - smoothing) * logsigmoid(logits) + smoothing * logsigmoid(-logits)
            return flipped / (1 - 2 * smoothing)
        case LossKind.hinge:
            # SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657
            return relu(1 - beta * _margin(ratios, config))
        case LossKind.ipo:
            # Azar et al. 2023, arXiv 2310.12036; length-averaged, as its authors confirmed
            margin = _mean_margin(ratios, config) if config.length_average else _margin(ratios, config)
            return _square(margin - 1 / (2 * beta))
        case LossKind.sigmoid_norm:
            # Tulu 3, arXiv 2411.15124
            return -logsigmoid(beta * _mean_margin(ratios, config))
        case LossKind.exo_pair:
            # Ji et al. 2024, arXiv 2402.00856, equation 16
            return _exo_pair(beta * _margin(ratios, config), smoothing)
        case LossKind.nca_pair:
            # Chen et al. 2024, arXiv 2402.05369
            chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
            return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        case LossKind.bco_pair:
            # Jung et al. 2024, arXiv 2404.04656
            delta = facts.running.reward if config.bco_delta is BcoDelta.running_mean else 0.0
            return -logsigmoid(beta * ratios.chosen - delta) - logsigmoid(delta - beta * ratios.rejected)
        case LossKind.sppo_hard:
            # Wu et al. 2024, arXiv 2405.00675
            return (ratios.chosen - 1 / (2 * beta)) ** 2 + (ratios.rejected + 1 / (2 * beta)) ** 2
        case LossKind.apo_zero:
            # D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7; 1 - s(x) = s(-x)
            return torch.sigmoid(-beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)
        case LossKind.apo_down:
            # The same, equation 8
            return torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(
                beta * (ratios.rejected - ratios.chosen)
            )
        case LossKind.discopop:
            # Lu et al. 2024, arXiv 2406.08414, equation 5
            return _discopop(beta * _margin(ratios, config), config.discopop_tau)
        case LossKind.dpop:
            # Pal et al. 2024, arXiv 2402.13228, which trains with lambda 50
            return -logsigmoid(beta * (_margin(ratios, config) - config.dpop_lambda * relu(-ratios.chosen)))
        case LossKind.odpo:
            # Amini et al. 2024, arXiv 2402.10571
            offset = config.offset_alpha * torch.log(_score_gaps(facts))
            return -logsigmoid(beta * _margin(ratios, config) - offset)
        case LossKind.aot:
            # Melnyk et al. 2024, arXiv 2406.05882
            of_policy, _ = torch.sort(policy.chosen - policy.rejected)
            of_reference, _ = torch.sort(reference.chosen - reference.rejected)
            return _smoothed(beta * (of_policy - of_reference), smoothing)
        case LossKind.aot_unpaired:
            # The same paper, for data that are not paired
            chosen, _ = torch.sort(ratios.chosen)
            rejected, _ = torch.sort(ratios.rejected)
            return _smoothed(beta * (chosen - rejected), smoothing)
        case LossKind.beta_dpo:
            # Wu et al. 2024, arXiv 2407.08639
            margin = _margin(ratios, config)
            of_batch = facts.running.batch_beta(config, beta * margin.detach().mean())
            return _smoothed(of_batch * margin, smoothing)
        case LossKind.plackett_luce:
            # Rafailov et al. 2023, arXiv 2305.18290, appendix A.3
            return _plackett_luce(ratios, beta)
    raise AssertionError(f"no formula for loss kind {kind}")


def divergence_score(log_ratio: Tensor, config: LossConfig) -> Tensor:
    """The score of a log-ratio under `config.divergence`: f'(exp(D)) up to a constant (arXiv 2309.16240).

    Exponents are clamped at 80, where float32 ends.
    """
    match config.divergence:
        case Divergence.reverse_kl:
            return log_ratio
        case Divergence.forward_kl:
            return -torch.expm1((-log_ratio).clamp(max=_LARGEST_EXPONENT))
        case Divergence.js:
            return math.log(2) + logsigmoid(log_ratio)
        case Divergence.alpha:
            order = config.alpha_coefficient - 1
            if abs(order) < 1e-6:
                return log_ratio
            return torch.expm1((order * log_ratio).clamp(max=_LARGEST_EXPONENT)) / order


def log_ratios(policy: PairLogps, reference: PairLogps | None, config: LossConfig) -> PairLogps:
    """`D` of each response; the policy's log-probs themselves without a reference and `reference_free`."""
    return policy if reference is None or config.reference_free else policy.minus(reference)


def scaled_margin(ratios: PairLogps, config: LossConfig) -> Tensor:
    """`b h` of each pair, [pairs]; `beta_dpo` keeps a running mean of it."""
    return config.beta * _margin(ratios, config)


def _margin(ratios: PairLogps, config: LossConfig) -> Tensor:
    return divergence_score(ratios.chosen, config) - divergence_score(ratios.rejected, config)


def _mean_margin(ratios: PairLogps, config: LossConfig) -> Tensor:
    chosen = divergence_score(ratios.chosen, config) / ratios.chosen_tokens
    return chosen - divergence_score(ratios.rejected, config) / ratios.rejected_tokens


def _smoothing(kind: LossKind, config: LossConfig) -> float:
    return KINDS[kind].smoothing if config.label_smoothing is None else config.label_smoothing


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def _square(value: Tensor) -> Tensor:
    return value.clamp(-_LARGEST_ROOT, _LARGEST_ROOT) ** 2


def _log_odds(mean_logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P."""
    mean_logp = mean_logp.clamp(max=_LARGEST_MEAN_LOGP)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def _exo_pair(logits: Tensor, smoothing: float) -> Tensor:
    chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-smoothing))
    return chosen + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(smoothing))


def _discopop(logits: Tensor, tau: float) -> Tensor:
    # As one exponential: of s(x / t) and exp(-x) one is 0 where the other is infinite.
    exponential = torch.exp(logsigmoid(logits / tau) - logits)
    return exponential - torch.sigmoid(-logits / tau) * logsigmoid(logits)


def _plackett_luce(ratios: PairLogps, beta: float) -> Tensor:
    """From the worst upwards, each response against all that are ranked below it and itself."""
    below = beta * ratios.rejected
    loss = torch.zeros_like(below)
    if ratios.between is not None and ratios.between_tokens is not None:
        for ratio, tokens in zip(
            reversed(ratios.between.unbind(1)), reversed(ratios.between_tokens.unbind(1)), strict=True
        ):
            present, reward = tokens > 0, beta * ratio
            from_here = torch.logaddexp(reward, below)
            loss = loss + torch.where(present, from_here - reward, 0.0)
            below = torch.where(present, from_here, below)
    reward = beta * ratios.chosen
    return loss + torch.logaddexp(reward, below) - reward


def _mean_chosen_tokens(policy: PairLogps, facts: BatchFacts) -> Tensor | float:
    given = facts.mean_chosen_tokens
    return policy.chosen_tokens.mean() if given is None else given


def _score_gaps(facts: BatchFacts) -> Tensor:
    if facts.score_gaps is None:
        raise ValueError("loss kind odpo needs the scores of the responses")
    return facts.score_gaps


@dataclass(frozen=True)
class Rewards:
    """Implicit rewards of pairs, [pairs], without gradient."""

    chosen: Tensor
    rejected: Tensor


@torch.no_grad()
def implicit_rewards(policy: PairLogps, reference: PairLogps | None, config: LossConfig) -> Rewards:
    """`b (p - r)`; without a reference `b p`, length-averaged where the kind is (DPO paper, equation 5)."""
    ratios = log_ratios(policy, reference, config)
    if ratios is policy and KINDS[config.kinds[0]].length_averaged:
        return Rewards(config.beta * policy.mean_chosen, config.beta * policy.mean_rejected)
    return Rewards(config.beta * ratios.chosen, config.beta * ratios.rejected)
