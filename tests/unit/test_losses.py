"""Each kind of loss by its definition: numbers worked out by hand, signs, and behaviour at the extremes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_dist.config.schema import REFERENCE_FREE_KINDS, LossConfig, LossKind, LossTermConfig
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import implicit_rewards, preference_loss

WITH_REFERENCE = sorted(set(LossKind) - REFERENCE_FREE_KINDS)

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


# With beta 0.5: b h is 2 and 0.5.
BY_HAND = [
    (LossConfig(LossKind.sigmoid), (softplus(-2), softplus(-0.5))),
    (
        LossConfig(LossKind.sigmoid, label_smoothing=0.1),
        (0.9 * softplus(-2) + 0.1 * softplus(2), 0.9 * softplus(-0.5) + 0.1 * softplus(0.5)),
    ),
    (
        LossConfig(LossKind.robust, label_smoothing=0.1),
        (
            (0.9 * softplus(-2) - 0.1 * softplus(2)) / 0.8,
            (0.9 * softplus(-0.5) - 0.1 * softplus(0.5)) / 0.8,
        ),
    ),
    (LossConfig(LossKind.hinge), (0.0, 0.5)),
    # Means over tokens 2/4 + 2/5 = 0.9 and 0/6 + 1/2 = 0.5, against 1 / (2 * 0.5) = 1.
    (LossConfig(LossKind.ipo), (0.01, 0.25)),
    (LossConfig(LossKind.ipo, length_average=False), (9.0, 0.0)),
    (LossConfig(LossKind.sigmoid_norm), (softplus(-0.45), softplus(-0.25))),
    # -10/4 + 20/5 = 1.5 and -12/6 + 9/2 = 2.5, times 0.5, less the target margin.
    (LossConfig(LossKind.simpo, simpo_gamma=0.5), (softplus(-0.25), softplus(-0.75))),
    (LossConfig(LossKind.simpo, simpo_gamma=0.0), (softplus(-0.75), softplus(-1.25))),
    # The chosen responses have 5 tokens in the mean.
    (LossConfig(LossKind.sft), (10 / 5, 12 / 5)),
]


@pytest.mark.parametrize(("config", "expected"), BY_HAND)
def test_losses_by_hand(config: LossConfig, expected: tuple[float, float]) -> None:
    losses = preference_loss(POLICY, REFERENCE, replace(config, beta=0.5))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_policy_equal_to_reference_has_the_loss_of_no_margin(kind: LossKind) -> None:
    expected = {LossKind.hinge: 1.0, LossKind.ipo: (1 / 0.2) ** 2}.get(kind, math.log(2))
    losses = preference_loss(REFERENCE, REFERENCE, LossConfig(kind, beta=0.1))
    assert losses.tolist() == pytest.approx([expected] * 2)


def test_every_kind_is_worked_out_by_hand() -> None:
    assert {config.kind for config, _ in BY_HAND} == set(LossKind)


@pytest.mark.parametrize("config", [config for config, _ in BY_HAND])
def test_gradients_are_the_slopes_of_the_losses(config: LossConfig) -> None:
    reference = logps(REFERENCE_CHOSEN, REFERENCE_REJECTED, torch.float64)
    policy = logps(CHOSEN, REJECTED, torch.float64)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(replace(policy, chosen=chosen, rejected=rejected), reference, config)

    inputs = (policy.chosen.requires_grad_(), policy.rejected.requires_grad_())
    assert torch.autograd.gradcheck(losses, inputs)


values = st.floats(-1e4, 1e4, width=32)
tokens = st.integers(1, 4096).map(float)


@given(st.sampled_from(LossKind), values, values, tokens, tokens, st.floats(0.01, 5))
def test_raising_chosen_and_lowering_rejected_never_costs(
    kind: LossKind, chosen: float, rejected: float, chosen_tokens: float, rejected_tokens: float, beta: float
) -> None:
    policy = PairLogps(
        torch.tensor([chosen], requires_grad=True),
        torch.tensor([rejected], requires_grad=True),
        torch.tensor([chosen_tokens]),
        torch.tensor([rejected_tokens]),
    )
    zeros = replace(policy, chosen=torch.zeros(1), rejected=torch.zeros(1))
    config = LossConfig(kind, beta=beta, label_smoothing=0.2 if kind is LossKind.robust else 0.0)
    loss = preference_loss(policy, zeros, config).sum()
    by_chosen, by_rejected = torch.autograd.grad(
        loss, (policy.chosen, policy.rejected), allow_unused=True, materialize_grads=True
    )
    # ipo wants a certain margin and turns back beyond it.
    beyond = kind is LossKind.ipo and chosen / chosen_tokens - rejected / rejected_tokens > 1 / (2 * beta)
    direction = -1 if beyond else 1
    assert torch.isfinite(torch.stack([loss.detach(), by_chosen[0], by_rejected[0]])).all()
    assert direction * by_chosen.item() <= 1e-6
    assert direction * by_rejected.item() >= -1e-6


@pytest.mark.parametrize("config", [config for config, _ in BY_HAND])
@pytest.mark.parametrize("ratio", [-1e4, 1e4])
def test_extreme_log_ratios_give_finite_losses_and_gradients(config: LossConfig, ratio: float) -> None:
    policy = logps([ratio, 0.0], [0.0, ratio])
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    zeros = logps([0.0, 0.0], [0.0, 0.0])
    losses = preference_loss(policy, zeros, replace(config, beta=1.0))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(losses).all()
    for leaf in (policy.chosen, policy.rejected):
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("kind", [LossKind.sigmoid, LossKind.sigmoid_norm, LossKind.hinge])
def test_a_pair_won_beyond_doubt_pulls_no_more_and_a_lost_one_pulls_fully(kind: LossKind) -> None:
    policy = logps([1e4, -1e4], [-1e4, 1e4])
    policy.chosen.requires_grad_()
    losses = preference_loss(policy, None, LossConfig(kind, beta=1.0, reference_free=True))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert policy.chosen.grad is not None
    full = -1 / CHOSEN_TOKENS[1] if kind is LossKind.sigmoid_norm else -1.0
    assert policy.chosen.grad.tolist() == pytest.approx([0.0, full])


@given(values, st.floats(0.0, 0.49))
def test_robust_loss_of_flipped_labels_is_the_clean_loss_in_the_mean(margin: float, share: float) -> None:
    right = preference_loss(
        logps([margin], [0.0]), None, LossConfig(LossKind.robust, 0.01, share, reference_free=True)
    )
    flipped = preference_loss(
        logps([0.0], [margin]), None, LossConfig(LossKind.robust, 0.01, share, reference_free=True)
    )
    clean = preference_loss(
        logps([margin], [0.0]), None, LossConfig(LossKind.sigmoid, 0.01, reference_free=True)
    )
    assert ((1 - share) * right + share * flipped).item() == pytest.approx(clean.item(), rel=1e-3, abs=1e-3)


@given(st.integers(1, 5), st.data())
def test_sft_of_a_batch_in_parts_is_the_token_mean_of_the_whole(parts: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(parts, 12))
    tokens_of = torch.tensor(data.draw(st.lists(tokens, min_size=count, max_size=count)))
    chosen = -torch.rand(count, generator=torch.Generator().manual_seed(count)) * tokens_of
    policy = PairLogps(chosen, chosen, tokens_of, tokens_of)
    mean_chosen_tokens = float(tokens_of.mean())
    total = torch.zeros(())
    for piece in torch.tensor_split(torch.arange(count), parts):
        part = PairLogps(chosen[piece], chosen[piece], tokens_of[piece], tokens_of[piece])
        total += preference_loss(part, None, LossConfig(LossKind.sft), mean_chosen_tokens).sum()
    token_mean = -float(chosen.sum() / tokens_of.sum())
    assert float(total / count) == pytest.approx(token_mean, rel=1e-4)
    assert float(preference_loss(policy, None, LossConfig(LossKind.sft)).mean()) == pytest.approx(
        token_mean, rel=1e-4
    )


def test_terms_are_a_weighted_sum() -> None:
    terms = [LossTermConfig(LossKind.sigmoid, 0.7), LossTermConfig(LossKind.sft, 0.2)]
    both = preference_loss(POLICY, REFERENCE, LossConfig(beta=0.5, terms=terms))
    # 0.7 softplus(-b h) + 0.2 (10 and 12) / 5.
    assert both.tolist() == pytest.approx([0.7 * softplus(-2) + 0.4, 0.7 * softplus(-0.5) + 0.48])


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_reference_free_is_a_reference_of_zeros(kind: LossKind) -> None:
    zeros = logps([0.0, 0.0], [0.0, 0.0])
    for reference in (None, REFERENCE):
        free = preference_loss(POLICY, reference, LossConfig(kind, reference_free=True))
        assert torch.equal(free, preference_loss(POLICY, zeros, LossConfig(kind)))


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_a_missing_reference_is_said_and_never_guessed(kind: LossKind) -> None:
    with pytest.raises(ValueError, match=f"{kind} needs reference"):
        preference_loss(POLICY, None, LossConfig(kind))
    with pytest.raises(ValueError, match=f"{kind} needs reference"):
        preference_loss(POLICY, None, LossConfig(terms=[LossTermConfig(LossKind.sft), LossTermConfig(kind)]))


@pytest.mark.parametrize("kind", sorted(REFERENCE_FREE_KINDS))
def test_reference_free_kinds_do_not_look_at_a_reference(kind: LossKind) -> None:
    alone = preference_loss(POLICY, None, LossConfig(kind))
    assert torch.equal(alone, preference_loss(POLICY, REFERENCE, LossConfig(kind)))


@pytest.mark.parametrize(
    ("config", "reference", "chosen", "rejected"),
    [
        (LossConfig(LossKind.sigmoid, 0.5), REFERENCE, (1.0, 0.0), (-1.0, -0.5)),
        (LossConfig(LossKind.ipo, 0.5), REFERENCE, (1.0, 0.0), (-1.0, -0.5)),
        (LossConfig(LossKind.sigmoid, 0.5, reference_free=True), REFERENCE, (-5.0, -6.0), (-10.0, -4.5)),
        (LossConfig(LossKind.simpo, 0.5), None, (-1.25, -1.0), (-2.0, -2.25)),
        (LossConfig(LossKind.sft, 0.5), None, (-1.25, -1.0), (-2.0, -2.25)),
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


def test_rewards_carry_no_gradient() -> None:
    policy = logps(CHOSEN, REJECTED)
    policy.chosen.requires_grad_()
    assert not implicit_rewards(policy, REFERENCE, LossConfig()).chosen.requires_grad
