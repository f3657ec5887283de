"""Each kind of loss by its definition: numbers worked out by hand, signs, extremes; a user's own loss."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import (
    KINDS,
    BcoDelta,
    BcoPairOptions,
    BetaDpoOptions,
    CpoOptions,
    Divergence,
    DpopOptions,
    IpoOptions,
    LossConfig,
    LossKind,
    LossTermConfig,
    OdpoOptions,
    OrpoOptions,
    ReferenceFreeLossConfig,
    RewardAwareOptions,
    RewardOptions,
    SimpoOptions,
    option_names,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.user_code import find_function
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import (
    BatchFacts,
    RunningMeans,
    check_custom_loss,
    implicit_rewards,
    preference_loss,
)
from tests.support.own_loss import OWN, function_of
from tests.unit.objective.test_losses_against_trl import AS_TRL

WITH_REFERENCE = sorted(kind for kind in LossKind if KINDS[kind].needs_reference)

# Pair one: log-ratios 2 and -2, h = 4. Pair two: log-ratios 0 and -1, h = 1. Completion tokens 4, 5 and 6, 2.
CHOSEN, REJECTED = (-10.0, -12.0), (-20.0, -9.0)
REFERENCE_CHOSEN, REFERENCE_REJECTED = (-12.0, -12.0), (-18.0, -8.0)
CHOSEN_TOKENS, REJECTED_TOKENS = (4.0, 6.0), (5.0, 2.0)


def logps(
    chosen: Sequence[float], rejected: Sequence[float], dtype: torch.dtype = torch.float32
) -> PairLogps:
    return PairLogps(
        torch.tensor(chosen, dtype=dtype),
        torch.tensor(rejected, dtype=dtype),
        torch.tensor(CHOSEN_TOKENS[: len(chosen)], dtype=dtype),
        torch.tensor(REJECTED_TOKENS[: len(chosen)], dtype=dtype),
    )


POLICY = logps(CHOSEN, REJECTED)
REFERENCE = logps(REFERENCE_CHOSEN, REFERENCE_REJECTED)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def divergence(target: float, logit: float) -> float:
    p, q = sigmoid(target), sigmoid(logit)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def log_odds(mean_logp: float) -> float:
    return mean_logp - math.log(1 - math.exp(mean_logp))


SCORE_GAPS = torch.tensor([2.0, 0.5])
FACTS = BatchFacts(
    score_gaps=SCORE_GAPS,
    mismatch=torch.tensor(1.0),
    running=RunningMeans(margin=0.25, reward=0.125),
    divergence=torch.tensor([2.0, 3.0]),
    squared_ratio=torch.tensor([1.0, 2.0]),
)

# With beta 0.5: b h is 2 and 0.5, b Dw 1 and 0, b Dl -1 and -0.5, 1 / (2 b) is 1.
BY_HAND = [
    (
        LossConfig(LossKind.sigmoid, label_smoothing=0.1),
        (0.9 * softplus(-2) + 0.1 * softplus(2), 0.9 * softplus(-0.5) + 0.1 * softplus(0.5)),
    ),
    (LossConfig(LossKind.custom, function=OWN), (0.0, 0.5)),
    (LossConfig(LossKind.distill), (0.4, 0.6)),  # divided by the mean of 4 and 6 tokens
    (LossConfig(LossKind.reverse_kl), (0.2, 0.4)),
    (LossConfig(LossKind.ipo, options=IpoOptions(length_average=False)), (9.0, 0.0)),
    (
        LossConfig(LossKind.bco_pair, options=BcoPairOptions(BcoDelta.running_mean)),
        (softplus(-0.875) + softplus(-1.125), softplus(0.125) + softplus(-0.625)),
    ),
    (LossConfig(LossKind.dpop), (softplus(-2), softplus(-0.5))),
    # Score gaps of 2 and 1/2.
    (
        LossConfig(LossKind.odpo, options=OdpoOptions(alpha=1.5)),
        (softplus(-2 + 1.5 * math.log(2)), softplus(-0.5 - 1.5 * math.log(2))),
    ),
    # The distance from a coin of probability s(0.7 gap) to one of s(b h).
    (
        LossConfig(LossKind.reward_aware, options=RewardAwareOptions(scale=0.7)),
        (divergence(1.4, 2.0), divergence(0.35, 0.5)),
    ),
    # -10/4 + 20/5 = 1.5 and -12/6 + 9/2 = 2.5, times 0.5, less the target margin.
    (LossConfig(LossKind.simpo, options=SimpoOptions(gamma=0.5)), (softplus(-0.25), softplus(-0.75))),
    (
        LossConfig(LossKind.orpo, options=OrpoOptions(odds_weight=0.3)),
        (
            2.5 + 0.3 * softplus(log_odds(-4) - log_odds(-2.5)),
            2.0 + 0.3 * softplus(log_odds(-4.5) - log_odds(-2)),
        ),
    ),
    (
        LossConfig(LossKind.cpo, options=CpoOptions(nll_weight=0.4)),
        (softplus(-5) + 0.4 * 2.5, softplus(1.5) + 0.4 * 2),
    ),
    # The chosen responses have 5 tokens in the mean.
    (LossConfig(LossKind.sft), (10 / 5, 12 / 5)),
    # M is 1.25 in the mean, M0 0.25: b' = 0.5 (1 + 0.6).
    (LossConfig(LossKind.beta_dpo), (softplus(-3.2), softplus(-0.8))),
    (LossConfig(LossKind.plackett_luce), (softplus(-2), softplus(-0.5))),
    # Log-ratios 2 and 0 of good responses, against z = 1, and against 0.
    (LossConfig(LossKind.kto, desirable_weight=1.5), (1.5 * sigmoid(-0.5), 1.5 * sigmoid(0.5))),
    (LossConfig(LossKind.apo_zero_unpaired), (sigmoid(-1), sigmoid(0))),
    # Scores -10 and -20, -12 and -9, whatever beta is: h is 10 and -3, the sums are -30 and -21.
    (
        LossConfig(LossKind.reward, label_smoothing=0.1, options=RewardOptions(centre=0.01)),
        (0.9 * softplus(-10) + 0.1 * softplus(10) + 9, 0.9 * softplus(3) + 0.1 * softplus(-3) + 4.41),
    ),
]
BESIDE_TRL = [
    *(LossConfig(LossKind(kind)) for kind in AS_TRL),
    LossConfig(LossKind.exo_pair, label_smoothing=0.1),
    *(LossConfig(divergence=divergence) for divergence in Divergence),
]
EVERY = [replace(config, beta=0.5) for config in (*(config for config, _ in BY_HAND), *BESIDE_TRL)]


@pytest.mark.parametrize(("config", "expected"), BY_HAND)
def test_losses_by_hand(config: LossConfig, expected: tuple[float, float]) -> None:
    losses = preference_loss(POLICY, REFERENCE, replace(config, beta=0.5), FACTS)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_dpop_punishes_a_chosen_response_that_fell_below_the_reference() -> None:
    losses = preference_loss(
        REFERENCE, POLICY, LossConfig(LossKind.dpop, 0.5, options=DpopOptions(penalty_weight=3.0))
    )
    # D is -2 and 2, then 0 and 1: -b h is 2 and 0.5, and of the first b 3 max(0, 2) more.
    assert losses.tolist() == pytest.approx([softplus(2 + 3), softplus(0.5)])


def test_a_ranking_by_hand_beside_shorter_ones() -> None:
    # Rewards b D of 1 > 0.5 > -1 > 0, of 2 > 1 > -1, and of a pair.
    zeros = torch.zeros(3)
    policy = PairLogps(
        chosen=torch.tensor([2.0, 4.0, 6.0]),
        rejected=torch.tensor([0.0, -2.0, 2.0]),
        chosen_tokens=torch.ones(3),
        rejected_tokens=torch.ones(3),
        between=torch.tensor([[1.0, -2.0], [2.0, 0.0], [0.0, 0.0]]),
        between_tokens=torch.tensor([[3.0, 1.0], [4.0, 0.0], [0.0, 0.0]]),
    )
    reference = replace(policy, chosen=zeros, rejected=zeros, between=torch.zeros(3, 2))

    def by_hand(*rewards: float) -> float:
        left = [math.exp(reward) for reward in rewards]
        return -sum(math.log(left[k] / sum(left[k:])) for k in range(len(left)))

    losses = preference_loss(policy, reference, LossConfig(LossKind.plackett_luce, 0.5))
    expected = [by_hand(1, 0.5, -1, 0), by_hand(2, 1, -1), by_hand(3, 1)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    # Of scores: the margin of a record is one of pairs, and the best and the worst are centred.
    facts = BatchFacts(margin=torch.tensor([0.0, 0.0, 1.5]))
    config = LossConfig(LossKind.reward, options=RewardOptions(centre=0.25))
    losses = preference_loss(policy, None, config, facts)
    expected = [by_hand(2, 1, -2, 0) + 0.25 * 4, by_hand(4, 2, -2) + 0.25 * 4, softplus(-2.5) + 0.25 * 64]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


# The options of `distill` are of the distributions: tests/unit/objective/test_distillation.py.
@pytest.mark.parametrize(
    "kind", [kind for kind in LossKind if option_names(kind) and kind is not LossKind.distill]
)
def test_every_option_changes_what_its_kind_computes(kind: LossKind) -> None:
    """The momentum of `beta_dpo` the running mean, all others the losses."""

    def computed(config: LossConfig) -> list[float]:
        losses = [
            preference_loss(*given, config, FACTS) for given in ((POLICY, REFERENCE), (REFERENCE, POLICY))
        ]
        margin = FACTS.running.after(config, 2.0, 0.0, 2).margin if kind is LossKind.beta_dpo else 0.0
        return [*torch.cat(losses).tolist(), margin or 0.0]

    plain = LossConfig(kind, 0.5)
    for name, value in asdict(plain.options).items():  # type: ignore[arg-type]
        others = {"delta": "running_mean", "length_average": False}
        other: Any = {"options": {name: others[name] if name in others else (value or 1.0) / 2}}
        assert computed(LossConfig(kind, 0.5, **other)) != computed(plain), name


def test_each_term_of_a_sum_has_its_own_options() -> None:
    terms = [
        LossTermConfig(LossKind.odpo, 2.0, OdpoOptions(alpha=0.3)),
        LossTermConfig(LossKind.beta_dpo, 1.0, BetaDpoOptions(alpha=0.9)),
        LossTermConfig(LossKind.cpo, -0.5, CpoOptions(nll_weight=0.2)),
    ]
    alone = [
        term.weight
        * preference_loss(POLICY, REFERENCE, LossConfig(term.kind, 0.5, options=term.options), FACTS)
        for term in terms
    ]
    losses = preference_loss(POLICY, REFERENCE, LossConfig(beta=0.5, terms=terms), FACTS)
    torch.testing.assert_close(losses, alone[0] + alone[1] + alone[2])


@pytest.mark.parametrize(("mismatch", "z"), [(1.0, 1.0), (-3.0, 0.0)])
def test_kto_by_hand_for_a_good_and_a_bad_response(mismatch: float, z: float) -> None:
    """Log-ratios of 2 and -4, beta 0.5; the side that a record lacks has no tokens."""
    tokens = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    policy = PairLogps(torch.tensor([-10.0, 0.0]), torch.tensor([0.0, -20.0]), *tokens)
    reference = PairLogps(torch.tensor([-12.0, 0.0]), torch.tensor([0.0, -16.0]), *tokens)
    config = LossConfig(LossKind.kto, 0.5, desirable_weight=1.5, undesirable_weight=0.5)
    losses = preference_loss(policy, reference, config, BatchFacts(mismatch=torch.tensor(mismatch)))
    expected = [1.5 * (1 - sigmoid(0.5 * (2 - z))), 0.5 * (1 - sigmoid(0.5 * (z + 4)))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_beta_dpo_takes_no_gradient_through_the_beta_of_the_batch() -> None:
    gradients = []
    for config in (LossConfig(LossKind.beta_dpo, 0.5), LossConfig(LossKind.sigmoid, 0.8)):
        chosen = POLICY.chosen.clone().requires_grad_()
        loss = preference_loss(replace(POLICY, chosen=chosen), REFERENCE, config, FACTS).sum()
        gradients.append(torch.autograd.grad(loss, chosen)[0])
    torch.testing.assert_close(*gradients)


def test_running_means_by_hand() -> None:
    config = LossConfig(LossKind.beta_dpo, 0.5, options=BetaDpoOptions(momentum=0.75))
    first = RunningMeans().after(config, mean_margin=2.0, mean_reward=1.0, pairs=10)
    assert first == RunningMeans(margin=2.0, reward=1.0, pairs=10)
    second = first.after(config, mean_margin=6.0, mean_reward=4.0, pairs=5)
    assert second == RunningMeans(margin=3.0, reward=2.0, pairs=15)
    assert RunningMeans().batch_beta(config, 7.0) == 0.5
    assert second.batch_beta(config, 4.0) == pytest.approx(0.5 * 1.6)


def test_every_kind_is_worked_out_by_hand_or_compared_with_trl() -> None:
    assert {config.kind for config in EVERY} == set(LossKind)


def one_pair(of: PairLogps, place: int) -> PairLogps:
    columns = of.chosen, of.rejected, of.chosen_tokens, of.rejected_tokens
    return PairLogps(*(column[place : place + 1] for column in columns))


@pytest.mark.parametrize("config", EVERY)
def test_only_the_losses_of_coupled_kinds_depend_on_other_pairs(config: LossConfig) -> None:
    """Of others, sums over micro-batches are those of the global batch, whose mean length `sft` has."""
    facts = replace(FACTS, mean_chosen_tokens=5.0)
    alone = []
    for place, gap in enumerate(SCORE_GAPS.split(1)):
        given = one_pair(POLICY, place), one_pair(REFERENCE, place)
        assert facts.divergence is not None
        assert facts.squared_ratio is not None
        own = slice(place, place + 1)
        of_pair = replace(
            facts, score_gaps=gap, divergence=facts.divergence[own], squared_ratio=facts.squared_ratio[own]
        )
        alone.append(preference_loss(*given, config, of_pair))
    together = preference_loss(POLICY, REFERENCE, config, facts)
    assert torch.equal(torch.cat(alone), together) is not config.is_coupled


@pytest.mark.parametrize("config", [config for config in EVERY if config.kind is not LossKind.beta_dpo])
def test_gradients_are_the_slopes_of_the_losses(config: LossConfig) -> None:
    reference = logps((-12.0, -12.25), REFERENCE_REJECTED, torch.float64)  # away from the bend of dpop
    policy = logps(CHOSEN, REJECTED, torch.float64)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(replace(policy, chosen=chosen, rejected=rejected), reference, config, FACTS)

    inputs = (policy.chosen.requires_grad_(), policy.rejected.requires_grad_())
    assert torch.autograd.gradcheck(losses, inputs)


values, tokens = st.floats(-1e4, 1e4, width=32), st.integers(1, 4096).map(float)
# Kinds that want a certain reward or ratio and turn back beyond it, or that let chosen fall.
NOT_MONOTONE = {LossKind.ipo, LossKind.sppo_hard, LossKind.nca_pair, LossKind.apo_down, LossKind.exo_pair}
NOT_MONOTONE |= {LossKind.reward_aware, LossKind.discopop}  # the latter at its default tau; docs/losses.md


# All but the kinds that read sums over tokens, made before.
OF_LOGPS = sorted({*LossKind} - {LossKind.distill, LossKind.reverse_kl})


@given(st.sampled_from(OF_LOGPS), values, values, tokens, tokens, st.floats(0.01, 5))
def test_losses_are_finite_and_raising_chosen_or_lowering_rejected_never_costs(
    kind: LossKind, chosen: float, rejected: float, chosen_tokens: float, rejected_tokens: float, beta: float
) -> None:
    if kind is LossKind.orpo:  # a probability
        chosen, rejected = -abs(chosen), -abs(rejected)
    smoothing = 0.2 if kind in (LossKind.robust, LossKind.exo_pair) else 0.0
    config = LossConfig(kind, beta=beta, label_smoothing=smoothing, function=function_of(kind))
    columns = [torch.tensor([each]) for each in (chosen, rejected, chosen_tokens, rejected_tokens)]
    leaves = [column.requires_grad_() for column in columns[:2]]
    policy, zeros = PairLogps(*columns), PairLogps(torch.zeros(1), torch.zeros(1), *columns[2:])
    loss = preference_loss(policy, zeros, config, replace(FACTS, score_gaps=torch.ones(1))).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    assert torch.isfinite(torch.stack([loss.detach(), *(slope[0] for slope in found)])).all()
    if kind not in NOT_MONOTONE:
        assert found[0].item() <= 1e-6
        assert found[1].item() >= -1e-6


def test_discopop_falls_with_the_margin_everywhere_by_its_preset() -> None:
    """At the paper's tau it rises around a margin of 0, where a run starts."""
    config = load_run_config(["model.path=m", "loss=discopop"]).loss
    chosen = torch.linspace(-200, 200, 4001, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(4001, dtype=torch.float64)
    policy, reference = (PairLogps(first, zeros, zeros + 1, zeros + 1) for first in (chosen, zeros))
    (slopes,) = torch.autograd.grad(preference_loss(policy, reference, config).sum(), chosen)
    assert (slopes < 0).all()
    assert slopes[2000] < -0.3 * config.beta


@pytest.mark.parametrize("kind", sorted(kind for kind in LossKind if KINDS[kind].fewest_responses > 1))
def test_modifiers_of_other_terms_leave_sft_as_it_is(kind: LossKind) -> None:
    """`ld_alpha` has changed the sums, `weighting` weighs the pairs."""
    facts = replace(FACTS, pair_weights=torch.tensor([0.25, 2.0]))
    desensitised = replace(POLICY, whole_chosen=torch.tensor([-15.0, -30.0]))
    terms = [LossTermConfig(kind, 0.5), LossTermConfig(LossKind.sft, 3.0)]
    config = LossConfig(beta=0.5, terms=terms, function=function_of(kind))
    both = preference_loss(desensitised, REFERENCE, config, facts)
    other = preference_loss(POLICY, REFERENCE, LossConfig(kind, 0.5, function=function_of(kind)), facts)
    assert (both - 0.5 * other).tolist() == pytest.approx([3.0 * 15 / 5, 3.0 * 30 / 5], rel=1e-4)


@pytest.mark.parametrize("kind", LossKind)
def test_reference_of_a_kind(kind: LossKind) -> None:
    plain = LossConfig(kind, function=function_of(kind))
    if kind not in WITH_REFERENCE:
        with_one = preference_loss(POLICY, REFERENCE, plain, FACTS)
        assert torch.equal(preference_loss(POLICY, None, plain, FACTS), with_one)
        return
    with pytest.raises(ValueError, match=f"{kind} needs reference"):
        preference_loss(POLICY, None, plain)
    zeros = preference_loss(POLICY, logps([0.0, 0.0], [0.0, 0.0]), plain, FACTS)
    for reference in (None, REFERENCE):
        free = ReferenceFreeLossConfig(**vars(plain))
        assert torch.equal(preference_loss(POLICY, reference, free, FACTS), zeros)


FREE = ReferenceFreeLossConfig(LossKind.sigmoid, 0.5)
AVERAGED = (-1.25, -1.0), (-2.0, -2.25)


@pytest.mark.parametrize(
    ("config", "reference", "chosen", "rejected"),
    [
        (LossConfig(LossKind.sigmoid, 0.5), REFERENCE, (1.0, 0.0), (-1.0, -0.5)),
        (LossConfig(LossKind.ipo, 0.5), REFERENCE, (1.0, 0.0), (-1.0, -0.5)),
        (FREE, REFERENCE, (-5.0, -6.0), (-10.0, -4.5)),
        (LossConfig(LossKind.cpo, 0.5), None, (-5.0, -6.0), (-10.0, -4.5)),
        *((LossConfig(LossKind(kind), 0.5), None, *AVERAGED) for kind in ("simpo", "sft", "orpo")),
    ],
)
def test_rewards_by_hand(
    config: LossConfig,
    reference: PairLogps | None,
    chosen: tuple[float, float],
    rejected: tuple[float, float],
) -> None:
    rewards = implicit_rewards(POLICY, reference, config)
    assert rewards.chosen.tolist() == pytest.approx(chosen)
    assert rewards.rejected.tolist() == pytest.approx(rejected)


def test_a_custom_function_is_a_term_like_any_other() -> None:
    terms = [LossTermConfig(LossKind.custom, 2.0), LossTermConfig(LossKind.sft, 0.5)]
    own = LossConfig(terms=terms, function=OWN)
    assert str(check_custom_loss(own)).startswith(f"custom loss {OWN} from ")
    builtin = LossConfig(terms=[LossTermConfig(LossKind.hinge, 2.0), terms[1]])
    assert preference_loss(POLICY, REFERENCE, own).tolist() == pytest.approx(
        preference_loss(POLICY, REFERENCE, builtin).tolist()
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return (policy.chosen - reference.chosen).mean()", "one loss per pair"),
        ("return torch.log(policy.chosen)", "not finite"),
        ("return policy.chosen.detach()", "without a gradient"),
        ("return policy.chosen.detach() * torch.ones((), requires_grad=True)", "without a gradient"),
        ("return policy.chosen + 0j", "not finite real"),
        ("raise SystemExit(0)", "SystemExit"),
        ("policy.chosen.register_hook(lambda _: 1 / 0)\n    return policy.chosen * 1", "ZeroDivisionError"),
        ("return torch.sqrt(policy.chosen - policy.chosen)", "gradients that are not finite"),
        ("return policy.chosen - policy.chosen.mean()", "for the pair alone"),
    ],
)
def test_an_unusable_function_is_an_error_with_a_reason(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find_function.cache_clear()
    source = f"import torch\n\n\ndef mine(policy, reference, config):\n    {body}\n"
    (tmp_path / "own_refused.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        check_custom_loss(LossConfig(LossKind.custom, function="own_refused:mine"))
    assert said in caught.value.block()
    assert caught.value.remedy
