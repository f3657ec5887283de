"""Preference losses: one formula per kind, for each pair; the loss of a step is their mean.

Notation: `pw`, `pl` are the policy's summed log-probs of chosen and rejected, `rw`, `rl` the reference's,
`nw`, `nl` completion token counts, `Dw = pw - rw` and `Dl = pl - rl` log-ratios, `Sw`, `Sl` their scores
under the divergence, `h = Sw - Sl`, `b` beta, `e` label smoothing. All formulas are finite, with finite
gradients, for log-ratios between -1e4 and 1e4.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo_dist.config.losses import (
    KINDS,
    LOSS_FUNCTION,
    BetaDpoOptions,
    CpoOptions,
    DiscopopOptions,
    Divergence,
    DpopOptions,
    IpoOptions,
    LossConfig,
    LossKind,
    LossTermConfig,
    OdpoOptions,
    OrpoOptions,
    RewardAwareOptions,
    RewardOptions,
    SimpoOptions,
    accepts_facts,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.user_code import find_function, user_function
from dpo_dist.objective.logps import PairLogps

_Margin = TypeVar("_Margin", float, Tensor)


@dataclass(frozen=True)
class RunningMeans:
    """Means over the earlier steps of a run, equal on all ranks.

    `margin` is the moving average over steps of the mean of `b h` (M0 of `beta_dpo`), None before the first
    step; `reward` the mean over all `pairs` so far of the mean reward of their two responses (d of
    `bco_pair`).
    """

    margin: float | None = None
    reward: float = 0.0
    pairs: int = 0

    def batch_beta(self, config: LossConfig, mean_margin: _Margin) -> _Margin:
        """Return `b' = b (1 + a (mean M - M0))` of a batch; `b` in the first step.

        Source: arXiv 2407.08639, equation 9.
        """
        start = mean_margin if self.margin is None else self.margin
        return config.beta * (1 + config.options_of(BetaDpoOptions).alpha * (mean_margin - start))

    def after(self, config: LossConfig, mean_margin: float, mean_reward: float, pairs: int) -> "RunningMeans":
        """Return the means after one more step, given its means of `b h` and of the pairs' rewards."""
        momentum = config.options_of(BetaDpoOptions).momentum
        before = mean_margin if self.margin is None else self.margin
        total = self.pairs + pairs
        return RunningMeans(
            margin=momentum * before + (1 - momentum) * mean_margin,
            reward=self.reward + (mean_reward - self.reward) * pairs / total,
            pairs=total,
        )


_LARGEST_EXPONENT = 80.0  # exp(89) overflows float32
_LARGEST_ROOT = 1e19  # the square of 1e20 overflows float32
_LARGEST_MEAN_LOGP = -1e-6  # of a response; toward 0 the odds of orpo and their gradient become infinite


@dataclass(frozen=True)
class BatchFacts:
    """Inputs of a loss besides log-probs, tensors of [pairs] or None. Each kind of loss reads only some."""

    mean_chosen_tokens: Tensor | float | None = None
    """`sft`: the mean `nw` over the *global* batch; None: the given pairs are that batch."""
    score_gaps: Tensor | None = None
    """`odpo`, `reward_aware`: score of chosen minus score of rejected."""
    pair_weights: Tensor | None = None
    """Factors of the losses by `loss.weighting`; `sft` has none."""
    loss_weight: Tensor | None = None
    """Weight of each pair in the mean of the losses, which the caller of `preference_loss` computes."""
    soft_label: Tensor | None = None
    """Probability that chosen is the better response."""
    margin: Tensor | None = None
    """Margin to subtract from the logits."""
    mismatch: Tensor | None = None
    """`kto`: mean log-ratio of mismatched responses over the *global* batch, one number without gradient."""
    divergence: Tensor | None = None
    """`distill`: KL(teacher || policy), summed over the tokens of the chosen response."""
    squared_ratio: Tensor | None = None
    """`reverse_kl`: (log p - log q)^2 / 2, summed over the tokens of the chosen response."""
    running: RunningMeans = field(default_factory=RunningMeans)
    """`beta_dpo`, `bco_pair`: means over the steps before."""


def preference_loss(
    policy: PairLogps, reference: PairLogps | None, config: LossConfig, facts: BatchFacts | None = None
) -> Tensor:
    """Return the loss of each pair; the loss of a step is the mean over the pairs of its global batch.

    For coupled kinds (`config.is_coupled`) the given pairs must be the whole global batch. With
    `config.ld_alpha` all log-probs must be sums weighted by `desensitised_weights`.

    Args:
        reference: log-probs of the same responses; None for kinds without a reference, and a
            `ReferenceFreeLossConfig`.
        facts: further inputs; by default none.

    Returns:
        [pairs] in the dtype of `policy`, differentiable in it.
    """
    return loss_and_terms(policy, reference, config, facts or BatchFacts())[0]


def loss_and_terms(
    policy: PairLogps, reference: PairLogps | None, config: LossConfig, facts: BatchFacts
) -> tuple[Tensor, dict[LossKind, Tensor]]:
    """Return `preference_loss`, and the loss of each of `config.terms` without its weight and gradient."""
    if config.reference_free:
        with torch.no_grad():
            reference = policy.minus(policy)
    total = torch.zeros_like(policy.chosen)
    terms = {}
    for term in list(config.terms) or [LossTermConfig(kind=config.kind, weight=1.0)]:
        kind_loss = _kind_loss(term.kind, policy, reference, config, facts)
        loss = term.weight * kind_loss
        terms[term.kind] = kind_loss.detach()
        if facts.pair_weights is not None and "weighting" in KINDS[term.kind].uses:
            loss = loss * facts.pair_weights
            terms[term.kind] = terms[term.kind] * facts.pair_weights
        total = total + loss
    return total, terms if config.terms else {}


def _kind_loss(  # noqa: C901, PLR0911, PLR0912  (one branch per kind)
    kind: LossKind, policy: PairLogps, reference: PairLogps | None, config: LossConfig, facts: BatchFacts
) -> Tensor:
    if reference is None:
        if KINDS[kind].needs_reference:
            raise ValueError(f"loss kind {kind} needs reference log-probs; pass them")
        reference = policy  # unused by these kinds
    beta = config.beta
    ratios = policy.minus(reference)
    default = KINDS[kind].smoothing
    smoothing: float | Tensor = default if config.label_smoothing is None else config.label_smoothing
    if facts.soft_label is not None:
        smoothing = (1 - facts.soft_label).clamp(min=default)
    match kind:
        case LossKind.sigmoid:  # Rafailov et al. 2023, arXiv 2305.18290; smoothing: Mitchell's cDPO
            return _smoothed(_minus_margin(facts, beta * score_margin(ratios, config)), smoothing)
        case LossKind.robust:  # Chowdhury et al. 2024, arXiv 2403.00409
            logits = beta * score_margin(ratios, config)
            flipped = -(1 - smoothing) * logsigmoid(logits) + smoothing * logsigmoid(-logits)
            return flipped / (1 - 2 * smoothing)
        case LossKind.hinge:  # SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657
            return relu(1 - _minus_margin(facts, beta * score_margin(ratios, config)))
        case LossKind.ipo:  # Azar et al. 2023, arXiv 2310.12036; length-averaged, as its authors confirmed
            is_averaged = config.options_of(IpoOptions).length_average
            margin = (_mean_margin if is_averaged else score_margin)(ratios, config)
            return (margin - 1 / (2 * beta)).clamp(-_LARGEST_ROOT, _LARGEST_ROOT) ** 2
        case LossKind.sigmoid_norm:  # Tulu 3, arXiv 2411.15124
            return -logsigmoid(beta * _mean_margin(ratios, config))
        case LossKind.exo_pair:  # Ji et al. 2024, arXiv 2402.00856, equation 16
            logits = beta * score_margin(ratios, config)
            library: Any = math if facts.soft_label is None else torch
            right: Tensor = torch.sigmoid(logits) * (logsigmoid(logits) - library.log1p(-smoothing))
            wrong: Tensor = torch.sigmoid(-logits) * (logsigmoid(-logits) - library.log(smoothing))
            return right + wrong
        case LossKind.nca_pair:  # Chen et al. 2024, arXiv 2402.05369
            chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
            return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        case LossKind.bco_pair:  # Jung et al. 2024, arXiv 2404.04656
            # The paper's moving average of rewards, here their mean over the steps before: with this step's
            # own rewards, a pair's loss would depend on the other pairs.
            shift = facts.running.reward if config.has_running_reward else 0.0
            return -logsigmoid(beta * ratios.chosen - shift) - logsigmoid(shift - beta * ratios.rejected)
        case LossKind.sppo_hard:  # Wu et al. 2024, arXiv 2405.00675
            return (ratios.chosen - 1 / (2 * beta)) ** 2 + (ratios.rejected + 1 / (2 * beta)) ** 2
        case LossKind.apo_zero:  # D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7; 1 - s(x) = s(-x)
            return torch.sigmoid(-beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)
        case LossKind.apo_down:  # D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8
            return torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(-beta * ratios.margin)
        case LossKind.discopop:  # Lu et al. 2024, arXiv 2406.08414, equation 5
            logits = beta * score_margin(ratios, config)
            tau = config.options_of(DiscopopOptions).tau
            # One exponential: the product s(x / t) exp(-x) could be 0 times infinity.
            exponential = torch.exp(logsigmoid(logits / tau) - logits)
            return exponential - torch.sigmoid(-logits / tau) * logsigmoid(logits)
        case LossKind.dpop:  # Pal et al. 2024, arXiv 2402.13228, trained with lambda 50
            penalty = config.options_of(DpopOptions).penalty_weight * relu(-ratios.chosen)
            return -logsigmoid(beta * (score_margin(ratios, config) - penalty))
        case LossKind.odpo:  # Amini et al. 2024, arXiv 2402.10571
            if facts.score_gaps is None:
                raise ValueError("loss kind odpo needs the scores of the responses")
            offset = config.options_of(OdpoOptions).alpha * torch.log(facts.score_gaps)
            return -logsigmoid(_minus_margin(facts, beta * score_margin(ratios, config) - offset))
        case LossKind.reward_aware:  # Adler et al. 2024, arXiv 2406.11704, section 3.3.2
            if facts.score_gaps is None:
                raise ValueError("loss kind reward_aware needs the scores of the responses")
            logits = beta * score_margin(ratios, config)
            target = config.options_of(RewardAwareOptions).scale * facts.score_gaps
            better = torch.sigmoid(target) * (logsigmoid(target) - logsigmoid(logits))
            return better + torch.sigmoid(-target) * (logsigmoid(-target) - logsigmoid(-logits))
        case LossKind.simpo:  # Meng et al. 2024, arXiv 2405.14734
            logits = beta * (policy.mean_chosen - policy.mean_rejected)
            return -logsigmoid(_minus_margin(facts, logits - config.options_of(SimpoOptions).gamma))
        case LossKind.orpo:  # Hong et al. 2024, arXiv 2403.07691
            log_odds_ratio = _log_odds(policy.mean_chosen) - _log_odds(policy.mean_rejected)
            weight = config.options_of(OrpoOptions).odds_weight
            return -policy.mean_chosen - weight * logsigmoid(log_odds_ratio)
        case LossKind.cpo:  # Xu et al. 2024, arXiv 2401.08417
            # The paper's negative log-likelihood is of the response; here of a token of it, as in TRL.
            preference = -logsigmoid(_minus_margin(facts, beta * policy.margin))
            return preference - config.options_of(CpoOptions).nll_weight * policy.mean_chosen
        case LossKind.sft:
            chosen = policy.chosen if policy.whole_chosen is None else policy.whole_chosen
            # Divided by the batch's mean length, not by each response's own: the mean over pairs is then the
            # mean over tokens, as in supervised fine-tuning.
            tokens = facts.mean_chosen_tokens
            return -chosen / (policy.chosen_tokens.mean() if tokens is None else tokens)
        case LossKind.distill:  # Hinton et al. 2015, arXiv 1503.02531, without its factor temperature^2
            if facts.divergence is None:
                raise ValueError("loss kind distill needs the divergences from a teacher")
            tokens = facts.mean_chosen_tokens  # see sft
            return facts.divergence / (policy.chosen_tokens.mean() if tokens is None else tokens)
        case LossKind.reverse_kl:  # Agarwal et al. 2023, arXiv 2306.13649, by half the squared log-ratio
            if facts.squared_ratio is None:
                raise ValueError("loss kind reverse_kl needs the squared log-ratios of tokens")
            tokens = facts.mean_chosen_tokens  # see sft
            return facts.squared_ratio / (policy.chosen_tokens.mean() if tokens is None else tokens)
        # Sorted over the global batch: TRL sorts each micro-batch, whose size would change the loss (law L1).
        case LossKind.aot:  # Melnyk et al. 2024, arXiv 2406.05882
            return _smoothed(beta * _sorted_difference(policy.margin, reference.margin), smoothing)
        case LossKind.aot_unpaired:  # Melnyk et al. 2024, arXiv 2406.05882, for unpaired data
            return _smoothed(beta * _sorted_difference(ratios.chosen, ratios.rejected), smoothing)
        case LossKind.beta_dpo:  # Wu et al. 2024, arXiv 2407.08639
            margin = score_margin(ratios, config)
            batch_beta = facts.running.batch_beta(config, beta * margin.detach().mean())
            return _smoothed(batch_beta * margin, smoothing)
        case LossKind.plackett_luce:  # Rafailov et al. 2023, arXiv 2305.18290, appendix A.3
            return _plackett_luce(ratios, beta)
        case LossKind.kto:  # Ethayarajh et al. 2024, arXiv 2402.01306, equation 7
            if facts.mismatch is None:
                raise ValueError("loss kind kto needs the log-ratio of mismatched responses")
            # z estimates a KL divergence, which is not negative; of the global batch, where TRL takes each
            # micro-batch (law L1).
            return _labelled(ratios, config, relu(facts.mismatch))
        case LossKind.apo_zero_unpaired:  # D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7
            return _labelled(ratios, config, 0.0)
        case LossKind.reward:  # Ouyang et al. 2022, arXiv 2203.02155, equation 1
            return _reward(policy, config, facts, smoothing)
        case LossKind.custom:
            return _custom(policy, reference, config, facts)


def divergence_score(log_ratio: Tensor, config: LossConfig) -> Tensor:
    """Return the score of a log-ratio under `config.divergence`: f'(exp(D)) up to a constant.

    Source: arXiv 2309.16240. Exponents are clamped at 80 to stay within float32.
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
    """Return `D` of each response; without a reference, or if it is 0, the policy's log-probs."""
    return policy if reference is None or config.reference_free else policy.minus(reference)


def score_margin(ratios: PairLogps, config: LossConfig) -> Tensor:
    """Return `h` of each pair, [pairs]."""
    return divergence_score(ratios.chosen, config) - divergence_score(ratios.rejected, config)


def _mean_margin(ratios: PairLogps, config: LossConfig) -> Tensor:
    chosen = divergence_score(ratios.chosen, config) / ratios.chosen_tokens
    return chosen - divergence_score(ratios.rejected, config) / ratios.rejected_tokens


KINDS_WITH_FLOOR = frozenset({LossKind.sigmoid, LossKind.beta_dpo, LossKind.reward})
"""Kinds that are a cross-entropy with the soft label."""


def floors(config: LossConfig, facts: BatchFacts) -> Tensor:
    """Return the lowest possible loss of each pair, [pairs]: the weighted entropy of its soft label."""
    terms = list(config.terms) or [LossTermConfig(kind=config.kind, weight=1.0)]
    weight = sum(term.weight for term in terms if term.kind in KINDS_WITH_FLOOR)
    label = facts.soft_label
    assert label is not None
    entropy: Tensor = torch.special.entr(label) + torch.special.entr(1 - label)
    floor = weight * entropy
    return floor if facts.pair_weights is None else floor * facts.pair_weights


def _minus_margin(facts: BatchFacts, logits: Tensor) -> Tensor:
    """Return the logits minus the records' margins."""
    return logits if facts.margin is None else logits - facts.margin


def _smoothed(logits: Tensor, smoothing: float | Tensor) -> Tensor:
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def _labelled(ratios: PairLogps, config: LossConfig, start: Tensor | float) -> Tensor:
    """Return losses of labelled records: a good response is the chosen side, a bad one the rejected side."""
    good = config.desirable_weight * torch.sigmoid(config.beta * (start - ratios.chosen))
    bad = config.undesirable_weight * torch.sigmoid(config.beta * (ratios.rejected - start))
    return torch.where(ratios.chosen_tokens > 0, good, bad)


def _log_odds(mean_logp: Tensor) -> Tensor:
    """Return log(P / (1 - P)), given log P."""
    mean_logp = mean_logp.clamp(max=_LARGEST_MEAN_LOGP)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def _sorted_difference(first: Tensor, second: Tensor) -> Tensor:
    return torch.sort(first)[0] - torch.sort(second)[0]


def _custom(policy: PairLogps, reference: PairLogps, config: LossConfig, facts: BatchFacts) -> Tensor:
    more = {"facts": facts} if accepts_facts(config.function) else {}
    losses = user_function(config.function, LOSS_FUNCTION)(policy, reference, config, **more)
    if not isinstance(losses, Tensor) or losses.shape != policy.chosen.shape:
        raise ConfigError(
            "the loss function does not return one loss per pair",
            where="loss.function",
            got=f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__,
            expected=f"a tensor of shape {list(policy.chosen.shape)}, [pairs]",
            remedy="return the loss of each pair, without a mean or a sum over pairs",
        )
    return losses


def _plackett_luce(ratios: PairLogps, beta: float) -> Tensor:
    """Sum over the responses, from the worst up: -log softmax of each among itself and all ranked below."""
    below = beta * ratios.rejected
    loss = torch.zeros_like(below)
    if ratios.between is not None and ratios.between_tokens is not None:
        for ratio, tokens in zip(
            reversed(ratios.between.unbind(1)), reversed(ratios.between_tokens.unbind(1)), strict=True
        ):
            present = tokens > 0
            reward = beta * ratio
            from_here = torch.logaddexp(reward, below)
            loss = loss + torch.where(present, from_here - reward, 0.0)
            below = torch.where(present, from_here, below)
    reward = beta * ratios.chosen
    return loss + torch.logaddexp(reward, below) - reward


def _reward(scores: PairLogps, config: LossConfig, facts: BatchFacts, smoothing: float | Tensor) -> Tensor:
    """Return losses of scores: of pairs by their difference, of longer rankings by Plackett and Luce."""
    loss = _smoothed(_minus_margin(facts, scores.margin), smoothing)
    if scores.between_tokens is not None:
        is_pair = (scores.between_tokens == 0).all(dim=1)
        loss = torch.where(is_pair, loss, _plackett_luce(scores, beta=1.0))
    # Eisenstein et al. 2023, arXiv 2312.09244: a loss of differences leaves the mean of the scores free.
    return loss + config.options_of(RewardOptions).centre * (scores.chosen + scores.rejected) ** 2


@dataclass(frozen=True)
class Rewards:
    """Implicit rewards of pairs, or their scores, [pairs], without gradient."""

    chosen: Tensor
    rejected: Tensor


@torch.no_grad()
def implicit_rewards(policy: PairLogps, reference: PairLogps | None, config: LossConfig) -> Rewards:
    """Return `b (p - r)` (DPO paper, equation 5); without a reference `b p`, averaged over tokens for kinds
    that average. The rewards of a reward model are its scores.
    """
    if config.of_scores:
        return Rewards(policy.chosen, policy.rejected)
    ratios = log_ratios(policy, reference, config)
    # A pair has one reward: of a sum's losses the first, to which others (sft) are added, decides.
    if ratios is policy and KINDS[config.kinds[0]].length_averaged:
        return Rewards(config.beta * policy.mean_chosen, config.beta * policy.mean_rejected)
    return Rewards(config.beta * ratios.chosen, config.beta * ratios.rejected)


TRIAL_LOGPS = [[-40, -70, -25], [-45, -60, -90], [-42, -66, -25], [-44, -63, -80], [20, 35, 12], [25, 28, 40]]
"""Log-probs of three pairs: chosen and rejected under the policy and the reference, and numbers of tokens."""


def check_custom_loss(config: LossConfig, device: torch.device | None = None) -> str | None:
    """Call `loss.function` on three pairs on `device`, forward and backward; return its description.

    None for a loss without `custom`.
    """
    if LossKind.custom not in config.kinds:
        return None
    user_function(config.function, LOSS_FUNCTION)
    alone = replace(config, kind=LossKind.custom, terms=[], options=None)
    columns = torch.tensor(TRIAL_LOGPS, dtype=torch.float64, device=device)
    try:
        losses, gradients = _try(columns, alone)
        first, _ = _try(columns[:, :1], alone)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the user's code can raise anything, and call sys.exit
        raise _error(f"{type(error).__name__}: {error}") from error
    if losses.is_complex() or not losses.isfinite().all():
        raise _error(f"losses that are not finite real numbers: {losses.tolist()}")
    if not gradients:
        raise _error("a loss without a gradient for policy.chosen and policy.rejected")
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise _error("gradients that are not finite")
    if not torch.allclose(first, losses[:1]):  # as in a function that averages or sorts the pairs
        raise _error(
            f"{losses[0].item():g} for the first pair among three, {first.item():g} for the pair alone"
        )
    return f"custom loss {find_function(config.function, LOSS_FUNCTION)}"


def _try(columns: Tensor, config: LossConfig) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of invented pairs, and the gradients of the log-probs on which they depend."""
    leaves = columns[0].clone().requires_grad_(), columns[1].clone().requires_grad_()
    reference = PairLogps(columns[2], columns[3], columns[4], columns[5])
    losses = preference_loss(PairLogps(*leaves, columns[4], columns[5]), reference, config)
    if not losses.requires_grad or losses.is_complex():
        return losses, []
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    return losses, [gradient for gradient in gradients if gradient is not None]


def _error(got: str) -> ConfigError:
    return ConfigError(
        "the loss function cannot be used for training",
        where="loss.function",
        got=f"on three invented pairs: {got}",
        expected="finite losses with finite gradients; each loss depends only on its own pair",
        remedy="correct the function; docs/python.md describes its arguments and what it must return",
    )
